"""Tiny random models as quantised checkpoints of each source, with the plain model that each stands for."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.engine.torch.quantization import packing
from tests.gguf_models import dequantised, write_gguf
from tests.models import tiny_model

GROUP = 32

Stored = tuple[dict[str, Tensor], Tensor]
"""The tensors of a layer by part, and the weight that they stand for."""

Quantise = Callable[[Tensor], Stored]


def _rounded(weight: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unsigned codes, scales in float16, zero points, and the values ``scale * (code - zero)``."""
    grouped = weight.float().view(weight.shape[0], -1, group)
    least, most = grouped.amin(-1), grouped.amax(-1)
    scales = ((most - least) / (2**bits - 1)).half()
    zeros = (-least / scales.float()).round().clamp(0, 2**bits - 1)
    codes = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    values = (scales.float()[..., None] * (codes - zeros[..., None])).view_as(weight)
    return codes.view_as(weight).long(), scales, zeros.long(), values


def _gptq(weight: Tensor) -> Stored:
    codes, scales, zeros, values = _rounded(weight, 4)
    return packing.gptq(codes, scales, zeros, torch.arange(weight.shape[1]) // GROUP, 4, first=True), values


def _act_order(weight: Tensor) -> Stored:
    inputs = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
    codes, scales, zeros, values = _rounded(weight[:, inputs], 4)
    back = torch.argsort(inputs)
    return packing.gptq(codes[:, back], scales, zeros, back // GROUP, 4, first=True), values[:, back]


def _awq(weight: Tensor) -> Stored:
    codes, scales, zeros, values = _rounded(weight, 4)
    return packing.awq(codes, scales, zeros), values


def _int4(weight: Tensor) -> Stored:
    codes, scales, zeros, values = _rounded(weight, 4)
    return packing.compressed(codes, scales, zeros, 4), values


def _int8(weight: Tensor) -> Stored:
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round()
    return {"weight": codes.to(torch.int8), "weight_scale": scales}, codes * scales


def _mlx(bits: int) -> Quantise:
    def quantise(weight: Tensor) -> Stored:
        codes, scales, zeros, values = _rounded(weight, bits)
        return packing.mlx(codes, scales, -scales.float() * zeros, bits), values

    return quantise


def _fp8(weight: Tensor) -> Stored:
    scales = torch.full((weight.shape[0] // GROUP, weight.shape[1] // GROUP), 0.5)
    codes = (weight / 0.5).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * 0.5


def _scheme(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}
FOLDERS: dict[str, tuple[Quantise, dict[str, Any], bool]] = {
    "gptq": (_gptq, {"quantization_config": _GPTQ}, False),
    "gptq-act-order": (_act_order, {"quantization_config": {**_GPTQ, "desc_act": True}}, False),
    "awq": (_awq, {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": GROUP}}, False),
    "compressed-int4": (
        _int4, _scheme("pack-quantized", num_bits=4, type="int", symmetric=False, group_size=GROUP), False,
    ),
    "compressed-int8": (_int8, _scheme("int-quantized", num_bits=8, type="int", strategy="channel"), False),
    "mlx-4": (_mlx(4), {"quantization": {"bits": 4, "group_size": GROUP}}, True),
    "mlx-8": (_mlx(8), {"quantization": {"bits": 8, "group_size": GROUP}}, True),
    "fp8": (_fp8, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}}, False),
}  # fmt: skip
"""By source: how a weight is stored, what config.json says of it, and whether embeddings are quantised, too."""

GGUF_KINDS = {
    "gguf-q8_0": Kind.Q8_0, "gguf-q4_0": Kind.Q4_0, "gguf-q4_1": Kind.Q4_1, "gguf-q5_1": Kind.Q5_1,
    "gguf-mxfp4": Kind.MXFP4,
}  # fmt: skip

SOURCES = (*FOLDERS, *GGUF_KINDS, "mxfp4")


def quantised_model(source: str, folder: Path, arch: str = "qwen2") -> tuple[Path, Path]:
    """Write a tiny model as ``source`` stores it, and the plain model in float32 that it stands for; their paths.

    With MXFP4 it is gpt-oss.
    """
    original = tiny_model("gpt_oss" if source.endswith("mxfp4") else arch, folder / "original")
    if source == "mxfp4":
        return _mxfp4_model(original, folder)
    if source in GGUF_KINDS:
        path = write_gguf(original, folder / "model.gguf", partial(_gguf_kind, source))
        return path, dequantised(original, path, folder / "plain")
    quantise, settings, everything = FOLDERS[source]
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in _one_by_one(load_file(original / "model.safetensors"), in_turns=arch == "gpt_oss").items():
        layer = name.removesuffix(".weight")
        of_expert = ".experts." in name and tensor.ndim == 2
        if name.endswith("_proj.weight") or of_expert or (everything and tensor.ndim == 2):
            parts, plain[name] = quantise(tensor)
            stored |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            stored[name] = plain[name] = tensor
    plain = _in_turns(plain) if arch == "gpt_oss" else plain
    return _written(original, folder, _switched(stored) if everything else stored, plain, settings)


def _gguf_kind(source: str, name: str) -> Kind:
    """MXFP4 is for experts alone, as in the files of gpt-oss."""
    kind = GGUF_KINDS[source]
    return Kind.Q8_0 if kind is Kind.MXFP4 and "_exps" not in name else kind


def _one_by_one(tensors: dict[str, Tensor], *, in_turns: bool) -> dict[str, Tensor]:
    """With the experts that Llama 4 and gpt-oss stack, as ``[experts, in, out]``, as quantised checkpoints have them.

    in_turns: the stack has an output of the gate, then one of its pair, and so on; and there are biases.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, stacked, part = name.rpartition(".experts.")
        if not stacked or (tensor.ndim != 3 and not in_turns):
            found[name] = tensor
            continue
        kind, own = ("weight" if tensor.ndim == 3 else "bias"), part.removesuffix("_bias")
        for number, weight in enumerate(tensor):
            rows = weight.t().contiguous()
            halves = (rows[0::2], rows[1::2]) if in_turns else rows.chunk(2)
            parts = dict(zip(("gate_proj", "up_proj"), halves, strict=True)) if "gate" in part else {own: rows}
            found |= {f"{block}.experts.{number}.{each}.{kind}": value for each, value in parts.items()}
    return found


def _in_turns(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `_one_by_one` makes of gpt-oss's, stacked again."""
    experts = {name: each for name, each in tensors.items() if ".experts." in name}
    found = {name: each for name, each in tensors.items() if name not in experts}
    blocks = {name.partition(".experts.")[0] for name in experts}
    count = len({name.partition(".experts.")[2].partition(".")[0] for name in experts})
    for block in blocks:
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            gate, up, down = (
                torch.stack([experts[f"{block}.experts.{number}.{part}_proj.{kind}"] for number in range(count)])
                for part in ("gate", "up", "down")
            )
            both = torch.stack([gate, up], dim=2).flatten(1, 2)
            stacks = {"gate_up_proj": both, "down_proj": down}
            found |= {
                f"{block}.experts.{own}{suffix}": each.transpose(1, 2) if kind == "weight" else each
                for own, each in stacks.items()
            }
    return found


def _switched(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """As MLX names experts, whose weights it stacks."""
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in stored.items():
        block, found, rest = name.partition(".experts.")
        number, _, part = rest.partition(".")
        stacks.setdefault(f"{block}.switch_mlp.{part}" if found else name, {})[int(number or 0)] = tensor
    return {
        name: torch.stack([by_number[each] for each in sorted(by_number)]) if ".switch_mlp." in name else by_number[0]
        for name, by_number in stacks.items()
    }


def _mxfp4_model(original: Path, folder: Path) -> tuple[Path, Path]:
    """gpt-oss, of which the experts' matrices are in MXFP4."""
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(original / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = plain[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 126, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return _written(original, folder, stored, plain, {"quantization_config": {"quant_method": "mxfp4"}})


def _written(
    original: Path, folder: Path, stored: dict[str, Tensor], plain: dict[str, Tensor], settings: dict[str, Any]
) -> tuple[Path, Path]:
    config = json.loads((original / "config.json").read_text())
    for where, tensors, more in ((folder / "quantised", stored, settings), (folder / "plain", plain, {})):
        shutil.copytree(original, where)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, where / "model.safetensors")
        (where / "config.json").write_text(json.dumps({**config, **more}))
    return folder / "quantised", folder / "plain"

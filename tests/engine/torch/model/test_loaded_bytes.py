"""What a source says that its weights take is what they take once they are loaded."""

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from emberkv.engine.torch.model.inspection import inspect_model
from emberkv.engine.torch.model.loader import load_model, open_source
from emberkv.engine.torch.quantization.layers import QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from emberkv.engine.torch.quantization.on_load import QuantizeName
from tests.conftest import CheckpointFactory
from tests.gguf_models import write_gguf
from tests.quantized_models import quantised_model


def held_bytes(model: torch.nn.Module) -> int:
    """Of all values, those that several layers share once."""
    held: list[Tensor | None] = list(model.state_dict().values())
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            held += [module.quantized.codes, module.quantized.scales, module.quantized.offsets]
            held += [module.bias] if isinstance(module, QuantizedLinear) else []
        if isinstance(module, QuantizedExperts):
            held += [part for each in module.quantized for part in (each.codes, each.scales, each.offsets)]
    return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in held if each is not None}.values())


def stated_bytes(path: Path, quantize: QuantizeName = "none") -> int:
    source = open_source(path, quantize)
    return source.num_bytes(inspect_model(source.config), torch.bfloat16)


@pytest.mark.parametrize("arch", ["qwen2", "gpt2", "mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_of_plain_weights_and_of_those_that_are_rounded(
    checkpoint: CheckpointFactory, arch: str, quantize: QuantizeName
) -> None:
    loaded = load_model(str(checkpoint(arch)), dtype="bfloat16", device="cpu", quantize=quantize)
    # some models keep a few buffers in float32
    assert stated_bytes(checkpoint(arch), quantize) == pytest.approx(held_bytes(loaded.model), rel=1e-3)


@pytest.mark.parametrize(
    "source", ["gptq", "awq", "compressed-int8", "mlx-4", "fp8", "mxfp4", "gguf-q8_0", "gguf-q4_1"]
)
def test_of_quantised_weights(tmp_path: Path, source: str) -> None:
    path, _ = quantised_model(source, tmp_path)
    loaded = load_model(str(path), dtype="bfloat16", device="cpu")
    assert stated_bytes(path) == held_bytes(loaded.model)


@pytest.mark.parametrize(
    ("gate", "up", "held"),
    [
        (Kind.Q4_0, Kind.Q8_0, "8 bits"),
        (Kind.Q4_1, Kind.Q8_0, "8 bits"),
        (Kind.Q4_1, Kind.Q4_0, "4 bits"),
        (Kind.F16, Kind.Q4_0, None),
    ],
)
def test_of_gates_and_their_pairs_in_other_types(
    checkpoint: CheckpointFactory, tmp_path: Path, gate: Kind, up: Kind, held: str | None
) -> None:
    """Both are one weight, whose codes have the more bits, with offsets if either has them; plain if either is."""
    kinds = {"blk.0.ffn_gate_exps.weight": gate, "blk.0.ffn_up_exps.weight": up}
    path = write_gguf(checkpoint("mixtral"), tmp_path / "model.gguf", lambda name: kinds.get(name, Kind.F32))
    loaded = load_model(str(path), dtype="bfloat16", device="cpu")
    assert stated_bytes(path) == held_bytes(loaded.model)
    assert open_source(path).held == (None if held is None else f"{held}, value by value")

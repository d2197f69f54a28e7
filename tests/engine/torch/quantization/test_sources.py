"""Readers of quantised checkpoints: every value is the one that the format's own arithmetic gives."""

from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from emberkv.engine.torch.quantization.gguf_blocks import BLOCK_TYPES, read_blocks
from emberkv.engine.torch.quantization.methods import AWQ, FP8, GPTQ, MLX, CompressedTensors, read_mxfp4
from emberkv.engine.torch.quantization.stored import Method, StoredWeight
from emberkv.engine.torch.quantization.weight import QuantizedWeight
from emberkv.errors import CorruptModelError, UnsupportedModelError
from tests.engine.torch.quantization import packing
from tests.engine.torch.quantization.packing import grouped, random_codes, random_scales

OUT, IN, GROUP = 24, 128, 32
GROUP_OF = torch.arange(IN) // GROUP
EXACT = {"rtol": 0.0, "atol": 0.0}


def read(method: Method, stored: packing.Packed) -> QuantizedWeight:
    found = method.read("layer", stored)
    assert isinstance(found, StoredWeight)
    assert method.shape("layer", {name: tuple(tensor.shape) for name, tensor in stored.items()}) == (OUT, IN)
    assert method.num_bytes(OUT, IN) == found.weight.num_bytes
    return found.weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_holds_every_value(bits: int, version: str, symmetric: bool) -> None:
    codes, scales = random_codes(OUT, IN, bits), random_scales(OUT, IN // GROUP)
    zeros = torch.full(scales.shape, 2 ** (bits - 1)) if symmetric else random_codes(OUT, IN // GROUP, bits, seed=2)
    stored = packing.gptq(codes, scales, zeros, GROUP_OF, bits, first=version == "gptq")
    settings = {"bits": bits, "group_size": GROUP, "sym": symmetric, "checkpoint_format": version}
    weight = read(GPTQ.of_config(settings), stored)
    expected = grouped(scales, GROUP_OF) * (codes - grouped(zeros, GROUP_OF))
    torch.testing.assert_close(weight.dequantised(), expected, **EXACT)
    assert (weight.bits, weight.group, weight.offsets is None) == (bits, GROUP, symmetric)


def test_gptq_in_two_bits_is_held_in_four() -> None:
    codes, scales = random_codes(OUT, IN, 2), random_scales(OUT, IN // GROUP)
    zeros = random_codes(OUT, IN // GROUP, 2, seed=2)
    stored = packing.gptq(codes, scales, zeros, GROUP_OF, 2, first=True)
    weight = read(GPTQ.of_config({"bits": 2, "group_size": GROUP, "sym": False}), stored)
    expected = grouped(scales, GROUP_OF) * (codes - grouped(zeros, GROUP_OF))
    torch.testing.assert_close(weight.dequantised(), expected, **EXACT)
    assert weight.bits == 4


def test_act_order_brings_the_inputs_of_a_group_together_and_says_how() -> None:
    codes, scales = random_codes(OUT, IN, 4), random_scales(OUT, IN // GROUP)
    group_of = GROUP_OF[torch.randperm(IN, generator=torch.Generator().manual_seed(3))]
    zeros = random_codes(OUT, IN // GROUP, 4, seed=2)
    stored = packing.gptq(codes, scales, zeros, group_of, 4, first=True)
    found = GPTQ.of_config({"bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}).read("layer", stored)
    expected = grouped(scales, group_of) * (codes - grouped(zeros, group_of))
    assert found.order is not None
    torch.testing.assert_close(found.weight.dequantised(), expected[:, found.order], **EXACT)
    torch.testing.assert_close(found.dequantised(), expected, **EXACT)


def test_act_order_with_groups_of_unequal_size_is_refused() -> None:
    stored = packing.gptq(
        random_codes(OUT, IN, 4), random_scales(OUT, IN // GROUP), random_codes(OUT, IN // GROUP, 4),
        torch.zeros(IN, dtype=torch.int64), 4, first=True,
    )  # fmt: skip
    with pytest.raises(CorruptModelError, match="g_idx of layer does not divide its 128 inputs into 4 equal groups"):
        GPTQ.of_config({"bits": 4, "group_size": GROUP}).read("layer", stored)


def test_awq_holds_every_value() -> None:
    codes, scales = random_codes(OUT, IN, 4), random_scales(OUT, IN // GROUP)
    zeros = random_codes(OUT, IN // GROUP, 4, seed=2)
    weight = read(AWQ.of_config({"bits": 4, "group_size": GROUP}), packing.awq(codes, scales, zeros))
    expected = grouped(scales, GROUP_OF) * (codes - grouped(zeros, GROUP_OF))
    torch.testing.assert_close(weight.dequantised(), expected, **EXACT)


def scheme(form: str, **weights: Any) -> dict[str, Any]:
    return {"format": form, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_compressed_tensors_hold_every_value(bits: int, symmetric: bool) -> None:
    codes, scales = random_codes(OUT, IN, bits), random_scales(OUT, IN // GROUP, torch.bfloat16)
    zeros = None if symmetric else random_codes(OUT, IN // GROUP, bits, seed=2)
    settings = scheme("pack-quantized", num_bits=bits, type="int", symmetric=symmetric, group_size=GROUP)
    weight = read(CompressedTensors.of_config(settings), packing.compressed(codes, scales, zeros, bits))
    middle = torch.full(scales.shape, 2 ** (bits - 1)) if zeros is None else zeros
    expected = grouped(scales, GROUP_OF) * (codes - grouped(middle, GROUP_OF))
    torch.testing.assert_close(weight.dequantised(), expected, **EXACT)


@pytest.mark.parametrize("form", ["int-quantized", "naive-quantized"])
def test_int8_of_a_scale_an_output_holds_every_value(form: str) -> None:
    codes = (random_codes(OUT, IN, 8) - 128).to(torch.int8)
    scales = random_scales(OUT, 1, torch.bfloat16)
    method = CompressedTensors.of_config(scheme(form, num_bits=8, type="int", symmetric=True, strategy="channel"))
    weight = read(method, {"weight": codes, "weight_scale": scales})
    torch.testing.assert_close(weight.dequantised(), scales.float() * codes, **EXACT)
    assert weight.group == IN


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_holds_every_value(bits: int) -> None:
    codes, scales = random_codes(OUT, IN, bits), random_scales(OUT, IN // GROUP, torch.bfloat16)
    biases = -random_scales(OUT, IN // GROUP, torch.bfloat16, seed=4) * 8
    weight = read(MLX.of_config({"bits": bits, "group_size": GROUP}), packing.mlx(codes, scales, biases, bits))
    expected = grouped(scales, GROUP_OF) * codes + grouped(biases, GROUP_OF)
    torch.testing.assert_close(weight.dequantised(), expected, rtol=1e-6, atol=1e-7)


def test_a_layer_of_mlx_may_have_bits_of_its_own() -> None:
    codes, scales = random_codes(OUT, IN, 8), random_scales(OUT, IN // GROUP)
    settings = {"bits": 4, "group_size": 64, "layer": {"bits": 8, "group_size": GROUP}, "other": False}
    found = MLX.of_config(settings).read("layer", packing.mlx(codes, scales, scales, 8))
    assert (found.weight.bits, found.weight.shape) == (8, (OUT, IN))


FP8_SCALES = {
    "of blocks": ((OUT + 15) // 16, IN // 16, (16, 16)),
    "of outputs": (OUT, 1, ()),
    "of the tensor": (1, 1, ()),
}


@pytest.mark.parametrize("kind", FP8_SCALES)
def test_fp8_is_value_times_scale(kind: str) -> None:
    rows, columns, block = FP8_SCALES[kind]
    stored = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = random_scales(rows, columns, torch.float32)
    settings = {"quant_method": "fp8", "weight_block_size": list(block)}
    found = FP8.of_config(settings).read("layer", {"weight": stored, "weight_scale_inv": scales})
    for out, into in ((0, 0), (15, 16), (16, 127), (OUT - 1, 40)):
        high, wide = block or (OUT // rows, IN // columns)
        factor = scales[out // high, into // wide]
        assert found[out, into] == stored[out, into].float() * factor
    assert found.shape == (OUT, IN)


def test_fp8_scales_that_do_not_cover_the_weight_are_refused() -> None:
    stored = {"weight": torch.zeros(OUT, IN).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(3, 3)}
    with pytest.raises(CorruptModelError, match=r"layer has scales of shape \[3, 3\]"):
        FP8.of_config({"weight_block_size": [16, 16]}).read("layer", stored)


def test_mxfp4_holds_every_value() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (OUT, IN // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(115, 130, (OUT, IN // 32), generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].t()
    found = read_mxfp4(blocks, scales)
    torch.testing.assert_close(found.dequantised(), expected, **EXACT)
    assert (found.bits, found.group) == (8, 32)


def random_blocks(kind: GGMLQuantizationType, rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Any bytes are a block, but for the float16 numbers and exponents in them, which are made small."""
    values, size = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(int(kind))
    blocks = generator.integers(0, 256, (rows * columns // values, size), dtype=np.uint8)
    halves = generator.uniform(-0.01, 0.01, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if kind is GGMLQuantizationType.Q2_K:
        blocks[:, -4:] = halves
    elif kind in (GGMLQuantizationType.Q3_K, GGMLQuantizationType.Q6_K):
        blocks[:, -2:] = halves[:, :2]
    elif kind is GGMLQuantizationType.MXFP4:
        blocks[:, 0] = generator.integers(115, 128, len(blocks))
    else:
        wide = 4 if BLOCK_TYPES[kind].has_offsets else 2
        blocks[:, :wide] = halves[:, :wide]
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_gguf_blocks_hold_every_value(kind: GGMLQuantizationType) -> None:
    rows = random_blocks(kind, OUT, 512)
    found = read_blocks(rows, kind)
    expected: Tensor = torch.from_numpy(dequantize(rows, kind))
    torch.testing.assert_close(found.dequantised(), expected, rtol=1e-6, atol=2e-6 * float(expected.abs().max()))
    known = BLOCK_TYPES[kind]
    assert (found.bits, found.group, found.offsets is not None) == (known.bits, known.group, known.has_offsets)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (GPTQ.of_config, {"bits": 3}, "by GPTQ, in 3 bits; 2, 4 and 8 bits are served"),
        (GPTQ.of_config, {"bits": 4, "checkpoint_format": "marlin"}, "in the layout 'marlin'"),
        (AWQ.of_config, {"bits": 4, "version": "gemv"}, "by AWQ, in the layout 'gemv'; the layout gemm is served"),
        (MLX.of_config, {"bits": 6}, "by MLX, in 6 bits; 4 and 8 bits are served"),
        (MLX.of_config, {"bits": 4, "mode": "mxfp4"}, "in its mode 'mxfp4'"),
        (FP8.of_config, {"fmt": "e5m2"}, "of the kind 'e5m2'; e4m3 is served"),
        (CompressedTensors.of_config, scheme("nvfp4-pack-quantized", num_bits=4, type="float"), "nvfp4-pack-quantized"),
        (CompressedTensors.of_config, scheme("pack-quantized", num_bits=3, type="int"), "as int3"),
    ],
)
def test_what_is_not_read_is_refused_by_name(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        make(settings)


def test_a_layer_that_lacks_a_tensor_is_refused_by_name() -> None:
    with pytest.raises(CorruptModelError, match="the layer q_proj has qweight, but no scales"):
        AWQ.of_config({"bits": 4}).read("q_proj", {"qweight": torch.zeros(8, 1, dtype=torch.int32)})


def test_a_tensor_of_another_type_than_the_formats_is_refused() -> None:
    scales = random_scales(OUT, IN // GROUP)
    whole = {"num_bits": 8, "type": "int", "group_size": GROUP}
    eight = CompressedTensors.of_config({"format": "int-quantized", "config_groups": {"all": {"weights": whole}}})
    stored = {"weight": torch.zeros(OUT, IN), "weight_scale": scales}
    with pytest.raises(CorruptModelError, match=r"has its weight in torch\.float32; it must be torch\.int8"):
        eight.read("layer", stored)
    with pytest.raises(CorruptModelError, match=r"it must be torch\.float8_e4m3fn"):
        FP8.of_config({}).read("layer", stored)

"""Products with quantised weights by the kernels: the dequantised weight's, row by row, whatever the other rows are."""

import pytest
import torch
from psutil import Process
from torch import Tensor, nn
from torch.nn.functional import silu

from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.native.layers import NativeGatedPair, NativeLinear, replace_layers
from emberkv.engine.torch.quantization.layers import QuantizedLinear
from emberkv.engine.torch.quantization.packing import pack, packed_bytes
from emberkv.engine.torch.quantization.weight import Bits, QuantizedWeight, pack_nibbles, quantise

FORMATS: list[tuple[Bits, int, bool]] = [
    (bits, group, offsets) for bits in (8, 4) for group in (16, 32, 64, 96, 128) for offsets in (False, True)
]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(bits: Bits, group: int, offsets: bool, out: int, size: int, seed: int = 0) -> QuantizedWeight:
    """Random codes over their whole range, with scales and offsets that fp16 holds."""
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (bits - 1)
    codes = torch.randint(-most, most, (out, size), generator=generator).to(torch.int8)
    scales = (torch.rand(out, size // group, generator=generator) + 0.1).half().float() / most
    given = torch.randn(scales.shape, generator=generator).half().float() if offsets else None
    return QuantizedWeight(codes if bits == 8 else pack_nibbles(codes), scales, given, group, bits)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("bits", "group", "offsets"), FORMATS)
def test_a_product_is_that_of_the_dequantised_weight(kernels: Kernels, bits: Bits, group: int, offsets: bool) -> None:
    weight = weight_of(bits, group, offsets, 70, 384)
    bias, inputs = values(70, seed=1), values(13, 384, seed=2)
    got = NativeLinear(kernels, weight, bias, torch.float32)(inputs)
    expected = inputs.double() @ weight.dequantised().double().t() + bias
    assert relative_error(got, expected) < 5e-5  # of values in 16 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_gated_pair_is_that_of_the_dequantised_weights(kernels: Kernels, bits: Bits, dtype: torch.dtype) -> None:
    gate, up = (weight_of(bits, 32, bits == 4, 80, 96, seed) for seed in (0, 1))
    inputs = values(33, 96, seed=2).to(dtype)
    got = NativeGatedPair(kernels, gate, up, 1)(inputs)
    x = inputs.double()
    expected = silu(x @ gate.dequantised().double().t()) * (x @ up.dequantised().double().t())
    assert got.dtype is dtype
    assert relative_error(got, expected) < (1e-4 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_has_the_same_bits_whatever_the_others_are(kernels: Kernels, bits: Bits, dtype: torch.dtype) -> None:
    """Also on several threads, and where there are so many rows that threads share them."""
    layer = NativeLinear(kernels, weight_of(bits, 32, True, 200, 128), values(200), dtype)
    layer.call.threads = 3
    inputs = values(400, 128, seed=3).to(dtype)
    whole = layer(inputs)
    few = [(7, 7 + count) for count in range(1, 9)]
    for first, last in [*few, (129, 130), (5, 22), (64, 128), (1, 300)]:
        assert torch.equal(layer(inputs[first:last]), whole[first:last])


@pytest.mark.parametrize("rest", range(4))
@pytest.mark.parametrize(("bits", "offsets"), [(8, False), (8, True), (4, True)])
def test_a_few_rows_have_the_same_bits_where_panels_are_multiplied_at_once(
    kernels: Kernels, bits: Bits, offsets: bool, rest: int
) -> None:
    outputs = (16 + rest) * kernels.columns - 3  # of so many, one thread takes up to 4 panels at once
    gate, up = (weight_of(bits, 32, offsets, outputs, 96, seed) for seed in (0, 1))
    layers = NativeLinear(kernels, gate, values(outputs), torch.float32), NativeGatedPair(kernels, gate, up, 1)
    inputs = values(7, 96, seed=3)
    for layer in layers:
        layer.call.threads = 1
        whole = layer(inputs)
        for rows in range(1, 6):
            assert torch.equal(layer(inputs[2 : 2 + rows]), whole[2 : 2 + rows])


def test_rounded_rows_are_held_once_however_many_threads_share_them(kernels: Kernels) -> None:
    layer = NativeLinear(kernels, weight_of(8, 32, False, 32, 4096), None, torch.float32)
    layer.call.threads = 8
    inputs = values(2000, 4096)
    layer(inputs)
    before = Process().memory_info().rss
    for _ in range(40):
        layer(inputs)
    assert Process().memory_info().rss - before < 2 * inputs.numel() * 2


def test_inputs_that_are_no_numbers_give_none_in_their_row_alone(kernels: Kernels) -> None:
    layer = NativeLinear(kernels, weight_of(8, 32, False, 32, 64), None, torch.float32)
    inputs = values(3, 64)
    expected = layer(inputs)
    inputs[1, 40] = torch.inf
    got = layer(inputs)
    assert bool(got[1].isnan().all())
    assert torch.equal(got[[0, 2]], expected[[0, 2]])
    inputs[1, 40] = torch.nan
    assert bool(layer(inputs)[1].isnan().all())


def test_zeros_and_the_largest_values_are_computed(kernels: Kernels) -> None:
    weight = weight_of(8, 32, False, 32, 64)
    layer = NativeLinear(kernels, weight, None, torch.float32)
    inputs = torch.stack([torch.zeros(64), values(64) * 1e30, values(64) * 1e-25])
    assert not layer(inputs)[0].any()
    assert relative_error(layer(inputs)[1], inputs[1].double() @ weight.dequantised().double().t()) < 5e-5
    assert relative_error(layer(inputs)[2], inputs[2].double() @ weight.dequantised().double().t()) < 5e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_of_any_size_are_held(kernels: Kernels, bits: Bits) -> None:
    """They are fp16 beside a factor an output."""
    plain = values(48, 64) * torch.logspace(-25, 20, 48)[:, None]
    weight = quantise(plain, bits)
    inputs = values(5, 64, seed=1)
    got = NativeLinear(kernels, weight, None, torch.float32)(inputs).double()
    expected = inputs.double() @ weight.dequantised().double().t()
    assert bool(((got - expected).norm(dim=0) < 1e-3 * expected.norm(dim=0)).all())


def test_an_output_whose_weights_are_all_the_same_keeps_its_offset(kernels: Kernels) -> None:
    """Its scales are zero, so that no factor of theirs holds it."""
    weight = weight_of(4, 32, True, 20, 64)
    assert weight.offsets is not None
    weight.scales[3], weight.offsets[3] = 0.0, 0.75
    inputs = values(5, 64, seed=1)
    got = NativeLinear(kernels, weight, None, torch.float32)(inputs)
    expected = inputs.double() @ weight.dequantised().double().t()
    assert relative_error(got[:, 3], expected[:, 3]) < 1e-4
    assert relative_error(got, expected) < 5e-5


def test_a_packed_weight_takes_the_bytes_of_its_codes_and_scales(kernels: Kernels) -> None:
    columns = kernels.columns
    weight = weight_of(8, 32, False, 3 * columns + 1, 64)
    packed = pack(weight, columns)
    assert packed.shape == (4, packed_bytes(weight, columns))
    assert packed.shape[1] == columns * (4 + 64 + 2 * 2)
    four = weight_of(4, 32, True, columns, 64)
    assert pack(four, columns).numel() == columns * (4 + 32 + 2 * 4)


def test_quantised_layers_of_a_model_are_computed_by_the_kernels(kernels: Kernels) -> None:
    weight, bias = quantise(values(64, 96), 8), values(64, seed=1)
    model = nn.Sequential(QuantizedLinear(weight, bias, torch.bfloat16))
    inputs = values(4, 96, seed=2).bfloat16()
    expected = model(inputs)
    assert replace_layers(model, kernels) == 1
    assert isinstance(model[0], NativeLinear)
    assert model[0].weight.shape == (64, 96)
    assert model[0].weight.dtype is torch.bfloat16
    torch.testing.assert_close(model(inputs), expected, rtol=2e-2, atol=5e-2)


class HalfQuantised(nn.Module):
    """A gated layer whose last product is plain, as one of a size that groups do not divide is."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            QuantizedLinear(weight_of(8, 32, False, 80, 96, seed), None, torch.float32) for seed in (0, 1)
        )
        self.down_proj = nn.Linear(80, 96, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(rows)) * self.up_proj(rows))
        return out


@torch.inference_mode()
def test_quantised_and_plain_layers_make_a_gated_pair(kernels: Kernels) -> None:
    model, inputs = nn.Sequential(HalfQuantised()), values(5, 96, seed=2)
    expected = model(inputs)
    replace_layers(model, kernels)
    assert any(isinstance(module, NativeGatedPair) for module in model.modules())
    assert relative_error(model(inputs), expected) < 1e-4

"""The format of quantised weights: what its codes mean, what rounding loses, and what it refuses."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.engine.torch.quantization.weight import (
    Bits,
    QuantizedWeight,
    can_quantise,
    pack_nibbles,
    quantise,
    unpack_nibbles,
)
from emberkv.errors import ConfigError, UnsupportedModelError


def random_weight(out: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, size, generator=torch.Generator().manual_seed(seed))


def test_a_value_is_scale_times_code_plus_offset() -> None:
    codes = torch.zeros(2, 32, dtype=torch.int8)
    codes[0, 5], codes[1, 20] = -128, 127
    scales = torch.tensor([[0.5, 2.0], [0.25, 3.0]])
    offsets = torch.tensor([[1.0, 0.0], [0.0, -7.0]])
    weight = QuantizedWeight(codes, scales, offsets, 16, 8)
    values = weight.dequantised()
    assert weight.shape == (2, 32)
    assert values[0, 5] == 0.5 * -128 + 1
    assert values[0, 6] == 1
    assert values[1, 20] == 3.0 * 127 - 7
    assert weight.num_bytes == 64 + 16 + 16


def test_two_codes_of_four_bits_lie_in_a_byte_the_even_input_below() -> None:
    codes = torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)
    packed = pack_nibbles(codes)
    assert packed.tolist() == [[0xF0, 0x78]]
    assert torch.equal(unpack_nibbles(packed), codes)


@pytest.mark.parametrize("group", [16, 32, 64])
def test_eight_bits_are_off_by_half_a_step_at_most(group: int) -> None:
    values = random_weight(12, 192)
    weight = quantise(values, 8, group)
    step = values.abs().view(12, -1, group).amax(-1, keepdim=True) / 127
    error = (weight.dequantised() - values).abs().view(12, -1, group)
    assert bool((error <= 0.5001 * step).all())
    assert weight.offsets is None
    assert weight.num_bytes == 12 * 192 + 12 * 192 // group * 4


def test_four_bits_take_an_offset_where_values_are_not_centred() -> None:
    values = random_weight(8, 64) * 0.1 + 1
    weight = quantise(values, 4)
    assert weight.offsets is not None
    assert bool((squared_errors(weight.dequantised(), values) <= squared_errors(even_steps(values), values)).all())


def even_steps(values: torch.Tensor) -> torch.Tensor:
    """Each group of 32 in 15 steps from its least to its largest value."""
    grouped = values.view(values.shape[0], -1, 32)
    least, most = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (most - least).clamp_min(1e-30) / 15
    return (((grouped - least) / step).round() * step + least).view_as(values)


def squared_errors(got: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of each group of 32."""
    return (got - values).square().view(values.shape[0], -1, 32).sum(-1)


@settings(max_examples=40, deadline=None)
@given(scale=st.floats(2**-20, 2**20), shift=st.floats(-2, 2), seed=st.integers(0, 999))
def test_four_bits_have_no_larger_error_than_even_steps_in_any_group(scale: float, shift: float, seed: int) -> None:
    values = (random_weight(4, 64, seed) + shift) * scale
    weight = quantise(values, 4)
    assert weight.offsets is not None
    ours, theirs = squared_errors(weight.dequantised(), values), squared_errors(even_steps(values), values)
    assert bool((ours <= theirs * 1.001).all())


def test_the_search_makes_the_error_of_four_bits_smaller_by_a_twentieth() -> None:
    values = random_weight(64, 1024)
    ours, theirs = ((each - values).norm() for each in (quantise(values, 4).dequantised(), even_steps(values)))
    assert ours < 0.95 * theirs


def test_four_bits_take_no_offset_where_it_does_not_help() -> None:
    codes = torch.arange(-8, 8, dtype=torch.float32).repeat(4, 4)
    codes[codes == 7] = 0  # -8 to 6: an offset's 15 steps have no better place than the codes themselves
    weight = quantise(codes * 0.5, 4)
    assert weight.offsets is None
    assert torch.equal(weight.dequantised(), codes * 0.5)


@settings(max_examples=40, deadline=None)
@given(
    group=st.sampled_from([16, 32]),
    scale=st.floats(2**-20, 2**20),
    shift=st.floats(-2, 2),
    seed=st.integers(0, 999),
)
def test_what_is_quantised_again_in_eight_bits_stays(group: int, scale: float, shift: float, seed: int) -> None:
    """Up to the rounding of the scale: the codes are a fixed point."""
    once = quantise((random_weight(4, 64, seed) + shift) * scale, 8, group).dequantised()
    twice = quantise(once, 8, group).dequantised()
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-5 * float(once.abs().max()))


def test_more_bits_are_nearer() -> None:
    values = random_weight(64, 256)
    formats: list[tuple[Bits, int]] = [(8, 32), (4, 32), (4, 128)]
    errors = [(quantise(values, bits, group).dequantised() - values).norm() for bits, group in formats]
    assert all(better < worse for better, worse in pairwise(errors))


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_of_zeros_and_of_the_smallest_values_are_zeros(bits: Bits) -> None:
    values = torch.zeros(2, 32)
    values[1] = 1e-44
    assert not quantise(values, bits).dequantised().abs().gt(1e-38).any()


def test_a_group_is_cut_and_outputs_are_taken() -> None:
    eight_and_four: tuple[Bits, Bits] = (8, 4)
    for bits in eight_and_four:
        weight = quantise(random_weight(6, 128) + 1, bits, 64)
        cut = weight.with_group(16)
        assert cut.group == 16
        assert torch.equal(cut.dequantised(), weight.dequantised())
        assert torch.equal(weight.rows(2, 5).dequantised(), weight.dequantised()[2:5])
    with pytest.raises(ConfigError, match="groups of 64 inputs cannot be cut into groups of 48"):
        weight.with_group(48)


def test_dequantised_in_another_type_is_rounded_once() -> None:
    weight = quantise(random_weight(3, 32), 8)
    assert torch.equal(weight.dequantised(torch.bfloat16), weight.dequantised().bfloat16())


@pytest.mark.parametrize(
    ("codes", "scales", "offsets", "group", "bits", "message"),
    [
        (torch.zeros(2, 32), torch.ones(2, 1), None, 32, 8, "codes of torch.float32"),
        (torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 2), None, 32, 8, "do not fit together"),
        (torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1), None, 32, 4, "must be torch.uint8"),
        (torch.zeros(2, 24, dtype=torch.int8), torch.ones(2, 1), None, 24, 8, "a multiple of 16"),
        (torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1), torch.ones(2, 2), 32, 8, "offsets of shape"),
    ],
)
def test_what_does_not_fit_is_refused(
    codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, group: int, bits: Bits, message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        QuantizedWeight(codes, scales, offsets, group, bits)


def test_weights_that_cannot_be_quantised() -> None:
    assert not can_quantise((4, 40))
    with pytest.raises(ConfigError, match=r"shape \[4, 40\] cannot be quantised in groups of 32"):
        quantise(torch.zeros(4, 40), 8)
    with pytest.raises(ConfigError, match="not finite"):
        quantise(torch.full((4, 32), torch.nan), 8)

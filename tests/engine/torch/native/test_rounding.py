"""Weights rounded to 4 bits by the kernels: what torch's own operations give, to the last bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.quantization.weight import QuantizedWeight, fitted, quantise


def same(ours: QuantizedWeight, theirs: QuantizedWeight) -> None:
    assert (ours.group, ours.bits) == (theirs.group, theirs.bits)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.scales, theirs.scales)
    assert ours.offsets is not None
    assert theirs.offsets is not None
    assert torch.equal(ours.offsets, theirs.offsets)


@settings(max_examples=40, deadline=None)
@given(
    group=st.sampled_from([16, 32, 64, 128]),
    out=st.integers(1, 9),
    groups=st.integers(1, 7),
    scale=st.floats(2**-30, 2**30),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 999),
)
def test_the_kernels_find_what_torch_finds(
    kernels: Kernels, group: int, out: int, groups: int, scale: float, shift: float, seed: int
) -> None:
    """Groups of any number, some of them all equal, all zeros, or with one value far from the others."""
    values = torch.randn(out, groups, group, generator=torch.Generator().manual_seed(seed))
    values = (values + shift) * scale
    values[0, 0] = 0.0
    values[-1, -1] = shift * scale
    values[out // 2, groups // 2, 3] *= 1000
    same(kernels.fitted(values), fitted(values))


@pytest.mark.parametrize("group", [144, 256])
def test_groups_that_are_larger_than_the_kernels_take_are_rounded_too(kernels: Kernels, group: int) -> None:
    values = torch.randn(3, 2, group, generator=torch.Generator().manual_seed(group))
    same(kernels.fitted(values), fitted(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_weight_is_rounded_alike_by_several_threads(kernels: Kernels, dtype: torch.dtype) -> None:
    weight = torch.randn(300, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        same(quantise(weight, 4, fit=kernels.fitted), quantise(weight, 4))
    finally:
        torch.set_num_threads(before)

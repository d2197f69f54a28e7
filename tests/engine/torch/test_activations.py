"""Activations whose bits depend on nothing but the element: not on its neighbours, nor on the number of threads."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from emberkv.engine.torch.layers import BatchInvariantActivation, wrap_activations


@pytest.fixture(params=[1, 2, 3, 5, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "relu2"])
@pytest.mark.usefixtures("threads")
def test_an_element_has_the_same_bits_among_any_others(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = ACT2FN[name]
    wrapped = BatchInvariantActivation(plain)
    for width in (100, 1056, 2432):
        inputs = torch.randn(1, 128, width).to(dtype)
        whole = wrapped(inputs)
        torch.testing.assert_close(whole, plain(inputs))
        for start, stop in [(0, 1), (127, 128), (0, 33), (64, 128), (31, 128)]:
            assert torch.equal(wrapped(inputs[:, start:stop]), whole[:, start:stop])


def test_every_activation_is_wrapped_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Sequential(ACT2FN["gelu_pytorch_tanh"]), nn.PReLU(4))
    assert wrap_activations(model) == 2
    assert wrap_activations(model) == 0
    assert [type(module) for module in model] == [nn.Linear, BatchInvariantActivation, nn.Sequential, nn.PReLU]

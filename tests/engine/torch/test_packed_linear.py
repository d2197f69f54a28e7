"""Linear layers in oneDNN's layout: the same products, row by row, whatever the other rows are."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from emberkv.engine.torch.layers import PackedLinear, pack_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")

DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 on this processor"
        ),
    ),
]


def random_layer(dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 80, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (1, 7, 96), (2, 3, 5, 96), (1, 0, 96), (1, 1, 96)], ids=str)
def test_the_product_is_that_of_a_plain_layer(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    layer = random_layer(dtype, bias=bias)
    inputs = torch.randn(shape).to(dtype)
    ours = PackedLinear(layer.weight, layer.bias)(inputs)
    assert ours.dtype is dtype
    torch.testing.assert_close(ours, layer(inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 320])
def test_a_row_has_the_same_bits_among_any_other_rows(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(width, 3 * width).to(dtype).requires_grad_(False)
    packed = PackedLinear(layer.weight, layer.bias)
    inputs = torch.randn(1, 130, width).to(dtype)
    whole = packed(inputs)
    for start, stop in [
        (0, 1),
        (129, 130),
        (3, 5),
        (0, 16),
        (5, 22),
        (64, 128),
        (1, 130),
        *((64, 64 + n) for n in range(1, 60)),
    ]:
        assert torch.equal(packed(inputs[:, start:stop]), whole[:, start:stop])


class Small(nn.Module):
    """A model with an output layer tied to its embedding, and layers of both kinds."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32), Conv1D(32, 32)])
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype).requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        result: torch.Tensor = self.head(hidden)
        return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layer_is_packed_once_and_a_tied_embedding_keeps_its_weight(dtype: torch.dtype) -> None:
    model, tokens = Small(dtype), torch.arange(50)[None]
    before = model(tokens)
    assert pack_linears(model) == 3
    assert [type(layer) for layer in (*model.layers, model.head)] == [PackedLinear] * 3
    torch.testing.assert_close(model(tokens), before)
    assert pack_linears(model) == 0
    assert [name for name, _ in model.named_parameters() if "weight" in name] == ["embedding.weight"]


def test_float16_stays_as_it_is() -> None:
    model = Small(torch.float16)
    assert pack_linears(model) == 0
    assert type(model.layers[0]) is nn.Linear

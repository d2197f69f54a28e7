"""Linear layers, gated pairs and norms by the kernels: the same numbers, row by row, whatever the other rows are."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from emberkv.engine.torch.attention.paged_attention import ActiveRows, AttentionStep, LayerCall, attention_step
from emberkv.engine.torch.layers import pack_linears, rows_are_independent
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.native.layers import NativeGatedPair, NativeLinear, NativeRMSNorm, replace_layers
from emberkv.errors import UnsupportedModelError
from tests.engine.conftest import ModelFactory

SOME_ROWS = [(0, 1), (129, 130), (3, 5), (0, 6), (5, 22), (64, 128), (1, 130), *((64, 64 + n) for n in range(1, 55, 3))]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    return kind


def weights(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "outputs"), [(96, 80), (64, 64), (6, 2), (130, 200)])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 5), (0,)], ids=str)
def test_a_linear_layer_is_what_it_was(
    kernels: Kernels, dtype: torch.dtype, bias: bool, size: int, outputs: int, shape: tuple[int, ...]
) -> None:
    layer = nn.Linear(size, outputs, bias=bias).to(dtype).requires_grad_(False)
    inputs = torch.randn(*shape, size).to(dtype)
    ours = NativeLinear(kernels, layer.weight, layer.bias)(inputs)
    assert ours.dtype is dtype
    torch.testing.assert_close(ours, layer(inputs))


@pytest.mark.parametrize(("number", "activation"), [(1, silu), (2, lambda x: gelu(x, approximate="tanh"))])
def test_a_gated_pair_is_activation_of_gate_times_up(
    kernels: Kernels, dtype: torch.dtype, number: int, activation: object
) -> None:
    gate, up, inputs = weights(80, 96, dtype), weights(80, 96, dtype, 1), weights(33, 96, dtype, 2)
    ours = NativeGatedPair(kernels, gate, up, number)(inputs)
    x, g, u = (each.double() for each in (inputs, gate, up))
    expected = activation(x @ g.t()) * (x @ u.t())  # type: ignore[operator]
    error = (ours.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype is torch.float32 else 3e-3)


@pytest.mark.parametrize("make", [LlamaRMSNorm, GemmaRMSNorm])
def test_a_norm_is_what_it_was(kernels: Kernels, dtype: torch.dtype, make: type[nn.Module]) -> None:
    model = nn.Sequential(make(96, eps=1e-5).to(dtype))
    with torch.no_grad():
        model[0].weight.copy_(weights(1, 96, dtype)[0])
    inputs = 3 * weights(40, 96, dtype, 1).view(2, 20, 96)
    expected = model(inputs)
    assert replace_layers(model, kernels) == 1
    assert isinstance(model[0], NativeRMSNorm)
    torch.testing.assert_close(model(inputs), expected)


@pytest.mark.parametrize(("make", "scale"), [(LlamaRMSNorm, 100.0), (GemmaRMSNorm, 101.0)])
def test_a_norm_of_large_weights_is_not_taken_for_another(
    kernels: Kernels, make: type[nn.Module], scale: float
) -> None:
    model = nn.Sequential(make(96).to(torch.bfloat16))
    nn.init.constant_(model[0].weight, 100)
    replace_layers(model, kernels)
    assert isinstance(model[0], NativeRMSNorm)
    assert model[0].scale.tolist() == [scale] * 96


class Clamped(nn.Module):
    """A gated pair of which what is large is clamped, as some experts' is."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(32, 64, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(64, 32, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, inputs: Tensor) -> Tensor:
        gate = self.act_fn(self.gate_proj(inputs)).clamp(max=7)
        result: Tensor = self.down_proj(gate * self.up_proj(inputs))
        return result


def test_a_pair_that_clamps_what_is_large_is_left(kernels: Kernels) -> None:
    model = nn.Sequential(Clamped()).requires_grad_(False)
    replace_layers(model, kernels)
    assert isinstance(model[0], Clamped)


@pytest.mark.parametrize("kind", ["linear", "gated", "norm"])
def test_a_row_has_the_same_bits_among_any_other_rows(kernels: Kernels, dtype: torch.dtype, kind: str) -> None:
    first, second = weights(200, 320, dtype), weights(200, 320, dtype, 1)
    layer: nn.Module = {
        "linear": NativeLinear(kernels, first, first[:, 0]),
        "gated": NativeGatedPair(kernels, first, second, 1),
        "norm": NativeRMSNorm(kernels, first[0].float(), 1e-6),
    }[kind]
    inputs = weights(130, 320, dtype, 2)
    whole = layer(inputs)
    for start, stop in SOME_ROWS:
        assert torch.equal(layer(inputs[start:stop]), whole[start:stop])


@pytest.mark.parametrize("rest", range(4))
@pytest.mark.parametrize("kind", ["linear", "gated"])
def test_a_few_rows_have_the_same_bits_where_panels_are_multiplied_at_once(
    kernels: Kernels, dtype: torch.dtype, kind: str, rest: int
) -> None:
    outputs = (16 + rest) * kernels.columns - 3  # of so many, one thread takes up to 4 panels at once
    first, second = weights(outputs, 64, dtype), weights(outputs, 64, dtype, 1)
    layer = (
        NativeLinear(kernels, first, first[:, 0])
        if kind == "linear"
        else NativeGatedPair(kernels, first, second, 1, (first[:, 0], second[:, 0]))
    )
    layer.call.threads = 1
    inputs = weights(7, 64, dtype, 2)
    whole = layer(inputs)
    for rows in range(1, 6):
        assert torch.equal(layer(inputs[2 : 2 + rows]), whole[2 : 2 + rows])


@pytest.mark.parametrize(
    ("arch", "linears", "pairs", "norms"),
    [("llama", 16, 3, 7), ("gemma2", 11, 2, 9), ("phi3", 7, 2, 5), ("qwen3", 16, 3, 13), ("gpt2", 9, 0, 0)],
)
def test_every_layer_of_a_kind_that_the_kernels_know_is_replaced(
    paged: ModelFactory, kernels: Kernels, arch: str, linears: int, pairs: int, norms: int
) -> None:
    model = paged(arch).model
    replace_layers(model, kernels)
    kinds = [type(module) for module in model.modules()]
    assert [kinds.count(kind) for kind in (NativeLinear, NativeGatedPair, NativeRMSNorm)] == [linears, pairs, norms]
    assert not any(issubclass(kind, (nn.Linear, Conv1D)) for kind in kinds)


class Odd(nn.Module):
    """Has the parts of a gated pair, and does something else with them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down_proj, self.act_fn = nn.Linear(48, 32, bias=False), nn.SiLU()

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.act_fn(self.up_proj(inputs)) * self.gate_proj(inputs))
        return result


class OddRMSNorm(LlamaRMSNorm):
    """Has the parts of a norm, and does something else with them."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        result: Tensor = super().forward(hidden_states) * 0.5
        return result


class Router(nn.Linear):
    """A layer that does something else with its weight."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).softmax(dim=-1)


def test_a_layer_derived_from_a_linear_one_is_left(kernels: Kernels) -> None:
    model = nn.Sequential(Router(32, 8), nn.Linear(8, 8)).requires_grad_(False)
    assert replace_layers(model, kernels) == 1
    assert pack_linears(model) == 0
    assert isinstance(model[0], Router)
    assert not rows_are_independent(model)


def test_a_layer_that_only_looks_like_one_is_left(kernels: Kernels) -> None:
    model = nn.Sequential(Odd(), OddRMSNorm(32)).requires_grad_(False)
    plain = copy.deepcopy(model)
    replace_layers(model, kernels)
    assert not any(isinstance(module, (NativeGatedPair, NativeRMSNorm)) for module in model.modules())
    inputs = weights(5, 32, torch.float32)
    torch.testing.assert_close(model(inputs), plain(inputs))


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16])
def test_inputs_of_another_type_are_refused(kernels: Kernels, given: torch.dtype) -> None:
    layer = NativeLinear(kernels, weights(64, 32, torch.float32), None)
    with pytest.raises(UnsupportedModelError, match=rf"given {given}, torch\.float32; they take all float32 or all"):
        layer(weights(3, 32, given))
    with pytest.raises(UnsupportedModelError, match=r"given torch\.float16; they take"):
        NativeRMSNorm(kernels, torch.ones(32), 1e-6)(weights(3, 32, torch.float16))


class _Left(AttentionStep):
    """After the last layer's attention."""

    def __init__(self, rows: list[int], of: int) -> None:
        self.active_rows = ActiveRows(torch.tensor(rows, dtype=torch.int64), of)

    def attend(self, call: LayerCall, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("rows", [[], [6], [0, 2, 6]])
def test_rows_that_are_not_left_are_not_computed(kernels: Kernels, rows: list[int]) -> None:
    layer = NativeLinear(kernels, weights(64, 32, torch.float32), weights(64, 1, torch.float32).flatten())
    pair = NativeGatedPair(kernels, weights(64, 32, torch.float32), weights(64, 32, torch.float32), 1)
    inputs = weights(7, 32, torch.float32).view(1, 7, 32)
    whole = layer(inputs), pair(inputs)
    inputs[0, [row for row in range(7) if row not in rows]] = float("nan")
    with attention_step(_Left(rows, of=7)):
        some = layer(inputs), pair(inputs)
        other_rows = layer(whole[0].new_ones(3, 32))
    for all_rows, left in zip(whole, some, strict=True):
        assert torch.equal(left[0, rows], all_rows[0, rows])
        assert left.count_nonzero() == all_rows[0, rows].count_nonzero()
    assert torch.equal(other_rows, layer(torch.ones(3, 32)))  # those of the output layer, for instance

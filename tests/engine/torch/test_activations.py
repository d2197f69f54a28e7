"""Activations and rotations whose bits depend on the element alone, not on its neighbours or the number of threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from emberkv.engine.torch.layers import (
    BatchInvariantActivation,
    BatchInvariantGates,
    ComplexRotation,
    wrap_activations,
    wrap_rotations,
)
from tests.architectures import ALSO_SUPPORTED
from tests.engine.conftest import ModelFactory


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


@pytest.mark.parametrize("name", ["gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_of_each_row_has_the_bits_of_the_same_values_laid_end_to_end(name: str, dtype: torch.dtype) -> None:
    rows = torch.randn(64, 2 * 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    half = rows.chunk(2, dim=-1)[0]
    wrapped = BatchInvariantActivation(ACT2FN[name])
    assert half.numel() % 64 == 0
    assert torch.equal(wrapped(half), wrapped(half.contiguous()))


@pytest.mark.parametrize("function", [torch.sigmoid, softplus])
@pytest.mark.usefixtures("threads")
def test_a_gate_has_the_same_bits_among_any_others(function: Callable[[Tensor], Tensor]) -> None:
    values = torch.randn(4099, generator=torch.Generator().manual_seed(0))
    with BatchInvariantGates():
        together, alone = function(values), torch.cat([function(each) for each in values.split(1)])
    assert torch.equal(together, alone)
    torch.testing.assert_close(together, function(values))


@pytest.mark.parametrize(
    ("arch", "gated"), [("afmoe", True), ("laguna", True), ("lfm3", True), ("qwen3_next", True), ("glm4_moe", False)]
)
def test_attention_that_multiplies_by_a_gate_is_known(arch: str, gated: bool) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **ALSO_SUPPORTED[arch], pad_token_id=0))
    assert BatchInvariantGates.wanted_by(model) is gated


def test_every_activation_is_wrapped_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Sequential(ACT2FN["gelu_pytorch_tanh"]), nn.PReLU(4))
    assert wrap_activations(model) == 2
    assert wrap_activations(model) == 0
    assert [type(module) for module in model] == [nn.Linear, BatchInvariantActivation, nn.Sequential, nn.PReLU]


def test_a_rotation_by_complex_numbers_rounds_alike_wherever_it_is_in_a_vector() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, rotation = (torch.randn(4099, dtype=torch.complex64, generator=generator) for _ in range(2))
    exact = rotation.as_subclass(ComplexRotation)
    together, alone = rows * exact, torch.cat([rows[i : i + 1] * exact[i : i + 1] for i in range(len(rows))])
    assert type(together) is torch.Tensor
    assert torch.equal(together, alone)
    torch.testing.assert_close(together, rows * rotation)


@pytest.mark.parametrize("arch", ["deepseek_v2", "llama4_text"])
def test_models_that_rotate_by_complex_numbers_use_them(paged: ModelFactory, arch: str) -> None:
    model = paged(arch).model
    assert wrap_rotations(model) == 1
    assert type(model.model.rotary_emb(torch.empty(1, 1), torch.tensor([[3]]))) is ComplexRotation

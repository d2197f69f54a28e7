"""Experts and routers by the kernels: what transformers computes, and each row by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from emberkv.engine.torch.native.experts import (
    GatedSharedExpert,
    NativeExperts,
    NativeRouter,
    ScaledInputs,
    replace_experts,
)
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.native.layers import replace_layers

SIZE, EXPERTS, TOP_K = 48, 6, 3
ROWS = 150
SOME = [(0, 1), (149, 150), (3, 10), (40, 105), (1, 150)]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    return kind


def config(model_type: str, **settings: Any) -> Any:
    made = AutoConfig.for_model(
        model_type, hidden_size=SIZE, intermediate_size=40, moe_intermediate_size=40, num_local_experts=EXPERTS,
        num_experts=EXPERTS, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=2, topk_group=1, **settings
    )  # fmt: skip
    made._experts_implementation = "eager"
    return made


def random(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.to(dtype).requires_grad_(False)


def rows_of(dtype: torch.dtype) -> Tensor:
    return torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)


def choices(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(ROWS)])
    return chosen, torch.rand(ROWS, TOP_K, generator=generator).to(dtype)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype is theirs.dtype
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert error < (1e-5 if theirs.dtype is torch.float32 else 2e-2)


def replaced(kernels: Kernels, module: nn.Module, kind: type[nn.Module]) -> Any:
    model = nn.Sequential(module)
    assert replace_experts(model, kernels) >= 1
    assert isinstance(model[0], kind)
    return model[0]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (MixtralExperts, config("mixtral")),
        (MixtralExperts, config("mixtral", hidden_act="gelu_pytorch_tanh")),
        (GptOssExperts, config("gpt_oss")),
    ],
    ids=["silu", "gelu", "clamped"],
)
def test_experts_are_what_they_were_and_a_row_depends_on_itself_alone(
    kernels: Kernels, dtype: torch.dtype, make: Any, settings: Any
) -> None:
    plain = random(make(settings), dtype)
    rows, (chosen, weights) = 3 * rows_of(dtype), choices(dtype)
    ours = replaced(kernels, plain, NativeExperts)
    got = ours(rows, chosen, weights)
    close(got, plain(rows, chosen, weights))
    for start, stop in SOME:
        assert torch.equal(ours(rows[start:stop], chosen[start:stop], weights[start:stop]), got[start:stop])


def test_an_expert_that_is_not_there_adds_nothing(kernels: Kernels) -> None:
    ours = replaced(kernels, random(MixtralExperts(config("mixtral")), torch.float32), NativeExperts)
    rows, one = rows_of(torch.float32)[:2], torch.ones(2, 1)
    alone = ours(rows, torch.tensor([[1], [2]]), one)
    beside = ours(rows, torch.tensor([[1, EXPERTS], [-1, 2]]), torch.ones(2, 2))
    assert torch.equal(beside, alone)


def test_experts_with_another_activation_stay(kernels: Kernels) -> None:
    model = nn.Sequential(random(MixtralExperts(config("mixtral", hidden_act="relu2")), torch.float32))
    assert replace_experts(model, kernels) == 0
    assert isinstance(model[0], MixtralExperts)


@pytest.mark.parametrize(
    ("make", "model_type"),
    [(MixtralTopKRouter, "mixtral"), (GptOssTopKRouter, "gpt_oss"), (Glm4MoeTopkRouter, "glm4_moe")],
)
def test_routers_choose_as_before_and_a_row_depends_on_itself_alone(
    kernels: Kernels, dtype: torch.dtype, make: Any, model_type: str
) -> None:
    plain = random(make(config(model_type)), dtype)
    rows = rows_of(dtype)
    ours = replaced(kernels, plain, NativeRouter)
    logits, weights, chosen = ours(rows)
    expected, _, expected_chosen = plain(rows)
    close(logits, expected)
    same = (chosen.sort(dim=-1)[0] == expected_chosen.sort(dim=-1)[0]).all(dim=-1)
    assert same.float().mean() > 0.9  # of some rows two experts are as good as each other
    for start, stop in SOME:
        assert all(map(torch.equal, ours(rows[start:stop]), (each[start:stop] for each in (logits, weights, chosen))))


class BiasedRouter(MixtralTopKRouter):
    """A router whose layer gives it the bias of each expert, as LFM2's mixtures do."""

    def forward(self, hidden_states: Tensor, bias: Tensor) -> Any:
        return super().forward(hidden_states + bias)


def test_a_router_that_takes_more_than_rows_stays_as_it_is(kernels: Kernels, dtype: torch.dtype) -> None:
    make: Any = BiasedRouter
    model = nn.Sequential(random(make(config("mixtral")), dtype))
    assert replace_experts(model, kernels) == 0
    assert type(model[0]) is BiasedRouter


def test_a_shared_expert_is_weighted_by_each_row_alone(kernels: Kernels, dtype: torch.dtype) -> None:
    settings = config("qwen2_moe", shared_expert_intermediate_size=40)
    make: Any = Qwen2MoeSparseMoeBlock
    plain = random(make(settings), dtype)
    model = nn.Sequential(plain)
    assert replace_experts(model, kernels) == 2  # the router and the experts
    assert isinstance(model[0], GatedSharedExpert)
    rows = rows_of(dtype).unsqueeze(0)
    close(model(rows), plain(rows))


@pytest.mark.parametrize("top_k", [1, 2])
def test_scores_that_multiply_the_inputs_of_experts(kernels: Kernels, dtype: torch.dtype, top_k: int) -> None:
    """Llama 4: beside an expert for every row; each row by itself gives the same bits."""
    settings = {"hidden_size": SIZE, "intermediate_size": 40, "num_local_experts": EXPERTS}
    block = random(Llama4TextMoe(AutoConfig.for_model("llama4_text", num_experts_per_tok=top_k, **settings)), dtype)
    rows = rows_of(dtype)
    expected, logits = block(rows)
    model = nn.Sequential(block)
    assert replace_experts(model, kernels) == 1  # its router
    replace_layers(model, kernels)
    assert isinstance(model[0], ScaledInputs)
    out, ours = model[0](rows)
    close(ours, logits)
    clear = (ours.topk(top_k).indices.sort().values == logits.topk(top_k).indices.sort().values).all(dim=-1)
    assert clear.float().mean() > 0.8
    close(out[clear], expected[clear])
    assert all(torch.equal(model[0](rows[i : i + 1])[0], out[i : i + 1]) for i in (0, 7, ROWS - 1))

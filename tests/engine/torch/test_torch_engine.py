"""The engine against transformers' own forward pass, and what it finds out about the model and the machine."""

import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from emberkv.engine.torch import engine as engine_module
from emberkv.engine.torch import self_check
from emberkv.engine.torch.engine import TorchEngine
from emberkv.engine.torch.model.loader import LoadedModel
from emberkv.engine.torch.namespace import namespace_of
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.self_check import is_batch_invariant
from emberkv.errors import ConfigError, UnsupportedModelError
from tests.architectures import SUPPORTED
from tests.conftest import CheckpointFactory
from tests.engine.conftest import ModelFactory
from tests.engine.driver import BLOCK, CHUNK, TILE, Driver, Engines
from tests.engine.torch.test_exactness import text

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
LONG = 150
"""Tokens: longer than every window in the zoo, and than two chunks."""

FLOAT32 = [(backend, arch, "float32") for backend in ("torch", "native") for arch in sorted(SUPPORTED)]
BFLOAT16 = [(backend, arch, "bfloat16") for backend, arch, _ in FLOAT32]

PlainModel = Callable[[str, torch.dtype], Any]


@pytest.fixture(scope="module")
def plain(checkpoint: CheckpointFactory) -> PlainModel:
    """``plain(arch, dtype)``: the model as transformers computes it."""
    auto_class: Any = AutoModelForCausalLM

    @cache
    def get(arch: str, dtype: torch.dtype) -> Any:
        return auto_class.from_pretrained(checkpoint(arch), dtype=dtype, attn_implementation="eager").eval()

    return get


@pytest.mark.parametrize("engines", [*FLOAT32, *BFLOAT16], indirect=True, ids="-".join)
@torch.inference_mode()
def test_logits_are_those_of_transformers(engines: Engines, plain: PlainModel) -> None:
    arch, dtype = engines.arch, getattr(torch, engines.dtype)
    prompt = text(random.Random(arch), LONG)
    run = engines.warm().run_one(prompt, new=24)
    whole = torch.tensor([[*prompt, *run.tokens]])
    theirs = plain(arch, dtype)(whole).logits[0, LONG - 1 : -1].float()
    ours = torch.stack(run.logits).float()
    error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert error.max() < TOLERANCE[dtype]


@pytest.mark.parametrize("engines", FLOAT32, indirect=True, ids="-".join)
@torch.inference_mode()
def test_greedy_answers_are_those_of_transformers(engines: Engines, plain: PlainModel) -> None:
    """Each token is the likeliest after those before it, which one pass of transformers over all of them says."""
    rng, served, model = random.Random(engines.arch), engines.warm(), plain(engines.arch, torch.float32)
    for length in (1, 30, LONG):
        prompt = text(rng, length)
        answer = served.run_one(prompt, new=40).tokens
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, length - 1 : -1]
        assert answer == logits.argmax(dim=-1).tolist()


def engine(
    loaded: LoadedModel,
    *,
    num_blocks: int = 64,
    chunk: int = CHUNK,
    kernels: Kernels | None = None,
    tile: int = TILE,
) -> TorchEngine:
    size = num_blocks * BLOCK * loaded.geometry.bytes_per_token(loaded.dtypes.kv)
    return TorchEngine(loaded, cache_bytes=size, block_size=BLOCK, prefill_chunk=chunk, kernels=kernels, tile=tile)


def test_a_plan_without_a_last_chunk_gives_no_logits(paged: ModelFactory) -> None:
    driver = Driver(paged("llama"), max_step_tokens=CHUNK)
    run = driver.run_one(text(random.Random(0), 3 * CHUNK))
    assert len(run.logits) == 1
    assert driver.executor.prefill([5] * CHUNK, 0, list(range(CHUNK // BLOCK)), sample=False).shape[0] == 0


def test_the_pool_takes_the_bytes_it_is_given(paged: ModelFactory) -> None:
    loaded = paged("llama", "bfloat16")
    pool = engine(loaded, num_blocks=37).pool
    assert pool.num_blocks == 37
    assert pool.num_bytes == 37 * BLOCK * loaded.geometry.bytes_per_token(loaded.dtypes.kv)
    with pytest.raises(ConfigError, match="holds no block"):
        TorchEngine(paged("llama"), cache_bytes=100, block_size=BLOCK, prefill_chunk=CHUNK)


@pytest.mark.parametrize(
    ("num_blocks", "chunk", "tile"),
    [(64, CHUNK, 24), (64, CHUNK, 4), (64, CHUNK, CHUNK), (2 * CHUNK // BLOCK, CHUNK, TILE)],
    ids=["does not divide the chunk", "is no multiple of the block", "is the chunk", "pool too small to try"],
)
def test_hits_end_at_chunks_where_a_smaller_tile_cannot_be(
    paged: ModelFactory, num_blocks: int, chunk: int, tile: int
) -> None:
    made = engine(paged("llama"), num_blocks=num_blocks, chunk=chunk, tile=tile)
    assert made.alignment == chunk


@pytest.mark.parametrize(
    "disturbance",
    [lambda rows: rows, lambda rows: rows % 2, lambda rows: rows == 1, lambda rows: rows > CHUNK],
    ids=["rows", "odd", "one", "many"],
)
def test_hits_end_at_chunks_where_results_depend_on_the_number_of_rows(
    paged: ModelFactory, disturbance: Callable[[int], int]
) -> None:
    def disturb(_: object, __: object, output: Tensor) -> Tensor:
        return output + 1e-3 * disturbance(output.shape[1])

    loaded = paged("llama")
    loaded.model.get_submodule("model.embed_tokens").register_forward_hook(disturb)
    assert engine(loaded).alignment == CHUNK


@pytest.mark.parametrize(("dtype", "passes"), [("float32", 1), ("float16", 4)])
def test_chunks_share_a_pass_only_where_rows_do_not_influence_one_another(
    paged: ModelFactory, dtype: str, passes: int
) -> None:
    driver = Driver(paged("llama", dtype))
    calls: list[int] = []
    driver.executor.loaded.model.get_submodule("model.embed_tokens").register_forward_hook(
        lambda module, given, output: calls.append(output.shape[1])
    )
    driver.run(text(random.Random(0), 2 * CHUNK), text(random.Random(1), 2 * CHUNK))
    assert len(calls) == passes


def test_hits_end_at_chunks_where_there_are_experts(paged: ModelFactory) -> None:
    loaded = paged("llama")
    experts = torch.nn.Module()
    experts.weights = torch.nn.Parameter(torch.zeros(2, 3, 4))
    loaded.model.add_module("experts", experts)
    assert engine(loaded).alignment == CHUNK


@pytest.mark.parametrize("arch", sorted(SUPPORTED))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_the_kernels_hits_end_at_blocks_and_decode_steps_are_exact(
    paged: ModelFactory, kernels: Kernels, arch: str, dtype: str
) -> None:
    made = engine(paged(arch, dtype), kernels=kernels)
    assert made.alignment == BLOCK
    assert made.batch_invariant


def test_with_the_kernels_blocks_as_large_as_chunks_are_tried_as_well(paged: ModelFactory, kernels: Kernels) -> None:
    made = engine(paged("llama"), kernels=kernels, chunk=BLOCK)
    assert made.alignment == BLOCK
    assert made.batch_invariant


@pytest.mark.parametrize("arch", sorted(SUPPORTED))
@torch.inference_mode()
def test_with_the_kernels_the_last_layer_computes_only_what_logits_need(
    paged: ModelFactory, kernels: Kernels, arch: str
) -> None:
    served = engine(paged(arch), kernels=kernels)
    served.decoder = None  # so that the modules compute
    computed: list[int] = []  # rows, layer by layer
    for name, module in served.loaded.model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_hook(lambda _, given, out: computed.append(int(out[0].any(dim=-1).sum())))
    tokens = text(random.Random(arch), 20)
    served.prefill(tokens[:16], 0, [0, 1, 2, 3, 4], sample=False)
    served.prefill(tokens[16:], 16, [0, 1, 2, 3, 4], sample=True)
    before = served.loaded.geometry.num_layers - 1
    assert computed == [*[16] * before, 0, *[4] * before, 1]


@pytest.mark.parametrize("chunk", [CHUNK, BLOCK])
@pytest.mark.parametrize(
    "disturbance",
    [lambda rows, _: rows, lambda rows, _: rows == 1, lambda rows, chunk: rows > chunk],
    ids=["rows", "one", "many"],
)
def test_the_kernels_do_not_hide_that_results_depend_on_the_number_of_rows(
    paged: ModelFactory, kernels: Kernels, disturbance: Callable[[int, int], int], chunk: int
) -> None:
    loaded = paged("llama")
    loaded.model.get_submodule("model.embed_tokens").register_forward_hook(
        lambda module, given, output: output + 1e-3 * disturbance(output.shape[1], chunk)
    )
    made = engine(loaded, kernels=kernels, chunk=chunk)
    assert made.alignment == chunk
    assert not made.one_pass
    assert not made.batch_invariant


@pytest.mark.parametrize("arch", sorted(SUPPORTED))
@pytest.mark.parametrize("num_blocks", [1, 3, 64])
def test_the_check_against_the_plain_forward_passes(paged: ModelFactory, arch: str, num_blocks: int) -> None:
    engine(paged(arch), num_blocks=num_blocks).check_against_plain_forward()


def test_the_logits_of_the_plain_forward_are_freed_with_the_check(
    paged: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []

    def plain_logits(loaded: LoadedModel, pool_tokens: int) -> Tensor:
        logits = self_check.plain_logits(loaded, pool_tokens)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(engine_module, "plain_logits", plain_logits)
    checked = engine(paged("llama"))
    assert [logits() is not None for logits in made] == [True]
    checked.check_against_plain_forward()
    assert [logits() for logits in made] == [None]


def test_a_model_that_the_paged_attention_does_not_reproduce_is_refused(paged: ModelFactory) -> None:
    loaded = paged("gemma")
    attention: Any = loaded.model.get_submodule("model.layers.1.self_attn")
    attention.layer_idx = 0  # two layers in one layer's rows
    with pytest.raises(UnsupportedModelError, match=r"differ from the model's own by .*GemmaForCausalLM cannot be"):
        engine(loaded).check_against_plain_forward()


def test_a_model_that_computes_no_numbers_is_refused(paged: ModelFactory) -> None:
    loaded = paged("llama")
    with torch.no_grad():
        loaded.model.get_parameter("model.norm.weight").fill_(float("nan"))
    with pytest.raises(UnsupportedModelError, match="differ from the model's own by nan%"):
        engine(loaded).check_against_plain_forward()


def test_what_state_depends_on_is_in_the_namespace_and_not_in_the_hash(paged: ModelFactory, kernels: Kernels) -> None:
    engines = {
        "this": engine(paged("llama")),
        "other dtype": engine(paged("llama", "bfloat16")),
        "other tile": engine(paged("llama"), tile=CHUNK),
        "other kernels": engine(paged("llama"), kernels=kernels, tile=BLOCK),
        "other code": engine(paged("qwen3")),
    }
    namespaces = [namespace_of(made, b"r" * 32) for made in engines.values()]
    assert len({each.digest() for each in namespaces}) == len(namespaces)
    assert namespace_of(engine(paged("llama")), b"r" * 32) == namespaces[0]


def test_one_type_for_all_is_computed_with(paged: ModelFactory) -> None:
    loaded = paged("llama")
    mixed = replace(loaded, dtypes=replace(loaded.dtypes, kv=torch.float16))
    with pytest.raises(UnsupportedModelError, match="has float32 weights, float32 activations, float16 KV; "):
        engine(mixed)


def test_other_salts_do_not_share(paged: ModelFactory) -> None:
    driver = Driver(paged("llama"))
    prompt = text(random.Random(0), LONG)
    driver.run_one(prompt, salt=b"one")
    assert driver.run_one(prompt, salt=b"two").cached == 0
    assert driver.run_one(prompt, salt=b"one").cached > 0


class _ForgetfulEngine:
    """An engine whose prefills find no state where they begin behind a whole block."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def prefill(self, tokens: list[int], start: int, block_ids: list[int], *, sample: bool) -> Tensor:
        size = self.pool.block_size
        if start and start % size == 0:
            for matrices in self.pool.matrices.values():
                matrices[block_ids[start // size - 1]] = 0
        return self._engine.prefill(tokens, start, block_ids, sample=sample)


def test_the_state_behind_a_block_that_has_grown_is_tried(paged: ModelFactory, kernels: Kernels) -> None:
    loaded = paged("bamba", "bfloat16")
    size = 64
    engine = TorchEngine(
        loaded, cache_bytes=4 * loaded.geometry.block_bytes(loaded.dtypes.kv, size), block_size=size,
        prefill_chunk=32, kernels=kernels,
    )  # fmt: skip
    assert engine.batch_invariant
    assert is_batch_invariant(engine)
    assert not is_batch_invariant(_ForgetfulEngine(engine))

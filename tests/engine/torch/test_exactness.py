"""A hit's logits and state equal a cold run's to the last bit, whatever was served in between."""

import copy
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from emberkv.engine.torch.attention.paged_attention import ATTENTION_NAME
from emberkv.engine.torch.model.loader import LoadedModel, load_model
from emberkv.engine.torch.native.kernels import Kernels
from tests.architectures import SUPPORTED
from tests.engine.conftest import DriverFactory, ModelFactory
from tests.engine.driver import BLOCK, CHUNK, TILE, Driver, Engines, Run
from tests.models import VOCAB_SIZE, save_tokenizer

COMBINATIONS = [(arch, dtype) for arch in sorted(SUPPORTED) for dtype in ("float32", "bfloat16")]
COMBINATIONS += [("llama", "float16"), ("gemma2", "float16")]
COMBINATIONS += [("llama", "int8 bfloat16"), ("phi3", "int4 float32")]
COMBINATIONS += [("mistral", "bfloat16/int8"), ("gemma2", "float32/int8")]
NATIVE = [("native", *combination) for combination in COMBINATIONS]
ALL = [*NATIVE, *(("torch", *combination) for combination in COMBINATIONS)]

TAILS = (1, 1, 2, BLOCK, TILE - 1, TILE, TILE + 1, 37, CHUNK - 1, CHUNK, CHUNK + 1, 100)

EVERY_KIND = pytest.mark.parametrize("engines", ALL, indirect=True, ids="-".join)
EVERY_NATIVE_KIND = pytest.mark.parametrize("engines", NATIVE, indirect=True, ids="-".join)


def half(lengths: tuple[int, ...], engines: Engines) -> tuple[int, ...]:
    """Every second of the lengths, which ones by the kind: each architecture gets all of them, but not with each type.
    A type of few architectures gets all.
    """
    if sum(dtype == engines.dtype for _, dtype in COMBINATIONS) <= 2:
        return lengths
    place = COMBINATIONS.index((engines.arch, engines.dtype))
    return lengths[(place // 2 + place) % 2 :: 2]


def text(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


def branches(rng: random.Random, stem: list[int], tails: tuple[int, ...]) -> list[tuple[int, list[int]]]:
    """Prompts that follow the stem to a random place and then go another way: (common tokens, prompt)."""
    found = []
    for tail in tails:
        common = rng.randrange(1, len(stem))
        other = (stem[common] - 2) % (VOCAB_SIZE - 3) + 3  # the first token that differs
        found.append((common, [*stem[:common], other, *text(rng, tail - 1)]))
    return found


def assert_equal_bits(warm: Run, cold: Run) -> None:
    assert cold.cached == 0
    for ours, theirs in zip(warm.logits, cold.logits, strict=True):
        assert torch.equal(ours, theirs), f"{warm.cached} cached of {warm.sequence.prompt_tokens}"


@EVERY_KIND
def test_hits_have_the_logits_and_the_state_of_a_cold_run(engines: Engines) -> None:
    rng = random.Random(engines.name)
    warm, cold = engines.warm(), engines.cold()
    unit = warm.executor.alignment
    stem = text(rng, 330)
    assert warm.run_one(stem).cached == 0
    for common, prompt in branches(rng, stem, half(TAILS, engines)):
        hit, computed = warm.run_one(prompt), cold.run_one(prompt)
        assert hit.cached // unit * unit == common // unit * unit
        assert warm.executor.batch_invariant or hit.cached % unit == 0
        assert_equal_bits(hit, computed)
        whole = len(prompt) // unit * unit // BLOCK
        assert torch.equal(hit.kv[:whole], computed.kv[:whole])
        warm.run_one(text(rng, rng.randrange(1, 90)))
    assert warm.stats.hit_tokens > 0
    assert warm.stats.prefill_tokens == warm.stats.query_tokens - warm.stats.hit_tokens


@EVERY_KIND
def test_eviction_in_between_changes_no_bit(engines: Engines) -> None:
    rng = random.Random(engines.name)
    warm, cold = engines.warm(num_blocks=44), engines.cold()
    stem = text(rng, 200)
    for tail in half((1, 20, TILE, CHUNK + 1), engines):
        warm.run_one(stem)
        warm.run_one(text(rng, 250))  # takes the blocks of the stem's end
        prompt = [*stem[: 3 * CHUNK], *text(rng, tail)]
        hit = warm.run_one(prompt)
        assert 0 < hit.cached < 3 * CHUNK
        assert_equal_bits(hit, cold.run_one(prompt))
    assert warm.stats.evicted_blocks > 0


@EVERY_KIND
def test_blocks_marked_exact_hold_the_bytes_of_a_cold_run(engines: Engines) -> None:
    """However they were computed: by prefills cut by hits, together with others that decode."""
    rng = random.Random(engines.name)
    warm, cold = engines.warm(), engines.cold()
    stem = text(rng, 200)
    prompts = [stem, *(prompt for _, prompt in branches(rng, stem, (1, 30, 70)))]
    runs = warm.run(*prompts, new=20)
    exact = inexact = 0
    for run in runs:
        chain = run.sequence.chain
        reference = cold.run_one(chain.slice(0, len(chain))).kv
        for position, block_hash in enumerate(chain.block_hashes):
            block = warm.pool.lookup(block_hash)
            if block is not None and block.exact:
                assert torch.equal(warm.executor.pool.blocks[block.block_id], reference[position])
                exact += 1
            inexact += block is not None and not block.exact
    assert exact > 0
    assert bool(inexact) is not warm.executor.batch_invariant  # decode steps filled some


@EVERY_KIND
def test_neighbours_in_a_step_change_no_bit(engines: Engines) -> None:
    """The first token's scores, computed in one step with other prompts and with sequences that decode."""
    rng = random.Random(engines.name)
    warm, cold = engines.warm(max_step_tokens=96), engines.cold()
    stem = text(rng, 200)
    warm.run_one(stem)
    prompts = [text(rng, 5), *(prompt for _, prompt in branches(rng, stem, (1, 9, TILE + 1, 70))), text(rng, 90)]
    runs = warm.run(*prompts, new=12)
    assert sum(run.cached for run in runs) > 0
    assert warm.mixed_steps > 0
    for run, prompt in zip(runs, prompts, strict=True):
        assert torch.equal(run.logits[0], cold.run_one(prompt).logits[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_mode_does_not_reuse_what_decode_steps_computed(paged: ModelFactory, dtype: str) -> None:
    """Where these round differently."""
    rng = random.Random(3)
    prompt, question = text(rng, 2 * CHUNK), text(rng, 5)
    default, exact = Driver(paged("llama", dtype)), Driver(paged("llama", dtype), exact=True)
    cold = Driver(paged("llama", dtype), prefix_cache=False)
    answer = default.run_one(prompt, new=80).tokens
    assert exact.run_one(prompt, new=80).tokens == answer
    second = [*prompt, *answer, *question]

    assert default.run_one(second).cached == 192  # the last block that decode filled ends at 200

    first_visit = exact.run_one(second)
    assert first_visit.cached == 2 * CHUNK
    assert exact.stats.replaced_blocks > 0
    second_visit = exact.run_one(second)
    assert second_visit.cached == (len(second) - 1) // exact.executor.alignment * exact.executor.alignment
    computed = cold.run_one(second)
    assert_equal_bits(first_visit, computed)
    assert_equal_bits(second_visit, computed)


@EVERY_NATIVE_KIND
def test_with_the_kernels_an_answer_is_reused_as_exactly_as_a_prompt(engines: Engines) -> None:
    rng = random.Random(3)
    prompt, question = text(rng, 2 * CHUNK + 3), text(rng, 5)
    exact, cold = engines.warm(exact=True), engines.cold()
    if engines.dtype == "float16":
        assert not exact.executor.batch_invariant
        return
    second = [*prompt, *exact.run_one(prompt, new=40).tokens, *question]

    visit, computed = exact.run_one(second), cold.run_one(second)

    assert visit.cached == 2 * CHUNK + 3 + 39  # all but the last token, which was never computed
    assert_equal_bits(visit, computed)
    assert torch.equal(visit.kv, computed.kv)


@EVERY_NATIVE_KIND
def test_with_the_kernels_a_hit_ends_at_any_token(engines: Engines) -> None:
    """Within a partial block, and within a full one, whose other tokens are then overwritten in the copy."""
    rng = random.Random(engines.name)
    warm, cold = engines.warm(), engines.cold()
    for extra in range(1, BLOCK):
        stem = text(rng, CHUNK + extra + BLOCK * rng.randrange(2))
        warm.run_one(stem)
        for kept in (len(stem), len(stem) - rng.randrange(1, extra + 1)):
            other = (stem[min(kept, len(stem) - 1)] - 2) % (VOCAB_SIZE - 3) + 3
            prompt = [*stem[:kept], other, *text(rng, rng.randrange(1, BLOCK))]
            hit, computed = warm.run_one(prompt), cold.run_one(prompt)
            assert_equal_bits(hit, computed)
            full = len(prompt) // BLOCK
            assert torch.equal(hit.kv[:full], computed.kv[:full])
            assert hit.cached == (kept if warm.executor.batch_invariant else kept // CHUNK * CHUNK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16/int8"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3"])
def test_with_the_kernels_any_mix_of_repeats_and_divergences_is_exact(
    paged: ModelFactory, kernels: Kernels, arch: str, dtype: str
) -> None:
    """Prompts served together, with answers of any length, in a pool so small that blocks are evicted all along."""
    rng = random.Random(f"{arch} {dtype} mix")
    warm = Driver(paged(arch, dtype), num_blocks=20, max_step_tokens=40, kernels=kernels)
    cold = Driver(paged(arch, dtype), prefix_cache=False, kernels=kernels)
    assert warm.executor.batch_invariant
    known = [text(rng, 40)]
    within_a_block = 0
    for _ in range(12):
        prompts = [
            [*(stem := rng.choice(known))[: rng.randrange(1, len(stem) + 1)], *text(rng, rng.randrange(5))][:60]
            for _ in range(rng.randrange(1, 4))
        ]
        new = rng.randrange(1, 20)
        for run, prompt in zip(warm.run(*prompts, new=new), prompts, strict=True):
            computed = cold.run_one(prompt, new=new)
            assert run.tokens == computed.tokens
            assert_equal_bits(run, computed)
            within_a_block += run.cached % BLOCK > 0
            known.append([*prompt, *run.tokens])
    assert within_a_block >= 5
    assert warm.stats.evicted_blocks > 0


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """``wide(arch, dtype)``: as `paged`, of layers so wide that threads share their work."""
    models: dict[tuple[str, str], LoadedModel] = {}

    def get(arch: str, dtype: str) -> LoadedModel:
        if (arch, dtype) not in models:
            folder = tmp_path_factory.mktemp(arch)
            write_wide_model(arch, folder)
            models[arch, dtype] = load(folder, dtype)
        return replace(models[arch, dtype], model=copy.deepcopy(models[arch, dtype].model))

    return get


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["llama", "gemma", "phi3"])
def test_hits_are_exact_on_several_threads(driver: DriverFactory, wide: ModelFactory, arch: str, dtype: str) -> None:
    """Which share the work of layers wide enough at places that depend on the number of rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        rng = random.Random(dtype)
        warm = driver(wide(arch, dtype))
        stem = text(rng, 300)
        warm.run_one(stem)
        prompts = [prompt for _, prompt in branches(rng, stem, (1, 7, 33, 90))]
        hits = [warm.run_one(prompt) for prompt in prompts]
        assert warm.stats.hit_tokens > 0
        cold = driver(warm.executor.loaded, prefix_cache=False, executor=warm.executor)
        for hit, prompt in zip(hits, prompts, strict=True):
            assert_equal_bits(hit, cold.run_one(prompt))
    finally:
        torch.set_num_threads(threads)


def write_wide_model(arch: str, folder: Path) -> None:
    settings = {**SUPPORTED[arch], "hidden_size": 192, "intermediate_size": 1056, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **settings)).save_pretrained(folder)
    save_tokenizer(folder)


def load(folder: Path, dtype: str) -> LoadedModel:
    return load_model(str(folder), dtype=dtype, device="cpu", attn_implementation=ATTENTION_NAME)  # type: ignore[arg-type]  # a name, as text

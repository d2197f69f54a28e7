"""A whole engine put together over a real model, and driven through its thread."""

import random
from dataclasses import replace

import pytest
import torch

from emberkv.core.hashing import root_hash
from emberkv.core.sequence import FinishReason
from emberkv.engine.assembly import AssembledEngine, EngineConfig, assemble_around
from emberkv.engine.request import CacheUsage, GenerationRequest, ModelLimits, SamplingParams
from emberkv.engine.torch.assembly import assemble, recompute_cost
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.errors import ConfigError, PromptTooLongError
from tests.engine.conftest import ModelFactory
from tests.engine.loop_harness import Inbox
from tests.engine.tiny_executor import TinyExecutor
from tests.engine.torch.test_exactness import text
from tests.models import CONTEXT

CONFIG = EngineConfig(cache_bytes=2**21, block_size=16, prefill_chunk=64)


def ask(engine: AssembledEngine, prompt: list[int], new: int = 8) -> Inbox:
    inbox = Inbox()
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    engine.loop.submit(GenerationRequest(f"{random.random()}", prompt, params), inbox)
    return inbox


def test_answers_through_the_thread(paged: ModelFactory) -> None:
    engine = assemble(paged("llama"), CONFIG)
    engine.loop.start()
    prompt = text(random.Random(0), 200)
    first, second = ask(engine, prompt), None
    assert first.reason is FinishReason.LENGTH
    second = ask(engine, prompt)
    assert second.reason is FinishReason.LENGTH
    engine.loop.stop()
    assert second.tokens == first.tokens
    unit = engine.executor.alignment
    assert first.outputs[0].usage == CacheUsage(200, 0, 192)
    assert second.outputs[0].usage == CacheUsage(200, 199 // unit * unit, 192 - 199 // unit * unit)
    engine.scheduler.cache.pool.check_integrity(holders=[])
    assert engine.loop.stats().free_blocks == engine.executor.pool.num_blocks


def test_many_at_once_through_the_thread(paged: ModelFactory) -> None:
    rng = random.Random(0)
    stem = text(rng, 300)
    prompts = [stem + text(rng, rng.randrange(1, 60)) for _ in range(8)]
    quiet, busy = (assemble(paged("llama"), CONFIG) for _ in range(2))
    quiet.loop.start()
    expected = []
    for prompt in prompts:
        inbox = ask(quiet, prompt, new=24)
        inbox.wait()
        expected.append(inbox.tokens)
    quiet.loop.stop()
    inboxes = [ask(busy, prompt, new=24) for prompt in prompts]
    busy.loop.start()
    assert {inbox.reason for inbox in inboxes} == {FinishReason.LENGTH}
    busy.loop.stop()
    assert [inbox.tokens for inbox in inboxes] == expected
    assert busy.loop.stats().prefix_hit_tokens > 0


def test_settings_reach_their_places(paged: ModelFactory) -> None:
    config = replace(CONFIG, max_step_tokens=100, max_running=3, exact=True, prefix_cache=False)
    engine = assemble(paged("llama"), config)
    pool = engine.executor.pool
    assert pool.num_bytes <= config.cache_bytes < pool.num_bytes + pool.num_bytes // pool.num_blocks
    assert engine.scheduler.cache.pool.num_blocks == pool.num_blocks
    assert (engine.scheduler.config.max_step_tokens, engine.scheduler.config.max_running) == (100, 3)
    assert (engine.scheduler.cache.exact, engine.scheduler.cache.enabled) == (True, False)
    assert engine.scheduler.cache.alignment == engine.executor.alignment
    assert engine.loop.context_length == min(CONTEXT, pool.num_blocks * 16)


@pytest.mark.parametrize(("arch", "size"), [("llama", 16), ("bamba", 256)])
def test_blocks_grow_with_the_state_beside_keys_and_values(
    paged: ModelFactory, kernels: Kernels, arch: str, size: int
) -> None:
    """A prefill chunk stays a part of one, and what is computed twice is hit but for its last token."""
    loaded = paged(arch, "bfloat16")
    cache_bytes = 2048 // size * loaded.geometry.block_bytes(torch.bfloat16, size)
    engine = assemble(loaded, replace(CONFIG, grow_blocks=True, cache_bytes=cache_bytes), kernels=kernels)
    assert engine.block_size == engine.executor.pool.block_size == size
    assert engine.root == root_hash(loaded.fingerprint, size)
    assert engine.scheduler.config.prefill_chunk == CONFIG.prefill_chunk
    prompt = text(random.Random(0), 600)
    engine.loop.start()
    first = ask(engine, prompt)
    assert first.reason is FinishReason.LENGTH
    second = ask(engine, prompt)
    assert second.reason is FinishReason.LENGTH
    engine.loop.stop()
    assert second.tokens == first.tokens
    assert engine.loop.stats().prefix_hit_tokens == 599


@pytest.mark.parametrize(
    ("block_size", "blocks", "context", "advice"),
    [
        (512, 1, 1024, "use a smaller --block-size or a larger --cache-ram"),
        (512, 4, 512, "use a smaller --block-size"),
        (16, 64, 512, "use a smaller --prefill-chunk"),
    ],
)
def test_units_that_no_prompt_fills_are_named_with_what_would_help(
    caplog: pytest.LogCaptureFixture, block_size: int, blocks: int, context: int, advice: str
) -> None:
    executor = TinyExecutor(num_blocks=blocks, block_size=block_size)
    executor.alignment, executor.batch_invariant = 512, False
    config = EngineConfig(cache_bytes=1, block_size=block_size, prefill_chunk=512)
    limits = ModelLimits(context, 50, frozenset())
    assemble_around(executor, config, limits=limits, root=bytes(32), namespace=bytes(32))
    assert caplog.messages == [
        f"nothing will be reused: hits are whole runs of 512 tokens here, and no prompt is longer; {advice}"
    ]


@pytest.mark.parametrize("within", [True, False])
def test_a_short_context_is_no_reason_to_warn_where_hits_end_within_blocks(
    caplog: pytest.LogCaptureFixture, within: bool
) -> None:
    executor = TinyExecutor(num_blocks=4, block_size=512)
    executor.hits_within_blocks = within
    config = EngineConfig(cache_bytes=1, block_size=512, prefill_chunk=512)
    limits = ModelLimits(512, 50, frozenset())
    assemble_around(executor, config, limits=limits, root=bytes(32), namespace=bytes(32))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_bytes": 1000}, "a KV pool of 1000 bytes holds no block"),
        ({"eviction": "random"}, "random"),
        ({"max_running": 0}, "max_running is 0"),
    ],
)
def test_settings_that_cannot_work(paged: ModelFactory, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assemble(paged("llama"), replace(CONFIG, **change))  # type: ignore[arg-type]  # fields by name


def test_a_prompt_that_the_pool_cannot_hold(paged: ModelFactory) -> None:
    loaded = paged("llama")
    engine = assemble(loaded, replace(CONFIG, cache_bytes=20 * 16 * loaded.geometry.bytes_per_token(loaded.dtypes.kv)))
    with pytest.raises(PromptTooLongError, match="320 prompt tokens and 8 to generate are 328; the KV pool holds 320"):
        ask(engine, [5] * 320)


def test_what_a_block_costs_grows_with_its_place(paged: ModelFactory) -> None:
    loaded = paged("llama")
    weight = recompute_cost(loaded, 16)
    first, later = weight(0), weight(100)
    assert first.size == later.size == 16 * loaded.geometry.bytes_per_token(loaded.dtypes.kv)
    # 3 layers of 4 heads of 16 channels, 100 blocks of 16 tokens seen by each of 16 tokens, 4 operations each.
    assert later.cost - first.cost == 3 * 4 * 16 * 1600 * 16 * 4

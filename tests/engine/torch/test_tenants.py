"""Tenants on a whole engine: shares of the pool, of RAM and of disk, and prefixes that all share."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from emberkv.core.hashing import PUBLIC_OWNER
from emberkv.core.policies.fair_shares import Share
from emberkv.engine.assembly import AssembledEngine, EngineConfig
from emberkv.engine.commands import Statistics
from emberkv.engine.request import CacheUsage, GenerationRequest, SamplingParams
from emberkv.engine.torch.assembly import assemble
from emberkv.errors import ConfigError
from emberkv.tiers.kinds import TierConfig, TierSpec
from emberkv.tiers.stats import TierStats
from tests.engine.conftest import ModelFactory
from tests.engine.loop_harness import Inbox
from tests.engine.torch.test_exactness import text
from tests.waiting import DEADLINE

BLOCK, CHUNK = 16, 32
POOL_BYTES = 2**20
TIER_BYTES = 600_000
CONFIG = EngineConfig(cache_bytes=POOL_BYTES, block_size=BLOCK, prefill_chunk=CHUNK, max_running=4)
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


@contextmanager
def running(engine: AssembledEngine) -> Iterator[AssembledEngine]:
    engine.loop.start()
    try:
        yield engine
    finally:
        engine.close()


def start(engine: AssembledEngine, tenant: str, prompt: Sequence[int]) -> Inbox:
    inbox = Inbox()
    request_id = f"{tenant}-{random.random()}"
    engine.loop.submit(GenerationRequest(request_id, prompt, ONE_TOKEN, tenant.encode(), tenant=tenant), inbox)
    return inbox


def ask(engine: AssembledEngine, tenant: str, prompt: Sequence[int]) -> CacheUsage:
    inbox = start(engine, tenant, prompt)
    inbox.wait()
    usage = inbox.outputs[-1].usage
    assert usage is not None
    return usage


def settle(engine: AssembledEngine) -> None:
    """Wait until what was computed is stored, and counted."""
    engine.loop.execute(Statistics()).result(DEADLINE)
    assert engine.tiers is not None
    assert engine.tiers.flush(DEADLINE)


def flood(engine: AssembledEngine, tenant: str, count: int) -> None:
    """Requests of 300 tokens, several at a time, none like another."""
    rng = random.Random(tenant)
    for inbox in [start(engine, tenant, text(rng, 300)) for _ in range(count)]:
        inbox.wait()


def test_prompts_are_shared_within_a_tenant_only(paged: ModelFactory) -> None:
    prompt = text(random.Random(0), 200)
    with running(assemble(paged("llama"), CONFIG)) as engine:
        cold = ask(engine, "acme", prompt)
        warm = ask(engine, "acme", prompt)
        other = ask(engine, "globex", prompt)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 192)
    assert other == cold


def test_a_public_prefix_is_shared_by_all_and_what_follows_is_not(paged: ModelFactory) -> None:
    rng = random.Random(1)
    public, private = text(rng, 100), text(rng, 100)
    with running(assemble(paged("llama"), CONFIG, public_prefixes=[public])) as engine:
        ask(engine, "acme", public + private)
        usage = ask(engine, "globex", public + private)
        again = ask(engine, "globex", public + private)
    assert usage.cached_tokens == 96
    assert again.cached_tokens == 192


def test_a_flood_pushes_nobody_below_its_floor_in_any_tier(paged: ModelFactory, tmp_path: Path) -> None:
    prompt = text(random.Random(2), 200)
    floor = Share(floor_bytes=180_000)
    tiers = TierConfig(
        (TierSpec("ram", TIER_BYTES), TierSpec("disk", TIER_BYTES, tmp_path)),
        shares={tier: {"quiet": floor, "flood": Share()} for tier in ("pool", "ram", "disk")},
    )
    with running(assemble(paged("llama"), replace(CONFIG, tiers=tiers))) as engine:
        ask(engine, "quiet", prompt)
        settle(engine)
        before = bytes_of(engine, "quiet")
        flood(engine, "flood", 24)
        settle(engine)
        stats = engine.loop.stats()
        assert stats.evictions > 100
        assert all(tier.evictions + sum(tier.skipped.values()) > 100 for tier in stats.tiers.values())
        assert bytes_of(engine, "quiet") == before
        assert min(before.values()) > 12 * 10_000
        usage = ask(engine, "quiet", prompt)
    assert usage.cached_tokens == 192
    assert usage.tokens_by_tier == {}


def bytes_of(engine: AssembledEngine, tenant: str) -> dict[str, int]:
    stats = engine.loop.stats()
    places: dict[str, Mapping[str, int]] = {"pool": stats.pool_bytes_by_owner}
    places.update((name, tier.bytes_by_owner) for name, tier in stats.tiers.items())
    return {name: owners.get(tenant, 0) for name, owners in places.items()}


def test_without_a_floor_the_flood_wins(paged: ModelFactory) -> None:
    prompt = text(random.Random(2), 200)
    tiers = TierConfig(shares={"pool": {"quiet": Share(), "flood": Share()}})
    with running(assemble(paged("llama"), replace(CONFIG, tiers=tiers))) as engine:
        ask(engine, "quiet", prompt)
        for inbox in [start(engine, "flood", text(random.Random(seed), 600)) for seed in range(12)]:
            inbox.wait()
        lost = ask(engine, "quiet", prompt)
    assert lost.cached_tokens < 192


def test_a_quota_binds_in_every_tier(paged: ModelFactory, tmp_path: Path) -> None:
    quota = Share(quota_bytes=200_000)
    tiers = TierConfig(
        (TierSpec("ram", TIER_BYTES), TierSpec("disk", TIER_BYTES, tmp_path)),
        shares={tier: {"small": quota} for tier in ("pool", "ram", "disk")},
    )
    with running(assemble(paged("llama"), replace(CONFIG, tiers=tiers))) as engine:
        flood(engine, "small", 6)
        settle(engine)
        used = bytes_of(engine, "small")
        sizes: dict[str, TierStats] = dict(engine.loop.stats().tiers)
    assert all(150_000 < size <= 200_000 for size in used.values()), used
    assert all(tier.bytes == used[name] for name, tier in sizes.items())


@pytest.mark.parametrize(
    ("tier", "place"), [("pool", "the KV pool"), ("ram", "the ram tier"), ("disk", "the disk tier")]
)
def test_floors_that_cannot_be_kept_are_refused(paged: ModelFactory, tmp_path: Path, tier: str, place: str) -> None:
    shares = {tier: {"a": Share(floor_bytes=POOL_BYTES), "b": Share(floor_bytes=1), PUBLIC_OWNER: Share()}}
    tiers = TierConfig((TierSpec("ram", TIER_BYTES), TierSpec("disk", TIER_BYTES, tmp_path)), shares=shares)
    with pytest.raises(ConfigError, match=rf"the floors in {place} add up to 1,048,577 bytes; it has [0-9,]+"):
        assemble(paged("llama"), replace(CONFIG, tiers=tiers))


def test_floors_bound_what_a_request_may_hold(paged: ModelFactory) -> None:
    free = assemble(paged("llama"), CONFIG)
    half = free.executor.pool.num_bytes // 2
    tiers = TierConfig(shares={"pool": {"a": Share(floor_bytes=half)}})
    bound = assemble(paged("llama"), replace(CONFIG, tiers=tiers))
    blocks = free.executor.pool.num_blocks
    assert bound.loop.context_length == (blocks - -(-half // (free.executor.pool.num_bytes // blocks))) * BLOCK

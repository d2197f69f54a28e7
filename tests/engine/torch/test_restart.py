"""Real models over real tiers: after a restart, hits come from the folder, and no bit differs from a cold run's."""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emberkv.engine.assembly import AssembledEngine, EngineConfig
from emberkv.engine.commands import Remove, Statistics
from emberkv.engine.executor import SampledToken, SamplingState
from emberkv.engine.request import CacheUsage, GenerationRequest, SamplingParams
from emberkv.engine.torch.assembly import assemble
from emberkv.engine.torch.sampling import Sampler, SamplingFailure
from emberkv.errors import ConfigError
from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.kinds import TierConfig, TierSpec, configured_tiers
from tests.engine.conftest import ModelFactory
from tests.engine.loop_harness import Inbox
from tests.engine.torch.test_exactness import text
from tests.waiting import DEADLINE, eventually

CONFIG = EngineConfig(cache_bytes=2**21, block_size=16, prefill_chunk=64)


class RecordingSampler(Sampler):
    """Keeps the scores that each token was drawn from."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []

    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> list[SampledToken | SamplingFailure]:
        self.logits += logits.clone().unbind(0)
        return super().sample(logits, states)


@contextmanager
def engine(
    paged: ModelFactory,
    folder: Path | None,
    arch: str = "llama",
    *,
    sampler: Sampler | None = None,
    public_prefixes: Sequence[Sequence[int]] = (),
    **change: object,
) -> Iterator[AssembledEngine]:
    """arch: with a type behind it, as in "llama bfloat16", where it is not float32."""
    tiers = TierConfig(configured_tiers(ram_bytes=0, folder=folder, disk_bytes=2**28))
    config = replace(CONFIG, **{"tiers": tiers, **change})  # type: ignore[arg-type]  # fields by name
    made = assemble(paged(*arch.split()), config, sampler=sampler, public_prefixes=public_prefixes)
    made.loop.start()
    try:
        yield made
    finally:
        made.close(DEADLINE)
        made.scheduler.cache.pool.check_integrity(holders=[])


def ask(made: AssembledEngine, prompt: list[int], new: int = 8, name: str = "", tenant: str = "") -> Inbox:
    inbox = Inbox()
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    request = GenerationRequest(name or f"{random.random()}", prompt, params, tenant.encode(), tenant=tenant)
    made.loop.submit(request, inbox)
    return inbox


def usage(inbox: Inbox) -> CacheUsage:
    found = inbox.wait().usage
    assert found is not None
    return found


def has_bits_of_a_cold_run(
    paged: ModelFactory, arch: str, prompt: list[int], warm: Inbox, sampler: RecordingSampler, **options: int
) -> None:
    """An engine without tiers gives the same tokens, by the logits that ``sampler`` was given. options: of `engine`."""
    reference = RecordingSampler()
    with engine(paged, None, arch, sampler=reference, **options) as plain:
        cold = ask(plain, prompt)
        assert usage(cold).cached_tokens == 0
    assert warm.tokens == cold.tokens
    assert len(sampler.logits) == len(reference.logits) == 8
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(sampler.logits, reference.logits, strict=True))


def seems_slow(made: AssembledEngine) -> None:
    """Loading is chosen, and has all the time it needs, however busy the machine is."""
    assert made.link is not None
    for _ in range(500):
        made.link.computed(256, 1000.0)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "mistral bfloat16/int8"])
def test_a_restart_on_the_same_folder_hits_with_the_bits_of_a_cold_run(
    paged: ModelFactory, tmp_path: Path, arch: str
) -> None:
    prompt = text(random.Random(arch), 330)
    with engine(paged, tmp_path, arch) as first:
        cold = ask(first, prompt)
        assert usage(cold).cached_tokens == 0
    sampler = RecordingSampler()
    with engine(paged, tmp_path, arch, sampler=sampler) as second:
        warm = ask(second, prompt)
        hit = 329 // second.executor.alignment * second.executor.alignment
        assert usage(warm) == CacheUsage(330, hit, 320 - hit, {"disk": hit})
    assert warm.tokens == cold.tokens
    has_bits_of_a_cold_run(paged, arch, prompt, warm, sampler)
    stats = second.loop.stats()
    assert (stats.loaded_blocks, dict(stats.tier_hit_tokens), dict(stats.transfer_errors)) == (
        hit // 16,
        {"disk": hit},
        {},
    )


HYBRID = {"block_size": 128, "cache_bytes": 2**24}
"""Larger than the tokens that a checkpoint has to save."""


def answered(paged: ModelFactory, folder: Path, arch: str) -> tuple[list[int], int]:
    """Has an engine answer a prompt of two blocks and 74 tokens; the next prompt of the conversation, and how much of
    it a hybrid's hit covers after a restart: all but the answer's last token, which was never computed.
    """
    rng = random.Random(arch)
    prompt = text(rng, 330)
    with engine(paged, folder, arch, **HYBRID) as first:
        answer = ask(first, prompt)
        answer.wait()
        found = 337 if first.scheduler.cache.keeps_branches else 256
    return [*prompt, *answer.tokens, *text(rng, 9)], found


@pytest.mark.parametrize("arch", ["lfm2", "granitemoehybrid bfloat16", "qwen3_next"])
def test_after_a_restart_a_hybrid_goes_on_from_its_checkpoint_with_the_bits_of_a_cold_run(
    paged: ModelFactory, tmp_path: Path, arch: str
) -> None:
    prompt, hit = answered(paged, tmp_path, arch)
    sampler = RecordingSampler()
    with engine(paged, tmp_path, arch, sampler=sampler, **HYBRID) as second:
        seems_slow(second)
        warm = ask(second, prompt)
        assert (usage(warm).cached_tokens, usage(warm).tokens_by_tier) == (hit, {"disk": hit})
    has_bits_of_a_cold_run(paged, arch, prompt, warm, sampler, **HYBRID)
    stats = second.loop.stats()
    assert (stats.loaded_blocks, stats.checkpoints.get("loaded", 0)) == (2, hit > 256)
    assert (dict(stats.tier_hit_tokens), dict(stats.transfer_errors)) == ({"disk": hit}, {})


def test_after_a_restart_a_tenant_goes_on_from_a_public_checkpoint_with_the_bits_of_a_cold_run(
    paged: ModelFactory, tmp_path: Path
) -> None:
    """Two public prefixes part behind 200 tokens, which are a block and 72."""
    rng = random.Random(3)
    common = text(rng, 200)
    declared = [[*common, *text(rng, 184)] for _ in range(2)]
    with engine(paged, tmp_path, "lfm2", public_prefixes=declared, **HYBRID) as first:
        for tenant, tokens in zip(("ann", "bob"), declared, strict=True):
            ask(first, [*tokens, 5], 1, tenant=tenant).wait()
        hit = 200 if first.scheduler.cache.keeps_branches else 128
    prompt = [*common, *text(rng, 20)]
    sampler = RecordingSampler()
    with engine(paged, tmp_path, "lfm2", sampler=sampler, public_prefixes=declared, **HYBRID) as second:
        seems_slow(second)
        warm = ask(second, prompt, tenant="carl")
        assert usage(warm).tokens_by_tier == {"disk": hit}
    has_bits_of_a_cold_run(paged, "lfm2", prompt, warm, sampler, **HYBRID)
    assert second.loop.stats().checkpoints.get("loaded", 0) == (hit > 128)


def test_a_hybrid_s_checkpoint_goes_with_the_block_before_it_for_good(paged: ModelFactory, tmp_path: Path) -> None:
    prompt, hit = answered(paged, tmp_path, "lfm2")
    assert len(list(tmp_path.rglob("*.part.kv"))) == (hit > 256)
    with engine(paged, tmp_path, "lfm2", **HYBRID) as second:
        chain = second.loop.chain(GenerationRequest("", prompt, SamplingParams()))
        removed = second.loop.execute(Remove(chain.block_hashes[1:2])).result(DEADLINE)
        assert {name: answer.result(DEADLINE).count for name, answer in removed.tiers.items()} == {"disk": 1}
    assert list(tmp_path.rglob("*.part.kv")) == []
    with engine(paged, tmp_path, "lfm2", **HYBRID) as third:
        seems_slow(third)
        assert usage(ask(third, prompt)).tokens_by_tier == {"disk": 128}
    assert third.loop.stats().checkpoints.get("loaded", 0) == 0


@pytest.mark.parametrize("kind", ["shm", "remote"])
def test_two_engines_on_a_shared_tier_are_warm_for_one_another_to_the_last_bit(
    paged: ModelFactory, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """A look-up or a load may be given up on a busy machine, so the engines are asked until it happens."""
    server = request.getfixturevalue("redis_server").address if kind == "remote" else None
    tiers = TierConfig((TierSpec(kind, 2**26, tmp_path, server),))
    sampler = RecordingSampler()
    with engine(paged, None, tiers=tiers) as first, engine(paged, None, tiers=tiers, sampler=sampler) as second:
        assert first.tiers is not None
        seems_slow(second)
        deadline = time.monotonic() + DEADLINE
        rng = random.Random(kind)
        while time.monotonic() < deadline:
            prompt = text(rng, 330)
            assert usage(ask(first, prompt)).cached_tokens == 0
            assert first.tiers.flush(DEADLINE)
            first.loop.execute(Statistics()).result(DEADLINE)
            assert first.tiers.flush(DEADLINE)
            sampler.logits.clear()
            warm = ask(second, prompt)
            if usage(warm).tokens_by_tier.get(kind) == 320:
                break
        assert usage(warm) == CacheUsage(330, 320, 0, {kind: 320})
        assert second.loop.stats().tiers[kind].corrupt == {}
    has_bits_of_a_cold_run(paged, "llama", prompt, warm, sampler)


def test_a_hybrid_goes_on_from_a_checkpoint_in_redis_with_the_bits_of_a_cold_run(
    paged: ModelFactory, request: pytest.FixtureRequest
) -> None:
    """A look-up may be given up on a busy machine, so the engines are asked until it happens."""
    tiers = TierConfig((TierSpec("remote", 2**26, None, request.getfixturevalue("redis_server").address),))
    sampler = RecordingSampler()
    rng = random.Random(4)
    with (
        engine(paged, None, "lfm2", tiers=tiers, **HYBRID) as first,
        engine(paged, None, "lfm2", tiers=tiers, sampler=sampler, **HYBRID) as second,
    ):
        assert first.tiers is not None
        assert second.tiers is not None
        tier = second.tiers.workers[0].tier
        hit = 337 if first.scheduler.cache.keeps_branches else 256
        seems_slow(second)
        for _ in range(20):
            prompt = text(rng, 330)
            answer = ask(first, prompt)
            answer.wait()
            prompt = [*prompt, *answer.tokens, *text(rng, 9)]
            first.loop.execute(Statistics()).result(DEADLINE)
            assert first.tiers.flush(DEADLINE)
            parent = first.loop.chain(GenerationRequest("", prompt, SamplingParams())).parent(2)
            eventually(lambda parent=parent: hit == 256 or tier.partial_counts(parent))
            sampler.logits.clear()
            warm = ask(second, prompt)
            if usage(warm).tokens_by_tier == {"remote": hit}:
                break
        assert usage(warm).tokens_by_tier == {"remote": hit}
    has_bits_of_a_cold_run(paged, "lfm2", prompt, warm, sampler, **HYBRID)


def test_ram_is_a_second_chance_behind_a_small_pool(paged: ModelFactory) -> None:
    block = 16 * paged("llama").geometry.bytes_per_token(torch.float32)
    rng = random.Random(0)
    prompts = [text(rng, 400) for _ in range(3)]
    tiers = TierConfig((TierSpec("ram", 2**24),))
    with engine(paged, None, tiers=tiers, cache_bytes=40 * block) as made:
        cold = []
        for prompt in prompts:
            cold.append(ask(made, prompt))
            cold[-1].wait()
        assert made.tiers is not None
        assert made.tiers.flush(DEADLINE)
        made.loop.execute(Statistics()).result(DEADLINE)  # the step that computed the last prompt has ended
        seems_slow(made)
        warm = ask(made, prompts[0])
        assert usage(warm).tokens_by_tier.keys() == {"ram"}
        assert warm.tokens == cold[0].tokens
        assert made.loop.stats().evictions > 0


def test_concurrent_requests_share_one_load(paged: ModelFactory, tmp_path: Path) -> None:
    rng = random.Random(1)
    stem = text(rng, 320)
    prompts = [stem + text(rng, 5) for _ in range(4)]
    with engine(paged, tmp_path) as first:
        expected = []
        for prompt in prompts:
            expected.append(ask(first, prompt))
            expected[-1].wait()
    tiers = TierConfig((TierSpec("disk", 2**28, tmp_path),))
    second = assemble(paged("llama"), replace(CONFIG, tiers=tiers))
    inboxes = [ask(second, prompt) for prompt in prompts]  # all there before the first step
    second.loop.start()
    hits = [usage(inbox).tokens_by_tier for inbox in inboxes]
    second.close(DEADLINE)
    assert hits == [{"disk": 320}] * 4
    assert [inbox.tokens for inbox in inboxes] == [inbox.tokens for inbox in expected]
    stats = second.loop.stats()
    assert (dict(stats.load_choices), stats.loaded_blocks) == ({"load": 1, "shared": 3}, 20)
    assert stats.tiers["disk"].loads == 20


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_file_is_computed_again(paged: ModelFactory, tmp_path: Path, damage: str) -> None:
    prompt = text(random.Random(2), 330)
    with engine(paged, tmp_path) as first:
        cold = ask(first, prompt)
        cold.wait()
        names = [
            block_hash.hex()
            for block_hash in first.loop.chain(GenerationRequest("", prompt, SamplingParams())).block_hashes
        ]
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file() and names[4] in path.name]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flip" else data[:100] if damage == "truncate" else b"")
    with engine(paged, tmp_path) as second:
        warm = ask(second, prompt)
        assert usage(warm) == CacheUsage(330, 64, 256, {"disk": 64})
    assert warm.tokens == cold.tokens
    stats = second.loop.stats()
    assert (sum(stats.tiers["disk"].corrupt.values()), stats.loaded_blocks) == (1, 4)
    with engine(paged, tmp_path) as third:
        assert usage(ask(third, prompt)).cached_tokens == 320


def test_state_of_other_weights_is_not_found(paged: ModelFactory, tmp_path: Path) -> None:
    prompt = text(random.Random(3), 330)
    with engine(paged, tmp_path) as first:
        ask(first, prompt).wait()
    other = assemble(paged("llama", seed=1), replace(CONFIG, tiers=TierConfig((TierSpec("disk", 2**30, tmp_path),))))
    other.loop.start()
    assert usage(ask(other, prompt)).cached_tokens == 0
    other.close(DEADLINE)
    assert other.namespace != first.namespace


def test_exact_mode_keeps_no_decoded_state(paged: ModelFactory, tmp_path: Path) -> None:
    prompt = text(random.Random(4), 100)
    with engine(paged, tmp_path) as loose:
        answer = ask(loose, prompt, new=60)
        answer.wait()
    grown = [*prompt, *answer.tokens, 5]
    with engine(paged, tmp_path, exact=True) as strict:
        unit = strict.executor.alignment
        assert usage(ask(strict, grown)).tokens_by_tier == {"disk": 100 // unit * unit}


def test_no_tiers_without_a_prefix_cache(paged: ModelFactory, tmp_path: Path) -> None:
    with engine(paged, tmp_path / "cache", prefix_cache=False) as made:
        ask(made, [5] * 40).wait()
        assert made.tiers is None
    assert not (tmp_path / "cache").exists()


def test_settings_that_cannot_work_leave_the_folder_to_others(paged: ModelFactory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_running is 0"), engine(paged, tmp_path, max_running=0):
        pass
    tier = DiskTier.open(tmp_path, 2**20, namespace=b"any")
    assert tier.read_only is None
    tier.close()

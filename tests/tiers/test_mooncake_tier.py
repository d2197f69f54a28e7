"""The remote tier and a real Mooncake store, whose master is frozen, killed, restarted or absent."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from emberkv.core.loading import LookupStatus
from emberkv.core.policies.eviction import LRU
from emberkv.core.policies.fair_shares import Share
from emberkv.errors import ConfigError
from emberkv.tiers.base import RemovalResult, TierEntry
from emberkv.tiers.breaker import Circuit
from emberkv.tiers.kinds import TierSpec
from emberkv.tiers.remote.mooncake import BUFFER_BYTES, MARKED_SECONDS, MooncakeTier
from emberkv.tiers.remote.server import ANSWER_SECONDS, LONGEST_PAUSE, ServerAddress
from emberkv.tiers.remote.tier import NOT_REACHED
from tests.tiers.build import NAMESPACE, OTHER, block_hashes, entries, records
from tests.tiers.harness import Clock
from tests.tiers.mooncake_process import MooncakeMaster, needs_mooncake
from tests.waiting import eventually

BLOCKS = records(6)
ENTRIES = entries(BLOCKS)
IDS = block_hashes(BLOCKS)
GIVEN = 32 * 2**20

pytestmark = needs_mooncake


@pytest.fixture(scope="module")
def master() -> Iterator[MooncakeMaster]:
    with MooncakeMaster() as made:
        yield made


@pytest.fixture
def opened(master: MooncakeMaster, tmp_path: Path) -> Iterator[Callable[..., MooncakeTier]]:
    """Makes tiers that see no other test's blocks."""
    tiers: list[MooncakeTier] = []

    def get(
        namespace: bytes = NAMESPACE,
        clock: Clock | None = None,
        *,
        answer_seconds: float = 10,
        block_bytes: int = 0,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> MooncakeTier:
        clock = clock or Clock()
        tier = MooncakeTier(
            master.address, GIVEN, namespace=namespace, prefix=tmp_path.name, answer_seconds=answer_seconds,
            clock=clock, block_bytes=block_bytes, buffer_bytes=buffer_bytes,
        )  # fmt: skip
        tiers.append(tier)
        comes_back(tier.connect(), clock)
        return tier

    yield get
    with ThreadPoolExecutor() as threads:  # each takes about two seconds
        list(threads.map(MooncakeTier.close, tiers))


def comes_back(tier: MooncakeTier, clock: Clock) -> None:
    """Probe until the store answers, with time that passes as fast as it is asked for."""

    def answers() -> bool:
        if tier.stats().circuit is not Circuit.CLOSED:
            clock.now += LONGEST_PAUSE
            tier.refresh()
        return tier.stats().circuit is Circuit.CLOSED

    eventually(answers)


def test_blocks_that_are_larger_than_the_buffer_s_share_are_stored_and_loaded(
    opened: Callable[..., MooncakeTier],
) -> None:
    size = 3 * 2**20
    blocks = records(4, payload_bytes=size)
    first, second = (opened(block_bytes=size, buffer_bytes=2**20) for _ in range(2))
    assert first.store(entries(blocks)).count == 4
    assert second.load(block_hashes(blocks)) == entries(blocks)
    assert second.stats().errors == {}


def test_what_one_process_stores_another_finds(opened: Callable[..., MooncakeTier]) -> None:
    first, second = opened(), opened()
    assert first.store(ENTRIES[:4]).count == 4
    assert second.status(IDS[0]) is LookupStatus.PENDING
    assert second.query(IDS) == 4
    assert second.load(IDS[:5]) == [*ENTRIES[:4], None]
    assert second.store(ENTRIES[:5]).count == 5
    assert opened(OTHER).query(IDS) == 0


def test_an_exact_block_replaces_one_that_is_not(opened: Callable[..., MooncakeTier]) -> None:
    tier = opened()
    (other,) = entries([replace(BLOCKS[0], exact=False)])
    assert tier.store([other]).count == 1
    assert (tier.query(IDS[:1]), tier.query(IDS[:1], exact=True)) == (1, 0)
    assert tier.load(IDS[:1]) == [other]
    assert tier.store(ENTRIES[:1]).count == 1
    assert tier.query(IDS[:1], exact=True) == 1
    assert tier.load(IDS[:1]) == ENTRIES[:1]
    assert tier.store([other]).count == 1
    assert tier.load(IDS[:1]) == ENTRIES[:1]
    assert tier.remove(IDS[:1]) == RemovalResult(1)
    assert tier.query(IDS[:1]) == 0


def test_a_long_prompt_is_looked_up_as_far_as_it_is_there(opened: Callable[..., MooncakeTier]) -> None:
    tier = opened()
    hashes = [number.to_bytes(32, "big") for number in range(700)]
    assert tier.store([TierEntry(each, "someone", b"x" * 100) for each in hashes[:650]]).count == 650
    assert tier.query(hashes) == 650
    assert [each.owner for each in tier.load(hashes[:20]) if each is not None] == ["someone"] * 20


def test_a_removed_block_is_not_stored_again_by_a_process_that_was_about_to(
    opened: Callable[..., MooncakeTier],
) -> None:
    clock = Clock()
    first, second = opened(clock=clock), opened()
    first.store(ENTRIES)
    assert first.remove(IDS[1:3]) == RemovalResult(2)
    assert second.query(IDS) == 1
    assert second.load(IDS) == [ENTRIES[0], None, None, *ENTRIES[3:]]
    assert second.store(ENTRIES[:3]).count == 1
    assert second.stats().skipped == {"removed meanwhile": 2}
    assert second.query(IDS) == 1
    clock.now += MARKED_SECONDS
    first.refresh()
    assert second.store(ENTRIES[:3]).count == 3
    assert second.query(IDS) == len(IDS)


def test_a_block_whose_bytes_alone_are_at_fault_may_be_stored_again(opened: Callable[..., MooncakeTier]) -> None:
    tier = opened()
    tier.store(ENTRIES[:1])
    assert tier.remove(IDS[:1], remember=False) == RemovalResult(1)
    assert tier.query(IDS[:1]) == 0
    assert tier.store(ENTRIES[:1]).count == 1


def test_clear_takes_what_all_processes_have_stored_of_this_model(opened: Callable[..., MooncakeTier]) -> None:
    clock = Clock()
    first, second, other = opened(clock=clock), opened(), opened(OTHER)
    second.store(ENTRIES[:3])
    other.store(entries(BLOCKS[:1], namespace=OTHER))
    assert first.clear() == RemovalResult(3)
    assert (second.query(IDS), other.query(IDS)) == (0, 1)
    assert second.store(ENTRIES[:3]).count == 0
    clock.now += MARKED_SECONDS
    first.refresh()
    assert second.store(ENTRIES[:3]).count == 3


def test_markers_of_a_process_that_has_ended_are_taken_away_by_another(opened: Callable[..., MooncakeTier]) -> None:
    clock = Clock()
    first, second = opened(), opened(clock=clock)
    second.store(ENTRIES)
    assert first.clear() == RemovalResult(len(ENTRIES))
    assert second.store(ENTRIES).count == 0
    clock.now += 2 * MARKED_SECONDS
    second.refresh()  # in place of the first one, whose clock stands still
    assert second.store(ENTRIES).count == len(ENTRIES)


def test_many_blocks_are_removed_and_their_markers_taken_away(opened: Callable[..., MooncakeTier]) -> None:
    clock = Clock()
    tier = opened(clock=clock)
    many = [TierEntry(number.to_bytes(32, "big"), "", b"x") for number in range(1100)]
    assert tier.store(many).count == len(many)
    assert tier.remove([entry.block_hash for entry in many]) == RemovalResult(len(many))
    clock.now += MARKED_SECONDS
    tier.refresh()
    assert tier.store(many).count == len(many)


def test_what_has_no_room_goes_or_is_not_stored(opened: Callable[..., MooncakeTier]) -> None:
    tier = opened()
    blocks = [TierEntry(number.to_bytes(32, "big"), "", bytes(2**20)) for number in range(200)]
    stored = sum(tier.store([block]).count for block in blocks)
    assert stored > 0
    assert stored + tier.stats().skipped.get("no room", 0) == len(blocks)


def test_a_frozen_master_costs_its_deadline_once_and_is_used_again(
    master: MooncakeMaster, opened: Callable[..., MooncakeTier]
) -> None:
    clock = Clock()
    tier = opened(clock=clock, answer_seconds=ANSWER_SECONDS)
    tier.store(ENTRIES)
    master.send(signal.SIGSTOP)
    try:
        eventually(lambda: tier.query(IDS) == 0)
        assert tier.stats().circuit is Circuit.OPEN
        assert tier.status(IDS[0]) is LookupStatus.MISS
        assert tier.load(IDS) == [None] * len(IDS)
        assert tier.store(ENTRIES).count == 0
        assert tier.stats().skipped == {"server not available": len(IDS)}
        assert tier.remove(IDS[:1]) == RemovalResult(0, 1, NOT_REACHED)
    finally:
        master.send(signal.SIGCONT)
    comes_back(tier, clock)
    assert tier.load(IDS[:2]) == [None, ENTRIES[1]]


def test_a_restarted_master_has_lost_the_blocks_and_takes_them_again(
    master: MooncakeMaster, opened: Callable[..., MooncakeTier]
) -> None:
    clock = Clock()
    tier = opened(clock=clock, answer_seconds=ANSWER_SECONDS)
    tier.store(ENTRIES)
    master.kill()
    eventually(lambda: tier.query(IDS) == 0)
    assert tier.stats().circuit is Circuit.OPEN
    master.start()

    def is_stored() -> bool:
        comes_back(tier, clock)
        return tier.store(ENTRIES).count == len(IDS)

    eventually(is_stored)  # once the client has given its memory to the new master
    assert tier.load(IDS) == ENTRIES


def test_a_master_that_comes_later_is_used_then() -> None:
    clock, late = Clock(), MooncakeMaster()
    tier = MooncakeTier(late.address, GIVEN, namespace=NAMESPACE, clock=clock).connect()
    assert (tier.query(IDS), tier.stats().circuit) == (0, Circuit.OPEN)
    late.start()
    try:
        comes_back(tier, clock)
        assert tier.store(ENTRIES).count == len(IDS)
    finally:
        tier.close()
        late.kill()


def test_floors_and_quotas_are_refused() -> None:
    spec = TierSpec("remote", GIVEN, server=ServerAddress("mooncake://127.0.0.1:1"))
    with pytest.raises(ConfigError, match="floors or quotas under 'remote'"):
        spec.open(NAMESPACE, LRU, {"someone": Share(1)})

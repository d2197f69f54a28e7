"""Lower tiers: what they keep, how long they take, and when they are worth it."""

from typing import Any

import pytest

from emberkv.core.loading import LoadChoice
from emberkv.core.policies.eviction import LRU
from emberkv.errors import ConfigError
from emberkv.sim.build import root_of
from emberkv.sim.outcome import CacheEvent
from emberkv.sim.tiers import Channel, ModelledTier
from emberkv.workload.request import Request
from tests.sim.build import Ran, config, run, single, turn
from tests.workload.build import span

MS = 1_000_000
FAST = {"name": "ram", "capacity": 1000, "read_gb_per_s": 1e-5, "write_gb_per_s": 1.0}
"""A block has 10 bytes and is read in 1 ms; computing it takes 10."""


def requests() -> list[Request]:
    """A prompt, another that drives it out of a pool of 12 blocks, and the first again, twice."""
    head = span("head", 100)
    return [
        single("first", 101, 1, head),
        single("other", 110, 1, at=10),
        single("again", 101, 1, head, at=20),
        single("other2", 110, 1, at=30),
        single("more", 101, 1, head, at=40),
    ]


def with_tiers(*tiers: dict[str, Any], **changes: Any) -> Ran:
    return run(requests(), kv_blocks=12, tiers=list(tiers), **changes)


def choices(ran: Ran) -> dict[LoadChoice, int]:
    return dict(ran.simulator.replicas[0].scheduler.stats.load_choices)


def test_without_tiers_what_was_driven_out_is_computed_again() -> None:
    ran = with_tiers()
    assert ran.cached("again") == (10, 91), "of the 12 blocks, the other prompt left one"


def test_what_left_the_pool_comes_back_from_a_tier() -> None:
    ran = with_tiers(FAST)
    outcome = ran.outcomes["again"]
    assert (ran.cached("again"), outcome.tier_tokens) == ((100, 1), {"ram": 90})
    assert outcome.event is CacheEvent.FULL_HIT_NO_PREFILL_NEEDED
    assert outcome.first_token == (20_000 + 9 * 1 + 1) * MS, "9 blocks loaded, then a token computed"
    assert choices(ran)[LoadChoice.LOAD] == 2
    ran.check_idle()


def test_a_load_that_takes_longer_than_computing_is_not_made_twice() -> None:
    slow = {**FAST, "read_gb_per_s": 1e-7}
    ran = with_tiers(slow)
    assert choices(ran)[LoadChoice.LOAD] == 1, "the first one measures it"
    assert choices(ran)[LoadChoice.RECOMPUTE_CHEAPER] == 1
    assert ran.cached("more") == (10, 91)


def test_a_load_is_given_up_when_computing_would_have_been_as_fast() -> None:
    """Nine blocks at 20 ms: after 90 ms, four have come."""
    ran = with_tiers({**FAST, "read_gb_per_s": 5e-7})
    assert (ran.cached("again"), ran.outcomes["again"].tier_tokens) == ((50, 51), {"ram": 40})
    assert ran.outcomes["again"].first_token == (20_000 + 90 + 51) * MS


def test_a_tier_evicts_when_it_is_full() -> None:
    ran = with_tiers({**FAST, "capacity": 50})
    (tier,) = ran.simulator.replicas[0].lower.tiers  # type: ignore[union-attr]  # there is one
    assert tier.stored_bytes == 50
    assert tier.evictions > 0
    assert ran.cached("again") == (10, 91), "the five blocks that are left are the other prompt's"


def test_the_faster_of_two_tiers_has_what_came_from_the_slower() -> None:
    disk = {**FAST, "name": "disk", "read_gb_per_s": 5e-6}
    ran = run(requests()[:3], kv_blocks=12, tiers=[{**FAST, "capacity": 110}, disk])
    again = ran.outcomes["again"]
    assert again.tier_tokens == {"disk": 90}
    ram, _ = ran.simulator.replicas[0].lower.tiers  # type: ignore[union-attr]  # there are two
    ram.apply_writes(21_000 * MS)
    block_hashes = again.request.chain(root_of(config(), 10)(again.request), 10).block_hashes
    assert ram.lookup(block_hashes[1:]) == 9


def test_who_needs_the_same_blocks_waits_for_one_load() -> None:
    head = span("head", 100)
    twice = [single(name, 101, 1, head, at=20) for name in ("a", "b")]
    ran = run([requests()[0], single("other", 225, 1, at=10), *twice], kv_blocks=24, tiers=[FAST])
    assert choices(ran) == {LoadChoice.ABSENT: 2, LoadChoice.LOAD: 1, LoadChoice.SHARED: 1}
    assert [ran.outcomes[name].tier_tokens for name in ("a", "b")] == [{"ram": 90}] * 2


def test_others_are_served_while_a_load_is_under_way() -> None:
    slow = {**FAST, "read_gb_per_s": 5e-7}
    ran = run([*requests()[:3], single("quick", 10, 1, at=20.01)], kv_blocks=14, tiers=[slow])
    quick, again = ran.outcomes["quick"], ran.outcomes["again"]
    assert quick.first_token == 20_020 * MS
    assert again.first_token is not None
    assert again.first_token > quick.first_token


@pytest.mark.parametrize(("keeps", "cached"), [(True, 100), (False, 0)])
def test_a_tier_may_outlive_its_replica(keeps: bool, cached: int) -> None:
    outage = {"replica": 0, "at": 5.0, "down_for": 1.0}
    head = span("head", 100)
    pair = [single("first", 101, 1, head), single("again", 101, 1, head, at=10)]
    ran = run(pair, tiers=[{**FAST, "keeps": keeps}], outages=[outage])
    assert ran.cached("again")[0] == cached


def test_a_shared_tier_serves_every_replica() -> None:
    head = span("head", 100)
    pair = [single("first", 101, 1, head), single("again", 101, 1, head, at=10)]
    how: dict[str, Any] = {"replicas": 2, "routing": "round-robin"}
    assert run(pair, tiers=[FAST], **how).cached("again") == (0, 101)
    assert run(pair, tiers=[{**FAST, "shared": True}], **how).cached("again") == (100, 1)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_request_goes_to_the_replica_whose_tier_has_its_prefix(keeps: bool) -> None:
    """Replica 0's pool has lost the prefix; its tier has it, and loses it with the replica unless it keeps it."""
    head = span("head", 100)
    first = [single("first", 101, 1, head), single("big", 189, 1, at=10)]
    where = {"replicas": 2, "kv_blocks": 19, "tiers": [{**FAST, "keeps": keeps}]}
    placed = run(first, **where).outcomes
    home = placed["first"].replica
    assert home is not None
    lost = [{"replica": home, "at": 15.0, "down_for": 1.0}]
    ran = run([*first, single("again", 101, 1, head, at=20)], outages=lost, **where)
    assert ran.cached("again")[0] == (100 if keeps else 0)
    if keeps:
        assert ran.outcomes["again"].replica == home


def test_sessions_come_back_from_a_tier() -> None:
    ran = run([turn("s", 0, 100, 50), single("big", 189, 1, at=10), turn("s", 1, 170, 5, at=20)],
              kv_blocks=19, tiers=[FAST])  # fmt: skip
    assert (ran.cached("s.1"), ran.outcomes["s.1"].tier_tokens) == ((150, 20), {"ram": 150})
    assert ran.outcomes["s.1"].event is CacheEvent.CONVERSATIONAL_HIT


def tier(capacity: int) -> ModelledTier:
    return ModelledTier("t", capacity, 10, LRU(), read=Channel(1.0, 0.0), write=Channel(10.0, 0.0))


def test_a_block_is_found_once_it_is_written() -> None:
    one = tier(4)
    one.offload(b"a", True, 0)
    one.apply_writes(999 * MS)
    assert one.lookup([b"a"]) == 0
    one.apply_writes(1000 * MS)
    assert one.lookup([b"a"]) == 1


def test_offers_beyond_the_queue_are_skipped() -> None:
    one = tier(4)
    for name in (b"a", b"b", b"c"):
        one.offload(name, True, 0)
    one.apply_writes(10_000 * MS)
    assert (one.lookup([b"a", b"b", b"c"]), one.skipped) == (2, 1)


def test_exact_blocks_take_the_place_of_others() -> None:
    one = tier(4)
    one.offload(b"a", False, 0)
    one.apply_writes(1000 * MS)
    assert (one.lookup([b"a"], exact=True), one.lookup([b"a"])) == (0, 1)
    one.offload(b"a", True, 1000 * MS)
    one.apply_writes(2000 * MS)
    assert one.lookup([b"a"], exact=True) == 1


def test_a_tier_whose_rates_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="tier 'tape' needs read_gb_per_s and write_gb_per_s"):
        run([], tiers=[{"name": "tape", "capacity": 1000}])


def test_a_conversation_that_moves_finds_in_a_shared_tier_what_the_lost_replica_had_computed() -> None:
    head = span("head", 100)
    pair = [single("a", 101, 1, head), single("b", 101, 1, head, at=2)]
    lost = {"replicas": 2, "routing": "least-loaded", "outages": [{"replica": 0, "at": 1.0}]}
    without, own, shared = (run(pair, **lost, tiers=each) for each in ([], [FAST], [{**FAST, "shared": True}]))
    assert [ran.outcomes["b"].replica for ran in (without, own, shared)] == [1, 1, 1]
    assert (without.cached("b"), own.cached("b")) == ((0, 101), (0, 101))
    assert (shared.cached("b"), shared.outcomes["b"].tier_tokens) == ((100, 1), {"ram": 100})
    assert shared.outcomes["b"].first_token == (2_000 + 10 * 1 + 1) * MS, "10 blocks loaded, then a token computed"

"""The loop above tiers: what is loaded is right, no request waits in vain, and no failure below ends a request."""

import threading
from collections.abc import Callable, Sequence

import pytest

from emberkv.core.loading import BlockRun, LookupStatus, PendingLookup
from emberkv.core.sequence import FinishReason
from emberkv.engine.commands import Remove, Statistics
from emberkv.engine.request import CacheUsage
from emberkv.engine.tier_link import FIRST_LOAD_SECONDS
from emberkv.tiers.memory import MemoryTier
from tests.engine.loop_harness import running
from tests.engine.tier_harness import GatedTier, TieredHarness
from tests.waiting import DEADLINE

PROMPT = range(2, 22)  # 20 tokens, of which 4 blocks of 4 can be reused
OTHER = range(30, 42)


def stocked(tier: GatedTier | None = None, clock: Callable[[], float] = lambda: 0.0) -> TieredHarness:
    harness = TieredHarness(tier, clock=clock)
    harness.stock(PROMPT)
    return harness


def answer(prompt: range) -> list[int]:
    with running(TieredHarness()) as harness:
        return harness.ask("cold", prompt).tokens


def test_what_an_earlier_process_left_is_loaded() -> None:
    with running(stocked()) as harness:
        inbox = harness.ask("a", PROMPT)
    assert {output.usage for output in inbox.outputs} == {CacheUsage(20, 16, 4, {"ram": 16})}
    assert inbox.tokens == answer(PROMPT)
    stats = harness.loop.stats()
    assert (harness.executor.prefilled["a"], stats.loaded_blocks, stats.unloaded_blocks) == (4, 4, 0)
    assert (dict(stats.tier_hit_tokens), dict(stats.load_choices)) == ({"ram": 16}, {"load": 1})
    assert (stats.tiers["ram"].loads, dict(stats.transfer_errors)) == (4, {})


def test_what_is_computed_goes_down() -> None:
    with running(TieredHarness()) as harness:
        first = harness.ask("a", PROMPT, new=5)
        assert harness.stack.flush(DEADLINE)
    chain = harness.chain([*PROMPT, *first.tokens])
    assert harness.tier.lookup(chain.block_hashes) == 6
    stats = harness.loop.stats()
    assert stats.stack is not None
    assert (stats.stack.offered, stats.tiers["ram"].stores) == (6, 6)


def test_exact_mode_offers_and_loads_exact_blocks_only() -> None:
    with running(TieredHarness(exact=True)) as harness:
        harness.stock(OTHER, exact=False)
        first = harness.ask("a", PROMPT, new=5)
        other = harness.ask("b", OTHER)
        assert harness.stack.flush(DEADLINE)
    chain = harness.chain([*PROMPT, *first.tokens])
    assert harness.tier.lookup(chain.block_hashes) == 5
    assert other.outputs[0].usage == CacheUsage(12, 0, 12)


def test_others_are_served_while_one_waits_for_a_load() -> None:
    tier = GatedTier()
    with running(stocked(tier=tier)) as harness:
        tier.gate.clear()
        waits = harness.submit("waits", PROMPT, new=2)
        assert tier.entered.wait(DEADLINE)
        assert harness.ask("other", OTHER).tokens == answer(OTHER)
        assert waits.outputs == []
        assert harness.loop.stats().loads == 1
        tier.gate.set()
        assert waits.wait().usage == CacheUsage(20, 16, 4, {"ram": 16})


def test_the_loop_sleeps_while_there_is_nothing_but_a_load() -> None:
    ticks = [0.0]

    def clock() -> float:
        ticks[0] += 1
        return 0.0

    tier = GatedTier()
    with running(stocked(tier=tier, clock=clock)) as harness:
        tier.gate.clear()
        waits = harness.submit("waits", PROMPT, new=2)
        assert tier.entered.wait(DEADLINE)
        harness.loop.execute(Statistics()).result(DEADLINE)
        before = ticks[0]
        threading.Event().wait(0.1)  # time in which a loop that spins would look at its clock thousands of times
        harness.loop.execute(Statistics()).result(DEADLINE)
        assert ticks[0] - before <= 10
        tier.gate.set()
        assert waits.reason is FinishReason.LENGTH


def test_concurrent_requests_share_a_load() -> None:
    tier = GatedTier()
    with running(stocked(tier=tier)) as harness:
        tier.gate.clear()
        inboxes = [harness.submit(str(number), PROMPT) for number in range(3)]
        assert tier.entered.wait(DEADLINE)
        harness.loop.execute(Statistics()).result(DEADLINE)
        tier.gate.set()
        assert {inbox.wait().usage for inbox in inboxes} == {CacheUsage(20, 16, 4, {"ram": 16})}
    stats = harness.loop.stats()
    assert (dict(stats.load_choices), stats.loaded_blocks, tier.loads) == ({"load": 1, "shared": 2}, 4, 1)


def test_an_abort_while_loading_ends_the_request_at_once() -> None:
    tier = GatedTier()
    with running(stocked(tier=tier)) as harness:
        tier.gate.clear()
        waits = harness.submit("waits", PROMPT, new=2)
        assert tier.entered.wait(DEADLINE)
        harness.loop.abort("waits")
        assert waits.reason is FinishReason.ABORT
        tier.gate.set()
        assert harness.ask("again", PROMPT).wait().usage in (
            CacheUsage(20, 16, 4, {"ram": 16}),  # it came too soon, and waited for the same load
            CacheUsage(20, 16, 4),
        )
    assert harness.loop.stats().loaded_blocks == 4


def test_stopping_while_loading_ends_the_request() -> None:
    tier = GatedTier()
    with running(stocked(tier=tier)) as harness:
        tier.gate.clear()
        waits = harness.submit("waits", PROMPT, new=2)
        assert tier.entered.wait(DEADLINE)
        harness.loop.stop()
        assert waits.reason is FinishReason.ABORT
        tier.gate.set()


def test_patience_ends_with_what_computing_would_have_taken() -> None:
    now = [0.0]
    tier = GatedTier()
    harness = stocked(tier=tier, clock=lambda: now[0])
    harness.link.computed(16, 1.0)  # 16 tokens a second
    with running(harness):
        tier.gate.clear()
        waits = harness.submit("waits", PROMPT, new=2)
        assert tier.entered.wait(DEADLINE)
        now[0] = 0.9
        harness.loop.execute(Statistics()).result(DEADLINE)
        assert waits.outputs == []
        now[0] = 1.1
        harness.loop.execute(Statistics()).result(DEADLINE)
        assert waits.wait().usage == CacheUsage(20, 0, 20)
        tier.gate.set()
    stats = harness.loop.stats()
    assert (stats.unloaded_blocks, dict(stats.transfer_errors)) == (4, {"timeout": 1})
    assert waits.tokens == answer(PROMPT)


def test_a_load_whose_time_is_not_known_has_a_deadline_too_and_so_have_those_who_share_it() -> None:
    """A tier that does not answer costs each prompt one wait; later ones do not even search it until it answers."""
    now = [0.0]
    tier = GatedTier()
    with running(stocked(tier=tier, clock=lambda: now[0])) as harness:
        tier.gate.clear()
        waits = [harness.submit(str(number), PROMPT, new=2) for number in range(2)]
        assert tier.entered.wait(DEADLINE)
        harness.loop.execute(Statistics()).result(DEADLINE)
        now[0] = FIRST_LOAD_SECONDS + 0.1
        harness.loop.execute(Statistics()).result(DEADLINE)
        assert [inbox.reason for inbox in waits] == [FinishReason.LENGTH] * 2
        harness.loop.execute(Remove(None, tiers=False)).result(DEADLINE)
        assert harness.ask("later", PROMPT).outputs[0].usage == CacheUsage(20, 0, 20)
        stats = harness.loop.stats()
        assert (stats.loads, dict(stats.transfer_errors), tier.loads) == (0, {"timeout": 1}, 1)
        assert dict(stats.tiers["ram"].errors) == {"stalled": 1}
        tier.gate.set()


def test_computing_is_chosen_where_it_is_known_to_be_faster() -> None:
    with running(stocked()) as harness:  # whose clock stands still: computing takes no time
        harness.ask("measures", PROMPT)
        harness.loop.execute(Remove(None, tiers=False)).result(DEADLINE)
        assert harness.ask("knows", PROMPT).outputs[0].usage == CacheUsage(20, 0, 20)
    assert dict(harness.loop.stats().load_choices) == {"load": 1, "recompute_cheaper": 1}


@pytest.mark.parametrize("payload", [b"too short", bytes(64)])
def test_a_block_of_another_size_is_computed(payload: bytes) -> None:
    harness = TieredHarness()
    harness.stock(PROMPT, payload=payload)
    with running(harness):
        inbox = harness.ask("a", PROMPT)
    assert (inbox.outputs[0].usage, inbox.tokens) == (CacheUsage(20, 0, 20), answer(PROMPT))
    assert dict(harness.loop.stats().transfer_errors) == {"size": 1}


def test_without_memory_to_copy_requests_go_on() -> None:
    harness = stocked()
    harness.bytes.failing = True
    with running(harness):
        inbox = harness.ask("a", PROMPT, new=5)
    assert (inbox.reason, inbox.outputs[0].usage) == (FinishReason.LENGTH, CacheUsage(20, 0, 20))
    assert harness.loop.stats().transfer_errors["memory"] > 1


def test_what_is_cleared_while_it_loads_does_not_come_back() -> None:
    tier = GatedTier()
    with running(stocked(tier=tier)) as harness:
        tier.gate.clear()
        waits = harness.submit("waits", PROMPT, new=2)
        assert tier.entered.wait(DEADLINE)
        harness.loop.execute(Remove(None, tiers=False)).result(DEADLINE)
        tier.gate.set()
        assert waits.wait().usage == CacheUsage(20, 0, 20)
    assert harness.loop.stats().unloaded_blocks == 4


class RemoteTier(GatedTier):
    """A tier that only `query` looks into, and that answers while the gate is open."""

    lookup_seconds = 1.0

    def lookup(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        return 0

    def status(self, block_hash: bytes, *, exact: bool = False) -> LookupStatus:
        return LookupStatus.PENDING

    def query(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        self.entered.set()
        assert self.gate.wait(DEADLINE)
        return MemoryTier.lookup(self, block_hashes, exact=exact)


def remote(clock: Callable[[], float] = lambda: 0.0) -> tuple[TieredHarness, RemoteTier]:
    tier = RemoteTier("remote")
    return stocked(tier=tier, clock=clock), tier


def test_a_tier_that_answers_later_is_waited_for_and_loaded_from() -> None:
    harness, tier = remote()
    with running(harness):
        tier.gate.clear()
        waits = harness.submit("waits", PROMPT, new=2)
        assert tier.entered.wait(DEADLINE)
        assert waits.outputs == []
        tier.gate.set()
        assert waits.wait().usage == CacheUsage(20, 16, 4, {"remote": 16})
    assert dict(harness.loop.stats().load_choices) == {"load": 1}


def test_a_tier_that_does_not_answer_in_time_is_a_miss() -> None:
    now = [0.0]
    harness, tier = remote(lambda: now[0])
    with running(harness):
        tier.gate.clear()
        waits = harness.submit("waits", PROMPT, new=2)
        assert tier.entered.wait(DEADLINE)
        now[0] = 1.0
        harness.link.on_ended()
        assert waits.wait().usage == CacheUsage(20, 0, 20)
        other = harness.ask("other", PROMPT[:8])  # the tier is not asked before it has answered
        assert other.reason is FinishReason.LENGTH
        tier.gate.set()
    stats = harness.loop.stats()
    assert (dict(stats.transfer_errors), stats.tiers["remote"].errors) == ({"lookup": 1}, {"stalled": 1})


@pytest.mark.parametrize(("answered", "deadline"), [(True, False), (True, True), (False, True), (False, False)])
def test_a_look_up_ends_with_the_answer_or_at_its_deadline(answered: bool, deadline: bool) -> None:
    now = [0.0]
    harness, tier = remote(lambda: now[0])
    link = harness.link
    lookup = PendingLookup(harness.chain(PROMPT), 0, 4, exact=False, break_even_seconds=0.5)
    tier.gate.clear()
    link.look_up(lookup)
    assert (link.has_ended, link.seconds_left, link.looked_up()) == (False, 0.5, [])
    if answered:
        arrived = threading.Event()
        link.on_ended = arrived.set
        tier.gate.set()
        assert arrived.wait(DEADLINE)
    if deadline:
        now[0] = 0.5
    ended = answered or deadline
    assert (link.has_ended, link.looked_up()) == (ended, [lookup] if ended else [])
    assert link.looked_up() == []
    assert dict(link.errors) == ({"lookup": 1} if deadline and not answered else {})
    assert link.find(lookup.block_hashes, exact=False) == ([BlockRun("remote", 4, None)] if answered else [])
    tier.gate.set()
    assert harness.stack.close(DEADLINE)
    assert link.looked_up() == ([] if ended else [lookup])

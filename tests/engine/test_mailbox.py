"""Commands to the engine's thread and news from it: done between steps, answered once, dropped when it stops."""

import threading
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import pytest

from emberkv.core.events import AllBlocksCleared, BlockStored
from emberkv.core.feed import EventBatch
from emberkv.core.hashing import PUBLIC_OWNER, BlockHash, PublicPrefixes
from emberkv.core.policies.eviction import LRU
from emberkv.core.policies.retention import Retaining
from emberkv.core.sequence import FinishReason
from emberkv.engine.commands import CacheControl, Command, FindCached, ReadEvents, ReadSnapshot, Remove, Statistics
from emberkv.engine.loop import CacheUpdate
from emberkv.engine.mailbox import Mail, Mailbox
from emberkv.engine.request import GenerationRequest, SamplingParams
from emberkv.errors import EngineStoppedError
from tests.engine.loop_harness import BLOCK, Harness, Inbox, running
from tests.waiting import DEADLINE

R = TypeVar("R")

PROMPT = range(2, 22)
PARAMS = SamplingParams(max_tokens=1, temperature=0.0)


class Watched(CacheControl):
    """Remembers on which threads commands were carried out; fails with `FindCached`."""

    threads: ClassVar[list[str]]

    def execute(self, command: Command[R]) -> R:
        self.threads.append(threading.current_thread().name)
        if isinstance(command, FindCached):
            raise ValueError("for the test")
        return super().execute(command)


@pytest.fixture
def threads() -> list[str]:
    Watched.threads = []
    return Watched.threads


def test_a_command_is_carried_out_on_the_engines_thread(threads: list[str]) -> None:
    with running(Harness(control=Watched)) as harness:
        harness.submit("a", PROMPT).wait()
        assert harness.loop.execute(Statistics()).result(DEADLINE).cached == 5
    assert threads == ["emberkv-engine"]


def test_a_command_that_fails_ends_no_request(threads: list[str]) -> None:
    with running(Harness(control=Watched)) as harness:
        inbox = harness.submit("a", PROMPT, new=30)
        failed = harness.loop.execute(FindCached([]))
        with pytest.raises(ValueError, match="for the test"):
            failed.result(DEADLINE)
        assert inbox.reason is FinishReason.LENGTH


def test_a_cancelled_command_is_not_carried_out(threads: list[str]) -> None:
    harness = Harness(control=Watched)
    assert harness.loop.execute(FindCached([])).cancel()
    with running(harness):
        harness.loop.execute(Statistics()).result(DEADLINE)
    assert len(threads) == 1


def test_a_command_that_comes_too_late_fails() -> None:
    harness = Harness()
    waits = harness.loop.execute(Statistics())
    harness.loop.stop()
    with pytest.raises(EngineStoppedError, match="has stopped"):
        waits.result(DEADLINE)
    with pytest.raises(EngineStoppedError, match="is stopping"):
        harness.loop.execute(Statistics())


def test_a_reader_follows_the_pool_by_commands() -> None:
    with running(Harness()) as harness:
        harness.submit("a", PROMPT, new=1).wait()
        events = harness.loop.execute(ReadEvents(2)).result(DEADLINE)
        chunk = harness.loop.execute(ReadSnapshot(limit=4, tokens=True)).result(DEADLINE)
    assert isinstance(events, EventBatch)
    assert (events.first, events.last) == (3, 5)
    assert (chunk.sequence, len(chunk.block_hashes), len(chunk.tokens)) == (5, 4, 4)
    assert chunk.next_cursor is not None


def test_a_nudge_that_comes_before_the_wait_ends_it() -> None:
    mailbox = Mailbox()
    mailbox.wake()
    assert mailbox.collect(None) == Mail()  # without `wake`, this would wait for ever
    mailbox.abort("unknown")
    assert mailbox.collect(0.0) == Mail()
    mailbox.stop()
    assert mailbox.collect(None) is None


def test_watchers_get_what_changed_with_who_was_admitted() -> None:
    updates: list[CacheUpdate] = []
    seen: list[tuple[str, int, int]] = []

    def watch(each: CacheUpdate) -> None:
        updates.append(each)
        for sequence in each.admitted:
            assert sequence.admission is not None
            seen.append((sequence.request_id, sequence.cached_tokens, sequence.admission.partial_tokens))

    harness = Harness()
    harness.loop.on_update(watch)
    with running(harness):
        for name in "ab":
            harness.submit(name, PROMPT, new=1).wait()
        harness.loop.execute(Remove(None)).result(DEADLINE)
        harness.loop.execute(Statistics()).result(DEADLINE)
    assert seen == [("a", 0, 4), ("b", 16, 4)]
    events = [event for each in updates for event in each.events]
    assert [type(event) for event in events] == [BlockStored] * 5 + [AllBlocksCleared]
    assert {(each.time, each.missed) for each in updates} == {(1000.0, False)}


def test_a_watcher_that_fails_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Sequence[object]] = []

    def fails(each: CacheUpdate) -> None:
        calls.append(each.events)
        raise ValueError("not our problem")

    harness = Harness()
    harness.loop.on_update(fails)
    with running(harness):
        assert harness.submit("a", PROMPT, new=30).reason is FinishReason.LENGTH
    assert len(calls) == 1
    (record,) = caplog.records
    assert record.getMessage().endswith(f"is not called again: {__name__}.{fails.__qualname__}")
    assert record.exc_info is not None


def test_public_blocks_are_shared_by_tenants_and_the_rest_is_not() -> None:
    harness = Harness(public=PublicPrefixes([list(PROMPT)[:9]], BLOCK))
    with running(harness):
        hits: list[int] = []
        for tenant in ("ann", "bob", "ann"):
            inbox = Inbox()
            request = GenerationRequest(f"{len(hits)}", list(PROMPT), PARAMS, tenant.encode(), tenant=tenant)
            harness.loop.submit(request, inbox)
            usage = inbox.wait().usage
            assert usage is not None
            hits.append(usage.cached_tokens)
    assert hits == [0, 8, 16]
    chain = harness.loop.chain(GenerationRequest("x", list(PROMPT), PARAMS, b"ann", tenant="ann"))
    assert [chain.owner(index) for index in range(3)] == [PUBLIC_OWNER, PUBLIC_OWNER, "ann"]
    block = harness.pool.lookup(chain.block_hashes[2])
    assert block is not None
    assert block.owner == "ann"


def test_what_a_request_retains_outlives_others_until_its_time() -> None:
    now = [0.0]
    retaining: Retaining[BlockHash] = Retaining(LRU(), max_bytes=100)
    harness = Harness(policy=retaining, clock=lambda: now[0])
    request = GenerationRequest("a", list(PROMPT), PARAMS, retain_tokens=10, retain_seconds=60)
    chain = harness.loop.chain(request)
    with running(harness):
        inbox = Inbox()
        harness.loop.submit(request, inbox)
        inbox.wait()
        assert [retaining.is_retained(block_hash) for block_hash in chain.block_hashes] == [
            True,
            True,
            False,
            False,
            False,
        ]
        now[0] = 61.0
        harness.submit("b", [40], new=1).wait()
        assert not any(map(retaining.is_retained, chain.block_hashes))

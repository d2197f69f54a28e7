"""Events: their numbers, their order, and that a reader which follows them knows what the pool has."""

from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.core.block import Block
from emberkv.core.block_pool import BlockPool
from emberkv.core.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventLog
from tests.core.harness import chain, store
from tests.core.mirror import Mirror

AB = chain(range(8))
FIRST, SECOND = AB.block_hashes


def events_of(pool: BlockPool) -> list[Event]:
    events = pool.events.since(0)
    assert events is not None
    assert len(events) == pool.events.last_sequence
    return list(events)


def test_numbers_start_at_one_and_have_no_gaps() -> None:
    log = EventLog()
    assert (log.last_sequence, log.since(0)) == (0, [])
    log.append(AllBlocksCleared())
    log.append(BlockRemoved((b"a",)))
    assert log.since(0) == [AllBlocksCleared(), BlockRemoved((b"a",))]
    assert log.since(1) == [BlockRemoved((b"a",))]
    assert log.since(2) == []


def test_a_log_without_room_gets_no_event_of_a_block() -> None:
    pool = BlockPool(2, 4, events=EventLog(capacity=0))
    for tokens in (range(8), range(8, 16)):
        pool.free(store(pool, chain(tokens)))
    assert (pool.stats.committed_blocks, pool.stats.evicted_blocks, pool.events.last_sequence) == (4, 2, 0)


def test_a_reader_that_fell_behind_is_told() -> None:
    log = EventLog(capacity=2)
    for _ in range(3):
        log.append(AllBlocksCleared())
    assert log.since(0) is None
    assert log.since(1) == [AllBlocksCleared(), AllBlocksCleared()]


def test_a_log_that_requires_a_snapshot_has_lost_what_was_before() -> None:
    log = EventLog()
    log.append(AllBlocksCleared())
    log.require_snapshot()
    assert (log.since(0), log.since(1), log.since(2), log.oldest_sequence) == (None, None, [], 3)
    log.append(AllBlocksCleared("ram"))
    assert log.since(2) == [AllBlocksCleared("ram")]


def test_a_reader_from_another_life_is_told() -> None:
    assert EventLog().since(7) is None


def test_a_blocks_life_in_events() -> None:
    pool = BlockPool(2, 4)
    pool.free(store(pool, AB))
    pool.allocate(1)
    pool.clear()
    assert events_of(pool) == [
        BlockStored((FIRST,), AB.root, (AB.block_tokens(0),), 4),
        BlockStored((SECOND,), FIRST, (AB.block_tokens(1),), 4),
        BlockRemoved((SECOND,)),
        AllBlocksCleared(),
    ]


def test_blocks_evicted_together_are_one_event() -> None:
    pool = BlockPool(2, 4)
    pool.free(store(pool, AB))
    pool.allocate(2)
    assert events_of(pool)[2:] == [BlockRemoved((SECOND, FIRST))]


def test_duplicates_and_replacements_are_no_news() -> None:
    pool = BlockPool(6, 4)
    store(pool, AB, exact=False)
    store(pool, AB, exact=False)
    store(pool, AB, exact=True)
    assert (pool.stats.duplicate_blocks, pool.stats.replaced_blocks) == (2, 2)
    assert pool.events.last_sequence == 2


def test_a_snapshot_names_parents_and_its_event() -> None:
    pool = BlockPool(4, 4)
    store(pool, AB)
    snapshot = pool.snapshot()
    assert (snapshot.sequence, snapshot.parents) == (2, {FIRST: AB.root, SECOND: FIRST})


OPERATIONS = st.tuples(st.sampled_from(["store", "store", "store", "free", "clear"]), st.integers(0, 63))


@settings(deadline=None, derandomize=True)
@given(operations=st.lists(OPERATIONS, max_size=40), start=st.integers(0, 40))
def test_a_reader_reconciles_from_any_snapshot(operations: list[tuple[str, int]], start: int) -> None:
    pool = BlockPool(6, 1)
    held: list[list[Block]] = []
    readers = [Mirror(pool)]
    for index, (verb, number) in enumerate(operations):
        if index == start:
            readers.append(Mirror(pool))
        tokens = chain([int(digit) for digit in f"{number:06b}"[: 1 + number % 5]], block_size=1)
        if verb == "store" and pool.num_free >= len(tokens):
            held.append(store(pool, tokens, exact=bool(number % 2)))
        elif verb == "free" and held:
            pool.free(held.pop(number % len(held)))
        elif verb == "clear" and number < 8:
            pool.clear()
        pool.check_integrity(held)
        for reader in readers:
            reader.follow()
            assert reader.parents == pool.snapshot().parents

"""A pool's feed: batches can be asked for again while the log keeps them, snapshots come in chunks."""

from emberkv.core.block_pool import BlockPool
from emberkv.core.events import EventLog
from emberkv.core.feed import MAX_SNAPSHOTS, CacheFeed, EventBatch, EventsLost, SnapshotChunk
from tests.core.harness import chain, store

ABCD = chain(range(16))


def stocked(capacity: int = 100) -> BlockPool:
    pool = BlockPool(6, 4, events=EventLog(capacity, epoch=b"first"))
    store(pool, ABCD)
    return pool


def test_events_come_in_batches_that_can_be_asked_for_again() -> None:
    feed = CacheFeed(stocked())
    first, rest = feed.events(0, limit=3), feed.events(3, limit=3)
    assert isinstance(first, EventBatch)
    assert isinstance(rest, EventBatch)
    assert [(each.epoch, each.first, each.last) for each in (first, rest)] == [(b"first", 1, 3), (b"first", 4, 4)]
    assert feed.events(0, limit=3) == first
    assert feed.events(4) == EventBatch(b"first", 5, [])


def test_events_that_are_not_kept_are_lost() -> None:
    feed = CacheFeed(stocked(capacity=2))
    assert feed.events(1) == EventsLost(b"first", 3, 4)
    assert feed.events(9) == EventsLost(b"first", 3, 4)
    batch = feed.events(2)
    assert isinstance(batch, EventBatch)
    assert batch.last == 4


def test_a_snapshot_comes_in_chunks() -> None:
    feed = CacheFeed(stocked())
    first = feed.snapshot(limit=3, tokens=True)
    assert first.next_cursor is not None
    second = feed.snapshot(first.next_cursor, limit=3)
    assert first.block_hashes + second.block_hashes == tuple(ABCD.block_hashes)
    assert first.parents == (ABCD.root, *ABCD.block_hashes[:2])
    assert first.tokens == tuple(ABCD.block_tokens(index) for index in range(3))
    assert (second.tokens, second.next_cursor, second.sequence) == ((), None, 4)


class Tiers:
    """Contents of the tiers below a pool."""

    def __init__(self, **blocks: list[bytes]) -> None:
        self.blocks = blocks

    def contents(self) -> dict[str, list[bytes]]:
        return {tier: list(blocks) for tier, blocks in self.blocks.items()}

    def tiers_of(self, block_hash: bytes) -> list[str]:
        return [tier for tier, blocks in self.blocks.items() if block_hash in blocks]


def test_a_snapshot_goes_on_with_the_tiers_below() -> None:
    hashes = ABCD.block_hashes
    tiers = Tiers(ram=hashes[:3], shared=[], disk=hashes[1:])
    feed = CacheFeed(stocked(), tiers)
    chunks = [feed.snapshot(limit=4, tokens=True)]
    while (cursor := chunks[-1].next_cursor) is not None:
        chunks.append(feed.snapshot(cursor, limit=2, tokens=True))
        tiers.blocks["disk"] = hashes[2:]
    assert [(chunk.tier, chunk.block_hashes) for chunk in chunks] == [
        ("pool", tuple(hashes)),
        ("ram", tuple(hashes[:2])),
        ("ram", (hashes[2],)),
        ("disk", (hashes[2],)),
        ("disk", (hashes[3],)),
    ]
    assert {(chunk.parents, chunk.tokens) for chunk in chunks[1:]} == {((), ())}


def test_a_chunk_has_what_is_there_when_it_is_taken() -> None:
    pool = stocked()
    feed = CacheFeed(pool)
    first = feed.snapshot(limit=2)
    pool.remove(ABCD.block_hashes[3:])
    second = feed.snapshot(first.next_cursor or "", limit=2)
    assert (second.block_hashes, second.sequence) == ((ABCD.block_hashes[2],), 5)


def test_a_cursor_that_is_not_known_begins_a_new_snapshot() -> None:
    feed = CacheFeed(stocked())
    begun = feed.snapshot(limit=1)
    for _ in range(MAX_SNAPSHOTS):
        feed.snapshot(limit=1)
    for cursor in (begun.next_cursor or "", "nonsense", "1.", "5.999", "5.0.999", "5.0.-1", "5.9.0", "9.0.\u0663"):
        chunk: SnapshotChunk = feed.snapshot(cursor, limit=100)
        assert (chunk.cursor, chunk.next_cursor, len(chunk.block_hashes)) == ("", None, 4)

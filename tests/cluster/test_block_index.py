"""The index agrees with sets of blocks by replica and tier, whatever events come."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from emberkv.cluster.block_index import AT_ONCE, BlockIndex
from emberkv.cluster.feed import FeedReader, ReplicaBlocks
from emberkv.core.events import POOL, AllBlocksCleared, BlockRemoved, BlockStored, Event
from emberkv.core.feed import EventBatch, SnapshotChunk

REPLICAS = 70
"""More than there are in one word of a row."""
SLOTS = [0, 1, 68, 69]
TIERS = [POOL, "ram", "disk"]
HASHES = [bytes([number]) * 32 for number in range(8)]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(SLOTS),
        st.sampled_from(TIERS),
        st.sampled_from(["store", "store", "remove", "clear", "forget"]),
        st.lists(st.sampled_from(HASHES), max_size=4, unique=True),
    ),
    max_size=30,
)
Held = dict[tuple[int, str], set[bytes]]


def stored(*block_hashes: bytes, tier: str = POOL) -> BlockStored:
    return BlockStored(block_hashes, bytes(32), (), 1, tier)


def apply(index: BlockIndex, held: Held, slot: int, tier: str, change: str, blocks: list[bytes]) -> None:
    event: Event = AllBlocksCleared(tier)
    if change == "store":
        held[slot, tier] |= set(blocks)
        event = stored(*blocks, tier=tier)
    elif change == "remove":
        held[slot, tier] -= set(blocks)
        event = BlockRemoved(tuple(blocks), tier=tier)
    elif change == "clear":
        held[slot, tier] = set()
    else:
        held.update({(slot, each): set() for each in TIERS})
        index.forget(slot)
        return
    index.apply(slot, event)


def counted(held: Held, slot: int, path: list[bytes]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for block_hash in path:
        tier = next((each for each in TIERS if block_hash in held[slot, each]), None)
        if tier is None:
            break
        counts[tier] = counts.get(tier, 0) + 1
    return counts


def nothing() -> Held:
    return {(slot, tier): set() for slot in SLOTS for tier in TIERS}


@given(CHANGES, st.lists(st.sampled_from(HASHES), max_size=6))
def test_matches_are_those_of_sets(changes: list[tuple[int, str, str, list[bytes]]], path: list[bytes]) -> None:
    index, held = BlockIndex(), nothing()
    for slot, tier, change, blocks in changes:
        apply(index, held, slot, tier, change, blocks)
    found = index.matches(path, REPLICAS)
    assert [found[slot] for slot in SLOTS] == [counted(held, slot, path) for slot in SLOTS]
    assert not any(found[slot] for slot in range(REPLICAS) if slot not in SLOTS)
    assert len(index) == len(set().union(*held.values()))


def test_long_chains_with_blocks_missing_anywhere_are_matched_while_the_table_grows() -> None:
    rng, index, held = Random(3), BlockIndex(), nothing()
    chains = [[rng.randbytes(32) for _ in range(3 * AT_ONCE)] for _ in range(12)]
    for number in range(400):
        blocks = chains[number % 12][: rng.randrange(3 * AT_ONCE)]
        change = rng.choice(["store", "store", "store", "remove", "clear"] if number % 40 else ["forget"])
        if change == "remove":
            blocks = rng.sample(blocks, min(3, len(blocks)))
        apply(index, held, rng.choice(SLOTS), rng.choice(TIERS), change, blocks)
    everything = set().union(*held.values())
    assert len(index) == len(everything) > 600, "the table has grown"
    for path in chains:
        found = index.matches(path, REPLICAS)
        assert [found[slot] for slot in SLOTS] == [counted(held, slot, path) for slot in SLOTS]


def test_what_one_replica_stored_in_the_shared_tier_all_have() -> None:
    index = BlockIndex()
    index.add(1, HASHES[:1])
    index.apply(1, stored(*HASHES[:3], tier="shared"))
    assert index.matches(HASHES, 3) == [{"shared": 3}, {POOL: 1, "shared": 2}, {"shared": 3}]
    index.forget(1)
    assert index.matches(HASHES, 1) == [{"shared": 3}], "it outlives the replica that stored it"
    index.apply(0, BlockRemoved((HASHES[1],), tier="shared"))
    assert index.matches(HASHES, 1) == [{"shared": 1}]


def test_a_row_takes_sixteen_bytes_and_at_least_three_of_ten_are_used() -> None:
    rng, index = Random(1), BlockIndex()
    for slot in range(64):
        index.add(slot, [rng.randbytes(32) for _ in range(100)])
    assert len(index) == 6400
    assert index.nbytes / len(index) <= 16 / 0.3


def test_a_gateway_that_comes_late_reads_every_tier_and_follows_it() -> None:
    index = BlockIndex()
    reader = FeedReader(ReplicaBlocks(index, 0))
    reader.take(SnapshotChunk(b"a", 7, "", "1.2", 1, tuple(HASHES[:2]), (bytes(32),) * 2))
    reader.take(EventBatch(b"a", 8, [BlockRemoved((HASHES[1],)), stored(HASHES[1], tier="ram")]))
    reader.take(SnapshotChunk(b"a", 9, "1.2", None, 1, (HASHES[2],), (bytes(32),), tier="disk"))
    assert (reader.exact, index.matches(HASHES, 1)) == (True, [{POOL: 1, "ram": 1, "disk": 1}])
    reader.take(EventBatch(b"b", 1, [stored(*HASHES[:2], tier="disk")]))
    assert (reader.exact, index.matches(HASHES, 1)) == (True, [{"disk": 2}]), "a restart: the disk's blocks are told"

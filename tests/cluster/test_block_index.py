"""The index agrees with sets of blocks by replica and tier, whatever events come."""

from hashlib import sha256
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from emberkv.cluster.block_index import AT_ONCE, STRIDE, BlockIndex
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


LONG = [number.to_bytes(4, "little") * 8 for number in Random(5).sample(range(1, 2**32), 1200)]
"""A chain that is sampled."""


@given(st.dictionaries(st.sampled_from(SLOTS), st.tuples(st.integers(0, 1200), st.integers(0, 1200))))
def test_a_long_chain_without_gaps_is_matched_by_a_part_of_its_blocks(ends: dict[int, tuple[int, int]]) -> None:
    index = BlockIndex()
    for slot, (pool, ram) in ends.items():
        index.add(slot, LONG[:pool])
        index.add(slot, LONG[:ram], "ram")
    found = index.matches(LONG, REPLICAS)
    for slot, (pool, ram) in ends.items():
        assert found[slot] == {tier: count for tier, count in ((POOL, pool), ("ram", ram - pool)) if count > 0}
    assert index.probes <= len(LONG) // STRIDE + 2 + STRIDE * 2 * len(ends)


@given(st.integers(1, 1200), st.lists(st.tuples(st.integers(0, 1199), st.integers(1, 40)), max_size=4))
def test_a_gap_in_a_long_chain_ends_the_hit_or_is_shorter_than_the_stride(
    length: int, gaps: list[tuple[int, int]]
) -> None:
    index = BlockIndex()
    index.add(0, LONG[:length])
    held = dict.fromkeys(range(length), True)
    for begin, count in gaps:
        index.remove(0, LONG[begin : begin + count])
        held.update(dict.fromkeys(range(begin, min(length, begin + count)), False))
    exact = next((depth for depth in range(length) if not held[depth]), length)
    missing = [depth for depth in range(length) if not any(held.get(each) for each in range(depth, depth + STRIDE))]
    found = index.matches(LONG, 1)[0].get(POOL, 0)
    assert exact <= found <= (missing[0] if missing else length)
    assert found == 0 or held[found - 1], "it ends behind a block that is there"


def test_what_one_replica_stored_in_a_shared_tier_all_have_that_share_it() -> None:
    index = BlockIndex()
    for slot, identity in ((0, b"a"), (1, b"a"), (2, b"b")):
        index.share(slot, {"remote": identity})
    index.add(1, HASHES[:1])
    index.apply(1, stored(*HASHES[:3], tier="remote"))
    assert index.matches(HASHES, 4) == [{"remote": 3}, {POOL: 1, "remote": 2}, {}, {}]
    index.leave(1)
    assert index.matches(HASHES, 2) == [{"remote": 3}, {}], "it outlives the replica that stored it"
    index.apply(0, BlockRemoved((HASHES[1],), tier="remote"))
    index.share(3, {"remote": b"a"})
    assert index.matches(HASHES, 4) == [{"remote": 1}, {}, {}, {"remote": 1}], "a replica that comes has it at once"
    index.apply(3, AllBlocksCleared("remote"))
    assert (index.matches(HASHES, 4), len(index)) == ([{}] * 4, 0)


def test_tiers_keep_their_names_beside_one_that_was_shared_and_has_no_blocks() -> None:
    index = BlockIndex()
    index.add(0, HASHES[:1])
    index.add(0, HASHES[1:3], "disk")
    index.share(0, {"shm": b"host"})
    index.share(0, {})
    assert index.matches(HASHES, 1) == [{POOL: 1, "disk": 2}]


def test_a_tier_that_a_replica_shares_from_now_on_was_its_own_before() -> None:
    index = BlockIndex()
    index.add(0, HASHES[:2], "shm")
    index.add(1, HASHES[:3], "shm")
    for slot in (0, 1):
        index.share(slot, {"shm": b"host"})
    assert index.matches(HASHES, 2) == [{}, {}]
    index.add(0, HASHES[:1], "shm")
    index.share(1, {"shm": b"other host"})
    assert index.matches(HASHES, 2) == [{"shm": 1}, {}]
    index.share(0, {})
    assert (index.matches(HASHES, 2), len(index)) == ([{}, {}], 0), "no replica shares it any more"


def test_all_shared_tiers_together_have_one_word_in_a_row() -> None:
    index = BlockIndex()
    for slot in range(48):
        index.share(slot, {"remote": b"server", "disk": b"folder", "shm": bytes([1 + slot // 4])})
    index.add(0, HASHES)
    before = index.nbytes
    for slot, tier in ((5, "shm"), (6, "disk"), (7, "remote")):
        index.add(slot, HASHES, tier)
    assert index.nbytes == before * 3 // 2
    assert [len(each) for each in index.matches(HASHES, 48)] == [1] * 48
    assert index.matches(HASHES, 9)[3:9] == [{"disk": 8}, *[{"shm": 8}] * 4, {"disk": 8}]


def test_a_large_replica_is_forgotten_in_parts_and_another_takes_its_slot_at_once() -> None:
    index, blocks = BlockIndex(), 200_000
    old = [number.to_bytes(32, "little") for number in range(1, blocks + 1)]
    new = [number.to_bytes(32, "little") for number in range(blocks + 1, 2 * blocks + 1)]
    index.add(0, old)
    index.forget(0)
    assert len(index) > blocks / 2, "most of them are still to be cleared"
    index.add(0, new[:16])
    assert index.matches(old, 1) == [{}]
    assert index.matches(new, 1) == [{"pool": 16}]
    for begin in range(0, blocks, 1000):
        index.add(0, new[begin : begin + 1000])
    assert (len(index), index.matches(new, 1)) == (blocks, [{"pool": blocks}])


def test_a_tier_of_a_large_replica_is_cleared_in_parts() -> None:
    index, blocks = BlockIndex(), 200_000
    old = [sha256(number.to_bytes(4, "little")).digest() for number in range(blocks)]
    index.add(0, old)
    index.add(0, old[:20], "disk")
    index.add(1, old[:10])
    for again in range(2):
        index.apply(0, AllBlocksCleared())
        assert len(index) > blocks / 4, "many of them are still to be cleared"
        index.add(0, old[: 5 + again])
        assert index.matches(old, 2) == [{"pool": 5 + again, "disk": 15 - again}, {"pool": 10}]
    for slot in (1, 2):
        index.share(slot, {"remote": b"server"})
    for begin in range(0, blocks, 1000):
        index.add(2, old[begin : begin + 1000], "remote")
    index.apply(2, AllBlocksCleared("remote"))
    index.add(1, old[10:12], "remote")
    assert index.matches(old, 3) == [{"pool": 6, "disk": 14}, {"pool": 10, "remote": 2}, {}]
    for begin in range(0, blocks, 1000):
        index.add(1, old[begin : begin + 1000], "disk")
    for begin in range(0, blocks, 1000):
        index.remove(1, old[begin : begin + 1000], "disk")
    assert len(index) == 20


def test_a_shared_tiers_column_is_not_taken_again_while_it_is_being_cleared() -> None:
    index = BlockIndex()
    blocks = [sha256(number.to_bytes(4, "little")).digest() for number in range(100_000)]
    index.share(0, {"remote": b"one"})
    index.add(0, blocks, "remote")
    index.apply(0, AllBlocksCleared("remote"))
    index.share(1, {"remote": b"two"})
    index.add(0, blocks[:1], "remote")
    index.add(1, blocks[:2], "remote")
    assert len(index) > 50_000, "many of them are still to be cleared"
    assert index.matches(blocks, 2) == [{"remote": 1}, {"remote": 2}]


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

"""Partial blocks in tiers: found by what they follow, removed with it, and in no event and no list."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from emberkv.core.hashing import partial_hash, partial_hashes, partial_siblings_hash
from emberkv.core.loading import BlockRun, StoredPartial
from emberkv.errors import ForeignBlockError
from emberkv.tiers.base import RemovalResult, StoreResult, Tier, TierEntry
from emberkv.tiers.codec import encode_record, verified_record
from emberkv.tiers.disk.files import BlockFiles, parse_path, scan, verify
from emberkv.tiers.manager import MOST_COUNTS, OffloadedBlock, TierManager
from emberkv.tiers.memory import MemoryTier
from emberkv.tiers.partial import PartialIndex, PartialPlace
from emberkv.tiers.shm.tier import LOCKED
from tests.tiers import contract
from tests.tiers.build import NAMESPACE, OTHER, block_hashes, checkpoint, entries, entry_of, fetched, records
from tests.tiers.contract import MakeTier
from tests.tiers.disks import files_of, opened
from tests.tiers.test_shm_tier import arena_of
from tests.tiers.test_shm_tier import opened as opened_memory
from tests.tiers.tiers import LARGE, GatedTier, RemoteTier
from tests.waiting import DEADLINE

BLOCKS = records(4)
ENTRIES = entries(BLOCKS)
IDS = block_hashes(BLOCKS)
SHORT, LONG = checkpoint(BLOCKS[0], 2), checkpoint(BLOCKS[0], 3)
PRIVATE = checkpoint(BLOCKS[0], 3, salt=b"tenant")

keeping = pytest.mark.parametrize(
    "make_tier", [contract.memory, contract.shm, contract.disk], ids=lambda make: make.__name__, indirect=True
)


def ready(tier: Tier) -> Tier:
    """Empty; in shared memory with slots of a full block's size."""
    assert tier.store(ENTRIES[:1]).count == 1
    assert tier.remove(IDS[:1]) == RemovalResult(1)
    return tier


def place(block: OffloadedBlock) -> PartialPlace:
    assert block.partial is not None
    return block.partial


def hash_of(block: OffloadedBlock) -> bytes:
    return block.record.block_hash


def refused(entry: TierEntry, *, partial: PartialPlace | None, block_hash: bytes | None = None) -> str:
    """Why a record is refused."""
    with pytest.raises(ForeignBlockError) as caught:
        verified_record(
            entry.data, namespace=NAMESPACE, block_hash=block_hash or entry.block_hash, exact=True, partial=partial
        )
    return caught.value.fault


def test_a_full_block_s_record_is_no_partial_one_and_the_reverse() -> None:
    full, partial = ENTRIES[1], entry_of(LONG)
    kept = verified_record(
        partial.data, namespace=NAMESPACE, block_hash=partial.block_hash, exact=True, partial=LONG.partial
    )
    assert kept == LONG.record
    assert refused(full, partial=place(LONG)) == "kind"
    assert refused(partial, partial=None) == "kind"
    assert refused(full, partial=place(LONG), block_hash=partial.block_hash) == "hash"


def test_a_record_that_calls_itself_the_other_kind_does_not_make_its_hash() -> None:
    full, partial = replace(BLOCKS[1], partial=True), replace(LONG.record, partial=False)
    where = PartialPlace(full.parent, full.parent, len(full.tokens) // 4)
    entry = TierEntry(full.block_hash, "", encode_record(full, namespace=NAMESPACE))
    assert refused(entry, partial=where) == "chain"
    entry = TierEntry(partial.block_hash, "", encode_record(partial, namespace=NAMESPACE))
    assert refused(entry, partial=None) == "chain"


@pytest.mark.parametrize("where", [PartialPlace(IDS[1], IDS[1], 3), PartialPlace(IDS[0], IDS[0], 2)])
def test_a_partial_block_has_the_parent_and_the_tokens_that_it_is_kept_under(where: PartialPlace) -> None:
    assert refused(entry_of(LONG), partial=where) == "place"


def test_the_hashes_of_all_beginnings_are_those_of_each() -> None:
    tokens = Random(0).randbytes(4 * 40)
    counts = [40, 7, 1, 8]
    assert partial_hashes(IDS[0], tokens, counts) == {each: partial_hash(IDS[0], tokens[: 4 * each]) for each in counts}


hashes = st.sampled_from([bytes([number]) for number in range(4)])


@given(
    st.lists(st.tuples(st.integers(0, 5), st.builds(PartialPlace, hashes, hashes, st.integers(1, 3)))),
    st.lists(hashes),
)
def test_an_index_is_a_dictionary_that_knows_what_follows_what(
    changes: list[tuple[int, PartialPlace]], parents: list[bytes]
) -> None:
    """A change discards what has that number, and enters it where there was nothing."""
    index, model = PartialIndex(), dict[bytes, PartialPlace]()
    for number, where in changes:
        block_hash = b"block %d" % number
        if model.pop(block_hash, None) is None:
            index.add(block_hash, where)
            model[block_hash] = where
        else:
            index.discard(block_hash)
        index.discard(b"unknown")
    assert len(index) == len(model)
    assert all(index.place(each) == where for each, where in model.items())
    for parent in [*parents, b"unknown"]:
        assert set(index.counts(parent)) == {each.count for each in model.values() if each.parent == parent}
        for named in ([parent], [partial_siblings_hash(parent)], parents):
            expected = {block_hash for block_hash, each in model.items() if each.is_removed_with(named)}
            found = index.removed_with(named)
            assert (set(found), len(found)) == (expected, len(expected))
    index.clear()
    assert (len(index), index.removed_with(parents), index.counts(b"\0")) == (0, [], [])


def test_the_number_of_tokens_that_came_last_is_the_last_one() -> None:
    index = PartialIndex()
    for number, count in enumerate([3, 2, 1, 3]):
        index.add(bytes([number]), PartialPlace(IDS[0], IDS[0], count))
    assert index.counts(IDS[0]) == [2, 1, 3]
    index.discard(bytes([0]))
    assert index.counts(IDS[0]) == [2, 1, 3]
    index.discard(bytes([3]))
    assert index.counts(IDS[0]) == [2, 1]


@keeping
def test_one_is_found_by_its_parent_and_is_in_no_list(make_tier: MakeTier) -> None:
    tier = ready(make_tier())
    kept = [entry_of(each) for each in (SHORT, LONG, PRIVATE)]
    assert tier.store([*ENTRIES[:1], *kept]).count == 4
    assert sorted(tier.partial_counts(IDS[0])) == [2, 3]
    assert tier.partial_counts(place(PRIVATE).parent) == [3]
    assert tier.partial_counts(IDS[1]) == []
    assert tier.load([hash_of(SHORT), hash_of(PRIVATE)]) == [kept[0], kept[2]]
    assert tier.lookup([hash_of(LONG)], exact=True) == 1
    assert tier.partial_place(hash_of(PRIVATE)) == PRIVATE.partial
    assert tier.partial_place(IDS[0]) is None
    assert tier.block_hashes() == IDS[:1]


@keeping
def test_it_says_whose_one_is(make_tier: MakeTier) -> None:
    tier = ready(make_tier())
    tier.store([*ENTRIES[:1], entry_of(SHORT), replace(entry_of(LONG), owner="ann")])
    assert [tier.partial_owner(hash_of(each)) for each in (SHORT, LONG, PRIVATE)] == ["", "ann", None]
    tier.remove([hash_of(LONG)])
    assert tier.partial_owner(hash_of(LONG)) is None


@keeping
def test_bytes_count_it_and_it_is_evicted_in_its_turn(make_tier: MakeTier) -> None:
    size = contract.block_bytes(make_tier)
    tier = ready(make_tier(3))
    outcomes = [tier.store([each]) for each in (entry_of(LONG), *ENTRIES)]
    assert [each.evicted for each in outcomes] == [[], [], [], [], [IDS[0]]]  # the first to go is no full block
    assert tier.partial_counts(IDS[0]) == []
    assert tier.lookup([hash_of(LONG)]) == 0
    stats = tier.stats()
    assert (stats.entries, stats.evictions, stats.bytes) == (3, 2, 3 * size)
    tier.store([entry_of(LONG)])
    assert tier.stats().bytes > 2 * size
    assert tier.partial_counts(IDS[0]) == [3]


@keeping
@pytest.mark.parametrize(
    ("named", "left", "full"),
    [
        ([IDS[0]], [], 1),
        ([place(PRIVATE).parent], [SHORT, LONG, PRIVATE], 0),
        ([partial_siblings_hash(IDS[0])], [PRIVATE], 0),
        ([partial_siblings_hash(place(PRIVATE).parent)], [SHORT, LONG], 0),
        ([hash_of(LONG)], [SHORT, PRIVATE], 0),
        ([IDS[1]], [SHORT, LONG, PRIVATE], 1),
    ],
    ids=["the block before", "a salted parent", "its parent", "its salted parent", "itself", "another block"],
)
def test_it_is_removed_by_what_names_it(
    make_tier: MakeTier, named: list[bytes], left: list[OffloadedBlock], full: int
) -> None:
    tier = make_tier()
    tier.store([*ENTRIES[:2], *map(entry_of, (SHORT, LONG, PRIVATE))])
    assert tier.remove(named) == RemovalResult(full)
    assert [each for each in (SHORT, LONG, PRIVATE) if tier.lookup([hash_of(each)])] == left
    assert tier.clear() == RemovalResult(2 - full)
    assert (tier.stats().entries, tier.stats().bytes) == (0, 0)
    assert tier.partial_counts(IDS[0]) == []


@keeping
def test_it_stays_where_only_the_bytes_of_the_block_before_it_are_at_fault(make_tier: MakeTier) -> None:
    tier = make_tier()
    tier.store([*ENTRIES[:1], entry_of(LONG)])
    assert tier.remove(IDS[:1], remember=False) == RemovalResult(1)
    assert tier.partial_counts(IDS[0]) == [3]


def test_processes_share_one_in_memory_and_a_removal_refuses_older_stores(tmp_path: Path) -> None:
    first, second = opened_memory(tmp_path), opened_memory(tmp_path)
    for named in (IDS[0], partial_siblings_hash(place(PRIVATE).parent), hash_of(PRIVATE)):
        first.store([*ENTRIES[:2], entry_of(PRIVATE)])
        second.refresh()
        assert second.load([hash_of(PRIVATE)]) == [entry_of(PRIVATE)]
        seen = first.removals_seen
        assert second.remove([named]) == RemovalResult(named == IDS[0])
        first.refresh()
        assert first.partial_counts(place(PRIVATE).parent) == []
        assert first.store([entry_of(PRIVATE)], seen=seen).count == 0
    assert first.stats().skipped == {"removed meanwhile": 3}
    first.close()
    second.close()


def test_one_whose_removal_waits_for_the_lock_is_not_found_meanwhile(tmp_path: Path) -> None:
    first, second = opened_memory(tmp_path), opened_memory(tmp_path)
    first.store([*ENTRIES[:2], entry_of(PRIVATE)])
    second.refresh()
    with arena_of(first).writing(1) as held:
        assert held
        assert second.remove(IDS[:1]) == RemovalResult(0, 1, LOCKED)
        assert (second.lookup([hash_of(PRIVATE)]), second.load([hash_of(PRIVATE)])) == (0, [None])
        assert second.lookup(IDS[1:2]) == 1
    second.refresh()
    first.refresh()
    assert [tier.partial_place(hash_of(PRIVATE)) for tier in (first, second)] == [None, None]
    first.close()
    second.close()


def test_shared_memory_has_no_slots_of_a_partial_block_s_size(tmp_path: Path) -> None:
    tier = opened_memory(tmp_path)
    assert tier.store([entry_of(LONG)]).count == 0
    assert tier.stats().skipped == {"no arena yet": 1}
    assert tier.store([entry_of(LONG), *ENTRIES[:1]]).count == 2
    tier.close()


def test_a_file_s_name_says_where_it_lies(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    tier.store([entry_of(LONG), entry_of(PRIVATE)])
    tier.close()
    by_hash = {file.block_hash: file for file in scan(tmp_path / "blocks")}
    assert [by_hash[hash_of(each)].partial for each in (LONG, PRIVATE)] == [LONG.partial, PRIVATE.partial]
    assert {str(tmp_path / "blocks" / file.path) for file in by_hash.values()} == set(map(str, files_of(tmp_path)))
    assert by_hash[hash_of(LONG)].path.endswith(f"/{hash_of(LONG).hex()}.{IDS[0].hex()}.3.part.kv")
    assert all(parse_path(file.path, file.size, file.mtime_ns) == file for file in by_hash.values())
    assert [fault for _, fault in verify(BlockFiles(tmp_path), by_hash.values())] == [None, None]


@pytest.mark.parametrize(
    "name",
    ["{0}.{1}.03.part.kv", "{0}.{1}.0.part.kv", "{0}.{1}.{1}.3.part.kv", "{0}.{1}.part.kv", "{0}.{1}.3.kv",
     "{0}.x.3.part.kv", "{0}.{1}.3.near.part.kv", "{0}.{1}.².part.kv"],
)  # fmt: skip
def test_names_that_only_look_like_one_are_passed_over(tmp_path: Path, name: str) -> None:
    tier = opened(tmp_path)
    tier.store([entry_of(LONG)])
    tier.close()
    (path,) = files_of(tmp_path)
    path.rename(path.with_name(name.format(hash_of(LONG).hex(), IDS[0].hex())))
    passed_over: list[str] = []
    assert list(scan(tmp_path / "blocks", passed_over.append)) == []
    assert len(passed_over) == 1


def test_the_next_process_finds_it_and_a_removal_outlasts_the_process(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.store([*ENTRIES[:1], *map(entry_of, (SHORT, PRIVATE))])
    first.close()
    second = opened(tmp_path)
    assert second.load([hash_of(SHORT)]) == [entry_of(SHORT)]
    assert second.partial_counts(place(PRIVATE).parent) == [3]
    assert second.remove(IDS[:1]) == RemovalResult(1)
    second.close()
    third = opened(tmp_path)
    assert (third.stats().entries, third.partial_counts(IDS[0])) == (0, [])
    third.close()


def test_a_reader_follows_what_is_stored_and_removed_and_removes_itself(tmp_path: Path) -> None:
    writer, reader = opened(tmp_path), opened(tmp_path)
    writer.store([entry_of(SHORT), entry_of(PRIVATE)])
    reader.refresh()
    assert (reader.partial_counts(IDS[0]), reader.load([hash_of(SHORT)])) == ([2], [entry_of(SHORT)])
    writer.remove([partial_siblings_hash(IDS[0])])
    writer.store([entry_of(LONG)])
    assert reader.remove(IDS[:1]) == RemovalResult(0, 2, "another process writes here")
    assert [reader.lookup([hash_of(each)]) for each in (SHORT, LONG, PRIVATE)] == [0, 0, 0]
    assert [writer.lookup([hash_of(each)]) for each in (SHORT, LONG, PRIVATE)] == [0, 1, 1]
    writer.close()
    reader.refresh()  # it is the one that writes from now on
    assert files_of(tmp_path) == []
    reader.close()


def test_another_model_s_are_not_found_and_not_removed(tmp_path: Path) -> None:
    other = opened(tmp_path, namespace=OTHER)
    other.store([entry_of(LONG, namespace=OTHER)])
    other.close()
    tier = opened(tmp_path)
    assert (tier.stats().entries, tier.partial_counts(IDS[0])) == (1, [])
    assert tier.remove(IDS[:1]) == RemovalResult()
    tier.close()
    assert len(files_of(tmp_path)) == 1


def search(manager: TierManager, counts: range = range(1, 4), wanted: OffloadedBlock = LONG) -> StoredPartial | None:
    where = place(wanted)
    return manager.find_partial(where.parent, lambda: wanted.record.tokens, counts)


def test_the_longest_is_found_from_the_fastest_tier_that_has_it() -> None:
    tiers = MemoryTier(LARGE, name="fast"), RemoteTier(), MemoryTier(LARGE, name="slow")
    manager = TierManager(tiers, namespace=NAMESPACE, queue_bytes=LARGE, start=False)
    tiers[0].store([entry_of(SHORT)])
    tiers[2].store([entry_of(SHORT), entry_of(LONG), entry_of(PRIVATE)])
    assert search(manager) == StoredPartial("slow", hash_of(LONG), 3, None)
    assert search(manager, range(1, 3)) == StoredPartial("fast", hash_of(SHORT), 2, None)
    assert search(manager, range(1, 2)) is None
    assert search(manager, wanted=PRIVATE) == StoredPartial("slow", hash_of(PRIVATE), 3, None)
    other = manager.find_partial(IDS[0], lambda: bytes(12), range(1, 4))
    assert (other, tiers[1].queries) == (None, [])


def test_a_search_for_an_owner_s_finds_no_other_s() -> None:
    tiers = MemoryTier(LARGE, name="fast"), MemoryTier(LARGE, name="slow")
    manager = TierManager(tiers, namespace=NAMESPACE, queue_bytes=LARGE, start=False)
    tiers[0].store([entry_of(LONG), entry_of(SHORT)])
    tiers[1].store([replace(entry_of(SHORT), owner="ann")])

    def found(owner: str) -> StoredPartial | None:
        return manager.find_partial(IDS[0], lambda: LONG.record.tokens, range(1, 4), owner=owner)

    assert found("") == StoredPartial("fast", hash_of(LONG), 3, None)
    assert found("ann") == StoredPartial("slow", hash_of(SHORT), 2, None)
    assert found("bob") is None


def test_a_search_looks_at_the_lengths_that_fit_and_came_last() -> None:
    """The longest came first; those that do not fit come last, and do not count."""
    tier = MemoryTier(LARGE)
    manager = TierManager([tier], namespace=NAMESPACE, queue_bytes=LARGE, start=False)
    most = MOST_COUNTS + 1
    for count in [*range(most, 0, -1), *range(most + 1, most + 9)]:
        tier.store([entry_of(checkpoint(BLOCKS[0], count))])
    longest = checkpoint(BLOCKS[0], most)
    found = search(manager, range(1, most + 1), longest)
    assert found is not None
    assert found.count == MOST_COUNTS
    assert search(manager, range(2, most + 1), longest) == StoredPartial("ram", hash_of(longest), most, None)


def test_it_comes_up_behind_a_full_block_and_goes_into_the_faster_tiers_that_keep_any() -> None:
    fast, remote, slow = MemoryTier(LARGE, name="fast"), _Remote(), MemoryTier(LARGE, name="slow")
    manager = TierManager([fast, remote, slow], namespace=NAMESPACE, queue_bytes=LARGE)
    slow.store([*ENTRIES[:1], entry_of(LONG)])
    wanted, runs = [BLOCKS[0], LONG.record], [BlockRun("slow", 1, None), BlockRun("slow", 1, None)]
    assert fetched(manager, wanted, runs, partial=LONG.partial) == wanted
    assert fast.load([IDS[0], hash_of(LONG)]) == [ENTRIES[0], entry_of(LONG)]
    assert remote.stored == [IDS[0]]
    assert manager.close(DEADLINE)


class _Remote(RemoteTier):
    """Remembers what it was given to store."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: list[bytes] = []

    def store(self, entries: Sequence[TierEntry], *, seen: int | None = None) -> StoreResult:
        self.stored += [each.block_hash for each in entries]
        return super().store(entries, seen=seen)


def test_no_event_and_no_list_tells_of_one() -> None:
    tier = MemoryTier(2 * ENTRIES[0].size + 40)
    events: list[Event] = []
    manager = TierManager([tier], namespace=NAMESPACE, queue_bytes=LARGE)
    manager.on_event = events.append
    manager.offload([OffloadedBlock(BLOCKS[0]), LONG])
    assert manager.flush(DEADLINE)
    assert (manager.contents(), search(manager) is None) == ({"ram": IDS[:1]}, False)
    manager.offload([OffloadedBlock(BLOCKS[1]), OffloadedBlock(BLOCKS[2])])  # evicts both
    assert manager.flush(DEADLINE)
    manager.remove([hash_of(LONG), IDS[0], IDS[2]])
    manager.offload([LONG])
    manager.clear()
    assert manager.flush(DEADLINE)
    assert manager.close(DEADLINE)
    told = [each for event in events if not isinstance(event, AllBlocksCleared) for each in event.block_hashes]
    assert set(told) == set(IDS[:3])
    assert {type(event) for event in events} == {BlockStored, BlockRemoved, AllBlocksCleared}


def test_a_bad_one_is_refused_and_removed_and_no_event_tells_of_it() -> None:
    tier = GatedTier()
    bad = replace(entry_of(LONG), data=entry_of(SHORT).data)
    tier.store([bad])
    events: list[Event] = []
    manager = TierManager([tier], namespace=NAMESPACE, queue_bytes=LARGE)
    manager.on_event = events.append
    runs = [BlockRun("gated", 1, None)]
    assert fetched(manager, [LONG.record], runs, partial=LONG.partial) == [None]
    assert (tier.stats().entries, manager.stats()["gated"].corrupt, events) == (0, {"hash": 1}, [])
    manager.offload([LONG])
    assert manager.flush(DEADLINE)
    assert fetched(manager, [LONG.record], runs, partial=LONG.partial) == [LONG.record]
    assert manager.close(DEADLINE)


def test_one_that_is_kept_behind_another_block_is_refused_and_removed() -> None:
    """A removal of the block that it follows would not find it there."""
    tier = GatedTier()
    tier.store([replace(entry_of(PRIVATE), partial=replace(place(PRIVATE), previous=IDS[1]))])
    manager = TierManager([tier], namespace=NAMESPACE, queue_bytes=LARGE)
    assert search(manager, wanted=PRIVATE) is not None
    assert fetched(manager, [PRIVATE.record], [BlockRun("gated", 1, None)], partial=PRIVATE.partial) == [None]
    assert (tier.stats().entries, manager.stats()["gated"].corrupt) == (0, {"place": 1})
    assert manager.close(DEADLINE)


def test_one_that_is_read_by_its_hash_alone_stays() -> None:
    tier = GatedTier()
    tier.store([entry_of(PRIVATE)])
    manager = TierManager([tier], namespace=NAMESPACE, queue_bytes=LARGE)
    assert fetched(manager, [PRIVATE.record], [BlockRun("gated", 1, None)]) == [PRIVATE.record]
    assert (tier.stats().entries, manager.stats()["gated"].corrupt) == (1, {})
    assert manager.close(DEADLINE)

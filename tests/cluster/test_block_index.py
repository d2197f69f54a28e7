"""The directory agrees with a set for each replica, whatever events come."""

from hypothesis import given
from hypothesis import strategies as st

from emberkv.cluster.block_index import BlockIndex
from emberkv.core.events import AllBlocksCleared, BlockRemoved, BlockStored, Event

REPLICAS = 4
HASHES = [bytes([number]) * 32 for number in range(8)]
CHANGES = st.lists(
    st.tuples(
        st.integers(0, REPLICAS - 1),
        st.sampled_from(["store", "remove", "clear", "replace"]),
        st.lists(st.sampled_from(HASHES), max_size=4, unique=True),
    ),
    max_size=30,
)


def apply(index: BlockIndex, held: list[set[bytes]], replica: int, change: str, blocks: list[bytes]) -> None:
    if change == "replace":
        held[replica] = set(blocks)
        index.forget(replica)
        index.add(replica, blocks)
        return
    event: Event = AllBlocksCleared()
    if change == "store":
        held[replica] |= set(blocks)
        event = BlockStored(tuple(blocks), b"", (b"",) * len(blocks), 1)
    elif change == "remove":
        held[replica] -= set(blocks)
        event = BlockRemoved(tuple(blocks))
    else:
        held[replica] = set()
    index.apply(replica, event)


def depth(held: set[bytes], path: list[bytes]) -> int:
    return next((at for at, block_hash in enumerate(path) if block_hash not in held), len(path))


@given(CHANGES, st.lists(st.sampled_from(HASHES), max_size=6))
def test_matches_are_those_of_sets(changes: list[tuple[int, str, list[bytes]]], path: list[bytes]) -> None:
    index = BlockIndex()
    held: list[set[bytes]] = [set() for _ in range(REPLICAS)]
    for replica, change, blocks in changes:
        apply(index, held, replica, change, blocks)
    assert index.matches(path, REPLICAS) == [depth(each, path) for each in held]
    assert len(index) == len(set().union(*held))

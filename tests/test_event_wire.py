"""The wire form of cache events: what is written is read, and anything else is one error of our own."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.events import AllBlocksCleared, BlockRemoved, BlockStored
from emberkv.core.feed import EventBatch, EventsLost, FeedMessage, SnapshotChunk
from emberkv.errors import EventWireError
from emberkv.event_wire import MAX_MESSAGE_BYTES, VERSION, decode, encode

EPOCH = b"an epoch of 16 b"
HASHES = (b"\1" * 32, b"\2" * 32)
ROOT = bytes(32)
TOKENS = (bytes(16), b"\3" * 16)
BATCH = EventBatch(
    EPOCH,
    7,
    [
        BlockStored(HASHES, ROOT, TOKENS, 4),
        BlockStored(HASHES[:1], ROOT, (), 4, "ram"),
        BlockRemoved(HASHES, evicted=False),
        AllBlocksCleared("disk"),
    ],
)
CHUNK = SnapshotChunk(EPOCH, 9, "1.2", "1.4", 4, HASHES, (ROOT, HASHES[0]), TOKENS)
MESSAGES: list[FeedMessage] = [BATCH, EventBatch(EPOCH, 1, []), EventsLost(EPOCH, 3, 2), CHUNK]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_comes_back_as_it_was(message: FeedMessage) -> None:
    assert decode(encode(message)) == message


def test_tokens_are_left_out_where_they_are_not_wanted() -> None:
    batch, chunk = decode(encode(BATCH, tokens=False)), decode(encode(CHUNK, tokens=False))
    assert isinstance(batch, EventBatch)
    assert batch.events[0] == BlockStored(HASHES, ROOT, (), 4)
    assert isinstance(chunk, SnapshotChunk)
    assert chunk.tokens == ()


def test_the_form_does_not_change_unnoticed() -> None:
    """Field by field, as docs/cache.md has it; another form needs another version."""
    assert msgspec.msgpack.decode(encode(BATCH)) == [
        1,
        ["batch", EPOCH, 7, [
            ["stored", list(HASHES), ROOT, list(TOKENS), 4, "pool"],
            ["stored", [HASHES[0]], ROOT, [], 4, "ram"],
            ["removed", list(HASHES), False, "pool"],
            ["cleared", "disk"],
        ]],
    ]  # fmt: skip
    assert msgspec.msgpack.decode(encode(CHUNK)) == [
        1,
        ["chunk", EPOCH, 9, "1.2", "1.4", 4, list(HASHES), [ROOT, HASHES[0]], list(TOKENS), "pool"],
    ]
    assert msgspec.msgpack.decode(encode(EventsLost(EPOCH, 3, 2))) == [1, ["lost", EPOCH, 3, 2]]


def test_a_chunk_of_a_lower_tier_has_no_parents() -> None:
    chunk = SnapshotChunk(EPOCH, 9, "1.1.0", None, 4, HASHES, (), (), "disk")
    assert decode(encode(chunk)) == chunk


def test_another_version_is_named() -> None:
    with pytest.raises(EventWireError, match=f"of version 2; this is version {VERSION}"):
        decode(msgspec.msgpack.encode([2, ["something", "new"]]))


STORED: list[Any] = ["stored", list(HASHES), ROOT, list(TOKENS), 4, "pool"]


@pytest.mark.parametrize(
    "body",
    [
        None,
        7,
        [],
        ["news", EPOCH, 1, []],
        ["batch", EPOCH, 1],
        ["batch", EPOCH, 1, [], "more"],
        ["batch", EPOCH, 0, []],
        ["batch", EPOCH, -1, []],
        ["batch", EPOCH, True, []],
        ["batch", EPOCH, 2**63 - 1, [["cleared", "pool"]]],
        ["batch", "text", 1, []],
        ["batch", b"", 1, []],
        ["batch", bytes(65), 1, []],
        ["batch", EPOCH, 1, [["cleared", "t" * 65]]],
        ["batch", EPOCH, 1, [["removed", [], True, "pool"]]],
        ["batch", EPOCH, 1, [["removed", [bytes(31)], True, "pool"]]],
        ["batch", EPOCH, 1, [["removed", [bytes(32)], 1, "pool"]]],
        ["batch", EPOCH, 1, [[*STORED[:3], [TOKENS[0]], 4, "pool"]]],
        ["batch", EPOCH, 1, [[*STORED[:4], 5, "pool"]]],
        ["batch", EPOCH, 1, [[*STORED[:4], 0, "pool"]]],
        ["lost", EPOCH, 1, -1],
        ["chunk", EPOCH, 9, "", None, 4, list(HASHES), [ROOT], [], "pool"],
        ["chunk", EPOCH, 9, "", None, 4, list(HASHES), [ROOT, ROOT], [bytes(16)], "pool"],
        ["chunk", EPOCH, 9, None, None, 4, [], [], [], "pool"],
    ],
)
def test_what_is_no_message_is_refused(body: Any) -> None:
    with pytest.raises(EventWireError, match="no event message"):
        decode(msgspec.msgpack.encode([VERSION, body]))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"\x91" * 100_000, b"\x92\x01" + b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", encode(BATCH) + b"\0"],
)
def test_bytes_that_are_no_msgpack_are_refused(data: bytes) -> None:
    with pytest.raises(EventWireError):
        decode(data)


def test_a_message_that_is_too_large_is_not_looked_at() -> None:
    with pytest.raises(EventWireError, match="at most"):
        decode(bytes(MAX_MESSAGE_BYTES + 1))


@given(st.sampled_from(MESSAGES), st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=3), st.data())
def test_damage_is_another_message_or_refused(
    message: FeedMessage, changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    encoded = bytearray(encode(message))
    for at, value in changes:
        encoded[at % len(encoded)] = value
    cut = bytes(encoded[: data.draw(st.integers(0, len(encoded)))])
    for damaged in (bytes(encoded), cut):
        try:
            read = decode(damaged)
        except EventWireError:
            continue
        assert decode(encode(read)) == read


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(EventWireError):
        decode(b"\x92\x01" + data)

"""A cache's events as bytes: msgpack, versioned, and checked to the last field when they are read.

    encode(feed.events(after=0))   # bytes
    decode(data)                   # the same EventBatch; raises EventWireError for anything else

A message is ``[version, [kind, field, ...]]``; docs/cache.md names the fields.
"""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct, ValidationError

from emberkv.core.events import POOL, AllBlocksCleared, BlockRemoved, BlockStored, Event
from emberkv.core.feed import EventBatch, EventsLost, FeedMessage, SnapshotChunk
from emberkv.core.hashing import TOKEN_BYTES
from emberkv.errors import EventWireError, reason_of

VERSION = 1
MAX_MESSAGE_BYTES = 64 << 20
_MAX_INT = 2**63 - 1

BlockHash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Epoch = Annotated[bytes, Meta(min_length=1, max_length=64)]
Name = Annotated[str, Meta(max_length=64)]
Number = Annotated[int, Meta(ge=0, le=_MAX_INT)]
Positive = Annotated[int, Meta(ge=1, le=_MAX_INT)]
Tokens = tuple[bytes, ...]


class _Stored(Struct, tag="stored", array_like=True, frozen=True, forbid_unknown_fields=True):
    block_hashes: Annotated[tuple[BlockHash, ...], Meta(min_length=1)]
    parent: BlockHash
    tokens: Tokens
    block_size: Positive
    tier: Name


class _Removed(Struct, tag="removed", array_like=True, frozen=True, forbid_unknown_fields=True):
    block_hashes: Annotated[tuple[BlockHash, ...], Meta(min_length=1)]
    evicted: bool
    tier: Name


class _Cleared(Struct, tag="cleared", array_like=True, frozen=True, forbid_unknown_fields=True):
    tier: Name


class _Batch(Struct, tag="batch", array_like=True, frozen=True, forbid_unknown_fields=True):
    epoch: Epoch
    first: Positive
    events: tuple[_Stored | _Removed | _Cleared, ...]


class _Lost(Struct, tag="lost", array_like=True, frozen=True, forbid_unknown_fields=True):
    epoch: Epoch
    oldest: Positive
    last: Number


class _Chunk(Struct, tag="chunk", array_like=True, frozen=True, forbid_unknown_fields=True):
    epoch: Epoch
    sequence: Number
    cursor: Name
    next_cursor: Name | None
    block_size: Positive
    block_hashes: tuple[BlockHash, ...]
    parents: tuple[BlockHash, ...]
    tokens: Tokens
    tier: Name


class Envelope(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    version: Positive
    message: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(Envelope)
_messages = msgspec.msgpack.Decoder(_Batch | _Lost | _Chunk)


def encode(message: FeedMessage, *, tokens: bool = True) -> bytes:
    """A message as bytes. tokens: whether stored blocks come with their token ids."""
    body: _Batch | _Lost | _Chunk
    match message:
        case EventBatch():
            body = _Batch(message.epoch, message.first, tuple(_wire_event(event, tokens) for event in message.events))
        case EventsLost():
            body = _Lost(message.epoch, message.oldest, message.last)
        case SnapshotChunk():
            body = _Chunk(
                message.epoch,
                message.sequence,
                message.cursor,
                message.next_cursor,
                message.block_size,
                message.block_hashes,
                message.parents,
                message.tokens if tokens else (),
                message.tier,
            )
    return _encoder.encode(Envelope(VERSION, msgspec.Raw(_encoder.encode(body))))


def decode(data: bytes) -> FeedMessage:
    """The message in ``data``. Raises EventWireError for bytes that are none, of whatever kind."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise EventWireError(f"an event message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are accepted")
    try:
        envelope = _envelopes.decode(data)
        if envelope.version != VERSION:
            raise EventWireError(f"an event message of version {envelope.version}; this is version {VERSION}")
        return _checked(_messages.decode(envelope.message))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventWireError(f"these {len(data)} bytes are no event message: {reason_of(error)}") from error


def _wire_event(event: Event, tokens: bool) -> _Stored | _Removed | _Cleared:
    match event:
        case BlockStored():
            kept = event.tokens if tokens else ()
            return _Stored(event.block_hashes, event.parent, kept, event.block_size, event.tier)
        case BlockRemoved():
            return _Removed(event.block_hashes, event.evicted, event.tier)
        case AllBlocksCleared():
            return _Cleared(event.tier)


def _checked(body: _Batch | _Lost | _Chunk) -> FeedMessage:
    """Raises msgspec's ValidationError where fields contradict one another."""
    match body:
        case _Batch():
            if body.first + len(body.events) > _MAX_INT:
                raise ValidationError("event numbers beyond 2**63")
            return EventBatch(body.epoch, body.first, [_event(event) for event in body.events])
        case _Lost():
            return EventsLost(body.epoch, body.oldest, body.last)
        case _Chunk():
            if len(body.parents) != len(body.block_hashes) and (body.parents or body.tier == POOL):
                raise ValidationError(f"{len(body.block_hashes)} blocks and {len(body.parents)} parents")
            _check_tokens(body.tokens, len(body.block_hashes), body.block_size)
            return SnapshotChunk(
                body.epoch,
                body.sequence,
                body.cursor,
                body.next_cursor,
                body.block_size,
                body.block_hashes,
                body.parents,
                body.tokens,
                body.tier,
            )


def _event(event: _Stored | _Removed | _Cleared) -> Event:
    match event:
        case _Stored():
            _check_tokens(event.tokens, len(event.block_hashes), event.block_size)
            return BlockStored(event.block_hashes, event.parent, event.tokens, event.block_size, event.tier)
        case _Removed():
            return BlockRemoved(event.block_hashes, event.evicted, event.tier)
        case _Cleared():
            return AllBlocksCleared(event.tier)


def _check_tokens(tokens: Tokens, blocks: int, block_size: int) -> None:
    if tokens and (len(tokens) != blocks or any(len(each) != block_size * TOKEN_BYTES for each in tokens)):
        raise ValidationError(f"the tokens are not those of {blocks} blocks of {block_size}")

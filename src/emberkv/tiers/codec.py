"""A block as bytes: what every tier stores, and the checks that bytes must pass before they are used.

    header (version, sizes, block hash, parent, position, flags) | namespace | tokens | payload | XXH3-128 of all before

Integers are little-endian. The checksum finds damage, not malice: users who can write the cache's files are trusted.
"""

import struct
from dataclasses import dataclass
from hashlib import sha256

from xxhash import xxh3_128_digest

from emberkv.core.hashing import TOKEN_BYTES, partial_hash
from emberkv.errors import CorruptBlockError, EntryError, ForeignBlockError
from emberkv.tiers.partial import PartialPlace

Payload = bytes | memoryview
"""A block's state, opaque. Decoding gives a view into the record's bytes, without a copy."""

VERSION = 1
MAGIC = b"\x89EMBERKV"
HASH_BYTES = 32
MOST_BESIDE = 2**18
"""Bytes of a stored block beside its state, at most: header, namespace, checksum, owner, and 32,768 tokens."""

_HEADER = struct.Struct("<8sHBBIIQ32s32s")
"""Magic, version, flags, namespace's size, position, tokens' size, payload's size, block hash, parent."""

_CHECKSUM_BYTES = 16
_EXACT = 1
_PARTIAL = 2
_KEEP_WHEN_EXTENDED = 4  # earlier versions neither set this flag nor look at it


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """One block, with all that is needed to check that it is the one that was looked up.

    block_hash: SHA-256 of ``parent`` and ``tokens``, and `partial_hash` of a partial block (see
    `emberkv.core.hashing`). tokens: four bytes each. position: of the block in its chain, from 0. exact: bit-equal to a
    cold prefill's state. keep_when_extended: of a partial block, see `emberkv.core.block.Block`.

    >>> parent, tokens = bytes(32), bytes(64)
    >>> record = BlockRecord(sha256(parent + tokens).digest(), parent, tokens, 0, exact=True, payload=b"KV")
    >>> data = encode_record(record, namespace=b"dtypes, kernels")
    >>> decode_record(data, namespace=b"dtypes, kernels") == record
    True
    >>> decode_record(data[:-1], namespace=b"dtypes, kernels")
    Traceback (most recent call last):
    emberkv.errors.CorruptBlockError: 188 bytes; its header says 189
    """

    block_hash: bytes
    parent: bytes
    tokens: bytes
    position: int
    exact: bool
    payload: Payload
    partial: bool = False
    keep_when_extended: bool = False


def encode_record(record: BlockRecord, *, namespace: bytes) -> bytes:
    """The record as bytes. namespace: of the model; at most 255 bytes.

    Raises EntryError for a block hash or a parent that has not 32 bytes, and for a namespace that is too long.
    """
    sizes = {len(record.block_hash), len(record.parent)}
    if sizes != {HASH_BYTES} or len(namespace) > 255:
        raise EntryError(
            f"hash of {len(record.block_hash)} bytes, parent of {len(record.parent)}, namespace of {len(namespace)}; "
            f"the first two must have {HASH_BYTES} and the last at most 255"
        )
    flags = (_EXACT if record.exact else 0) | (_PARTIAL if record.partial else 0)
    flags |= _KEEP_WHEN_EXTENDED if record.keep_when_extended else 0
    header = _HEADER.pack(
        MAGIC, VERSION, flags, len(namespace), record.position,
        len(record.tokens), len(record.payload), record.block_hash, record.parent,
    )  # fmt: skip
    body = b"".join((header, namespace, record.tokens, record.payload))
    return body + xxh3_128_digest(body)


def decode_record(data: bytes, *, namespace: bytes) -> BlockRecord:
    """The record in ``data``. Raises CorruptBlockError for damaged bytes, ForeignBlockError for another version
    or model. The payload is a view into ``data``.
    """
    if len(data) < _HEADER.size + _CHECKSUM_BYTES:
        raise CorruptBlockError(f"{len(data)} bytes are too few for a block", fault="truncated")
    magic, version, flags, space_size, position, tokens_size, payload_size, block_hash, parent = _HEADER.unpack_from(
        data
    )
    if magic != MAGIC:
        raise CorruptBlockError("the bytes are no block", fault="no block")
    if version != VERSION:
        raise ForeignBlockError(f"block of version {version}; this is version {VERSION}", fault="version")
    tokens_at = _HEADER.size + space_size
    payload_at = tokens_at + tokens_size
    end = payload_at + payload_size
    if end + _CHECKSUM_BYTES != len(data):
        raise CorruptBlockError(f"{len(data)} bytes; its header says {end + _CHECKSUM_BYTES}", fault="truncated")
    view = memoryview(data)
    if xxh3_128_digest(view[:end]) != view[end:]:
        raise CorruptBlockError("the checksum does not fit the bytes", fault="checksum")
    if view[_HEADER.size : tokens_at] != namespace:
        raise ForeignBlockError("block of another model", fault="namespace")
    tokens = data[tokens_at:payload_at]
    return BlockRecord(
        block_hash,
        parent,
        tokens,
        position,
        exact=bool(flags & _EXACT),
        payload=view[payload_at:end],
        partial=bool(flags & _PARTIAL),
        keep_when_extended=bool(flags & _KEEP_WHEN_EXTENDED),
    )


def verified_record(
    data: bytes, *, namespace: bytes, block_hash: bytes, exact: bool, partial: PartialPlace | None = None
) -> BlockRecord:
    """The record of the block ``block_hash``, with the tokens that make it so.

    exact: whether the tier stored it as an exact block, which it must be then. partial: where it lies, if the tier
    stored it as a partial block; None: it must be a full one. Raises as `decode_record` does, and ForeignBlockError for
    a sound record that is not the one that was looked up.
    """
    record = decode_record(data, namespace=namespace)
    if record.block_hash != block_hash:
        raise ForeignBlockError("another block than the one looked up", fault="hash")
    if record.partial != (partial is not None):
        found, kept = ("partial", "full") if record.partial else ("full", "partial")
        raise ForeignBlockError(f"a {found} block, kept as a {kept} one", fault="kind")
    if partial is not None and (record.parent, len(record.tokens)) != (partial.parent, partial.count * TOKEN_BYTES):
        raise ForeignBlockError("its parent or its number of tokens is not what it is kept under", fault="place")
    made = partial_hash if record.partial else _full_hash
    if made(record.parent, record.tokens) != block_hash:
        raise ForeignBlockError("its parent and its tokens do not make its hash", fault="chain")
    if exact and not record.exact:
        raise ForeignBlockError("kept as exact, and is not", fault="exactness")
    return record


def _full_hash(parent: bytes, tokens: bytes) -> bytes:
    return sha256(parent + tokens).digest()

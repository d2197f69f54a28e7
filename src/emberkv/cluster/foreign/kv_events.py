"""vLLM's KV events: decoding, and their blocks under the gateway's own block hashes.

A batch is msgpack: an object ``{"ts", "events", "data_parallel_rank"}`` or, from older versions, an array of the same.
Each event is also an object or an array, with its name as ``type`` or as the first element. The server's block hashes
are integers or bytes, and vLLM seeds them at its start, so blocks are identified here by their tokens and parent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from emberkv.core.events import POOL, AllBlocksCleared, BlockRemoved, BlockStored, Event
from emberkv.core.hashing import TOKEN_BYTES, BlockHash, encode_tokens, hash_blocks, token_array
from emberkv.errors import WireError, reason_of

ForeignHash = int | bytes
_BlockSize = Annotated[int, msgspec.Meta(ge=1)]
Publish = Callable[[Sequence[Event]], None]

_TIERS = {"GPU": POOL, "CPU": "ram"}
"""Tiers by an event's medium; any other medium in lower case is the tier."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Consecutive blocks are cached in a tier.

    parent: the hash of the block before them; None for the first blocks of a prompt. tokens: of all blocks, possibly
    empty. is_plain: whether the hashes depend on tokens alone, and not on a LoRA adapter, images or a salt.
    """

    block_hashes: Sequence[ForeignHash]
    parent: ForeignHash | None
    tokens: Sequence[int]
    block_size: int
    tier: str = POOL
    is_plain: bool = True


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks are evicted from a tier."""

    block_hashes: Sequence[ForeignHash]
    tier: str = POOL


@dataclass(frozen=True, slots=True)
class Cleared:
    """All blocks are evicted."""


KvEvent = Stored | Removed | Cleared

_FIELDS = {
    "BlockStored": (
        "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
        "group_idx",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}  # fmt: skip
"""The fields of array-encoded events, in order. Trailing fields may be missing."""


def decode_batch(payload: bytes) -> list[KvEvent]:
    """The events of a batch, in order. Events of other layer groups than the first and unknown events are left out.

    Raises WireError for an invalid batch.
    """
    try:
        batch = msgspec.msgpack.decode(payload)
        events = batch["events"] if isinstance(batch, dict) else batch[1]
        decoded = [_event(*_named(each)) for each in events]
    except (msgspec.DecodeError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise WireError(f"an invalid batch of KV events: {reason_of(error)}") from error
    return [event for event in decoded if event is not None]


def _named(event: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(event, dict):
        return event["type"], event
    return event[0], dict(zip(_FIELDS.get(event[0], ()), event[1:], strict=False))


def _event(kind: str, fields: dict[str, Any]) -> KvEvent | None:
    if kind == "AllBlocksCleared":
        return Cleared()
    if kind not in _FIELDS or fields.get("group_idx"):
        return None
    medium = str(fields.get("medium") or "GPU")
    tier = _TIERS.get(medium, medium.lower())
    block_hashes = msgspec.convert(fields["block_hashes"], list[ForeignHash])
    if kind == "BlockRemoved":
        return Removed(block_hashes, tier)
    others = (fields.get("lora_id"), fields.get("lora_name"), *(fields.get("extra_keys") or ()))
    return Stored(
        block_hashes,
        msgspec.convert(fields["parent_block_hash"], ForeignHash | None),
        token_array(fields["token_ids"]),
        msgspec.convert(fields["block_size"], _BlockSize),
        tier,
        is_plain=not any(others),
    )


@dataclass(slots=True)
class _Block:
    """A server's block.

    block_hashes: the gateway's hashes of the blocks that it consists of; empty if the server's hash depends on more
    than tokens. copies: their number by tier. A server may hold several copies of a block, with events for each.
    """

    parent: BlockHash
    block_hashes: tuple[BlockHash, ...]
    copies: dict[str, int] = field(default_factory=dict)

    @property
    def last(self) -> BlockHash | None:
        return self.block_hashes[-1] if self.block_hashes else None


class KvBlocks:
    """The blocks of one server, by its events.

    root, block_size: of the gateway's block hashes. publish: gets each change as the gateway's own events. is_unfit:
    whether the server's block size is not a multiple of the gateway's, so that its events cannot be used. fault: why
    some of the server's blocks are not known, until the next clear; "" if all are.
    """

    def __init__(self, root: BlockHash, block_size: int, publish: Publish) -> None:
        self.root = root
        self.fault = ""
        self.is_unfit = False
        self._block_size = block_size
        self._publish = publish
        self._blocks: dict[ForeignHash, _Block] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def apply(self, events: Sequence[KvEvent]) -> None:
        """Apply events in order. An event that refers to unknown blocks sets `fault` and changes nothing else."""
        for event in events:
            match event:
                case Stored():
                    self._store(event)
                case Removed():
                    self._remove(event)
                case Cleared():
                    self.clear()

    def clear(self) -> None:
        """Remove all blocks: the server's cache was cleared, or the server has restarted."""
        tiers = {tier for block in self._blocks.values() for tier in block.copies}
        self._blocks.clear()
        self.fault = ""
        self._publish([AllBlocksCleared(tier) for tier in sorted(tiers | {POOL})])

    def _store(self, event: Stored) -> None:
        if event.block_size % self._block_size:
            self.is_unfit = True
            self.fault = (
                f"its blocks have {event.block_size} tokens, which are not whole blocks of {self._block_size}; "
                f"set EMBERKV_BLOCK_SIZE={event.block_size} for the gateway"
            )
            return
        parent = self._last(event.parent)
        tokens = event.tokens
        if len(tokens) != event.block_size * len(event.block_hashes):
            tokens = ()  # below the GPU, blocks may be named without their tokens
        for number, foreign_hash in enumerate(event.block_hashes):
            block = self._blocks.get(foreign_hash)
            if block is None:
                if parent is None and event.is_plain and self._is_missing(event.parent, bool(tokens)):
                    self.fault = "an event stores a block whose parent is unknown"
                    return
                some = tokens[number * event.block_size : (number + 1) * event.block_size]
                block = self._blocks[foreign_hash] = self._block(parent if event.is_plain else None, some)
            copies = block.copies.get(event.tier, 0)
            block.copies[event.tier] = copies + 1
            if not copies and block.block_hashes:
                self._stored(block, tokens[number * event.block_size : (number + 1) * event.block_size], event.tier)
            parent = block.last

    def _last(self, foreign_hash: ForeignHash | None) -> BlockHash | None:
        """The gateway's hash of the chain up to a server's block; None if it is unknown."""
        if foreign_hash is None:
            return self.root
        block = self._blocks.get(foreign_hash)
        return None if block is None else block.last

    def _is_missing(self, parent: ForeignHash | None, has_tokens: bool) -> bool:
        return not has_tokens or (parent is not None and parent not in self._blocks)

    def _block(self, parent: BlockHash | None, tokens: Sequence[int]) -> _Block:
        if parent is None:
            return _Block(b"", ())
        encoded = encode_tokens(token_array(tokens))
        return _Block(parent, tuple(hash_blocks(parent, encoded, self._block_size)))

    def _stored(self, block: _Block, tokens: Sequence[int], tier: str) -> None:
        encoded, width = encode_tokens(token_array(tokens)), self._block_size * TOKEN_BYTES
        parts = tuple(encoded[start : start + width] for start in range(0, len(encoded), width))
        self._publish([BlockStored(block.block_hashes, block.parent, parts, self._block_size, tier)])

    def _remove(self, event: Removed) -> None:
        gone: list[BlockHash] = []
        for foreign_hash in event.block_hashes:
            block = self._blocks.get(foreign_hash)
            if block is None or event.tier not in block.copies:
                continue
            block.copies[event.tier] -= 1
            if block.copies[event.tier]:
                continue
            del block.copies[event.tier]
            gone += block.block_hashes
            if not block.copies:
                del self._blocks[foreign_hash]
        if gone:
            self._publish([BlockRemoved(tuple(gone), tier=event.tier)])


class KvSequence:
    """Applies a server's numbered batches in order. `missing_from` says where a replay has to begin.

    Numbers increase from 0 at the server's start, so a live batch without a higher number than the live batch before it
    shows that the server has restarted. A batch may arrive by a replay before it arrives live.
    """

    def __init__(self, blocks: KvBlocks) -> None:
        self.blocks = blocks
        self.next = 0
        self._has_heard = False
        self._published = -1  # the number of the latest batch that was not a replay's
        self._later: dict[int, list[KvEvent]] = {}

    @property
    def has_heard(self) -> bool:
        """Whether batches have arrived and can be used."""
        return self._has_heard and not self.blocks.is_unfit

    @property
    def fault(self) -> str:
        """Why the known blocks may differ from the server's; "" while they are exact."""
        return self.blocks.fault or ("events are missing, and a replay is requested" if self._later else "")

    @property
    def missing_from(self) -> int | None:
        """The number of the first missing batch, or None."""
        return self.next if self._later else None

    def live(self, number: int, events: list[KvEvent]) -> None:
        """Take a batch that was published now."""
        if number <= self._published:
            self.restart()
        self._published = number
        self._has_heard = True
        if number >= self.next:
            self._later[number] = events
            self._catch_up()

    def replayed(self, number: int, events: list[KvEvent]) -> None:
        """Take a batch of a replay."""
        self._has_heard = True
        if number >= self.next:
            self._later[number] = events
            self._catch_up()

    def give_up(self) -> None:
        """Go on without the missing batches, and record them in the fault."""
        if self._later:
            first = min(self._later)
            self.next, lost = first, f"events {self.next} to {first - 1} are lost, until the server's cache is cleared"
            self.blocks.fault = self.blocks.fault or lost
            self._catch_up()

    def restart(self) -> None:
        """Reset: the server has restarted with an empty cache."""
        self.next = 0
        self._published = -1
        self._later.clear()
        self.blocks.clear()

    def _catch_up(self) -> None:
        while (events := self._later.pop(self.next, None)) is not None:
            self.next += 1
            self.blocks.apply(events)

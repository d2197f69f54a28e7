"""The commands of `emberkv.engine.commands` and their answers as bytes, so that a gateway gives them to a worker.

A command is ``[name, field, ...]``; a chain in it is its tokens, with what its hashes begin with and whose they are.
ReadEvents, ReadSnapshot and ReadLoad are not among them: they have routes of their own.
"""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import fields
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from emberkv.cluster import wire
from emberkv.core.explaining.explanation import CacheOutcome, MissReason
from emberkv.core.hashing import BlockHash, Chain, TokenChain
from emberkv.core.loading import LoadChoice
from emberkv.core.stats import SchedulerStats
from emberkv.engine.block_transfer import ImportedBlocks
from emberkv.engine.commands import (
    CachedTokens,
    Command,
    ExportBlocks,
    ExportCheckpoint,
    FindCached,
    ImportBlocks,
    LookedUp,
    LookUp,
    PoolStatistics,
    Remove,
    RemovedBlocks,
    Retain,
    Statistics,
    Unretain,
)
from emberkv.errors import ConfigError, RequestError, WireError
from emberkv.tiers.base import RemovalResult

R = TypeVar("R")

Hashes = tuple[wire.Hash, ...]


class _Chain(Struct, frozen=True, array_like=True):
    root: wire.Hash
    tokens: wire.Tokens
    block_size: Annotated[int, Meta(ge=1)]
    owner: str
    salt: bytes
    public_blocks: wire.Count


class _Message(Struct, frozen=True, array_like=True):
    """A command on the wire."""


class _Retain(_Message, frozen=True, tag="retain"):
    block_hashes: Hashes
    seconds: Annotated[float, Meta(ge=0)]


class _Unretain(_Message, frozen=True, tag="unretain"):
    block_hashes: Hashes


class _Remove(_Message, frozen=True, tag="remove"):
    block_hashes: Hashes | None
    tiers: bool


class _CachedTokens(_Message, frozen=True, tag="cached-tokens"):
    chain: _Chain


class _LookUp(_Message, frozen=True, tag="look-up"):
    chain: _Chain


class _FindCached(_Message, frozen=True, tag="find-cached"):
    block_hashes: Hashes


class _Statistics(_Message, frozen=True, tag="statistics"):
    pass


class _Export(_Message, frozen=True, tag="export"):
    block_hashes: Hashes


class _ExportCheckpoint(_Message, frozen=True, tag="export-checkpoint"):
    chain: _Chain
    position: wire.Count


class _Import(_Message, frozen=True, tag="import"):
    chain: _Chain
    records: tuple[bytes, ...]


class _Removed(Struct, frozen=True, array_like=True):
    pool: int
    tiers: dict[str, RemovalResult]


class _CacheOutcome(Struct, frozen=True):
    """As `CacheOutcome`. Of classes of the core msgspec cannot see the fields' types where they are compiled."""

    hit: dict[str, int]
    set_aside: dict[MissReason, int]
    refused: MissReason | None


class _LookedUp(Struct, frozen=True):
    outcome: _CacheOutcome
    hit_unit: int
    checkpoints: bool = False

    def received(self) -> LookedUp:
        outcome = CacheOutcome(self.outcome.hit, self.outcome.set_aside, self.outcome.refused)
        return LookedUp(outcome, self.hit_unit, self.checkpoints)


class _PoolStatistics(Struct, frozen=True):
    counters: dict[str, int | dict[str, int]]
    total: int
    in_use: int
    cached: int
    empty: int
    block_size: int
    bytes_by_owner: dict[str, float]

    def received(self) -> PoolStatistics:
        """What a later version counts beside is passed over. Raises WireError for a counter of another kind."""
        counters = SchedulerStats()
        for name in [each.name for each in fields(counters) if each.name in self.counters]:
            sent = self.counters[name]
            if isinstance(getattr(counters, name), Counter) is not isinstance(sent, dict):
                raise WireError(f"the counter {name} is {sent!r:.100}, which is of another kind here")
            setattr(counters, name, Counter(sent) if isinstance(sent, dict) else sent)
        choices = self.counters.get("load_choices")
        if isinstance(choices, dict):
            found = {choice: choices[choice.value] for choice in LoadChoice if choice.value in choices}
            counters.load_choices = Counter(found)
        rest = self.total, self.in_use, self.cached, self.empty, self.block_size, self.bytes_by_owner
        return PoolStatistics(counters, *rest)


_AnyMessage = (
    _Retain
    | _Unretain
    | _Remove
    | _CachedTokens
    | _LookUp
    | _FindCached
    | _Statistics
    | _Export
    | _ExportCheckpoint
    | _Import
)

_commands = msgspec.msgpack.Decoder(_AnyMessage)

_ANSWERS: Mapping[type[Command[Any]], Any] = {
    Retain: int,
    Unretain: None,
    CachedTokens: int,
    LookUp: _LookedUp,
    FindCached: list[bool],
    Statistics: _PoolStatistics,
    ExportBlocks: list[bytes | None],
    ExportCheckpoint: bytes | None,
    ImportBlocks: ImportedBlocks,
}


def encode_command(command: Command[Any], *, message_bytes: int = wire.MAX_MESSAGE_BYTES) -> bytes:
    """Raises ConfigError for a command that is not sent to workers, or is larger than the receiver accepts."""
    message: _AnyMessage
    match command:
        case Retain():
            message = _Retain(tuple(command.block_hashes), command.seconds)
        case Unretain():
            message = _Unretain(tuple(command.block_hashes))
        case Remove():
            message = _Remove(None if command.block_hashes is None else tuple(command.block_hashes), command.tiers)
        case CachedTokens():
            message = _CachedTokens(_sent(command.chain))
        case LookUp():
            message = _LookUp(_sent(command.chain))
        case FindCached():
            message = _FindCached(tuple(command.block_hashes))
        case Statistics():
            message = _Statistics()
        case ExportBlocks():
            message = _Export(tuple(command.block_hashes))
        case ExportCheckpoint():
            message = _ExportCheckpoint(_sent(command.chain), command.position)
        case ImportBlocks():
            message = _Import(_sent(command.chain), tuple(command.records))
        case _:
            raise ConfigError(f"{type(command).__name__} is not sent to workers; ask by its route")
    return _bounded(wire.encode(message), message_bytes)


def decode_command(data: bytes, root: BlockHash) -> Command[Any]:
    """root: of the model's block hashes. Raises WireError for bytes that are no command, RequestError for a chain of
    another model.
    """
    command: Command[Any]
    message = wire.decode_with(_commands, data)
    match message:
        case _Retain():
            command = Retain(message.block_hashes, message.seconds)
        case _Unretain():
            command = Unretain(message.block_hashes)
        case _Remove():
            command = Remove(message.block_hashes, message.tiers)
        case _CachedTokens():
            command = CachedTokens(_received(message.chain, root))
        case _LookUp():
            command = LookUp(_received(message.chain, root))
        case _FindCached():
            command = FindCached(message.block_hashes)
        case _Statistics():
            command = Statistics()
        case _Export():
            command = ExportBlocks(message.block_hashes)
        case _ExportCheckpoint():
            command = ExportCheckpoint(_received(message.chain, root), message.position)
        case _Import():
            command = ImportBlocks(_received(message.chain, root), message.records)
    return command


def encode_answer(
    answer: Any, removed: Mapping[str, RemovalResult] | None = None, *, message_bytes: int = wire.MAX_MESSAGE_BYTES
) -> bytes:
    """removed: what `RemovedBlocks.tiers` have answered. Raises ConfigError for an answer that is larger than the
    caller accepts.
    """
    if isinstance(answer, RemovedBlocks):
        return wire.encode(_Removed(answer.pool, dict(removed or {})))
    return _bounded(wire.encode(answer), message_bytes)


def _bounded(message: bytes, message_bytes: int) -> bytes:
    """The message, which only records of large blocks make too long."""
    if len(message) > message_bytes:
        raise ConfigError(
            f"a message of {len(message):,} bytes; at most {message_bytes:,} are sent, and blocks of fewer tokens "
            "take less: give the workers a smaller --block-size"
        )
    return message


def decode_answer(data: bytes, command: Command[R]) -> R:
    """The answer to ``command``. Raises WireError for anything else."""
    answer: Any
    if isinstance(command, Remove):
        found = wire.decode(data, _Removed)
        answer = RemovedBlocks(found.pool, {name: _done(each) for name, each in found.tiers.items()})
    else:
        answer = wire.decode(data, _ANSWERS[type(command)])
        if isinstance(answer, _LookedUp | _PoolStatistics):
            answer = answer.received()
    result: R = answer
    return result


def _done(removed: RemovalResult) -> "Future[RemovalResult]":
    future: Future[RemovalResult] = Future()
    future.set_result(removed)
    return future


def _sent(chain: Chain) -> _Chain:
    if not isinstance(chain, TokenChain):
        raise ConfigError(f"a {type(chain).__name__} has no token ids, which are what a worker needs")
    owner = chain.owner(chain.public_blocks)
    return _Chain(chain.root, chain.encoded(), chain.block_size, owner, chain.salt, chain.public_blocks)


def _received(chain: _Chain, root: BlockHash) -> TokenChain:
    if chain.root != root:
        raise RequestError("the chain is of another model, or of another block size, than this worker serves")
    tokens = wire.decode_prompt(chain.tokens)
    return TokenChain(
        root, tokens, chain.block_size, owner=chain.owner, salt=chain.salt, public_blocks=chain.public_blocks
    )

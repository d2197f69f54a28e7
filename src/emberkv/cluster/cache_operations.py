"""Messages by which a gateway operates a worker's cache: the operations behind the routes under /v1/cache.

    found = await connection.operate(FindPath(block_hash))
    await connection.operate(RemoveBlocks(None))

The answer to each is a map from names to plain values.
"""

import time
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from emberkv.cluster import wire
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.serving.cache.service import CacheService, Explained, PrefixPath, explanation_json
from emberkv.serving.errors import NotFoundError

Hashes = tuple[wire.Hash, ...]


class CacheOperation(Struct, frozen=True):
    """An operation that is sent to a worker."""

    async def carry_out(self, cache: CacheService, tokenizer: Tokenizer) -> dict[str, Any]:
        """Perform the operation at the worker, and return its answer. Raises EmberError."""
        raise NotImplementedError


class ListPrefixes(CacheOperation, frozen=True, tag="list"):
    """Answer: ``data``, as ``GET /v1/cache/prefixes`` has it. by: "hottest" or "largest"."""

    by: str
    limit: Annotated[int, Meta(ge=1)]

    async def carry_out(self, cache: CacheService, tokenizer: Tokenizer) -> dict[str, Any]:
        return {"data": await cache.prefixes(self.by, self.limit, tokenizer)}


class FindPath(CacheOperation, frozen=True, tag="find"):
    """Answer: ``block_hashes``, ``tokens``, ``tenant`` and ``parents`` of the prefix that ends with a block. Refused by
    NotFoundError where the worker does not know it.
    """

    block_hash: wire.Hash

    async def carry_out(self, cache: CacheService, tokenizer: Tokenizer) -> dict[str, Any]:
        path = await cache.path(self.block_hash)
        named = {"block_hashes": path.block_hashes, "tenant": path.tenant, "parents": list(path.parents)}
        return {**named, "tokens": wire.encode_prompt(path.tokens)}


class _OnPath(CacheOperation, frozen=True):
    block_hashes: Hashes
    tokens: wire.Tokens
    tenant: str

    @property
    def path(self) -> PrefixPath:
        """Raises WireError for a number of bytes that is not a multiple of a token's."""
        return PrefixPath(list(self.block_hashes), wire.decode_prompt(self.tokens), self.tenant)


class Pin(_OnPath, frozen=True, tag="pin"):
    """Answer: ``blocks``, ``retained_blocks`` and ``tokens_kept_warm``. For the fields see `CacheService.pin`."""

    seconds: float | None
    even_uncached: bool

    async def carry_out(self, cache: CacheService, tokenizer: Tokenizer) -> dict[str, Any]:
        return dict(await cache.pin(self.path, self.seconds, even_uncached=self.even_uncached))


class Unpin(_OnPath, frozen=True, tag="unpin"):
    """The answer is empty."""

    async def carry_out(self, cache: CacheService, tokenizer: Tokenizer) -> dict[str, Any]:
        await cache.unpin(self.path)
        return {}


class FindUnshared(CacheOperation, frozen=True, tag="unshared"):
    """Answer: ``block_hashes``, see `CacheService.unshared`. parents, tokens: of a prompt that fills no block."""

    block_hashes: Hashes
    parents: Hashes = ()
    tokens: wire.Tokens = b""

    async def carry_out(self, cache: CacheService, tokenizer: Tokenizer) -> dict[str, Any]:
        path = PrefixPath(list(self.block_hashes), wire.decode_prompt(self.tokens), "", self.parents)
        return {"block_hashes": await cache.unshared(path)}


class RemoveBlocks(CacheOperation, frozen=True, tag="remove"):
    """Answer: ``blocks``, ``learned_prompts`` and ``kept``, see `Removal.as_json`. block_hashes: None: all."""

    block_hashes: Hashes | None

    async def carry_out(self, cache: CacheService, tokenizer: Tokenizer) -> dict[str, Any]:
        return (await cache.remove_blocks(self.block_hashes)).as_json()


class ExplainRequest(CacheOperation, frozen=True, tag="explain"):
    """Answer: the explanation of a prompt that was served, as ``/v1/cache/explain`` has it. Refused by NotFoundError
    where the worker does not know it. request_id: the engine's.
    """

    request_id: wire.Name

    async def carry_out(self, cache: CacheService, tokenizer: Tokenizer) -> dict[str, Any]:
        explanation = cache.ledger_store.explained(self.request_id)
        if explanation is None:
            raise NotFoundError(f"request {self.request_id!r} is unknown to this worker, which remembers the last ones")
        return explanation_json(Explained(explanation), tokenizer, now=time.time())


_AnyOperation = ListPrefixes | FindPath | Pin | Unpin | FindUnshared | RemoveBlocks | ExplainRequest

_operations = msgspec.msgpack.Decoder(_AnyOperation)


def decode_operation(data: bytes) -> CacheOperation:
    """The operation in ``data``. Raises WireError for invalid bytes."""
    operation: CacheOperation = wire.decode_with(_operations, data)
    return operation


def find_unshared(path: PrefixPath) -> FindUnshared:
    """The operation for a path, whose tokens are sent only where they fill no block."""
    if path.block_hashes:
        return FindUnshared(tuple(path.block_hashes))
    return FindUnshared((), tuple(path.parents), wire.encode_prompt(path.tokens))


def on_path(kind: type[Pin] | type[Unpin], path: PrefixPath, **fields: Any) -> CacheOperation:
    """The operation of ``kind`` on a path. fields: the operation's further fields."""
    return kind(tuple(path.block_hashes), wire.encode_prompt(path.tokens), path.tenant, **fields)

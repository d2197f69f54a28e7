"""Looks into the cache and changes it: by commands to the engine's thread, and by reading the ledger of blocks."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import Enum
from math import inf
from typing import Any, TypeVar

from emberkv.core.events import POOL
from emberkv.core.explaining.explain import explain
from emberkv.core.explaining.explanation import Explanation, Reason
from emberkv.core.explaining.ledger import CachedPrefix, LedgerView, first_tokens, hottest, largest, path_to, unshared
from emberkv.core.hashing import PUBLIC_OWNER, BlockHash, TokenChain, decode_tokens
from emberkv.engine.commands import (
    Command,
    Execute,
    FindCached,
    LookUp,
    Remove,
    RemovedBlocks,
    Retain,
    Statistics,
    Unretain,
)
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.serving.cache.explain import Explained, text_of
from emberkv.serving.cache.ledger_store import LedgerStore
from emberkv.serving.cache.reuse_watch import ReuseWatch
from emberkv.serving.errors import NotFoundError
from emberkv.serving.tenancy.tenants import Tenant
from emberkv.serving.warmup.warmup import Warmup
from emberkv.tiers.base import Removed
from emberkv.tiers.stats import BOUNDS, Latencies, TierStats

R = TypeVar("R")

SHOWN_TOKENS = 24
"""Shown of the beginning of a listed prefix."""

ANSWER_SECONDS = 10.0
"""How long an answer about a removal waits for a disk."""

LEARNED = "learned_prompts"
NO_ANSWER = Removed(reason=f"no answer within {ANSWER_SECONDS:g} s; what is stored is removed when the disk answers")


@dataclass(frozen=True, slots=True)
class Path:
    """Full blocks from a chain's beginning, their tokens, and the name of the tenant whose they are."""

    block_hashes: list[BlockHash]
    tokens: Sequence[int]
    tenant: str


@dataclass(frozen=True, slots=True)
class Removal:
    """What a removal has removed. blocks: by place. learned_prompts: prefixes that no next start computes again.

    kept: what is still stored, though it is not served any more: by place, how many, and why.
    """

    blocks: Mapping[str, int]
    learned_prompts: int
    kept: Mapping[str, Mapping[str, int | str]]


class CacheService:
    """Looks into one model's cache, and changes it. Its coroutines belong to the event loop.

    execute: has commands carried out by the engine. chain: a prompt's blocks as its tenant's requests name them.
    tier_stats: of the tiers below the pool, by name. reuse: what caches of other sizes would find of the traffic; None:
    it is not followed. other_models: how many of a prompt's tokens are cached for each other model that is known of,
    by its name.
    """

    def __init__(
        self,
        ledger_store: LedgerStore,
        execute: Execute,
        chain: Callable[[Sequence[int], Tenant], TokenChain],
        *,
        tier_stats: Callable[[], Mapping[str, TierStats]] = dict,
        reuse: ReuseWatch | None = None,
        other_models: Callable[[Sequence[int], Tenant], Mapping[str, int]] = lambda _tokens, _tenant: {},
    ) -> None:
        self.ledger_store = ledger_store
        self.chain = chain
        self.reuse = reuse
        self.other_models = other_models
        self._execute = execute
        self._tier_stats = tier_stats

    async def statistics(self) -> dict[str, Any]:
        """Counters since the start, what each tier holds, by tenant too where shares are kept, and what an LRU pool of
        other sizes would find of recent prompts.
        """
        pool = await self._ask(Statistics())
        blocks = {"total": pool.total, "in_use": pool.in_use, "cached": pool.cached, "empty": pool.empty}
        held = {"blocks": blocks, "block_size": pool.block_size, "bytes_by_tenant": dict(pool.bytes_by_owner)}
        tiers = await asyncio.to_thread(self._tier_stats)
        return {
            "counters": plain(pool.counters),
            "places": {POOL: held, **{name: plain(stats) for name, stats in tiers.items()}},
            "other_sizes": [] if self.reuse is None else self.reuse.figures(),
        }

    async def explain(self, tokens: Sequence[int], tenant: Tenant, others: Sequence[Tenant] = ()) -> Explained:
        """What a prompt would hit if ``tenant`` sent it now, and why not more.

        others: tenants that the caller may hear of: whether one of them has what this tenant has not.
        """
        chain = await asyncio.to_thread(self.chain, tokens, tenant)
        found = await self._ask(LookUp(chain))

        def explained() -> Explanation:
            with self.ledger_store.reading() as ledger:
                return explain(ledger, chain, found.outcome, hit_unit=found.hit_unit)

        explanation = await asyncio.to_thread(explained)
        elsewhere: list[Mapping[str, Any]] = []
        for model, count in (await asyncio.to_thread(self.other_models, tokens, tenant)).items():
            elsewhere.append({"model": model, "tokens": count})
            explanation = explanation.with_elsewhere(Reason.OTHER_MODEL, count)
        for other in await self._holders(chain, tokens, [each for each in others if each != tenant]):
            theirs = await asyncio.to_thread(self.chain, tokens, other)
            count = (await self._ask(LookUp(theirs))).outcome.tokens
            elsewhere.append({"tenant": other.name, "tokens": count})
            explanation = explanation.with_elsewhere(Reason.OTHER_TENANT, count)
        return Explained(explanation, elsewhere=elsewhere)

    async def _holders(self, chain: TokenChain, tokens: Sequence[int], others: Sequence[Tenant]) -> list[Tenant]:
        """Which of the others have the prompt's first private block."""
        count = len(chain.block_hashes)
        first = next((index for index in range(count) if chain.owner(index) != PUBLIC_OWNER), count)
        if first == count:
            return []
        beginning = tokens[: (first + 1) * chain.block_size]

        def hash_all() -> list[BlockHash]:
            return [self.chain(beginning, other).block_hashes[first] for other in others]

        held = await self._ask(FindCached(await asyncio.to_thread(hash_all)))
        return [other for other, holds in zip(others, held, strict=True) if holds]

    async def prefixes(self, by: str, limit: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """by: "largest" or "hottest"."""
        return await asyncio.to_thread(self._listed, largest if by == "largest" else hottest, limit, tokenizer)

    def _listed(
        self, choose: Callable[[LedgerView, int], list[CachedPrefix]], limit: int, tokenizer: Tokenizer
    ) -> list[dict[str, Any]]:
        view = self.ledger_store.copied()
        chosen = [(each, first_tokens(view, each.block_hash, SHOWN_TOKENS)) for each in choose(view, limit)]
        return [
            {
                **{name: value for name, value in asdict(each).items() if name != "block_hash"},
                "identity": each.block_hash.hex(),
                "places": list(dict.fromkeys([*each.places, *self.ledger_store.below(each.block_hash)])),
                "begins": text_of(tokenizer, tokens),
            }
            for each, tokens in chosen
        ]

    async def path(self, block_hash: BlockHash) -> Path:
        """The way to a listed prefix. Raises NotFoundError when it is not known, or not any more."""
        return await asyncio.to_thread(self._path, block_hash)

    def _path(self, block_hash: BlockHash) -> Path:
        with self.ledger_store.reading() as ledger:
            entries = path_to(ledger, block_hash)
            owners = [border.owner for entry in entries if (border := ledger.border(entry)) is not None]
        if not entries:
            raise NotFoundError(f"prefix {block_hash.hex()!r} is not known here, or not any more", param="prefix")
        tokens = decode_tokens(b"".join(entry.tokens for entry in entries))
        return Path([entry.block_hash for entry in entries], list(tokens), owners[-1] if owners else "")

    async def retain(self, path: Path, seconds: float = inf) -> int:
        """Have the pool evict these blocks last, for so long; how many of them it retains."""
        return await self._ask(Retain(path.block_hashes, seconds))

    async def unretain(self, path: Path) -> None:
        await self._ask(Unretain(path.block_hashes))

    async def remove(self, path: Path, warmup: Warmup | None) -> Removal:
        """Remove a prefix and all that goes on from it, but not what other prefixes share, from pool, tiers and learned
        prompts. warmup: has these.
        """
        block_hashes = await asyncio.to_thread(self._unshared, path)
        removal = await self._remove(block_hashes, warmup)
        self.ledger_store.removed(block_hashes)
        return removal

    def _unshared(self, path: Path) -> list[BlockHash]:
        with self.ledger_store.reading() as ledger:
            return unshared(ledger, path.block_hashes)

    async def clear(self, warmup: Warmup | None) -> Removal:
        """Remove everything of this model, from pool, tiers and learned prompts."""
        removal = await self._remove(None, warmup)
        for place in removal.blocks:
            if place != POOL:
                self.ledger_store.cleared(place)
        return removal

    async def _remove(self, block_hashes: Collection[BlockHash] | None, warmup: Warmup | None) -> Removal:
        forgetting = asyncio.to_thread(warmup.forget, block_hashes) if warmup is not None else _nothing()
        learned = asyncio.ensure_future(forgetting)
        removed: RemovedBlocks = await self._ask(Remove(block_hashes))
        awaited = {name: asyncio.wrap_future(future) for name, future in removed.tiers.items()}
        await asyncio.wait([learned, *awaited.values()], timeout=ANSWER_SECONDS)
        results = {name: future.result() if future.done() else NO_ANSWER for name, future in awaited.items()}
        prompts = learned.result() if learned.done() else NO_ANSWER
        kept = {name: result for name, result in (*results.items(), (LEARNED, prompts)) if result.reason}
        return Removal(
            blocks={POOL: removed.pool, **{name: result.count for name, result in results.items()}},
            learned_prompts=prompts.count,
            kept={name: {"count": result.kept, "reason": result.reason} for name, result in kept.items()},
        )

    def _ask(self, command: Command[R]) -> Awaitable[R]:
        return asyncio.wrap_future(self._execute(command))


async def _nothing() -> Removed:
    return Removed()


def plain(stats: object) -> Any:
    """Figures as JSON has them. Not `dataclasses.asdict`, which spoils counters."""
    if isinstance(stats, Latencies):
        return {"upper_bounds": [*BOUNDS, None], "counts": list(stats.counts), "seconds": stats.seconds}
    if is_dataclass(stats) and not isinstance(stats, type):
        return {each.name: plain(getattr(stats, each.name)) for each in fields(stats)}
    if isinstance(stats, Mapping):
        return {plain(key): plain(value) for key, value in stats.items()}
    if isinstance(stats, (list, tuple)):
        return [plain(each) for each in stats]
    return stats.value if isinstance(stats, Enum) else stats

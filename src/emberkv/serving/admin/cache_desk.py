"""What the cache's own routes do: each of these is a command on the engine's thread, or a look into the books."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import Enum
from math import inf
from typing import Any, TypeVar

from emberkv.core.explaining.cached_prefixes import CachedPrefix, first_tokens, hottest, largest, path_to, unshared
from emberkv.core.explaining.explain import decode_tokens
from emberkv.core.explaining.explanation import POOL
from emberkv.core.explaining.ledger import LedgerView
from emberkv.core.hashing import Identity
from emberkv.core.policies.fair_shares import FairShares
from emberkv.core.scheduler import Scheduler
from emberkv.engine.tokenizer import Tokenizer
from emberkv.serving.admin.cache_access import CacheAccess
from emberkv.serving.admin.explain import text_of
from emberkv.serving.errors import NotFoundError
from emberkv.serving.warmup.warmup import Warmup
from emberkv.tiers.base import Removed
from emberkv.tiers.stats import BOUNDS, Latencies

T = TypeVar("T")

SHOWN_TOKENS = 24
"""Shown of the beginning of a listed prefix."""

ANSWER_SECONDS = 10.0
"""How long an answer about a removal waits for a disk."""

LEARNED = "learned_prompts"
NO_ANSWER = Removed(reason=f"no answer within {ANSWER_SECONDS:g} s; what is stored is removed when the disk answers")


@dataclass(frozen=True, slots=True)
class Path:
    """Full blocks from a chain's beginning, their tokens, and the name of the tenant whose they are."""

    identities: list[Identity]
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


class CacheDesk:
    """Over one model's cache; belongs to the event loop. warmup: of the model, which has learned prompts."""

    def __init__(self, cache: CacheAccess, warmup: Warmup | None = None) -> None:
        self._cache = cache
        self._warmup = warmup

    async def statistics(self) -> dict[str, Any]:
        """Counters since the start, what each place holds, by tenant too where shares are kept, and what an LRU pool of
        other sizes would find of recent prompts.
        """
        figures = await self._run(_figures)
        manager = self._cache.manager
        tiers = await asyncio.to_thread(manager.stats) if manager is not None else {}
        places = {POOL: figures.pop(POOL), **{name: plain(stats) for name, stats in tiers.items()}}
        reuse = self._cache.reuse
        return {**figures, "places": places, "other_sizes": [] if reuse is None else reuse.figures()}

    async def prefixes(self, by: str, limit: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """by: "largest" or "hottest"."""
        return await asyncio.to_thread(self._listed, largest if by == "largest" else hottest, limit, tokenizer)

    def _listed(
        self, choose: Callable[[LedgerView, int], list[CachedPrefix]], limit: int, tokenizer: Tokenizer
    ) -> list[dict[str, Any]]:
        view = self._cache.books.copied()
        chosen = [(each, first_tokens(view, each.identity, SHOWN_TOKENS)) for each in choose(view, limit)]
        return [
            {
                **asdict(each),
                "identity": each.identity.hex(),
                "places": list(dict.fromkeys([*each.places, *self._cache.books.below(each.identity)])),
                "begins": text_of(tokenizer, tokens),
            }
            for each, tokens in chosen
        ]

    async def path(self, identity: Identity) -> Path:
        """The way to a listed prefix. Raises NotFoundError when it is not known, or not any more."""
        return await asyncio.to_thread(self._path, identity)

    def _path(self, identity: Identity) -> Path:
        with self._cache.books.reading() as ledger:
            entries = path_to(ledger, identity)
            owners = [border.owner for entry in entries if (border := ledger.border(entry)) is not None]
        if not entries:
            raise NotFoundError(f"prefix {identity.hex()!r} is not known here, or not any more", param="prefix")
        tokens = decode_tokens(b"".join(entry.tokens for entry in entries))
        return Path([entry.identity for entry in entries], list(tokens), owners[-1] if owners else "")

    async def retain(self, path: Path, seconds: float) -> int:
        """Have the pool evict these blocks last, for so long; of how many it promises that."""
        until = inf if seconds == inf else self._cache.clock() + seconds
        return await self._run(lambda scheduler: scheduler.cache.pool.policy.retain(path.identities, until))

    async def let_go(self, path: Path) -> None:
        await self._run(lambda scheduler: scheduler.cache.pool.policy.let_go(path.identities))

    async def remove(self, path: Path) -> Removal:
        """Remove a prefix and all that goes on from it, but not what other prefixes share, from pool, tiers and learned
        prompts.
        """
        identities = await asyncio.to_thread(self._unshared, path)
        manager = self._cache.manager

        def command(scheduler: Scheduler) -> tuple[int, Mapping[str, Future[Removed]]]:
            return scheduler.remove(identities), manager.remove(identities) if manager is not None else {}

        removal = await self._removal(identities, command)
        self._cache.books.removed(identities)
        return removal

    def _unshared(self, path: Path) -> list[Identity]:
        with self._cache.books.reading() as ledger:
            return unshared(ledger, path.identities)

    async def clear(self) -> Removal:
        """Remove everything of this model, from pool, tiers and learned prompts."""
        manager = self._cache.manager

        def command(scheduler: Scheduler) -> tuple[int, Mapping[str, Future[Removed]]]:
            return _clear(scheduler), manager.clear() if manager is not None else {}

        removal = await self._removal(None, command)
        for place in removal.blocks:
            if place != POOL:
                self._cache.books.cleared(place)
        return removal

    async def _removal(
        self,
        identities: Collection[Identity] | None,
        command: Callable[[Scheduler], tuple[int, Mapping[str, Future[Removed]]]],
    ) -> Removal:
        """Pool and tiers are told between two steps, so that no block gets from one to the other meanwhile."""
        warmup = self._warmup
        forgetting = asyncio.to_thread(warmup.forget, identities) if warmup is not None else _nothing()
        learned = asyncio.ensure_future(forgetting)
        pool, futures = await self._run(command)
        awaited = {name: asyncio.wrap_future(future) for name, future in futures.items()}
        await asyncio.wait([learned, *awaited.values()], timeout=ANSWER_SECONDS)
        results = {name: future.result() if future.done() else NO_ANSWER for name, future in awaited.items()}
        prompts = learned.result() if learned.done() else NO_ANSWER
        kept = {name: result for name, result in (*results.items(), (LEARNED, prompts)) if result.reason}
        return Removal(
            blocks={POOL: pool, **{name: result.count for name, result in results.items()}},
            learned_prompts=prompts.count,
            kept={name: {"count": result.kept, "reason": result.reason} for name, result in kept.items()},
        )

    async def _run(self, command: Callable[[Scheduler], T]) -> T:
        return await asyncio.wrap_future(self._cache.run(command))


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


def _figures(scheduler: Scheduler) -> dict[str, Any]:
    pool, stats = scheduler.cache.pool, scheduler.stats
    blocks = {
        "total": pool.num_blocks,
        "in_use": pool.num_blocks - pool.num_free,
        "cached": pool.num_evictable,
        "empty": pool.num_free - pool.num_evictable,
    }
    shares = dict(pool.policy.bytes_by_owner()) if isinstance(pool.policy, FairShares) else {}
    return {
        "counters": plain(stats),
        POOL: {"blocks": blocks, "block_size": pool.block_size, "bytes_by_tenant": shares},
    }


def _clear(scheduler: Scheduler) -> int:
    pool = scheduler.cache.pool
    cached = pool.num_cached
    pool.clear()
    return cached

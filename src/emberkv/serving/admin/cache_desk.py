"""What the cache's own routes do: each of these is a command on the engine's thread, or a look into the books."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import Enum
from math import inf
from typing import Any, TypeVar

from emberkv.core.explaining.cached_prefixes import CachedPrefix, first_tokens, hottest, largest, path_to, unshared
from emberkv.core.explaining.explain import decode_tokens
from emberkv.core.explaining.explanation import POOL
from emberkv.core.explaining.ledger import Ledger
from emberkv.core.hashing import Identity
from emberkv.core.policies.fair_shares import FairShares
from emberkv.core.scheduler import Scheduler
from emberkv.engine.tokenizer import Tokenizer
from emberkv.serving.admin.cache_access import CacheAccess
from emberkv.serving.admin.explain import text_of
from emberkv.serving.api.failures import NotFoundError

T = TypeVar("T")

SHOWN_TOKENS = 24
"""Tokens told of the beginning of a listed prefix."""


@dataclass(frozen=True, slots=True)
class Path:
    """Full blocks from a chain's beginning, their tokens, and the name of the tenant whose they are."""

    identities: list[Identity]
    tokens: Sequence[int]
    tenant: str


class CacheDesk:
    """Over one model's cache; belongs to the event loop."""

    def __init__(self, cache: CacheAccess) -> None:
        self._cache = cache

    async def statistics(self) -> dict[str, Any]:
        """Counters since the start, what each place holds, by tenant too where shares are kept, and what an LRU pool of
        other sizes would find of recent prompts.
        """
        figures = await self._run(_figures)
        stack = self._cache.stack
        tiers = await asyncio.to_thread(stack.stats) if stack is not None else {}
        places = {POOL: figures.pop(POOL), **{name: plain(stats) for name, stats in tiers.items()}}
        reuse = self._cache.reuse
        return {**figures, "places": places, "other_sizes": [] if reuse is None else reuse.figures()}

    async def prefixes(self, by: str, limit: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """by: "largest" or "hottest"."""
        return await asyncio.to_thread(self._listed, largest if by == "largest" else hottest, limit, tokenizer)

    def _listed(
        self, choose: Callable[[Ledger, int], list[CachedPrefix]], limit: int, tokenizer: Tokenizer
    ) -> list[dict[str, Any]]:
        with self._cache.books.reading() as ledger:
            chosen = [(each, first_tokens(ledger, each.identity, SHOWN_TOKENS)) for each in choose(ledger, limit)]
        return [
            {
                **asdict(each),
                "identity": each.identity.hex(),
                "places": list(dict.fromkeys([*each.places, *self._cache.books.below(each.identity)])),
                "begins": text_of(tokenizer, tokens),
            }
            for each, tokens in chosen
        ]

    def path(self, identity: Identity) -> Path:
        """The way to a listed prefix. Raises NotFoundError when it is not known, or not any more."""
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

    async def remove(self, path: Path) -> dict[str, int]:
        """Forget a prefix and all that goes on from it, but not what other prefixes share; blocks, by place."""
        with self._cache.books.reading() as ledger:
            identities = unshared(ledger, path.identities)
        removed = await self._run(lambda scheduler: scheduler.remove(identities))
        stack = self._cache.stack
        below = await self._below(None if stack is None else stack.remove(identities))
        self._cache.books.removed(identities)
        return {POOL: removed, **below}

    async def clear(self) -> dict[str, int]:
        """Forget everything; blocks, by place."""
        removed = await self._run(_clear)
        stack = self._cache.stack
        below = await self._below(None if stack is None else stack.clear())
        for place in below:
            self._cache.books.cleared(place)
        return {POOL: removed, **below}

    async def _run(self, command: Callable[[Scheduler], T]) -> T:
        return await asyncio.wrap_future(self._cache.run(command))

    @staticmethod
    async def _below(removal: "Future[dict[str, int]] | None") -> dict[str, int]:
        return await asyncio.wrap_future(removal) if removal is not None else {}


def plain(stats: object) -> Any:
    """Figures as JSON has them. Not `dataclasses.asdict`, which spoils counters."""
    if is_dataclass(stats) and not isinstance(stats, type):
        return {each.name: plain(getattr(stats, each.name)) for each in fields(stats)}
    if isinstance(stats, Mapping):
        return {plain(key): plain(value) for key, value in stats.items()}
    if isinstance(stats, (list, tuple)):
        return [plain(each) for each in stats]
    return stats.value if isinstance(stats, Enum) else stats


def _figures(scheduler: Scheduler) -> dict[str, Any]:
    pool, stats = scheduler.cache.pool, scheduler.stats
    blocks = {"total": pool.num_blocks, "cached": pool.num_cached, "free": pool.num_free}
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

"""The way from the routes to what a model has cached: commands on the engine's thread, the tiers, the books."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

from emberkv.core.hashing import TokenChain
from emberkv.core.promotion import LowerTiers
from emberkv.core.scheduler import Scheduler
from emberkv.serving.admin.cache_books import CacheBooks
from emberkv.serving.admin.reuse_watch import ReuseWatch
from emberkv.serving.tenancy.tenants import Tenant
from emberkv.tiers.manager import TierManager

T = TypeVar("T")


class Runner(Protocol):
    def __call__(self, command: Callable[[Scheduler], T], /) -> "Future[T]":
        """Have a command executed on the engine's thread, between two steps."""
        ...


@dataclass(frozen=True)
class CacheAccess:
    """chain: a prompt's blocks as its tenant's requests name them. clock: seconds, by which retention ends.

    lower: what loads come from, asked without being counted; None: nothing is below the pool. manager: of the same
    tiers. reuse: what caches of other sizes would find of the traffic; None: it is not followed. other_models:
    how many of a prompt's tokens are cached for each other model that is known of, by its name.
    """

    books: CacheBooks
    run: Runner
    chain: Callable[[Sequence[int], Tenant], TokenChain]
    clock: Callable[[], float] = time.monotonic
    lower: LowerTiers | None = None
    manager: TierManager | None = None
    reuse: ReuseWatch | None = None
    other_models: Callable[[Sequence[int], Tenant], Mapping[str, int]] = lambda _tokens, _tenant: {}

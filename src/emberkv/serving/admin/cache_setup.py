"""Ties the books and the cache's own routes to an engine: its news, its tiers, its names for blocks."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from emberkv.core.explaining.explain import admission_outcome
from emberkv.core.hashing import TokenChain
from emberkv.engine.news import CacheNews, CacheObserver
from emberkv.engine.request import GenerationRequest
from emberkv.engine.sampling_params import SamplingParams
from emberkv.serving.admin.cache_access import CacheAccess
from emberkv.serving.admin.cache_books import CacheBooks
from emberkv.serving.admin.other_models import KnownModel, OtherModels
from emberkv.serving.admin.reuse_watch import ReuseWatch
from emberkv.serving.background import Background
from emberkv.serving.tenancy.tenants import Tenant

if TYPE_CHECKING:  # needs torch
    from emberkv.engine.assembly import AssembledEngine

_log = logging.getLogger(__name__)

_ANY_ANSWER = SamplingParams(max_tokens=1)


def observer(books: CacheBooks, *, hit_unit: int) -> CacheObserver:
    """Writes an engine's news into books. hit_unit: as `PrefixCache.hit_unit`.

    Where events were missed, the ledger keeps some blocks that are gone: reasons and lists suffer, not hits, which are
    looked up in the cache itself.
    """

    def saw(news: CacheNews) -> None:
        for sequence in news.admitted:
            if sequence.admission is not None and isinstance(sequence.chain, TokenChain):
                outcome = admission_outcome(sequence.admission, sequence.prompt_tokens)
                books.admitted(sequence.request_id, sequence.chain, sequence.prompt_tokens, outcome, hit_unit=hit_unit)
        if news.events:
            books.saw([numbered.event for numbered in news.events])

    return saw


def cache_access(
    engine: "AssembledEngine",
    books: CacheBooks,
    *,
    name: str,
    folder: Path | None = None,
    background: Background | None = None,
) -> CacheAccess:
    """The way to an engine's cache; from now on its news are written into ``books``. Call before the engine starts.

    name: of the model. folder: where it keeps blocks; its name is written there, for other models to tell. background:
    counts what of the news cannot be taken in.
    """
    loop = engine.loop
    background = background or Background()
    ledger = background.work("ledger of blocks")
    loop.watch(ledger.guarded(observer(books, hit_unit=engine.scheduler.cache.hit_unit)))
    reuse = ReuseWatch(engine.executor.pool.num_blocks, engine.executor.pool.block_bytes)
    loop.watch(background.work("reuse estimates").guarded(reuse.saw))
    if engine.tiers is not None:
        books.below = engine.tiers.tiers_of

    def chain(tokens: Sequence[int], tenant: Tenant) -> TokenChain:
        return loop.chain(GenerationRequest("", tokens, _ANY_ANSWER, tenant.salt, tenant=tenant.name))

    lower = engine.link.peeking if engine.link is not None else None
    access = CacheAccess(books, loop.run, chain, lower=lower, manager=engine.tiers, reuse=reuse)
    if folder is None or engine.tiers is None:
        return access
    own = KnownModel(name=name, root=engine.root, block_size=engine.scheduler.cache.pool.block_size)
    try:
        models = OtherModels(folder, engine.namespace, own)
    except OSError as error:  # a folder that cannot be written serves what it has all the same
        _log.warning("the cache folder's list of models cannot be written (%s)", type(error).__name__)
        return access

    def others(tokens: Sequence[int], tenant: Tenant) -> Mapping[str, int]:
        return models.cached(tokens, chain(tokens, tenant), tenant.salt)

    return replace(access, other_models=others)

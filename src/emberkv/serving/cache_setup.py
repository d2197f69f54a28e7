"""Ties the books and the cache's own routes to an engine: its news, its tiers, its names for blocks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from emberkv.core.explain import admission_outcome
from emberkv.core.hashing import TokenChain
from emberkv.engine.news import CacheNews, CacheObserver
from emberkv.engine.request import GenerationRequest
from emberkv.engine.sampling_params import SamplingParams
from emberkv.serving.cache_access import CacheAccess
from emberkv.serving.cache_books import CacheBooks
from emberkv.serving.tenants import Tenant

if TYPE_CHECKING:  # needs torch
    from emberkv.engine.assembly import AssembledEngine

_ANY_ANSWER = SamplingParams(max_tokens=1)


def observer(books: CacheBooks, *, alignment: int) -> CacheObserver:
    """Writes an engine's news into books. alignment: tokens of the unit in which state can be reused.

    Where events were missed, the ledger keeps some blocks that are gone: reasons and lists suffer, not hits, which are
    looked up in the cache itself.
    """

    def saw(news: CacheNews) -> None:
        for sequence in news.admitted:
            if sequence.admission is not None and isinstance(sequence.chain, TokenChain):
                outcome = admission_outcome(sequence.admission, sequence.prompt_tokens)
                books.admitted(
                    sequence.request_id, sequence.chain, sequence.prompt_tokens, outcome, alignment=alignment
                )
        if news.events:
            books.saw([numbered.event for numbered in news.events])

    return saw


def cache_access(engine: "AssembledEngine", books: CacheBooks) -> CacheAccess:
    """The way to an engine's cache; from now on its news are written into ``books``. Call before the engine starts."""
    loop = engine.loop
    loop.watch(observer(books, alignment=engine.scheduler.cache.alignment))
    if engine.tiers is not None:
        books.below = engine.tiers.places

    def chain(tokens: Sequence[int], tenant: Tenant) -> TokenChain:
        return loop.chain(GenerationRequest("", tokens, _ANY_ANSWER, tenant.salt, tenant=tenant.name))

    return CacheAccess(books, loop.run, chain, lower=engine.link, stack=engine.tiers)

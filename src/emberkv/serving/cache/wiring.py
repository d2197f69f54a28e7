"""Connects the ledger and the cache's own routes to an engine."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emberkv.core.explaining.explain import admission_outcome
from emberkv.core.hashing import TokenChain
from emberkv.engine.loop import CacheObserver, CacheUpdate
from emberkv.engine.request import GenerationRequest, SamplingParams
from emberkv.serving.background import Background
from emberkv.serving.cache.ledger_store import LedgerStore
from emberkv.serving.cache.other_models import KnownModel, OtherModels
from emberkv.serving.cache.reuse_watch import ReuseWatch
from emberkv.serving.cache.service import CacheService
from emberkv.serving.tenancy.tenants import Tenant

if TYPE_CHECKING:  # needs torch
    from emberkv.engine.assembly import AssembledEngine


_log = logging.getLogger(__name__)

_ANY_ANSWER = SamplingParams(max_tokens=1)


def observer(ledger_store: LedgerStore, *, hit_unit: int) -> CacheObserver:
    """Writes an engine's updates into the ledger. hit_unit: as `PrefixCache.hit_unit`.

    Where events were missed, the ledger keeps some blocks that are gone: reasons and lists suffer, not hits, which are
    looked up in the cache itself.
    """

    def on_update(update: CacheUpdate) -> None:
        for sequence in update.admitted:
            if sequence.admission is not None and isinstance(sequence.chain, TokenChain):
                outcome = admission_outcome(sequence.admission, sequence.prompt_tokens)
                ledger_store.admitted(
                    sequence.request_id, sequence.chain, sequence.prompt_tokens, outcome, hit_unit=hit_unit
                )
        if update.events:
            ledger_store.apply(update.events)

    return on_update


def cache_service(
    engine: "AssembledEngine",
    ledger_store: LedgerStore,
    *,
    name: str,
    folder: Path | None = None,
    background: Background | None = None,
) -> CacheService:
    """The service for an engine's cache, whose updates are written into the ledger from now on. Call it before the
    engine starts.

    name: of the model. folder: where the model keeps blocks; its name is written there, for other models to read.
    background: counts failures to take an update in.
    """
    loop = engine.loop
    background = background or Background()
    ledger = background.work("ledger of blocks")
    loop.on_update(ledger.guarded(observer(ledger_store, hit_unit=engine.hit_unit)))
    reuse = ReuseWatch(engine.executor.pool.num_blocks, engine.executor.pool.block_bytes)
    loop.on_update(background.work("reuse estimates").guarded(reuse.on_update))
    if engine.tiers is not None:
        ledger_store.below = engine.tiers.tiers_of

    def chain(tokens: Sequence[int], tenant: Tenant) -> TokenChain:
        return loop.chain(GenerationRequest("", tokens, _ANY_ANSWER, tenant.salt, tenant=tenant.name))

    tier_stats = engine.tiers.stats if engine.tiers is not None else dict
    service = CacheService(ledger_store, loop.execute, chain, tier_stats=tier_stats, reuse=reuse)
    if folder is None or engine.tiers is None:
        return service
    own = KnownModel(name=name, root=engine.root, block_size=engine.block_size)
    try:
        models = OtherModels(folder, engine.namespace, own)
    except OSError as error:  # a folder that cannot be written serves what it has all the same
        _log.warning("the cache folder's list of models cannot be written (%s)", type(error).__name__)
        return service

    def others(tokens: Sequence[int], tenant: Tenant) -> Mapping[str, int]:
        return models.cached(tokens, chain(tokens, tenant), tenant.salt)

    service.other_models = others
    return service

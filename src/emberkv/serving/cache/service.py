"""Looks into the cache and changes it: by commands to the engine's thread, and by reading the ledger of blocks."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from emberkv.core.events import POOL
from emberkv.core.explaining.explain import admission_outcome, explain
from emberkv.core.explaining.explanation import Divergence, Explanation, Miss, MissReason
from emberkv.core.explaining.ledger import (
    CachedPrefix,
    LedgerView,
    beginning_with,
    first_tokens,
    hottest,
    largest,
    path_to,
    unshared,
)
from emberkv.core.hashing import PUBLIC_OWNER, BlockHash, TokenChain, decode_tokens, partial_siblings_hash
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
from emberkv.engine.loop import CacheObserver, CacheUpdate
from emberkv.engine.request import GenerationRequest, SamplingParams
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.serving.background import Background
from emberkv.serving.cache.ledger_store import LedgerStore, ReuseWatch
from emberkv.serving.cache.other_models import KnownModel, OtherModels
from emberkv.serving.errors import NotFoundError
from emberkv.serving.tenancy import Tenant
from emberkv.serving.warmup.warmup import Warmup
from emberkv.tiers.base import RemovalResult
from emberkv.tiers.stats import BOUNDS, Latencies, TierStats

if TYPE_CHECKING:  # needs torch
    from emberkv.engine.assembly import AssembledEngine


BROKEN = "\ufffd"


@dataclass(frozen=True, slots=True)
class Explained:
    """canonical: lines or tools changed, by rule. elsewhere: tokens that other tenants or models have cached."""

    explanation: Explanation
    canonical: Mapping[str, int] = field(default_factory=dict)
    elsewhere: Sequence[Mapping[str, Any]] = ()


def explanation_json(explained: Explained, tokenizer: Tokenizer, *, now: float) -> dict[str, Any]:
    """What ``/v1/cache/explain`` answers. now: seconds since 1970."""
    explanation = explained.explanation
    return {
        "object": "cache.explanation",
        "prompt_tokens": explanation.prompt_tokens,
        "hit_tokens": explanation.hit_tokens,
        "hit_tokens_by_tier": dict(explanation.hit),
        "misses": [_miss_json(miss, now) for miss in explanation.misses],
        "divergence": explanation.divergence and _divergence_json(explanation.divergence, tokenizer),
        "canonical": dict(explained.canonical),
        "elsewhere": [dict(each) for each in explained.elsewhere],
    }


def _miss_json(miss: Miss, now: float) -> dict[str, Any]:
    lost = miss.loss and {
        "tier": miss.loss.tier,
        "how": miss.loss.kind.value,
        "at": round(miss.loss.at, 3),
        "seconds_ago": round(max(0.0, now - miss.loss.at), 3),
    }
    return {"reason": miss.reason.value, "start": miss.start, "tokens": miss.tokens, "lost": lost}


def _divergence_json(divergence: Divergence, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": divergence.position,
        "still_cached": divergence.cached,
        "before": text_of(tokenizer, divergence.before),
        "expected": text_of(tokenizer, divergence.expected),
        "found": text_of(tokenizer, divergence.found),
    }


def text_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Tokens as a person reads them, special ones included; half a character at either end shows as U+FFFD."""
    shown = ""
    pieces: list[int] = []
    for token_id in token_ids:
        text = tokenizer.token_text(token_id)
        if BROKEN in text:
            pieces.append(token_id)
            continue
        shown += _joined(tokenizer, pieces) + text
        pieces = []
    return shown + _joined(tokenizer, pieces)


def _joined(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The characters that tokens make up together which are none alone."""
    detokenizer = tokenizer.detokenizer()
    return detokenizer.push(token_ids) + detokenizer.flush() if token_ids else ""


R = TypeVar("R")

SHOWN_TOKENS = 24
"""Shown of the beginning of a listed prefix."""

ANSWER_SECONDS = 10.0
"""How long an answer about a removal waits for a disk."""

LEARNED = "learned_prompts"
NO_ANSWER = RemovalResult(
    reason=f"no answer within {ANSWER_SECONDS:g} s; what is stored is removed when the disk answers"
)


@dataclass(frozen=True, slots=True)
class PrefixPath:
    """Full blocks from a chain's beginning, their tokens, and the name of the tenant that owns them.

    parents: the hash before each block, with the tenant's salt; one more for tokens that fill no block. Only what
    removes a path needs them.
    """

    block_hashes: list[BlockHash]
    tokens: Sequence[int]
    tenant: str
    parents: Sequence[BlockHash] = ()

    @classmethod
    def of(cls, chain: TokenChain, tokens: Sequence[int], tenant: str) -> "PrefixPath":
        """The full blocks of ``chain``, whose tokens are ``tokens``."""
        parents = [chain.parent(index) for index in range(max(1, len(chain.block_hashes)))]
        return cls(list(chain.block_hashes), tokens, tenant, parents)

    def removed_with(self, first: int) -> list[BlockHash]:
        """What stands for the partial blocks beside this path from block ``first`` on, in a removal."""
        return [partial_siblings_hash(parent) for parent in self.parents[first:]]


@dataclass(frozen=True, slots=True)
class Removal:
    """What a removal has removed. pool: blocks of the pool. tiers: the lower tiers' answers, by name. learned: prefixes
    that the next start does not warm.
    """

    pool: int
    tiers: Mapping[str, RemovalResult]
    learned: RemovalResult

    def as_json(self) -> dict[str, Any]:
        """blocks: by tier. learned_prompts: a count. kept: by tier, how many are still stored though they are served
        no longer, and why.
        """
        answers = {**self.tiers, LEARNED: self.learned}
        return {
            "blocks": {POOL: self.pool, **{name: each.count for name, each in self.tiers.items()}},
            "learned_prompts": self.learned.count,
            "kept": {
                name: {"count": each.kept, "reason": each.reason} for name, each in answers.items() if each.reason
            },
        }


class CacheService:
    """Looks into one model's cache, and changes it. Its coroutines belong to the event loop.

    execute: has commands carried out by the engine. chain: a prompt's blocks as its tenant's requests name them.
    tier_stats: of the tiers below the pool, by name. reuse: what caches of other sizes would find of the traffic; None:
    it is not followed. other_models: how many of a prompt's tokens are cached for each other model that is known of,
    by its name. warmup: has the pinned and the learned prompts.
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
        warmup: Warmup | None = None,
    ) -> None:
        self.ledger_store = ledger_store
        self.chain = chain
        self.reuse = reuse
        self.other_models = other_models
        self._execute = execute
        self._tier_stats = tier_stats
        self._warmup = warmup

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
            "tiers": {POOL: held, **{name: plain(stats) for name, stats in tiers.items()}},
            "other_sizes": [] if self.reuse is None else self.reuse.as_json(),
        }

    async def explain(self, tokens: Sequence[int], tenant: Tenant, others: Sequence[Tenant] = ()) -> Explained:
        """What a prompt would hit if ``tenant`` sent it now, and why not more.

        others: tenants that the caller may hear of: whether one of them has what this tenant has not.
        """
        chain = await asyncio.to_thread(self.chain, tokens, tenant)
        found = await self._ask(LookUp(chain))

        def explained() -> Explanation:
            with self.ledger_store.reading() as ledger:
                return explain(ledger, chain, found.outcome, hit_unit=found.hit_unit, checkpoints=found.checkpoints)

        explanation = await asyncio.to_thread(explained)
        elsewhere: list[Mapping[str, Any]] = []
        for model, count in (await asyncio.to_thread(self.other_models, tokens, tenant)).items():
            elsewhere.append({"model": model, "tokens": count})
            explanation = explanation.with_elsewhere(MissReason.OTHER_MODEL, count)
        for other in await self._holders(chain, tokens, [each for each in others if each != tenant]):
            theirs = await asyncio.to_thread(self.chain, tokens, other)
            count = (await self._ask(LookUp(theirs))).outcome.tokens
            if count <= theirs.public_blocks * theirs.block_size:
                continue
            elsewhere.append({"tenant": other.name, "tokens": count})
            explanation = explanation.with_elsewhere(MissReason.OTHER_TENANT, count)
        return Explained(explanation, elsewhere=elsewhere)

    async def _holders(self, chain: TokenChain, tokens: Sequence[int], others: Sequence[Tenant]) -> list[Tenant]:
        """Which of the others may have more of a prompt than what is public: those that have its first private block,
        also in a tier below, or in the pool any block in its place, which may begin like it.
        """
        count = len(chain.block_hashes)
        first = next((index for index in range(count) if chain.owner(index) != PUBLIC_OWNER), count)
        beginning = tokens[: (first + 1) * chain.block_size]
        if len(beginning) == first * chain.block_size:
            return []

        def hash_all() -> list[BlockHash]:
            theirs = [self.chain(beginning, other) for other in others]
            blocks = [each.block_hashes[first] for each in theirs if first < count]
            return [*(each.parent(first) for each in theirs), *blocks]

        held = await self._ask(FindCached(await asyncio.to_thread(hash_all)))
        follow, whole = held[: len(others)], held[len(others) :] or [False] * len(others)
        return [other for other, *holds in zip(others, follow, whole, strict=True) if any(holds)]

    async def prefixes(self, by: str, limit: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """by: "largest" or "hottest"."""
        return await asyncio.to_thread(self._listed, largest if by == "largest" else hottest, limit, tokenizer)

    def _listed(
        self, choose: Callable[[LedgerView, int], list[CachedPrefix]], limit: int, tokenizer: Tokenizer
    ) -> list[dict[str, Any]]:
        view = self.ledger_store.copied()
        chosen = [(each, first_tokens(view, each.block_hash, SHOWN_TOKENS)) for each in choose(view, limit)]
        listed = []
        for each, tokens in chosen:
            tiers = list(dict.fromkeys([*each.tiers, *self.ledger_store.below(each.block_hash)]))
            counts = {name: value for name, value in asdict(each).items() if name not in ("block_hash", "tiers")}
            names = {"block_hash": each.block_hash.hex(), "tiers": tiers}
            listed.append({**counts, **names, "begins": text_of(tokenizer, tokens)})
        return listed

    async def path(self, block_hash: BlockHash) -> PrefixPath:
        """The way to a listed prefix. Raises NotFoundError when it is not known, or not any more."""
        return await asyncio.to_thread(self._path, block_hash)

    def _path(self, block_hash: BlockHash) -> PrefixPath:
        with self.ledger_store.reading() as ledger:
            entries = path_to(ledger, block_hash)
            owners = [border.owner for entry in entries if (border := ledger.border(entry)) is not None]
        if not entries:
            raise NotFoundError(f"prefix {block_hash.hex()!r} is not known here, or not any more", param="prefix")
        tokens = decode_tokens(b"".join(entry.tokens for entry in entries))
        parents = [entry.parent for entry in entries]
        return PrefixPath([entry.block_hash for entry in entries], list(tokens), owners[-1] if owners else "", parents)

    async def pin(self, path: PrefixPath, seconds: float | None, *, even_uncached: bool = True) -> dict[str, int]:
        """Have the pool evict a prefix last, for so long; None: until it is unpinned, and have it warmed again whenever
        it is lost. even_uncached: False leaves a prefix alone of which the pool has nothing.
        """
        retained = await self._ask(Retain(path.block_hashes, inf if seconds is None else seconds))
        kept_warm = 0
        if self._warmup is not None and seconds is None and (retained or even_uncached):
            kept_warm = self._warmup.pin(path.tokens, path.tenant)
        return {"blocks": len(path.block_hashes), "retained_blocks": retained, "tokens_kept_warm": kept_warm}

    async def unpin(self, path: PrefixPath) -> None:
        await self._ask(Unretain(path.block_hashes))
        if self._warmup is not None:
            self._warmup.unpin(path.tokens, path.tenant)

    async def remove(self, path: PrefixPath) -> Removal:
        """Remove a prefix and all that goes on from it, but not what other prefixes share."""
        gone = await self.unshared(path)
        shared = len(set(path.block_hashes).difference(gone))
        return await self.remove_blocks([*gone, *path.removed_with(shared)])

    async def unshared(self, path: PrefixPath) -> list[BlockHash]:
        """Of a prefix's blocks and all that go on from it, those that no other known prefix shares."""

        def found() -> list[BlockHash]:
            with self.ledger_store.reading() as ledger:
                if path.block_hashes:
                    return unshared(ledger, path.block_hashes)
                return [each for parent in path.parents for each in beginning_with(ledger, parent, path.tokens)]

        return await asyncio.to_thread(found)

    async def remove_blocks(self, block_hashes: Collection[BlockHash] | None) -> Removal:
        """Remove blocks, or with None everything of this model, from pool, tiers and learned prompts."""
        removal = await self._removed(block_hashes)
        if block_hashes is not None:
            self.ledger_store.removed(list(block_hashes))
        else:
            for tier in removal.tiers:
                self.ledger_store.cleared(tier)
        return removal

    async def _removed(self, block_hashes: Collection[BlockHash] | None) -> Removal:
        warmup = self._warmup
        forgetting = asyncio.to_thread(warmup.forget, block_hashes) if warmup is not None else _nothing()
        learned = asyncio.ensure_future(forgetting)
        removed: RemovedBlocks = await self._ask(Remove(block_hashes))
        awaited = {name: asyncio.wrap_future(future) for name, future in removed.tiers.items()}
        await asyncio.wait([learned, *awaited.values()], timeout=ANSWER_SECONDS)
        results = {name: future.result() if future.done() else NO_ANSWER for name, future in awaited.items()}
        return Removal(removed.pool, results, learned.result() if learned.done() else NO_ANSWER)

    def _ask(self, command: Command[R]) -> Awaitable[R]:
        return asyncio.wrap_future(self._execute(command))


async def _nothing() -> RemovalResult:
    return RemovalResult()


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


_log = logging.getLogger(__name__)

_ANY_ANSWER = SamplingParams(max_tokens=1)


def observer(ledger_store: LedgerStore, *, hit_unit: int, checkpoints: bool = False) -> CacheObserver:
    """Writes an engine's updates into the ledger. hit_unit, checkpoints: as for `explain`.

    Where events were missed, the ledger keeps some blocks that are gone: reasons and lists suffer, not hits, which are
    looked up in the cache itself.
    """

    def on_update(update: CacheUpdate) -> None:
        for sequence in update.admitted:
            if sequence.admission is not None and isinstance(sequence.chain, TokenChain):
                outcome = admission_outcome(sequence.admission, sequence.prompt_tokens)
                ledger_store.admitted(
                    sequence.request_id,
                    sequence.chain,
                    sequence.prompt_tokens,
                    outcome,
                    hit_unit=hit_unit,
                    checkpoints=checkpoints,
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
    warmup: Warmup | None = None,
) -> CacheService:
    """The service for an engine's cache, whose updates are written into the ledger from now on. Call it before the
    engine starts.

    name: of the model. folder: where the model keeps blocks; its name is written there, for other models to read.
    background: counts failures to take an update in. warmup: has the pinned and the learned prompts.
    """
    loop = engine.loop
    background = background or Background()
    ledger = background.work("ledger of blocks")
    checkpoints = engine.scheduler.cache.keeps_branches
    loop.on_update(ledger.guarded(observer(ledger_store, hit_unit=engine.hit_unit, checkpoints=checkpoints)))
    reuse = ReuseWatch(engine.executor.pool.num_blocks, engine.executor.pool.block_bytes)
    loop.on_update(background.work("reuse estimates").guarded(reuse.on_update))
    if engine.tiers is not None:
        ledger_store.below = engine.tiers.tiers_of

    def chain(tokens: Sequence[int], tenant: Tenant) -> TokenChain:
        return loop.chain(GenerationRequest("", tokens, _ANY_ANSWER, tenant.salt, tenant=tenant.name))

    tier_stats = engine.tiers.stats if engine.tiers is not None else dict
    service = CacheService(ledger_store, loop.execute, chain, tier_stats=tier_stats, reuse=reuse, warmup=warmup)
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

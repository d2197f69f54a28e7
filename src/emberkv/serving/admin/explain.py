"""Explains a prompt that is only asked about, and writes explanations as JSON, with the texts around a divergence."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emberkv.core.explaining.explain import explain
from emberkv.core.explaining.explanation import Divergence, Explanation, Miss, Reason
from emberkv.core.explaining.look_up import look_up
from emberkv.core.hashing import PUBLIC_OWNER, Identity, TokenChain
from emberkv.core.promotion import LowerTiers
from emberkv.core.scheduler import Scheduler
from emberkv.engine.tokenizer import Tokenizer
from emberkv.serving.admin.cache_access import CacheAccess
from emberkv.serving.api.rendering import RenderedPrompt
from emberkv.serving.tenancy.tenants import Tenant

BROKEN = "\ufffd"


@dataclass(frozen=True, slots=True)
class Explained:
    """canonical: lines or tools changed, by rule. elsewhere: tokens that other tenants or models have cached."""

    explanation: Explanation
    canonical: Mapping[str, int] = field(default_factory=dict)
    elsewhere: Sequence[Mapping[str, Any]] = ()


async def explain_prompt(
    cache: CacheAccess, prompt: RenderedPrompt, tenant: Tenant, others: Sequence[Tenant]
) -> Explained:
    """What the prompt would hit if ``tenant`` sent it now, and why not more.

    others: tenants that the asker may hear of: whether one of them has what this tenant has not.
    """
    chain = await asyncio.to_thread(cache.chain, prompt.token_ids, tenant)
    outcome, hit_unit = await asyncio.wrap_future(
        cache.run(lambda scheduler: (look_up(scheduler.cache, cache.lower, chain), scheduler.cache.hit_unit))
    )

    def explained() -> Explanation:
        with cache.books.reading() as ledger:
            return explain(ledger, chain, outcome, hit_unit=hit_unit)

    explanation = await asyncio.to_thread(explained)
    elsewhere: list[Mapping[str, Any]] = []
    for model, tokens in (await asyncio.to_thread(cache.other_models, prompt.token_ids, tenant)).items():
        elsewhere.append({"model": model, "tokens": tokens})
        explanation = explanation.with_elsewhere(Reason.OTHER_MODEL, tokens)
    for other in await _holders(cache, chain, prompt.token_ids, [each for each in others if each != tenant]):
        theirs = await asyncio.to_thread(cache.chain, prompt.token_ids, other)
        tokens = await asyncio.wrap_future(cache.run(_cached_tokens(cache, theirs)))
        elsewhere.append({"tenant": other.name, "tokens": tokens})
        explanation = explanation.with_elsewhere(Reason.OTHER_TENANT, tokens)
    return Explained(explanation, prompt.canonical, elsewhere)


async def _holders(
    cache: CacheAccess, chain: TokenChain, token_ids: Sequence[int], others: Sequence[Tenant]
) -> list[Tenant]:
    """Which of the others have the prompt's first private block."""
    count = len(chain.identities)
    first = next((index for index in range(count) if chain.owner(index) != PUBLIC_OWNER), count)
    if first == count:
        return []
    beginning = token_ids[: (first + 1) * chain.block_size]

    def name_all() -> list[Identity]:
        return [cache.chain(beginning, other).identities[first] for other in others]

    def which(scheduler: Scheduler) -> list[bool]:
        return [_is_somewhere(scheduler, cache.lower, identity) for identity in identities]

    identities = await asyncio.to_thread(name_all)
    held = await asyncio.wrap_future(cache.run(which))
    return [other for other, holds in zip(others, held, strict=True) if holds]


def _is_somewhere(scheduler: Scheduler, lower: LowerTiers | None, identity: Identity) -> bool:
    if scheduler.cache.pool.lookup(identity) is not None:
        return True
    return lower is not None and bool(lower.find([identity], exact=False))


def _cached_tokens(cache: CacheAccess, chain: TokenChain) -> Callable[[Scheduler], int]:
    return lambda scheduler: look_up(scheduler.cache, cache.lower, chain).tokens


def explanation_json(explained: Explained, tokenizer: Tokenizer, *, now: float) -> dict[str, Any]:
    """What ``/v1/cache/explain`` answers. now: seconds since 1970."""
    explanation = explained.explanation
    return {
        "object": "cache.explanation",
        "prompt_tokens": explanation.prompt_tokens,
        "hit_tokens": explanation.hit_tokens,
        "hit_tokens_by_place": dict(explanation.hit),
        "misses": [_miss_json(miss, now) for miss in explanation.misses],
        "divergence": explanation.divergence and _divergence_json(explanation.divergence, tokenizer),
        "canonical": dict(explained.canonical),
        "elsewhere": [dict(each) for each in explained.elsewhere],
    }


def _miss_json(miss: Miss, now: float) -> dict[str, Any]:
    lost = miss.loss and {
        "place": miss.loss.place,
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

"""Explanations as JSON, with the texts around a divergence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emberkv.core.explaining.explanation import Divergence, Explanation, Miss
from emberkv.engine.tokenization.tokenizer import Tokenizer

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

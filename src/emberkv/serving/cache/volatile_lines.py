"""Finds volatile lines in prompts that miss, and suggests canonical rules that would turn the misses into hits.

If a line has a value that changes with each session, the prompts of different sessions first differ in that line, after
the same words. The tokens after the line are compared with those of the prompt before. Their common prefix would have
been a hit if the line had been placed after it.
"""

import re
import string
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emberkv.core.explaining.explanation import Explanation, MissReason
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.serving.cache.service import text_of

MIN_MISS = 256
"""The fewest missed tokens after the first difference for which a prompt is analyzed."""
MIN_REQUESTS = 3
"""The fewest requests that differ in a line before a rule is suggested."""
MAX_LINES = 256
"""Lines that are remembered for all tenants together."""
MAX_LINES_OF_TENANT = 16
_WINDOW = 64  # tokens on either side of the first difference, within which the line must begin and end
_UNIT = 32  # tokens that are compared at once
_MAX_UNITS = 1024
_DAY, _HOUR = 86_400.0, 3_600.0
_VALUE = string.ascii_letters + string.digits + "._:/+-"
"""Characters that are cut from the end of a line's beginning, as they may belong to its value: 2026-11- of a date."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A rule for lines of the system prompt that begin with ``beginning``.

    requests: the number of prompts that first differed in the line. tokens: how many of their tokens the rule would
    have turned into hits. tokens_a_day: the same at the observed rate, over at least one hour. first_seen, last_seen:
    seconds since 1970.
    """

    tenant: str
    beginning: str
    requests: int
    tokens: int
    tokens_a_day: int
    first_seen: float
    last_seen: float

    def rule(self) -> dict[str, str]:
        """An entry for ``lines`` in a file of canonical rules (--canonical). It moves the line; nothing is dropped."""
        name = re.sub("[^a-z0-9]+", "-", self.beginning.lower()).strip("-")[:40].rstrip("-")
        match = self.beginning.replace("\\", "\\\\").replace("*", "\\*") + "*"
        return {"name": name or "line", "match": match, "action": "move"}

    def as_json(self) -> dict[str, Any]:
        """The suggestion as ``GET /v1/cache/suggestions`` has it."""
        return {
            "tenant": self.tenant,
            "rule": self.rule(),
            "requests": self.requests,
            "tokens": self.tokens,
            "tokens_a_day": self.tokens_a_day,
            "first_seen": round(self.first_seen, 3),
            "last_seen": round(self.last_seen, 3),
        }


def first_difference(explanation: Mapping[str, Any]) -> int | None:
    """The token at which a prompt first differs, by an answer of ``/v1/cache/explain``; None if it misses fewer than
    `MIN_MISS` tokens for that.
    """
    divergence = explanation["divergence"]
    misses = explanation["misses"]
    diverged = sum(miss["tokens"] for miss in misses if miss["reason"] == MissReason.DIVERGED.value)
    return None if divergence is None or diverged < MIN_MISS else int(divergence["token"])


@dataclass(slots=True)
class _Line:
    """Counts of one line. rest: digests of the tokens after it in the latest prompt, one for each `_UNIT` tokens."""

    first_seen: float
    last_seen: float
    requests: int = 0
    tokens: int = 0
    rest: list[int] = field(default_factory=list)


class VolatileLines:
    """The lines in which recent prompts of each tenant first differed, by the line's beginning.

    No other text of prompts is kept. All methods are called from the event loop.
    """

    def __init__(self) -> None:
        self._lines: OrderedDict[tuple[str, str], _Line] = OrderedDict()

    def observe(
        self,
        tenant: str,
        prompt: Sequence[int],
        system: str,
        explanation: Explanation,
        tokenizer: Tokenizer,
        now: float,
    ) -> None:
        """Analyze a prompt that was answered. system: its system prompt. now: seconds since 1970."""
        divergence = explanation.divergence
        diverged = sum(miss.tokens for miss in explanation.misses if miss.reason is MissReason.DIVERGED)
        if divergence is not None and diverged >= MIN_MISS and system:
            self.observe_at(tenant, prompt, system, divergence.position, tokenizer, now)

    def observe_at(
        self, tenant: str, prompt: Sequence[int], system: str, position: int, tokenizer: Tokenizer, now: float
    ) -> None:
        """As `observe`, of a prompt that first differs at token ``position``, with `MIN_MISS` missed tokens or more."""
        found = _line_at(prompt, position, system, tokenizer)
        if found is None:
            return
        beginning, end = found
        line = self._line(tenant, beginning, system, now)
        rest = _digests(prompt[end:])
        same = next((at for at, (one, other) in enumerate(zip(rest, line.rest, strict=False)) if one != other), None)
        line.tokens += _UNIT * (min(len(rest), len(line.rest)) if same is None else same)
        line.requests += 1
        line.last_seen = now
        line.rest = rest

    def suggestions(self, tenant: str | None = None) -> list[Suggestion]:
        """The suggestions for one tenant, or for all if tenant is None; most tokens per day first."""
        made = [
            Suggestion(
                owner,
                beginning,
                line.requests,
                line.tokens,
                round(line.tokens * _DAY / max(_HOUR, line.last_seen - line.first_seen)),
                line.first_seen,
                line.last_seen,
            )
            for (owner, beginning), line in self._lines.items()
            if line.requests >= MIN_REQUESTS and line.tokens >= MIN_MISS and tenant in (None, owner)
        ]
        return sorted(made, key=lambda each: -each.tokens_a_day)

    def _line(self, tenant: str, beginning: str, system: str, now: float) -> _Line:
        """The line with this beginning, or with a prefix of it: values of a line may have a common prefix, too."""
        of_tenant = [key for key in self._lines if key[0] == tenant]
        for key in of_tenant:
            shorter, longer = sorted((beginning, key[1]), key=len)
            if longer.startswith(shorter) and _begins_one_line(system, shorter):
                line = self._lines.pop(key)
                self._lines[tenant, shorter] = line
                return line
        if len(of_tenant) >= MAX_LINES_OF_TENANT:
            del self._lines[of_tenant[0]]
        elif len(self._lines) >= MAX_LINES:
            self._lines.popitem(last=False)
        line = self._lines[tenant, beginning] = _Line(now, now)
        return line


def _line_at(prompt: Sequence[int], position: int, system: str, tokenizer: Tokenizer) -> tuple[str, int] | None:
    """The line of ``system`` with token ``position`` of a prompt: its text before the value, and the position of the
    first token after it. None if there is no such line, or if several lines begin with that text.
    """
    before = text_of(tokenizer, prompt[max(0, position - _WINDOW) : position]).rpartition("\n")[2]
    after = ""
    end = position
    while "\n" not in after and end < min(len(prompt), position + _WINDOW):
        after += tokenizer.token_text(prompt[end])
        end += 1
    value, newline, _ = after.partition("\n")
    # in the prompt, the markup of a chat template may stand before the first line of the system prompt
    lines = [line for line in system.split("\n") if len(line) > len(value) and (before + value).endswith(line)]
    if not newline or not lines:
        return None
    line = max(lines, key=len)
    beginning = line[: len(line) - len(value)].rstrip(_VALUE)
    return (beginning, end) if beginning.strip() and _begins_one_line(system, beginning) else None


def _begins_one_line(text: str, beginning: str) -> bool:
    return f"\n{text}".count(f"\n{beginning}") == 1


def _digests(tokens: Sequence[int]) -> list[int]:
    """Digests of each `_UNIT` tokens, valid within this process."""
    encoded = array("i", tokens[: _UNIT * _MAX_UNITS]).tobytes()
    size = 4 * _UNIT
    return [hash(encoded[at : at + size]) for at in range(0, len(encoded) - size + 1, size)]

"""Finds volatile lines in the misses of prompts, and suggests the canonical rules that would have made them hits.

A line whose value changes from session to session is where the prompts of two sessions first differ, again and again
behind the same words. What follows the line is compared with what followed it the time before: as many tokens as are
the same would have been found in the cache, had the line stood behind them.
"""

import re
import string
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from emberkv.core.explaining.explanation import Explanation, Reason
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.serving.cache.service import text_of

MIN_MISS = 256
"""Tokens that a prompt must have behind its first difference to be looked at."""
MIN_REQUESTS = 3
"""How often a line must have differed before a rule is suggested."""
MAX_LINES = 256
MAX_LINES_OF_TENANT = 16
_WINDOW = 64  # tokens on either side of the first difference, within which the line must begin and end
_UNIT = 32  # tokens that are compared at once
_MAX_UNITS = 1024
_DAY, _HOUR = 86_400.0, 3_600.0
_VALUE = string.ascii_letters + string.digits + "._:/+-"
"""Characters at the end of what two lines have in common that may belong to their values, as 2026-11- of a date."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A rule for lines of the system prompt that begin with ``beginning``.

    requests: how many differed there first. tokens: how many of theirs the rule would have made hits since first_seen,
    in seconds since 1970. tokens_a_day: at this rate; what was seen within an hour counts as an hour's.
    """

    tenant: str
    beginning: str
    requests: int
    tokens: int
    tokens_a_day: int
    first_seen: float
    last_seen: float

    def rule(self) -> dict[str, str]:
        """For the ``lines`` of a file of canonical rules (--canonical). The model still reads the line, later."""
        name = re.sub("[^a-z0-9]+", "-", self.beginning.lower()).strip("-")[:40].rstrip("-")
        match = self.beginning.replace("\\", "\\\\").replace("*", "\\*") + "*"
        return {"name": name or "line", "match": match, "action": "move"}

    def as_json(self) -> dict[str, Any]:
        return {
            "tenant": self.tenant,
            "rule": self.rule(),
            "requests": self.requests,
            "tokens": self.tokens,
            "tokens_a_day": self.tokens_a_day,
            "first_seen": round(self.first_seen, 3),
            "last_seen": round(self.last_seen, 3),
        }


@dataclass(slots=True)
class _Line:
    """rest: what followed the line the last time, as a digest of each `_UNIT` tokens."""

    first_seen: float
    last_seen: float
    requests: int = 0
    tokens: int = 0
    rest: list[int] = field(default_factory=list)


class VolatileLines:
    """The lines at which prompts of each tenant first differed lately, by the line's beginning.

    Of a prompt's text no more than the beginnings of such lines is kept. Belongs to the event loop.
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
        """Take in a prompt that was answered. system: its system prompt. now: seconds since 1970."""
        divergence = explanation.divergence
        diverged = sum(miss.tokens for miss in explanation.misses if miss.reason is Reason.DIVERGED)
        if divergence is None or diverged < MIN_MISS or not system:
            return
        found = _line_at(prompt, divergence.position, system, tokenizer)
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
        """Of one tenant, or None: of all; the costliest first."""
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
        """The line that begins so, or with the beginning of it: two values may begin with the same words."""
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
    """The beginning of the line of ``system`` that holds token ``position`` of a prompt, up to its value, and the first
    token behind the line. None where there is no such line, or its beginning does not tell it from others.
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
    """A digest of each `_UNIT` tokens, which is good within this process."""
    encoded = array("i", tokens[: _UNIT * _MAX_UNITS]).tobytes()
    size = 4 * _UNIT
    return [hash(encoded[at : at + size]) for at in range(0, len(encoded) - size + 1, size)]

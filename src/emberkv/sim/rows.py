"""The numbers of every outcome in compact arrays, from which summary and report are made."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from emberkv.sim.outcome import CacheEvent, Outcome, Status, Turn, e2e_ms, tpot_ms, ttft_ms

STATUSES = tuple(Status)
EVENTS = tuple(CacheEvent)
NONE = -1


class Row(NamedTuple):
    """One outcome's numbers; times in nanoseconds."""

    arrival: int
    first_token: int | None
    completion: int | None
    prompt_tokens: int
    output_tokens: int
    status: Status
    conversational: bool
    event: CacheEvent | None
    cached_tokens: int
    prefilled_tokens: int
    replica: int | None
    preemptions: int
    retries: int
    tier_tokens: tuple[int, ...]

    @property
    def ttft_ms(self) -> float | None:
        return ttft_ms(self.arrival, self.first_token)

    @property
    def tpot_ms(self) -> float | None:
        return tpot_ms(self.first_token, self.completion, self.output_tokens)

    @property
    def e2e_ms(self) -> float | None:
        return e2e_ms(self.arrival, self.completion)


def _long() -> "array[int]":
    return array("q")


@dataclass(slots=True)
class Rows:
    """In the order in which requests ended, about 110 bytes each. ids: kept only if asked for, as they take more."""

    tiers: tuple[str, ...] = ()
    keep_ids: bool = False
    ids: list[str] = field(default_factory=list)
    _arrival: "array[int]" = field(default_factory=_long)
    _first_token: "array[int]" = field(default_factory=_long)
    _completion: "array[int]" = field(default_factory=_long)
    _small: "array[int]" = field(default_factory=_long)

    @property
    def _width(self) -> int:
        return 10 + len(self.tiers)

    def __len__(self) -> int:
        return len(self._arrival)

    def add(self, outcome: Outcome) -> None:
        self._arrival.append(outcome.arrival)
        self._first_token.append(NONE if outcome.first_token is None else outcome.first_token)
        self._completion.append(NONE if outcome.completion is None else outcome.completion)
        self._small.extend((
            outcome.request.prompt_tokens, outcome.output_tokens, STATUSES.index(outcome.status),
            outcome.turn is not Turn.FIRST, NONE if outcome.event is None else EVENTS.index(outcome.event),
            outcome.cached_tokens, outcome.prefilled_tokens, NONE if outcome.replica is None else outcome.replica,
            outcome.preemptions, outcome.retries, *(outcome.tier_tokens.get(tier, 0) for tier in self.tiers),
        ))  # fmt: skip
        if self.keep_ids:
            self.ids.append(outcome.request.request_id)

    def __getitem__(self, index: int) -> Row:
        at = range(len(self))[index]
        small: Sequence[int] = self._small[at * self._width : (at + 1) * self._width]
        prompt, output, status, turn, event, cached, prefilled, replica, preemptions, retries, *tiers = small
        return Row(
            self._arrival[at], _optional(self._first_token[at]), _optional(self._completion[at]), prompt, output,
            STATUSES[status], bool(turn), None if event == NONE else EVENTS[event], cached, prefilled,
            _optional(replica), preemptions, retries, tuple(tiers),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))


def _optional(value: int) -> int | None:
    return None if value == NONE else value

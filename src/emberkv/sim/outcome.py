"""The outcome of a request, and its row in the CSV."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TextIO

from emberkv.sim.timing import NANOSECONDS
from emberkv.workload.request import Request


class Status(Enum):
    COMPLETED = "completed"
    REJECTED = "rejected"  # cannot ever be served: too large for the memory, or nothing to compute
    FAILED = "failed"  # its replica was lost, and it was out of retries
    UNFINISHED = "unfinished"  # the simulation ended first


class CacheEvent(Enum):
    """What a request found, when it was first admitted (or its last retry was)."""

    CONVERSATIONAL_HIT = "CONVERSATIONAL_HIT"  # a later turn of its session that found something
    CROSS_REQUEST_HIT = "CROSS_REQUEST_HIT"  # a session's first request, or one without a session
    MISS_FULL = "MISS_FULL"  # nothing was cached
    FULL_HIT_NO_PREFILL_NEEDED = "FULL_HIT_NO_PREFILL_NEEDED"  # all but the last token was cached
    CONVERSATIONAL_MISS_UNEXPECTED_PROMPT = "CONVERSATIONAL_MISS_UNEXPECTED_PROMPT"
    # a later turn that found nothing, and whose prompt does not go on from what its session left


class Turn(Enum):
    """A request's place in its session, as far as this simulation has seen it."""

    FIRST = "first"  # or of no session
    CONTINUES = "continues"  # the prompt goes on from the session's last turn
    UNEXPECTED = "unexpected"  # it does not


def cache_event(turn: Turn, prompt_tokens: int, cached_tokens: int) -> CacheEvent:
    """A hit exactly where something was cached, so that counting events and counting hits come to the same."""
    if cached_tokens and cached_tokens >= prompt_tokens - 1:
        return CacheEvent.FULL_HIT_NO_PREFILL_NEEDED
    if cached_tokens:
        return CacheEvent.CROSS_REQUEST_HIT if turn is Turn.FIRST else CacheEvent.CONVERSATIONAL_HIT
    return CacheEvent.CONVERSATIONAL_MISS_UNEXPECTED_PROMPT if turn is Turn.UNEXPECTED else CacheEvent.MISS_FULL


@dataclass(slots=True)
class Outcome:
    """Times in nanoseconds; None for what did not happen, or where nothing times it.

    first_token: of the attempt that succeeded, where replicas were lost. prefilled_tokens: really computed, what was
    computed again after a preemption or a lost replica included. tier_tokens: of the cached tokens, those that a lower
    tier brought, by tier. event: None if never admitted. replica: the last one that had it.
    """

    request: Request
    status: Status
    arrival: int
    first_token: int | None = None
    completion: int | None = None
    output_tokens: int = 0
    turn: Turn = Turn.FIRST
    event: CacheEvent | None = None
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    tier_tokens: Mapping[str, int] = field(default_factory=dict)
    replica: int | None = None
    preemptions: int = 0
    retries: int = 0


def milliseconds(begin: int, end: int) -> float:
    return (end - begin) / (NANOSECONDS // 1000)


def ttft_ms(arrival: int, first_token: int | None) -> float | None:
    """From arrival, queueing included."""
    return None if first_token is None else milliseconds(arrival, first_token)


def tpot_ms(first_token: int | None, completion: int | None, output_tokens: int) -> float | None:
    """For each output token after the first; None where there is no such."""
    if first_token is None or completion is None or output_tokens < 2:
        return None
    return milliseconds(first_token, completion) / (output_tokens - 1)


def e2e_ms(arrival: int, completion: int | None) -> float | None:
    return None if completion is None else milliseconds(arrival, completion)


COLUMNS = (
    "request_id", "client_id", "session_id", "prompt_tokens", "max_output_tokens", "output_tokens", "arrival_time",
    "first_token_time", "completion_time", "status", "ttft_ms", "tpot_ms", "e2e_latency_ms", "is_conversational_turn",
    "prefix_cache_event", "cached_prefix_length", "tokens_actually_prefilled", "replica", "preemptions", "retries",
)  # fmt: skip
"""Of the CSV; then follows one for each lower tier, ``<tier>_tokens``."""


def _seconds(time: int | None) -> float | str:
    return "" if time is None else time / NANOSECONDS


def _blank(value: float | None) -> float | str:
    return "" if value is None else value


class CsvRows:
    """A row for each outcome, written as it comes. Numbers are written so that they read back as they were."""

    def __init__(self, file: TextIO, tiers: Sequence[str] = ()) -> None:
        self._tiers = tiers
        self._csv = csv.writer(file, lineterminator="\n")
        self._csv.writerow([*COLUMNS, *(f"{tier}_tokens" for tier in tiers)])

    def add(self, outcome: Outcome) -> None:
        request = outcome.request
        self._csv.writerow([
            request.request_id, request.client_id, request.session_id, request.prompt_tokens,
            request.max_output_tokens, outcome.output_tokens, _seconds(outcome.arrival),
            _seconds(outcome.first_token), _seconds(outcome.completion), outcome.status.value,
            _blank(ttft_ms(outcome.arrival, outcome.first_token)),
            _blank(tpot_ms(outcome.first_token, outcome.completion, outcome.output_tokens)),
            _blank(e2e_ms(outcome.arrival, outcome.completion)),
            str(outcome.turn is not Turn.FIRST).lower(), outcome.event.value if outcome.event else "",
            outcome.cached_tokens, outcome.prefilled_tokens, _blank(outcome.replica), outcome.preemptions,
            outcome.retries, *(outcome.tier_tokens.get(tier, 0) for tier in self._tiers),
        ])  # fmt: skip

"""The outcome of each request: its row in the CSV, and the numbers of all outcomes in compact arrays."""

import csv
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple, TextIO

from emberkv.core.hashing import BlockHash
from emberkv.sim.timing import NANOSECONDS
from emberkv.workload.request import Request


class Status(StrEnum):
    """How a request ended.

    >>> [status.value for status in Status]
    ['completed', 'rejected', 'failed', 'unfinished']
    """

    COMPLETED = "completed"
    REJECTED = "rejected"  # cannot ever be served: too large for the memory, or nothing to compute
    FAILED = "failed"  # its replica was lost, and it was out of retries
    UNFINISHED = "unfinished"  # the simulation ended first


class CacheEvent(StrEnum):
    """What a request found, when it was first admitted (or its last retry was)."""

    CONVERSATIONAL_HIT = "CONVERSATIONAL_HIT"  # a later turn of its session that found something
    CROSS_REQUEST_HIT = "CROSS_REQUEST_HIT"  # a session's first request, or one without a session
    MISS_FULL = "MISS_FULL"  # nothing was cached
    FULL_HIT_NO_PREFILL_NEEDED = "FULL_HIT_NO_PREFILL_NEEDED"  # all but the last token was cached
    CONVERSATIONAL_MISS_UNEXPECTED_PROMPT = "CONVERSATIONAL_MISS_UNEXPECTED_PROMPT"
    # a later turn that found nothing, and whose prompt does not go on from what its session left


class TurnKind(StrEnum):
    """A request's place in its session, as far as this simulation has seen it."""

    FIRST = "first"  # or of no session
    CONTINUES = "continues"  # the prompt goes on from the session's last turn
    UNEXPECTED = "unexpected"  # it does not


def cache_event(turn: TurnKind, prompt_tokens: int, cached_tokens: int) -> CacheEvent:
    """A hit exactly where something was cached, so that counting events and counting hits come to the same."""
    if cached_tokens and cached_tokens >= prompt_tokens - 1:
        return CacheEvent.FULL_HIT_NO_PREFILL_NEEDED
    if cached_tokens:
        return CacheEvent.CROSS_REQUEST_HIT if turn is TurnKind.FIRST else CacheEvent.CONVERSATIONAL_HIT
    return CacheEvent.CONVERSATIONAL_MISS_UNEXPECTED_PROMPT if turn is TurnKind.UNEXPECTED else CacheEvent.MISS_FULL


@dataclass(slots=True, init=False)
class RequestOutcome:
    """What became of a request. Times are in nanoseconds; None for what did not happen, or where nothing times it.

    first_token: of the attempt that succeeded, where replicas were lost. prefilled_tokens: prompt tokens that were
    really computed, including those computed again after a preemption or a lost replica. tier_tokens: of the cached
    tokens, those loaded from each lower tier. event: None if the request was never admitted. replica: the last one.

    >>> from emberkv.workload.content import Content
    >>> lengths = {"prompt_tokens": 40, "output_tokens": 3, "max_output_tokens": 3}
    >>> request = Request(request_id="a", arrival_time=1.0, content=Content(), **lengths)
    >>> outcome = RequestOutcome(request, Status.COMPLETED, 1_000_000_000, first_token=1_250_000_000)
    >>> ttft_ms(outcome.arrival, outcome.first_token)
    250.0
    """

    request: Request
    status: Status
    arrival: int
    first_token: int | None
    completion: int | None
    output_tokens: int
    turn: TurnKind
    event: CacheEvent | None
    cached_tokens: int
    prefilled_tokens: int
    tier_tokens: Mapping[str, int]
    replica: int | None
    preemptions: int
    retries: int

    def __init__(
        self,
        request: Request,
        status: Status,
        arrival: int,
        first_token: int | None = None,
        completion: int | None = None,
        output_tokens: int = 0,
        turn: TurnKind = TurnKind.FIRST,
        event: CacheEvent | None = None,
        cached_tokens: int = 0,
        prefilled_tokens: int = 0,
        tier_tokens: Mapping[str, int] | None = None,
        replica: int | None = None,
        preemptions: int = 0,
        retries: int = 0,
    ) -> None:
        self.request = request
        self.status = status
        self.arrival = arrival
        self.first_token = first_token
        self.completion = completion
        self.output_tokens = output_tokens
        self.turn = turn
        self.event = event
        self.cached_tokens = cached_tokens
        self.prefilled_tokens = prefilled_tokens
        self.tier_tokens = {} if tier_tokens is None else tier_tokens
        self.replica = replica
        self.preemptions = preemptions
        self.retries = retries


class _LastTurn(NamedTuple):
    """What a session's last completed turn left: its length, and its last full block."""

    tokens: int
    blocks: int
    block_hash: BlockHash


@dataclass(slots=True)
class Sessions:
    """What the last turn of each session left, to recognise a turn that does not continue it. About 200 bytes a
    session.

    >>> from emberkv.workload.content import Content
    >>> lengths = {"prompt_tokens": 40, "output_tokens": 3, "max_output_tokens": 3}
    >>> turn = Request(request_id="a", arrival_time=0.0, session_id="s", content=Content(), **lengths)
    >>> sessions = Sessions()
    >>> sessions.turn_of(turn, []).value, sessions.turn_of(turn, []).value
    ('first', 'continues')
    """

    _left: dict[str, _LastTurn | None] = field(default_factory=dict)

    def turn_of(self, request: Request, blocks: Sequence[BlockHash]) -> TurnKind:
        """To be called once for each request, when it arrives. blocks: the hashes of its prompt's full blocks."""
        session = request.session_id
        if not session:
            return TurnKind.FIRST
        if session not in self._left:
            self._left[session] = None
            return TurnKind.FIRST
        left = self._left[session]
        if left is None:
            return TurnKind.CONTINUES
        goes_on = request.prompt_tokens > left.tokens and (
            not left.blocks or blocks[left.blocks - 1] == left.block_hash
        )
        return TurnKind.CONTINUES if goes_on else TurnKind.UNEXPECTED

    def completed(self, request: Request, blocks: Sequence[BlockHash], tokens: int) -> None:
        """A turn is complete. blocks: the hashes of the full blocks of its prompt and answer, of ``tokens`` tokens."""
        if request.session_id:
            self._left[request.session_id] = _LastTurn(tokens, len(blocks), blocks[-1] if blocks else b"")


def milliseconds(begin: int, end: int) -> float:
    return (end - begin) / (NANOSECONDS // 1000)


def ttft_ms(arrival: int, first_token: int | None) -> float | None:
    """Milliseconds from arrival to the first token, queueing included."""
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
"""The columns of the CSV; one for each lower tier follows, ``<tier>_tokens``."""


def _seconds(time: int | None) -> float | None:
    return None if time is None else time / NANOSECONDS


class CsvRows:
    """Writes one row for each outcome as it comes. Numbers are written so that they read back as they were, None as
    nothing.

    >>> from io import StringIO
    >>> file = StringIO()
    >>> rows = CsvRows(file, tiers=["ram"])
    >>> file.getvalue().strip().split(",")[-2:]
    ['retries', 'ram_tokens']
    """

    def __init__(self, file: TextIO, tiers: Sequence[str] = ()) -> None:
        self._tiers = tiers
        self._csv = csv.writer(file, lineterminator="\n")
        self._csv.writerow([*COLUMNS, *(f"{tier}_tokens" for tier in tiers)])

    def add(self, outcome: RequestOutcome) -> None:
        request = outcome.request
        self._csv.writerow([
            request.request_id, request.client_id, request.session_id, request.prompt_tokens,
            request.max_output_tokens, outcome.output_tokens, _seconds(outcome.arrival),
            _seconds(outcome.first_token), _seconds(outcome.completion), outcome.status,
            ttft_ms(outcome.arrival, outcome.first_token),
            tpot_ms(outcome.first_token, outcome.completion, outcome.output_tokens),
            e2e_ms(outcome.arrival, outcome.completion),
            "false" if outcome.turn is TurnKind.FIRST else "true", outcome.event,
            outcome.cached_tokens, outcome.prefilled_tokens, outcome.replica, outcome.preemptions,
            outcome.retries, *[outcome.tier_tokens.get(tier, 0) for tier in self._tiers],
        ])  # fmt: skip


STATUSES: Final = tuple(Status)
EVENTS: Final = tuple(CacheEvent)
NONE: Final = -1


class Row(NamedTuple):
    """One outcome's numbers; times are in nanoseconds.

    >>> done = (Status.COMPLETED, False, None)
    >>> row = Row(0, 2_000_000, 8_000_000, 40, 4, *done, 0, 40, 0, 0, 0, ())
    >>> row.ttft_ms, row.tpot_ms, row.e2e_ms
    (2.0, 2.0, 8.0)
    """

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
    """The numbers of all outcomes, in the order in which requests ended; about 110 bytes each.

    tiers: names of the lower tiers. keep_ids: whether request ids are kept, which take more memory than the numbers.

    >>> from emberkv.workload.content import Content
    >>> lengths = {"prompt_tokens": 40, "output_tokens": 3, "max_output_tokens": 3}
    >>> request = Request(request_id="a", arrival_time=1.0, content=Content(), **lengths)
    >>> rows = Rows()
    >>> rows.add(RequestOutcome(request, Status.REJECTED, arrival=1_000_000_000))
    >>> len(rows), rows[0].status.value, rows[0].first_token
    (1, 'rejected', None)
    """

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

    def add(self, outcome: RequestOutcome) -> None:
        self._arrival.append(outcome.arrival)
        self._first_token.append(NONE if outcome.first_token is None else outcome.first_token)
        self._completion.append(NONE if outcome.completion is None else outcome.completion)
        self._small.extend((
            outcome.request.prompt_tokens, outcome.output_tokens, STATUSES.index(outcome.status),
            outcome.turn is not TurnKind.FIRST, NONE if outcome.event is None else EVENTS.index(outcome.event),
            outcome.cached_tokens, outcome.prefilled_tokens, NONE if outcome.replica is None else outcome.replica,
            outcome.preemptions, outcome.retries, *[outcome.tier_tokens.get(tier, 0) for tier in self.tiers],
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

    def served(self) -> Iterator[tuple[int, int | None, bool]]:
        """Arrival, first token and `Row.conversational` of each request that was not rejected."""
        statuses, turns = self._small[2 :: self._width], self._small[3 :: self._width]
        rejected = STATUSES.index(Status.REJECTED)
        for arrival, first_token, status, turn in zip(self._arrival, self._first_token, statuses, turns, strict=True):
            if status != rejected:
                yield arrival, _optional(first_token), bool(turn)


def _optional(value: int) -> int | None:
    return None if value == NONE else value

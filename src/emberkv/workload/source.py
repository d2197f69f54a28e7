"""Sources: the requests that a simulation draws, and the follow-ups that completed requests set off."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Protocol

from emberkv.workload.conversation import Conversation, Library
from emberkv.workload.request import Request
from emberkv.workload.spec import GeneratedWorkload


class Source(Protocol):
    """Requests that arrive by themselves, in order, and follow-ups that arrive because others completed."""

    def next_arrival(self) -> Request | None:
        """The next request that waits for no other; None when there are no more."""

    def completed(self, request: Request, at: float, generated: int) -> Request | None:
        """``request`` completed at ``at`` seconds with ``generated`` tokens: the follow-up that this sets off, if any.

        Its arrival_time is ``at`` or later.
        """

    def lost(self, request: Request) -> None:
        """``request`` will not complete (rejected, failed): its conversation ends."""


class GeneratedSource:
    """A generated workload. Memory: the conversations that are under way."""

    def __init__(self, workload: GeneratedWorkload) -> None:
        self._library = Library(workload)
        self._times = workload.arrivals.times(Random(f"{workload.seed}/arrivals"))
        self._duration = workload.duration
        self._sessions = workload.sessions
        self._begun = 0
        self._live: dict[str, Conversation] = {}

    def next_arrival(self) -> Request | None:
        if self._begun == self._sessions:
            return None
        at = next(self._times, None)
        if at is None or (self._duration is not None and at >= self._duration):
            self._sessions = self._begun
            return None
        conversation = Conversation(self._library, self._begun)
        self._begun += 1
        request = conversation.first(at)
        self._live[request.request_id] = conversation
        return request

    def completed(self, request: Request, at: float, generated: int) -> Request | None:
        conversation = self._live.pop(request.request_id)
        follow_up = conversation.follow_up(request, at, generated)
        if follow_up is not None:
            self._live[follow_up.request_id] = conversation
        return follow_up

    def lost(self, request: Request) -> None:
        del self._live[request.request_id]


class TraceSource:
    """A trace as it was recorded: every request arrives at its own time. Memory: one request.

    >>> from emberkv.workload.content import Content
    >>> lengths = {"prompt_tokens": 40, "output_tokens": 4, "max_output_tokens": 8}
    >>> source = TraceSource([Request(request_id="only", arrival_time=2.5, content=Content(), **lengths)])
    >>> source.next_arrival().arrival_time, source.next_arrival()
    (2.5, None)
    """

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = iter(requests)

    def next_arrival(self) -> Request | None:
        return next(self._requests, None)

    def completed(self, request: Request, at: float, generated: int) -> Request | None:
        return None

    def lost(self, request: Request) -> None:
        """Nothing waits for it."""


class ClosedLoopTraceSource:
    """A trace whose follow-ups wait: a request with ``after`` arrives its think time after that one completes here.

    One whose predecessor is not in the trace (clipped off) or leads more than one follow-up arrives as recorded.
    Memory: the whole trace, as a faster machine asks for follow-ups sooner than they were recorded.
    """

    def __init__(self, requests: Iterable[Request]) -> None:
        self._waiting: dict[str, Request] = {}
        arriving, known = [], set[str]()
        for request in requests:
            leader = request.after.request_id if request.after else None
            if leader is not None and leader in known and leader not in self._waiting:
                self._waiting[leader] = request
            else:
                arriving.append(request)
            known.add(request.request_id)
        self._arriving = iter(arriving)

    def next_arrival(self) -> Request | None:
        return next(self._arriving, None)

    def completed(self, request: Request, at: float, generated: int) -> Request | None:
        follow_up = self._waiting.pop(request.request_id, None)
        if follow_up is None or follow_up.after is None:
            return None
        return replace(follow_up, arrival_time=at + follow_up.after.think_time)

    def lost(self, request: Request) -> None:
        self._waiting.pop(request.request_id, None)


def unroll(source: Source, *, first_token: float, per_token: float) -> Iterator[Request]:
    """A source's requests in the order of their arrival, if each took ``first_token`` seconds to its first token and
    ``per_token`` for every further one, however many run at once. An assumption: only a simulation knows better.
    """
    order = count()
    follow_ups: list[tuple[float, int, Request]] = []
    arriving = source.next_arrival()
    while arriving is not None or follow_ups:
        if arriving is None or (follow_ups and follow_ups[0][0] < arriving.arrival_time):
            request = heappop(follow_ups)[2]
        else:
            request, arriving = arriving, source.next_arrival()
        yield request
        done = request.arrival_time + first_token + per_token * max(0, request.output_tokens - 1)
        follow_up = source.completed(request, done, request.output_tokens)
        if follow_up is not None:
            heappush(follow_ups, (follow_up.arrival_time, next(order), follow_up))

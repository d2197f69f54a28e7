"""Sources: the requests that a simulation draws, and the follow-ups that completed requests set off."""

from bisect import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import accumulate, count
from pathlib import Path
from random import Random
from typing import Protocol

from emberkv.errors import WorkloadError
from emberkv.workload.bounds import MOST_SECONDS, MOST_TOKENS, MOST_TURNS
from emberkv.workload.content import Content, Span, StreamKeys, stream_key
from emberkv.workload.request import After, Request
from emberkv.workload.spec import GeneratedWorkload, Profile, SystemPrompts, load_workload, whole
from emberkv.workload.trace import TraceFormat, read_trace


class SystemPromptSet:
    """The prompts of one set, the most popular first, each of a length drawn once.

    >>> prompts = SystemPrompts(count=3, skew=1.0, tokens=200)
    >>> chosen = SystemPromptSet(prompts, Random(0), "example").choose(Random(1))
    >>> len(chosen)
    200
    """

    def __init__(self, prompts: SystemPrompts, rng: Random, *names: str) -> None:
        self._contents = [
            Content([Span(stream_key(*names, rank), 0, whole(prompts.tokens.sample(rng), least=0))])
            for rank in range(prompts.count)
        ]
        self._cumulative = list(accumulate((rank + 1) ** -prompts.skew for rank in range(prompts.count)))

    def choose(self, rng: Random) -> Content:
        """Draw by Zipf's law: the k-th is chosen in proportion to k^-skew."""
        at = bisect(self._cumulative, rng.random() * self._cumulative[-1])
        return self._contents[min(at, len(self._contents) - 1)]


class WorkloadContext:
    """What all conversations of a workload share. name: in every stream's key, so that no other workload has them.

    >>> from emberkv.workload.spec import parse_workload
    >>> client = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 3, "think_time": 5}
    >>> data = {"sessions": 4, "seed": 1, "arrivals": {"kind": "poisson", "rate": 1.0}, "clients": [client]}
    >>> context = WorkloadContext(parse_workload(data, folder=Path()))
    >>> context.choose_profile(Random(0)).name
    'chat'
    """

    def __init__(self, workload: GeneratedWorkload) -> None:
        self.name = stream_key(workload.model_dump_json()).hex()
        self.workload = workload
        self._weights = list(accumulate(profile.weight for profile in workload.clients))
        self._system_prompts = {
            name: SystemPromptSet(prompts, Random(f"{workload.seed}/system/{name}"), self.name, "system", name)
            for name, prompts in workload.system_prompts.items()
        }

    def choose_profile(self, rng: Random) -> Profile:
        at = bisect(self._weights, rng.random() * self._weights[-1])
        return self.workload.clients[min(at, len(self._weights) - 1)]

    def choose_system_prompt(self, profile: Profile, rng: Random) -> Content:
        return Content() if profile.system_prompts is None else self._system_prompts[profile.system_prompts].choose(rng)


class GeneratedConversation:
    """Session ``number`` of a workload. It has its own random generator, so that it depends on no other session.

    >>> from emberkv.workload.spec import parse_workload
    >>> client = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 3, "think_time": 5}
    >>> data = {"sessions": 4, "seed": 1, "arrivals": {"kind": "poisson", "rate": 1.0}, "clients": [client]}
    >>> conversation = GeneratedConversation(WorkloadContext(parse_workload(data, folder=Path())), number=0)
    >>> first = conversation.first(at=10.0)
    >>> second = conversation.follow_up(first, at=12.0, generated=8)
    >>> second.arrival_time, second.prompt_tokens
    (17.0, 88)
    """

    def __init__(self, context: WorkloadContext, number: int) -> None:
        self._rng = Random(f"{context.workload.seed}/session/{number}")
        self.session_id = f"s{number}"
        self._streams = StreamKeys(context.name, self.session_id)
        self.profile = context.choose_profile(self._rng)
        self._history = context.choose_system_prompt(self.profile, self._rng)
        self._turns_left = whole(self.profile.turns.sample(self._rng), most=MOST_TURNS)
        self._turn = 0

    def first(self, at: float) -> Request:
        """The first turn; it is sent whatever its length."""
        profile = self.profile
        message = profile.message if profile.first_message is None else profile.first_message
        return self._next(at, whole(message.sample(self._rng)), None)

    def follow_up(self, request: Request, at: float, generated: int) -> Request | None:
        """The turn after ``request``, which completed at ``at`` with ``generated`` tokens; None after the last one."""
        if self._turns_left == 0:
            return None
        profile = self.profile
        self._history = request.content.cut(0, request.prompt_tokens + generated)
        think_time = profile.think_time.sample(self._rng)
        message = whole(profile.message.sample(self._rng))
        turn = self._next(at + think_time, message, After(request.request_id, think_time))
        if profile.max_context is not None and turn.prompt_tokens + turn.max_output_tokens > profile.max_context:
            return None
        return turn

    def _next(self, arrival: float, message: int, after: After | None) -> Request:
        limit = self.profile.max_output_tokens
        drawn = whole(self.profile.output.sample(self._rng))
        output = drawn if limit is None else min(drawn, limit)
        said = Span(self._streams.key(self._turn, "message"), 0, message)
        answer = Span(self._streams.key(self._turn, "answer"), 0, output)
        prompt = len(self._history) + message
        if prompt > MOST_TOKENS:
            raise WorkloadError(
                f"client {self.profile.name}: a conversation has grown to {prompt:,} tokens; "
                f"at most {MOST_TOKENS:,} are accepted, and max_context ends one sooner"
            )
        if arrival > MOST_SECONDS:
            raise WorkloadError(
                f"client {self.profile.name}: a request arrives after {arrival:g} s; the limit is {MOST_SECONDS:g}"
            )
        request = Request(
            request_id=f"{self.session_id}.{self._turn}",
            arrival_time=arrival,
            prompt_tokens=prompt,
            output_tokens=output,
            max_output_tokens=output if limit is None else limit,
            content=self._history.followed_by((said, answer)),
            client_id=self.profile.name,
            session_id=self.session_id,
            turn=self._turn,
            after=after,
        )
        self._turn += 1
        self._turns_left -= 1
        return request


class Source(Protocol):
    """Requests that arrive independently, in order, and follow-ups that arrive because others completed."""

    def next_arrival(self) -> Request | None:
        """The next request that waits for no other; None when there are no more."""

    def completed(self, request: Request, at: float, generated: int) -> Request | None:
        """``request`` completed at ``at`` seconds with ``generated`` tokens: the follow-up that this sets off, if any.

        Its arrival_time is ``at`` or later.
        """

    def lost(self, request: Request) -> None:
        """``request`` will not complete (rejected, failed): its conversation ends."""


class GeneratedSource:
    """A generated workload. Memory: the conversations that are under way.

    >>> from emberkv.workload.spec import parse_workload
    >>> client = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 3, "think_time": 5}
    >>> data = {"sessions": 4, "seed": 1, "arrivals": {"kind": "constant", "rate": 1.0}, "clients": [client]}
    >>> source = GeneratedSource(parse_workload(data, folder=Path()))
    >>> first = source.next_arrival()
    >>> source.completed(first, at=2.0, generated=8).arrival_time
    7.0
    """

    def __init__(self, workload: GeneratedWorkload) -> None:
        self._context = WorkloadContext(workload)
        self._times = workload.arrivals.times(Random(f"{workload.seed}/arrivals"))
        self._duration = workload.duration
        self._sessions = workload.sessions
        self._begun = 0
        self._live: dict[str, GeneratedConversation] = {}

    def next_arrival(self) -> Request | None:
        if self._begun == self._sessions:
            return None
        at = next(self._times, None)
        if at is None or (self._duration is not None and at >= self._duration):
            self._sessions = self._begun
            return None
        conversation = GeneratedConversation(self._context, self._begun)
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

    A request arrives as recorded if the one it follows is not in the trace (clipped off) or has a follow-up already.
    Memory: the whole trace, as a faster machine gets follow-ups sooner than they were recorded.

    >>> from emberkv.workload.content import Content
    >>> some = {"content": Content(), "prompt_tokens": 32, "output_tokens": 1, "max_output_tokens": 1}
    >>> first = Request(request_id="a", arrival_time=0.0, **some)
    >>> second = Request(request_id="b", arrival_time=9.0, after=After("a", think_time=4.0), **some)
    >>> source = ClosedLoopTraceSource([first, second])
    >>> source.completed(source.next_arrival(), at=1.0, generated=1).arrival_time
    5.0
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


YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class ServiceTime:
    """Seconds that a request is assumed to take where nothing simulates it.

    >>> ASSUMED.first_token + 9 * ASSUMED.per_token  # an answer of ten tokens
    0.6799999999999999
    """

    first_token: float
    per_token: float


ASSUMED = ServiceTime(first_token=0.5, per_token=0.02)


def is_description(path: Path) -> bool:
    """Whether the file describes a workload (YAML), rather than being a trace."""
    return path.suffix in YAML_SUFFIXES


def open_source(
    path: Path, *, format: TraceFormat | None = None, block_size: int | None = None, closed_loop: bool = False
) -> Source:
    """The requests of a file as a simulation draws them. Generated conversations always wait for their answers.

    closed_loop: in a trace that records which request follows which, follow-ups wait too, instead of arriving as
    recorded. Raises WorkloadError, for a trace also while it is read.
    """
    if is_description(path):
        return GeneratedSource(load_workload(path))
    requests = read_trace(path, format=format, block_size=block_size)
    return ClosedLoopTraceSource(requests) if closed_loop else TraceSource(requests)


def open_requests(
    path: Path,
    *,
    format: TraceFormat | None = None,
    block_size: int | None = None,
    scope: str | None = None,
    service: ServiceTime = ASSUMED,
) -> Iterator[Request]:
    """All requests by arrival: a trace's, or a described workload's if each takes ``service``. Raises WorkloadError."""
    if is_description(path):
        source = GeneratedSource(load_workload(path))
        return unroll(source, first_token=service.first_token, per_token=service.per_token)
    return read_trace(path, format=format, block_size=block_size, scope=scope)

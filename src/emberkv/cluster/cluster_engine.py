"""An engine that computes elsewhere: each request goes to a worker, and is resumed at another where that one fails."""

import asyncio
import logging
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from urllib.parse import quote

from emberkv.cluster.membership import Membership
from emberkv.cluster.routing import Decision, RoutingReason, RoutingRequest
from emberkv.cluster.wire import WorkerDescription, decode_prompt
from emberkv.cluster.workers import Worker, WorkerStatus
from emberkv.core.hashing import PublicPrefixes, TokenChain
from emberkv.core.sequence import BACKGROUND_PRIORITY, FinishReason
from emberkv.engine.recent_chains import RecentChains
from emberkv.engine.request import (
    CacheUsage,
    EngineStats,
    GenerationRequest,
    OutputListener,
    PrefillProgress,
    TokenOutput,
)
from emberkv.errors import (
    ClusterError,
    DuplicateRequestError,
    EmberError,
    EngineStoppedError,
    WireError,
    WorkerLostError,
    WorkerTimeoutError,
)
from emberkv.serving.admission import ConcurrencyLimit
from emberkv.serving.errors import (
    GenerationFailedError,
    NotReadyError,
    OverloadedError,
    TooManyRequestsError,
    UnauthorizedError,
)

_log = logging.getLogger(__name__)

MAX_REQUESTS = 1024
MAX_LOSSES = 3
"""Workers that a request may lose in turn, without a token between them: it may be what kills them."""

MAX_ATTEMPTS = 20
"""How often a request is sent without a token, where workers cannot be reached or stop."""

RESUME_SECONDS = 30.0
"""How long an answer that has begun waits for a worker to go on with it."""

MAX_ROUTES = 2000
"""Ended requests of which the route is remembered."""


@dataclass(slots=True)
class Route:
    """Where a request went. workers: ids, in turn. decision: the latest. resumed: how often its answer was resumed at
    another worker; retried: how often it was sent to another before its answer began. seconds: from its submission to
    the latest decision before that. reasons: by worker, of the latest decision for it.
    """

    workers: list[str] = field(default_factory=list)
    decision: Decision | None = None
    cached: Mapping[str, int] = field(default_factory=dict)
    retried: int = 0
    resumed: int = 0
    seconds: float | None = None
    reasons: dict[str, RoutingReason] = field(default_factory=dict)


def route_header(route: Route) -> str:
    """Which worker answers a request, and why: ``worker=b;why=least_cost;cached=96;pool=96;retried=1``.

    cached: prompt tokens that the worker has by the gateway's index, and how many of them in which tier. Numbers that
    are 0 are left out. docs/cluster.md says what else there is.
    """
    assert route.decision is not None, "a route that has a worker has a decision"
    pairs: dict[str, str | int] = {"worker": quote(route.workers[-1]), "why": route.decision.reason.value}
    if cached := sum(route.cached.values()):
        pairs |= {"cached": cached, **{tier: tokens for tier, tokens in route.cached.items() if tokens}}
    pairs |= {name: count for name, count in (("retried", route.retried), ("resumed", route.resumed)) if count}
    return ";".join(f"{name}={value}" for name, value in pairs.items())


@dataclass(slots=True)
class _Answer:
    """What of an answer has been relayed. usage: of the prompt, as the first worker said. in_background: it is
    computed while its worker does nothing else.
    """

    request: GenerationRequest
    chain: TokenChain
    listener: OutputListener
    route: Route
    submitted: float
    in_background: bool
    tokens: list[int] = field(default_factory=list)
    usage: CacheUsage | None = None
    progress: PrefillProgress | None = None
    has_begun: bool = False
    has_ended: bool = False

    def rest(self) -> GenerationRequest:
        """What a worker is asked: the request, or the rest of its answer."""
        if not self.tokens:
            return self.request
        return replace(
            self.request,
            prompt_token_ids=[*self.request.prompt_token_ids, *self.tokens],
            params=replace(self.request.params, prompt_logprobs=None),
            answered=len(self.tokens),
        )

    def computed(self, progress: PrefillProgress) -> None:
        """A worker has computed the prompt so far."""
        self.progress = progress

    def relay(self, output: TokenOutput) -> None:
        """Give an output to the listener. Of a worker that resumes an answer, its account of the prompt is left
        out: to it, the tokens before are a prompt.
        """
        if self.route.resumed:
            output = replace(output, usage=self.usage, queue_seconds=None, prompt_logprobs=())
        if not self.has_begun:
            prompt_tokens = len(self.request.prompt_token_ids)
            self.progress = PrefillProgress(prompt_tokens, prompt_tokens)
            output = replace(output, route_seconds=self.route.seconds)
        self.usage = output.usage or self.usage
        self.tokens += output.token_ids
        self.has_begun = True
        self.has_ended = output.finish_reason is not None
        self.listener(output)


class ClusterEngine:
    """An `Engine` over the workers of ``membership``, whose model ``model`` describes. Belongs to their event loop.

    A request whose worker fails before its first output is sent to another one. Later, its answer is resumed
    behind the tokens that were relayed (`GenerationRequest.answered`), so that the whole is what one worker would
    have given; for that, requests without a seed get one here.

    rng: draws these seeds. in_flight: bounds how many requests there are at once. resume_seconds: how long an answer
    that has begun waits for a worker. clock: monotonic seconds.
    """

    def __init__(
        self,
        membership: Membership,
        model: WorkerDescription,
        *,
        rng: random.Random | None = None,
        in_flight: ConcurrencyLimit | None = None,
        resume_seconds: float = RESUME_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._membership = membership
        self._model = model
        self._rng = rng if rng is not None else random.Random()
        self._in_flight = in_flight if in_flight is not None else ConcurrencyLimit(MAX_REQUESTS)
        self._resume_seconds = resume_seconds
        self._clock = clock
        self._chains = RecentChains(model.block_size)
        self.public = PublicPrefixes([decode_prompt(each) for each in model.public_prefixes], model.block_size)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._answers: dict[str, _Answer] = {}
        self._background: dict[Worker, str] = {}  # which request each worker computes that must make way for others
        self._routes: OrderedDict[str, Route] = OrderedDict()
        self._is_stopped = False
        self._prompt_tokens = 0
        self._hit_tokens = 0
        self.retried = 0
        self.resumed = 0
        self.refused = 0
        self.decisions: Counter[RoutingReason] = Counter()

    @property
    def context_length(self) -> int:
        """The least of all workers: any of them may have to go on with an answer."""
        return min((each.context_length for each in self._descriptions()), default=self._model.context_length)

    @property
    def max_prompt_tokens(self) -> int:
        return min((each.max_prompt_tokens for each in self._descriptions()), default=self._model.max_prompt_tokens)

    def route(self, request_id: str) -> Route | None:
        """Where a request went; None where that is not known, or not any more."""
        return self._routes.get(request_id)

    def chain(self, request: GenerationRequest) -> TokenChain:
        """The prompt under the block hashes by which all workers know its blocks."""
        tokens = request.prompt_token_ids
        return self._chains.chain(
            self._model.root,
            tokens,
            owner=request.tenant,
            salt=request.salt,
            public_blocks=self.public.blocks_of(tokens),
            remember=True,
        )

    def worker_of(self, request_id: str) -> str:
        """The worker that has answered a request, or answers it; "" where that is not known."""
        route = self._routes.get(request_id)
        return route.workers[-1] if route is not None and route.workers else ""

    def epoch_of(self, worker_id: str) -> bytes | None:
        """Another one after each start of a worker; None while the worker is not up."""
        worker = self._up(worker_id)
        return None if worker is None or worker.description is None else worker.description.epoch

    def _up(self, worker_id: str) -> Worker | None:
        worker = self._membership.named(worker_id) if worker_id else None
        return worker if worker is not None and worker.status is WorkerStatus.UP else None

    def free_tokens(self, worker_id: str) -> int | None:
        """What an idle worker's pool holds beside what is in use. None where the worker is not up, or has something to
        do for this gateway or, as it last said, for others. What others have it compute in the background does not
        count: its scheduler has both share its time.
        """
        worker = self._up(worker_id)
        if worker is None or worker.running or worker in self._background:
            return None
        report = worker.report
        is_idle = report is not None and not (report.running or report.waiting)
        return report.free_blocks * self._model.block_size if report is not None and is_idle else None

    def decide(self, request: GenerationRequest) -> tuple[Worker, Decision] | None:
        """Where a request would go now; None while no worker is up."""
        chain = self.chain(request)
        asked = RoutingRequest(chain, len(chain), request.session_id, self._clock())
        return self._membership.decide(asked, only_asks=True)

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        """Queue a request. Raises EngineStoppedError, DuplicateRequestError or TooManyRequestsError; what only a worker
        finds wrong with the request is the ``refusal`` of its last output.

        One of `BACKGROUND_PRIORITY` that names its worker is computed there alone, unless the worker has something to
        do; it ends with ABORT when another request goes there. No policy is asked, its route is not remembered, and it
        does not count among the requests in flight.
        """
        if self._is_stopped:
            raise EngineStoppedError("the gateway has stopped")
        if request.request_id in self._running:
            raise DuplicateRequestError(f"request {request.request_id!r} is already in flight")
        in_background = bool(request.worker) and request.priority >= BACKGROUND_PRIORITY
        if not in_background:
            self._enter(request.tenant)
        params = request.params
        if params.seed is None and not params.is_greedy:
            request = replace(request, params=replace(params, seed=self._rng.getrandbits(63)))
        answer = _Answer(request, self.chain(request), listener, Route(), self._clock(), in_background)
        if not in_background:
            self._routes[request.request_id] = answer.route
        if len(self._routes) > len(self._running) + MAX_ROUTES:
            self._routes.popitem(last=False)
        work = self._carry_out_in_background(answer) if in_background else self._carry_out(answer)
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(partial(self._ended, answer))
        self._running[request.request_id] = task
        self._answers[request.request_id] = answer

    def _enter(self, tenant: str) -> None:
        try:
            self._in_flight.enter(tenant, 1)
        except TooManyRequestsError:
            self.refused += 1
            raise

    def abort(self, request_id: str) -> None:
        task = self._running.get(request_id)
        if task is not None:
            task.cancel()

    async def stop(self) -> None:
        """End every request with ABORT."""
        self._is_stopped = True
        for task in self._running.values():
            task.cancel()
        while self._running:
            await asyncio.wait(self._running.values())

    def progress(self, request_id: str) -> PrefillProgress | None:
        """As the request's worker last said it."""
        answer = self._answers.get(request_id)
        return None if answer is None else answer.progress

    def stats(self) -> EngineStats:
        """The sums of what the workers last reported; the counters are of this gateway's requests."""
        reports = [worker.report for worker in self._membership.up if worker.report is not None]
        return EngineStats(
            running=sum(report.running for report in reports),
            waiting=sum(report.waiting for report in reports),
            block_size=self._model.block_size,
            block_bytes=max((report.block_bytes for report in reports), default=0),
            total_blocks=sum(report.total_blocks for report in reports),
            free_blocks=sum(report.free_blocks for report in reports),
            cached_blocks=sum(report.cached_blocks for report in reports),
            prefix_query_tokens=self._prompt_tokens,
            prefix_hit_tokens=self._hit_tokens,
        )

    def _descriptions(self) -> list[WorkerDescription]:
        return [worker.description for worker in self._membership.up if worker.description is not None]

    def _ended(self, answer: _Answer, task: asyncio.Task[None]) -> None:
        """Give the listener its last output, however the request has ended, and even if it was aborted at once."""
        request_id = answer.request.request_id
        del self._running[request_id], self._answers[request_id]
        if not answer.in_background:
            self._in_flight.leave(answer.request.tenant, 1)
        error = None if task.cancelled() else task.exception()
        if error is None:
            if not answer.has_ended:
                answer.listener(TokenOutput(request_id, finish_reason=FinishReason.ABORT))
        elif isinstance(error, EmberError):
            refused = TokenOutput(request_id, finish_reason=FinishReason.ERROR, error=str(error), refusal=error)
            answer.listener(refused)
        else:
            _log.error("request %s failed", request_id, exc_info=error)
            failed = f"the gateway failed: {type(error).__name__}"
            answer.listener(TokenOutput(request_id, finish_reason=FinishReason.ERROR, error=failed))

    async def _carry_out(self, answer: _Answer) -> None:
        """Send a request to one worker after the other, until one has given its last output.

        Raises what a worker refuses the request by, and what the last one failed with where there is no other.
        """
        busy: dict[Worker, OverloadedError] = {}
        losses = attempts = 0
        deadline = self._clock() + self._resume_seconds
        while True:
            worker = await self._choose(answer, busy, deadline)
            if (background := self._background.get(worker)) is not None:
                self.abort(background)
            before = len(answer.tokens)
            try:
                await self._ask(worker, answer)
                return
            except OverloadedError as error:
                busy[worker] = error
                continue
            except DuplicateRequestError as error:
                if not attempts:
                    raise
                busy[worker] = OverloadedError(f"{worker} has not aborted it yet: {error}", retry_after=1.0)
                continue
            except (ClusterError, EngineStoppedError, NotReadyError, UnauthorizedError) as error:
                if answer.has_ended:
                    return
                self._failed(worker, answer, error)
                if len(answer.tokens) > before:
                    losses = attempts = 0
                    deadline = self._clock() + self._resume_seconds
                losses += isinstance(error, (WireError, WorkerLostError, WorkerTimeoutError))
                attempts += 1
            if losses >= MAX_LOSSES or attempts >= MAX_ATTEMPTS:
                raise GenerationFailedError(f"{attempts} workers in turn did not finish the answer")
            busy.clear()

    async def _carry_out_in_background(self, answer: _Answer) -> None:
        """Have the worker that the request names compute it, while it does nothing else but background work; without
        an output where it does something else.

        Raises what the worker refuses the request by, or fails with.
        """
        request = answer.request
        worker = self._membership.named(request.worker)
        if worker is None or self.free_tokens(request.worker) is None:
            return

        def make_way(progress: PrefillProgress) -> None:
            answer.computed(progress)
            report = worker.report
            if report is not None and report.running + report.waiting:  # for another gateway
                self.abort(request.request_id)

        answer.route.workers.append(worker.worker_id)
        worker.background += 1
        self._background[worker] = request.request_id
        try:
            async with aclosing(worker.connection.generate(request, make_way)) as outputs:
                async for output in outputs:
                    answer.relay(output)
        except (ClusterError, EngineStoppedError, NotReadyError) as error:
            self._membership.suspect(worker, error)
            raise
        finally:
            del self._background[worker]

    def _failed(self, worker: Worker, answer: _Answer, error: EmberError) -> None:
        """The worker has not finished the answer, which is resumed at another one."""
        _log.warning("request %s is resumed at another worker: %s", answer.request.request_id, error)
        self._membership.suspect(worker, error)
        worker.lost += 1
        if answer.has_begun:
            answer.route.resumed += 1
            self.resumed += 1
        else:
            answer.route.retried += 1
            self.retried += 1

    async def _ask(self, worker: Worker, answer: _Answer) -> None:
        request_id = answer.request.request_id
        computed = len(answer.chain) + len(answer.tokens) - sum(answer.route.cached.values())
        worker.sent(request_id, computed, self._clock())
        try:
            async with aclosing(worker.connection.generate(answer.rest(), answer.computed)) as outputs:
                async for output in outputs:
                    if output.finish_reason is FinishReason.ABORT:
                        raise EngineStoppedError(f"worker {worker} stopped before the answer was finished")
                    if output.token_ids:
                        worker.begun(request_id)
                    if not answer.has_begun and output.usage is not None:
                        self._prompt_tokens += output.usage.prompt_tokens
                        self._hit_tokens += output.usage.cached_tokens
                    answer.relay(output)
        finally:
            worker.ended(request_id)

    async def _choose(self, answer: _Answer, busy: dict[Worker, OverloadedError], deadline: float) -> Worker:
        """The worker that a request, or the rest of its answer, goes to; by ``deadline`` where it waits for one.

        Raises TooManyRequestsError when all that are up refuse it as overloaded, NotReadyError when none is up; for an
        answer that has begun, only after it has waited for one.
        """
        while True:
            asked = RoutingRequest(answer.chain, len(answer.chain), answer.request.session_id, self._clock())
            found = self._named(answer.request.worker, asked, busy) or self._membership.decide(asked, busy)
            if found is not None:
                worker, decision = found
                self.decisions[decision.reason] += 1
                answer.route.workers.append(worker.worker_id)
                answer.route.decision = decision
                answer.route.reasons[worker.worker_id] = decision.reason
                if not answer.has_begun:
                    answer.route.seconds = self._clock() - answer.submitted
                answer.route.cached = decision.cached_by_tier
                return worker
            left = deadline - self._clock()
            if not answer.has_begun or left <= 0:
                raise self._none_left(busy)
            await self._wait(min(left, 1.0) if busy else left)
            if self._clock() < deadline:
                busy.clear()  # they may accept requests again

    def _named(self, worker_id: str, asked: RoutingRequest, busy: Collection[Worker]) -> tuple[Worker, Decision] | None:
        """The worker that a request names, while it can take it."""
        worker = self._membership.named(worker_id) if worker_id else None
        if worker is None or worker in busy:
            return None
        found = self._membership.choose(asked, [worker])
        return None if found is None else (worker, found[1]._replace(reason=RoutingReason.SEQUENCE))

    async def _wait(self, seconds: float) -> None:
        """Until a worker's status changes, or for so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._membership.changed()
        except TimeoutError:
            pass

    def _none_left(self, busy: Mapping[Worker, OverloadedError]) -> EmberError:
        self.refused += 1
        if busy:
            soonest = min(error.retry_after or 1.0 for error in busy.values())
            return TooManyRequestsError(
                "all workers have as many requests as they take; send it again later", retry_after=soonest
            )
        return NotReadyError("no worker is up; send it again later")

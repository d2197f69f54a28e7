"""Computes, while the server is idle, or at a gateway the worker, what the next prompt of each session begins with.

Many chat templates rewrite earlier turns once the user asks again: they drop the thoughts. Then the next prompt differs
from all that is cached from the first answer to the last question on, often by thousands of tokens. Everything before
the user's next text is known when the answer ends, so it can be computed before the user has written that.
"""

import asyncio
import contextlib
import uuid
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile
from math import inf
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emberkv.core.sequence import BACKGROUND_PRIORITY, FinishReason
from emberkv.engine.request import GenerationRequest, SamplingParams, TokenOutput
from emberkv.errors import EmberError
from emberkv.serving.background import WorkerPool
from emberkv.serving.lifecycle import AnsweringWorkers, Lifecycle, ServedModel, ServerPhase
from emberkv.serving.parsing.events import ParsedMessage
from emberkv.serving.request_context import RequestContext

MOST_WAITING = 64
"""Next prompts that wait to be computed; of more, those that have waited longest are dropped."""

SHARE_OF_POOL = 4
"""A prompt is dropped that would take more than one part in so many of the blocks that no request holds."""

POLL_SECONDS = 0.25
"""Between two looks at whether a worker has nothing to do."""

_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


class RenderNext(Protocol):
    """Renders the next prompt of a conversation; `api.rendering.NextPrompt` is one."""

    @property
    def beginning(self) -> int:
        """The same for all turns of the conversation, and hardly ever for another one."""
        ...

    def tokens(self, answer: ParsedMessage) -> "array[int]":
        """Its beginning, up to the user's text. Raises RequestError for what the template refuses."""
        ...


Conversation = tuple[str, str, int]
"""Tenant, session, and the beginning: side calls of a session, such as one for a title, are other conversations."""


class NextTurnOutcome(Enum):
    """What became of a next prompt."""

    COMPUTED = "computed"
    NOTHING_TO_DO = "nothing_to_do"  # all of it was computed for the turn that has ended
    REPLACED = "replaced"  # the next request of the conversation came before
    QUEUE_FULL = "queue_full"
    TOO_LONG = "too_long"  # it leaves no place in the context for a question
    POOL_TOO_SMALL = "pool_too_small"
    OVER_BUDGET = "over_budget"  # of tokens a minute
    WORKER_LOST = "worker_lost"  # at a gateway: the worker that has the conversation's blocks is not up, or began anew
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class _Turn:
    """A turn that has ended. prompt: its token ids. answer, render: of which ``tokens`` are made, the beginning of the
    next prompt; these three are dropped then.

    worker: where it is computed, at a gateway, while it has that epoch. missing: how many of ``tokens`` were not
    computed for the turn. is_charged: they are taken from the budget.
    request_id: of the engine, while they are computed. is_stale: the next request of the conversation has come.
    """

    request: RequestContext
    conversation: Conversation
    prompt: Sequence[int]
    answer: ParsedMessage | None
    render: RenderNext | None
    worker: str = ""
    epoch: bytes | None = None
    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    missing: int = 0
    is_charged: bool = False
    request_id: str = ""
    is_stale: bool = False
    is_interrupted: bool = False

    def rendered(self) -> None:
        """Render the next prompt, and forget the text. Raises RequestError for what the template refuses."""
        if self.render is None or self.answer is None:
            return
        self.tokens = self.render.tokens(self.answer)
        common = takewhile(lambda pair: pair[0] == pair[1], zip(self.prompt, self.tokens, strict=False))
        self.missing = len(self.tokens) - sum(1 for _ in common)
        self.answer = self.render = None
        self.prompt = ()


class NextTurns(Collector):
    """Computes the next prompts of conversations one at a time, while no request is being answered. Belongs to the
    event loop, and collects its own metrics.

    A request that arrives ends the computation behind the step that the engine is in; what was computed stays cached,
    and the rest follows when the server is idle again. Of each conversation the latest turn alone waits. At a gateway
    (`ServedModel.answering_workers`), all this is about the worker that has answered the turn, and `ClusterEngine` ends
    a computation when another request goes to that worker.

    tokens_a_minute: the most that are computed; 0: nothing is. clock: monotonic seconds.
    """

    def __init__(
        self, lifecycle: Lifecycle, workers: WorkerPool, *, tokens_a_minute: int, clock: Callable[[], float]
    ) -> None:
        self.counts: Counter[NextTurnOutcome] = Counter()
        self.computed_tokens = 0
        self.interruptions = 0
        self._lifecycle = lifecycle
        self._workers = workers
        self._budget = _Budget(tokens_a_minute, clock)
        self._waiting: OrderedDict[Conversation, _Turn] = OrderedDict()
        self._current: _Turn | None = None
        self._task: asyncio.Task[None] | None = None
        lifecycle.on_unload.append(self._waiting.clear)

    def turn_ended(
        self, request: RequestContext, prompt: Sequence[int], answer: ParsedMessage, render: RenderNext
    ) -> None:
        """An answer without tool calls has ended, so that the user is next. prompt: the token ids of its prompt."""
        if not self._budget.tokens_a_minute:
            return
        conversation = _conversation(request, render)
        if self._waiting.pop(conversation, None) is not None:
            self.counts[NextTurnOutcome.REPLACED] += 1
        turn = _Turn(request, conversation, prompt, answer, render)
        if (workers := self._answering_workers) is not None:
            turn.worker = workers.worker_of(request.request_id)
            turn.epoch = workers.epoch_of(turn.worker)
            if turn.epoch is None:
                self.counts[NextTurnOutcome.WORKER_LOST] += 1
                return
        self._waiting[conversation] = turn
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popitem(last=False)
            self.counts[NextTurnOutcome.QUEUE_FULL] += 1

    def request_arrived(self, request: RequestContext, render: RenderNext | None) -> None:
        """A request goes before all that is computed here. What waits for its conversation is of no use any more."""
        turn = self._current
        if not (turn or self._waiting):
            return
        conversation = None if render is None else _conversation(request, render)
        if conversation is not None and self._waiting.pop(conversation, None) is not None:
            self.counts[NextTurnOutcome.REPLACED] += 1
        if turn is not None:
            is_its_next = turn.conversation == conversation
            turn.is_stale = turn.is_stale or is_its_next
            if self._answering_workers is not None and not is_its_next:
                return
            turn.is_interrupted = True
            if turn.request_id:
                self._lifecycle.model().engine.abort(turn.request_id)

    def begin_if_idle(self) -> None:
        """Go on with what waits, unless a request is being answered; at a gateway, by the turn's worker."""
        if self._waiting and self._is_idle and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._compute_all())

    @property
    def _answering_workers(self) -> AnsweringWorkers | None:
        return self._lifecycle.model().answering_workers if self._lifecycle.has_model else None

    @property
    def _is_idle(self) -> bool:
        is_serving = self._lifecycle.phase in (ServerPhase.WARMING, ServerPhase.READY)
        return is_serving and (self._answering_workers is not None or not self._lifecycle.running)

    def _next(self) -> Conversation | None:
        """The first that waits; at a gateway, the first whose worker has nothing to do. Those are dropped whose worker
        is lost.
        """
        workers = self._answering_workers
        if workers is None:
            return next(iter(self._waiting))
        for name in [name for name, turn in self._waiting.items() if workers.epoch_of(turn.worker) != turn.epoch]:
            del self._waiting[name]
            self.counts[NextTurnOutcome.WORKER_LOST] += 1
        return next(
            (name for name, turn in self._waiting.items() if workers.free_tokens(turn.worker) is not None), None
        )

    async def _compute_all(self) -> None:
        work = self._lifecycle.background.work("next turns")
        while self._waiting and self._is_idle:
            conversation = self._next()
            if conversation is None:
                await asyncio.sleep(POLL_SECONDS)
                continue
            turn = self._waiting.pop(conversation)
            outcome: NextTurnOutcome | None = NextTurnOutcome.FAILED
            turn.is_interrupted = False
            self._current = turn
            try:
                with work.attempt():
                    outcome = await self._compute(turn)
            finally:
                self._current = None
            if outcome is not None:
                self.counts[outcome] += 1
                continue
            self.interruptions += 1
            if turn.is_stale or conversation in self._waiting:
                self.counts[NextTurnOutcome.REPLACED] += 1
            else:
                self._waiting[conversation] = turn
                self._waiting.move_to_end(conversation, last=False)

    async def _compute(self, turn: _Turn) -> NextTurnOutcome | None:
        """None: a request has interrupted it."""
        model = self._lifecycle.model()
        try:
            await self._workers.run(turn.rendered)
            if (problem := self._problem(model, turn)) is not None:
                return problem
            output = None if turn.is_interrupted else await self._last_output(model, turn)
        except EmberError:  # a template that refuses the next turn, a server that stops or has too much to do
            return NextTurnOutcome.FAILED
        if output is None or output.finish_reason is FinishReason.ABORT:
            return None
        if output.usage is None or output.finish_reason is FinishReason.ERROR:
            return NextTurnOutcome.FAILED
        self.computed_tokens += output.usage.computed_tokens
        return NextTurnOutcome.COMPUTED

    def _problem(self, model: ServedModel, turn: _Turn) -> NextTurnOutcome | None:
        if turn.missing <= 1:  # the last token of a prompt is always computed
            return NextTurnOutcome.NOTHING_TO_DO
        if len(turn.tokens) >= model.engine.max_prompt_tokens:
            return NextTurnOutcome.TOO_LONG
        if turn.missing * SHARE_OF_POOL > self._free_tokens(model, turn):
            return NextTurnOutcome.POOL_TOO_SMALL
        if not turn.is_charged and not self._budget.take(turn.missing):
            return NextTurnOutcome.OVER_BUDGET
        turn.is_charged = True
        return None

    def _free_tokens(self, model: ServedModel, turn: _Turn) -> float:
        if model.answering_workers is not None:
            free = model.answering_workers.free_tokens(turn.worker)
            return inf if free is None else free  # it is not begun then, and waits again
        stats = model.engine.stats()
        return stats.free_blocks * stats.block_size

    async def _last_output(self, model: ServedModel, turn: _Turn) -> TokenOutput:
        """Raises what `Engine.submit` raises."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[TokenOutput] = loop.create_future()

        def end(output: TokenOutput) -> None:
            if not ended.done():
                ended.set_result(output)

        def listen(output: TokenOutput) -> None:
            if output.finish_reason is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing waits
                    loop.call_soon_threadsafe(end, output)

        request = turn.request
        turn.request_id = f"next-turn-{uuid.uuid4().hex}"
        generation = GenerationRequest(
            turn.request_id,
            turn.tokens,
            _ONE_TOKEN,
            request.tenant.salt,
            priority=BACKGROUND_PRIORITY,
            tenant=request.tenant.name,
            session_id=request.session,
            worker=turn.worker,
        )
        try:
            model.engine.submit(generation, listen)
            return await ended
        finally:
            if not ended.done():
                model.engine.abort(turn.request_id)
            turn.request_id = ""

    def collect(self) -> Iterator[Metric]:
        counts = CounterMetricFamily(
            "emberkv_next_turn_prompts", "Next prompts of conversations, by what became of them.", labels=["outcome"]
        )
        for outcome in NextTurnOutcome:
            counts.add_metric([outcome.value], self.counts[outcome])
        yield counts
        yield GaugeMetricFamily(
            "emberkv_next_turn_waiting",
            "Next prompts that wait until the server, or their worker, is idle.",
            value=len(self._waiting),
        )
        for name, text, value in (
            (
                "tokens",
                "Tokens computed of next prompts, without interrupted computations.",
                self.computed_tokens,
            ),
            ("interruptions", "Computations of next prompts that a request has interrupted.", self.interruptions),
        ):
            yield CounterMetricFamily(f"emberkv_next_turn_{name}", text, value=value)


def _conversation(request: RequestContext, render: RenderNext) -> Conversation:
    return request.tenant.name, request.session, render.beginning


class _Budget:
    """At most so many tokens a minute, and at once."""

    def __init__(self, tokens_a_minute: int, clock: Callable[[], float]) -> None:
        self.tokens_a_minute = tokens_a_minute
        self._clock = clock
        self._left = float(tokens_a_minute)
        self._at = clock()

    def take(self, tokens: int) -> bool:
        """Whether there were so many left, which are taken then."""
        now = self._clock()
        self._left = min(self.tokens_a_minute, self._left + (now - self._at) * self.tokens_a_minute / 60)
        self._at = now
        if tokens > self._left:
            return False
        self._left -= tokens
        return True

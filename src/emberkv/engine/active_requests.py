"""The requests in flight: each gets its outputs in order, and exactly one last output."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from emberkv.core.scheduler import Scheduler, StepPlan
from emberkv.core.sequence import FinishReason, Sequence
from emberkv.engine.constraints import AnswerMasks
from emberkv.engine.executor import PromptLogprobs, SampledToken, SamplingState, StepOutput
from emberkv.engine.request import (
    CacheUsage,
    GenerationRequest,
    OutputListener,
    PrefillProgress,
    TokenLogprobs,
    TokenOutput,
)
from emberkv.errors import RequestError

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ActiveRequest:
    """A request in flight. masks: of its constraint."""

    request: GenerationRequest
    sequence: Sequence
    state: SamplingState
    listener: OutputListener
    submitted_at: float
    masks: AnswerMasks | None = None
    admitted_at: float | None = None
    has_output: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def queue_seconds(self) -> float | None:
        """From submission to the first admission; None before that."""
        return None if self.admitted_at is None else self.admitted_at - self.submitted_at

    @property
    def progress(self) -> PrefillProgress | None:
        """None before the first admission. May be read from any thread: it is made of numbers that are replaced."""
        if self.admitted_at is None:
            return None
        prompt_tokens = self.sequence.prompt_tokens
        return PrefillProgress(min(self.sequence.num_computed, prompt_tokens), prompt_tokens)

    @property
    def load_seconds(self) -> float:
        """That the loads took which it waited for, one after another."""
        return sum(load.took for load in {id(wait.load): wait.load for wait in self.sequence.waits}.values())

    def keep_prompt_logprobs(self, found: PromptLogprobs) -> None:
        """Of the tokens that are not known yet: a preempted sequence is computed again."""
        known = self.prompt_logprobs
        if not known:
            known.append(TokenLogprobs(self.sequence.chain[0], None, ()))
        known += found.tokens[len(known) - found.start :]


class ActiveRequests:
    """By request id. Belongs to the engine's thread.

    sampling: the sampling state of each. clock: seconds. forget: called with the id of each request that has ended,
    before its last output.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        clock: Callable[[], float],
        forget: Callable[[str], None],
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._forget = forget
        self._requests: dict[str, ActiveRequest] = {}
        self.sampling: dict[str, SamplingState] = {}

    def add(self, arrived: Iterable[ActiveRequest]) -> None:
        """Know them; they are not queued by this."""
        for active in arrived:
            self._requests[active.request.request_id] = active
            self.sampling[active.request.request_id] = active.state

    def admitted(self, sequences: Iterable[Sequence], now: float) -> Iterator[Sequence]:
        """Those of them that had not been admitted before."""
        for sequence in sequences:
            active = self._requests[sequence.request_id]
            if active.admitted_at is None:
                active.admitted_at = now
                yield sequence

    def end(self, request_id: str, reason: FinishReason, error: str | None = None) -> None:
        """End a request for good; an id that is not in flight is ignored."""
        active = self._requests.get(request_id)
        if active is not None:
            self._scheduler.finish(request_id, reason)
            self._send(active, finish_reason=reason, error=error)

    def is_in_flight(self, active: ActiveRequest) -> bool:
        return self._requests.get(active.request.request_id) is active

    def refuse(self, active: ActiveRequest, error: RequestError) -> None:
        """End a request that the scheduler has not got, because it cannot be accepted."""
        self._send(active, finish_reason=FinishReason.ERROR, error=str(error), refusal=error)

    def fail(self, sequences: Iterable[Sequence], error: str) -> None:
        for request_id in {sequence.request_id for sequence in sequences}:
            self.end(request_id, FinishReason.ERROR, error)

    def end_all(self) -> None:
        for request_id in list(self._requests):
            self.end(request_id, FinishReason.ABORT)

    def end_failed(self, plan: StepPlan, output: StepOutput) -> None:
        """End the requests that failed with ERROR, and take them out of the plan before their tokens are committed."""
        failed = output.failed
        if not failed:
            return
        for request_id, reason in failed.items():
            self.end(request_id, FinishReason.ERROR, reason)
        plan.decodes = [each for each in plan.decodes if each.request_id not in failed]
        plan.prefills = [each for each in plan.prefills if each.sequence.request_id not in failed]

    def deliver(self, plan: StepPlan, output: StepOutput) -> None:
        """Account for a computed plan, and hand out its tokens. Requests that failed have been ended before."""
        sampled = output.tokens
        for found in output.prompt_logprobs:
            if found.request_id in self._requests:
                self._requests[found.request_id].keep_prompt_logprobs(found)
        stopped = {
            request_id for request_id, token in sampled.items() if self.sampling[request_id].ends_with(token.token_id)
        }
        tokens = {request_id: token.token_id for request_id, token in sampled.items()}
        self._scheduler.complete(plan, tokens, stopped)
        for request_id, token in sampled.items():
            active = self._requests[request_id]
            active.state.append(token.token_id)
            self._retain(active)
            if request_id in stopped:
                self._send(active, finish_reason=FinishReason.STOP)
            else:
                self._send(active, token=token, finish_reason=active.sequence.finish_reason)

    def _retain(self, active: ActiveRequest) -> None:
        """At the first token: the whole prompt is computed, and its blocks are in the pool if they are to be."""
        request, chain = active.request, active.sequence.chain
        if request.retain_tokens and not active.has_output:
            blocks = chain.block_hashes[: request.retain_tokens // chain.block_size]
            self._scheduler.cache.pool.retain(blocks, self._clock() + request.retain_seconds)

    def _send(
        self,
        active: ActiveRequest,
        *,
        token: SampledToken | None = None,
        finish_reason: FinishReason | None = None,
        error: str | None = None,
        refusal: RequestError | None = None,
    ) -> None:
        first = not active.has_output
        complete = len(active.prompt_logprobs) == active.sequence.prompt_tokens
        active.has_output = True
        if finish_reason is not None:
            self._remove(active.request.request_id)
        self._hand_out(
            active,
            TokenOutput(
                active.request.request_id,
                token_ids=(token.token_id,) if token is not None else (),
                logprobs=(token.logprobs,) if token is not None and token.logprobs is not None else (),
                usage=self._usage(active.sequence),
                finish_reason=finish_reason,
                error=error,
                refusal=refusal,
                prompt_logprobs=tuple(active.prompt_logprobs) if first and complete else (),
                queue_seconds=active.queue_seconds if first else None,
                load_seconds=active.load_seconds if first else 0.0,
            ),
        )

    def _hand_out(self, active: ActiveRequest, output: TokenOutput) -> None:
        """A listener that raises gets nothing more: its request ends, and no other."""
        try:
            active.listener(output)
        except Exception:  # noqa: BLE001 - logged; the caller's own failure ends the caller's request
            request_id = active.request.request_id
            _log.exception("the listener of request %s failed, and the request ends", request_id)
            if output.finish_reason is None:
                self._scheduler.finish(request_id, FinishReason.ABORT)
                self._remove(request_id)

    def _remove(self, request_id: str) -> None:
        self._forget(request_id)
        del self._requests[request_id]
        del self.sampling[request_id]

    def _usage(self, sequence: Sequence) -> CacheUsage:
        cache = self._scheduler.cache
        full = sequence.prompt_tokens - sequence.prompt_tokens % cache.pool.block_size
        created = max(0, full - sequence.cached_tokens) if cache.enabled else 0
        return CacheUsage(sequence.prompt_tokens, sequence.cached_tokens, created, sequence.tier_tokens)

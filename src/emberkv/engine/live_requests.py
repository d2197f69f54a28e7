"""The requests in flight: each gets its outputs in order, and exactly one last output."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from emberkv.core.scheduler import Scheduler, StepPlan
from emberkv.core.sequence import FinishReason, Sequence
from emberkv.engine.executor import PromptLogprobs, SampledToken, SamplingState, StepOutput
from emberkv.engine.limits import ModelLimits
from emberkv.engine.request import CacheUsage, GenerationRequest, OutputListener, TokenLogprobs, TokenOutput

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Live:
    """A request in flight."""

    request: GenerationRequest
    sequence: Sequence
    state: SamplingState
    listener: OutputListener
    submitted_at: float
    admitted_at: float | None = None
    answered: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def keep_prompt_logprobs(self, found: PromptLogprobs) -> None:
        """Of the tokens that are not known yet: a preempted sequence is computed again."""
        known = self.prompt_logprobs
        if not known:
            known.append(TokenLogprobs(self.sequence.chain[0], None, ()))
        known += found.tokens[len(known) - found.start :]


class LiveRequests:
    """By request id. Belongs to the engine's thread.

    sampling: the sampling state of each. clock: seconds. forget: called with the id of each request that has ended,
    before its last output.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        limits: ModelLimits,
        *,
        clock: Callable[[], float],
        forget: Callable[[str], None],
    ) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self._clock = clock
        self._forget = forget
        self._live: dict[str, Live] = {}
        self.sampling: dict[str, SamplingState] = {}

    def add(self, arrived: Iterable[Live]) -> None:
        """Know them; they are not queued by this."""
        for live in arrived:
            self._live[live.request.request_id] = live
            self.sampling[live.request.request_id] = live.state

    def admitted(self, sequences: Iterable[Sequence], now: float) -> Iterator[Sequence]:
        """Those of them that had not been admitted before."""
        for sequence in sequences:
            live = self._live[sequence.request_id]
            if live.admitted_at is None:
                live.admitted_at = now
                yield sequence

    def end(self, request_id: str, reason: FinishReason, error: str | None = None) -> None:
        """End a request for good; an id that is not in flight is ignored."""
        live = self._live.get(request_id)
        if live is not None:
            self._scheduler.finish(request_id, reason)
            self._send(live, finish_reason=reason, error=error)

    def fail(self, sequences: Iterable[Sequence], error: str) -> None:
        for request_id in {sequence.request_id for sequence in sequences}:
            self.end(request_id, FinishReason.ERROR, error)

    def end_all(self) -> None:
        for request_id in list(self._live):
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
            if found.request_id in self._live:
                self._live[found.request_id].keep_prompt_logprobs(found)
        stopped = {
            request_id
            for request_id, token in sampled.items()
            if token.token_id in self._limits.eos_token_ids and not self._live[request_id].request.params.ignore_eos
        }
        tokens = {request_id: token.token_id for request_id, token in sampled.items()}
        self._scheduler.complete(plan, tokens, stopped)
        for request_id, token in sampled.items():
            live = self._live[request_id]
            live.state.append(token.token_id)
            self._retain(live)
            if request_id in stopped:
                self._send(live, finish_reason=FinishReason.STOP)
            else:
                self._send(live, token=token, finish_reason=live.sequence.finish_reason)

    def _retain(self, live: Live) -> None:
        """At the first token: the whole prompt is computed, and its blocks are in the pool if they are to be."""
        request, chain = live.request, live.sequence.chain
        if request.retain_tokens and not live.answered:
            blocks = chain.block_hashes[: request.retain_tokens // chain.block_size]
            self._scheduler.cache.pool.policy.retain(blocks, self._clock() + request.retain_seconds)

    def _send(
        self,
        live: Live,
        *,
        token: SampledToken | None = None,
        finish_reason: FinishReason | None = None,
        error: str | None = None,
    ) -> None:
        first = not live.answered
        complete = len(live.prompt_logprobs) == live.sequence.prompt_tokens
        live.answered = True
        if finish_reason is not None:
            self._remove(live.request.request_id)
        self._hand_out(
            live,
            TokenOutput(
                live.request.request_id,
                token_ids=(token.token_id,) if token is not None else (),
                logprobs=(token.logprobs,) if token is not None and token.logprobs is not None else (),
                usage=self._usage(live.sequence),
                finish_reason=finish_reason,
                error=error,
                prompt_logprobs=tuple(live.prompt_logprobs) if first and complete else (),
                queue_seconds=live.admitted_at - live.submitted_at if first and live.admitted_at is not None else None,
            ),
        )

    def _hand_out(self, live: Live, output: TokenOutput) -> None:
        """A listener that raises gets nothing more: its request ends, and no other."""
        try:
            live.listener(output)
        except Exception:  # noqa: BLE001 - logged; the caller's own failure ends the caller's request
            request_id = live.request.request_id
            _log.exception("the listener of request %s failed, and the request ends", request_id)
            if output.finish_reason is None:
                self._scheduler.finish(request_id, FinishReason.ABORT)
                self._remove(request_id)

    def _remove(self, request_id: str) -> None:
        self._forget(request_id)
        del self._live[request_id]
        del self.sampling[request_id]

    def _usage(self, sequence: Sequence) -> CacheUsage:
        cache = self._scheduler.cache
        full = sequence.prompt_tokens - sequence.prompt_tokens % cache.pool.block_size
        created = max(0, full - sequence.cached_tokens) if cache.enabled else 0
        return CacheUsage(sequence.prompt_tokens, sequence.cached_tokens, created, sequence.tier_tokens)

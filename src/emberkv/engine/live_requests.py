"""The requests in flight: their next tokens are drawn here, and each gets its outputs, the last one exactly once."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from emberkv.core.scheduler import Scheduler, StepPlan
from emberkv.core.sequence import FinishReason, Sequence
from emberkv.engine.limits import ModelLimits
from emberkv.engine.request import CacheUsage, GenerationRequest, OutputListener, TokenLogprobs, TokenOutput
from emberkv.engine.sampling import NOT_NUMBERS, SampledToken, Sampler, SamplingFailure, SamplingState, prompt_logprobs
from emberkv.engine.torch_engine import PromptLogits, StepResult

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


class LiveRequests:
    """By request id. Belongs to the engine's thread.

    clock: seconds. forget: called with the id of each request that has ended, before its last output.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        limits: ModelLimits,
        sampler: Sampler,
        *,
        clock: Callable[[], float],
        forget: Callable[[str], None],
    ) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self._sampler = sampler
        self._clock = clock
        self._forget = forget
        self._live: dict[str, Live] = {}

    def add(self, arrived: Iterable[Live]) -> None:
        """Know them; they are not queued by this."""
        self._live.update((live.request.request_id, live) for live in arrived)

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

    def sample(self, plan: StepPlan, result: StepResult | None) -> dict[str, SampledToken]:
        """The next token of each sequence that is ready for one, by request id.

        A request that cannot be sampled ends with ERROR and leaves the plan before its tokens of this step are
        committed. The other requests of the step are not affected.
        """
        if result is None:
            return {}
        ids = [sequence.request_id for sequence in result.sequences]
        results = self._sampler.sample(result.logits, [self._live[request_id].state for request_id in ids])
        sampled: dict[str, SampledToken] = {}
        failed: dict[str, str] = {}
        for request_id, each in zip(ids, results, strict=True):
            if isinstance(each, SamplingFailure):
                failed[request_id] = each.reason
            else:
                sampled[request_id] = each
        failed.update(self._take_prompts(result.prompts))
        for request_id, reason in failed.items():
            sampled.pop(request_id, None)
            self.end(request_id, FinishReason.ERROR, reason)
        if failed:
            plan.decodes = [each for each in plan.decodes if each.request_id not in failed]
            plan.prefills = [each for each in plan.prefills if each.sequence.request_id not in failed]
        return sampled

    def _take_prompts(self, computed: Iterable[PromptLogits]) -> Iterator[tuple[str, str]]:
        """Keep log-probabilities of prompt tokens; yields the requests whose scores are no numbers, and that reason.

        What a preempted sequence computes again is known already.
        """
        for each in computed:
            sequence, live = each.sequence, self._live[each.sequence.request_id]
            known = live.prompt_logprobs
            if not known:
                known.append(TokenLogprobs(sequence.chain[0], None, ()))
            first, stop = len(known), min(each.start + each.logits.shape[0] + 1, sequence.prompt_tokens)
            if first >= stop:
                continue
            rows = each.logits[first - 1 - each.start : stop - 1 - each.start]
            alternatives = live.request.params.prompt_logprobs or 0
            found = prompt_logprobs(rows, sequence.chain.slice(first, stop), alternatives)
            if found is None:
                yield sequence.request_id, NOT_NUMBERS
            else:
                known += found

    def deliver(self, plan: StepPlan, sampled: dict[str, SampledToken]) -> None:
        """Account for a computed plan, and hand out its tokens."""
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
            blocks = chain.identities[: request.retain_tokens // chain.block_size]
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
            self._forget(live.request.request_id)
            del self._live[live.request.request_id]
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
                self._forget(request_id)
                del self._live[request_id]

    def _usage(self, sequence: Sequence) -> CacheUsage:
        cache = self._scheduler.cache
        full = sequence.prompt_tokens - sequence.prompt_tokens % cache.pool.block_size
        created = max(0, full - sequence.cached_tokens) if cache.enabled else 0
        return CacheUsage(sequence.prompt_tokens, sequence.cached_tokens, created, sequence.tier_tokens)

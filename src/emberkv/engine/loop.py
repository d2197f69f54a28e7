"""The engine's thread: takes requests in, runs step after step, and hands tokens out."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from emberkv.core.hashing import Identity, TokenChain
from emberkv.core.scheduler import Scheduler, StepPlan
from emberkv.core.sequence import FinishReason, Sequence
from emberkv.engine.limits import ModelLimits
from emberkv.engine.request import (
    CacheUsage,
    EngineStats,
    GenerationRequest,
    OutputListener,
    TokenOutput,
)
from emberkv.engine.sampling import SampledToken, Sampler, SamplingState
from emberkv.engine.torch_engine import StepResult
from emberkv.errors import DuplicateRequestError, EngineStoppedError

_log = logging.getLogger(__name__)


class StepExecutor(Protocol):
    """What computes a plan; `TorchEngine` is one."""

    def root(self, salt: bytes) -> Identity: ...

    def execute(self, plan: StepPlan) -> StepResult | None: ...


@dataclass(slots=True)
class _Live:
    """A request in flight."""

    request: GenerationRequest
    sequence: Sequence
    state: SamplingState
    listener: OutputListener
    submitted_at: float
    admitted_at: float | None = None
    answered: bool = False


class EngineLoop:
    """Owns the scheduler and everything below it; no other thread touches them.

    clock: seconds, for queue times. rng: draws for requests that bring no seed. on_crash: called on the engine's
    thread when the loop itself fails, not just a step; every request then ends with ABORT.
    """

    def __init__(
        self,
        executor: StepExecutor,
        scheduler: Scheduler,
        limits: ModelLimits,
        *,
        sampler: Sampler | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        on_crash: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._limits = limits
        self._sampler = sampler if sampler is not None else Sampler()
        self._clock = clock
        self._rng = rng if rng is not None else random.Random()
        self._on_crash = on_crash
        self._wake = threading.Condition()
        self._arrived: list[_Live] = []
        self._aborted: list[str] = []
        self._ids: set[str] = set()
        self._stopping = False
        self._live: dict[str, _Live] = {}
        self._stats = EngineStats()
        self._publish_stats()
        self._thread = threading.Thread(target=self._run, name="emberkv-engine", daemon=True)

    @property
    def context_length(self) -> int:
        return min(self._limits.context_length, self._scheduler.max_sequence_tokens)

    @property
    def max_prompt_tokens(self) -> int:
        return self.context_length - 1

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End every request with ABORT and join the thread. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is None:
            self._end_all()  # never started: nobody else would
        elif self._thread.is_alive():
            self._thread.join()

    def stats(self) -> EngineStats:
        return self._stats

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        """Queue a request; hashing the prompt's blocks happens here, on the caller's thread.

        Raises PromptTooLongError, RequestError, DuplicateRequestError or EngineStoppedError; then no output follows.
        """
        self._limits.check(request, self._scheduler.max_sequence_tokens)
        chain = TokenChain(
            self._executor.root(request.salt), request.prompt_token_ids, self._scheduler.cache.pool.block_size
        )
        sequence = Sequence(request.request_id, chain, request.params.max_tokens, request.priority)
        with self._wake:
            if self._stopping:
                raise EngineStoppedError("the engine is stopping; no request can begin")
            if request.request_id in self._ids:
                raise DuplicateRequestError(f"request id {request.request_id!r} is in flight already")
            state = SamplingState(request.params, request.prompt_token_ids, self._rng)
            self._ids.add(request.request_id)
            self._arrived.append(_Live(request, sequence, state, listener, self._clock()))
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        with self._wake:
            if request_id in self._ids:
                self._aborted.append(request_id)
                self._wake.notify()

    def _run(self) -> None:
        try:
            while self._take_in():
                self._step()
                self._publish_stats()
        except Exception as error:  # noqa: BLE001 - the thread ends here, and whoever watches it is told why
            _log.exception("the engine failed and has stopped")
            self._on_crash(error)
        finally:
            self._end_all()

    def _take_in(self) -> bool:
        """Wait for work, move it to the scheduler; False when it is time to stop."""
        with self._wake:
            while not (self._arrived or self._aborted or self._live or self._stopping):
                self._wake.wait()
            arrived, self._arrived = self._arrived, []
            aborted, self._aborted = self._aborted, []
            stopping = self._stopping
        # All are known before any is queued, so that each gets its last output even if queueing one fails.
        self._live.update((live.request.request_id, live) for live in arrived)
        for live in arrived:
            self._scheduler.add(live.sequence)
        for request_id in aborted:
            if request_id in self._live:
                self._scheduler.finish(request_id, FinishReason.ABORT)
                self._send(self._live[request_id], finish_reason=FinishReason.ABORT)
        if arrived or aborted:
            self._publish_stats()
        return not stopping

    def _step(self) -> None:
        plan = self._scheduler.schedule()
        now = self._clock()
        for sequence in plan.admitted:
            live = self._live[sequence.request_id]
            live.admitted_at = live.admitted_at if live.admitted_at is not None else now
        if not plan:
            return
        try:
            result = self._executor.execute(plan)
            sampled = self._sample(self._without_broken(plan, result)) if result is not None else {}
        except Exception as error:  # noqa: BLE001 - whatever failed, these requests end with it and others go on
            _log.exception("a step failed")
            failed = [*plan.decodes, *(chunk.sequence for chunk in plan.prefills)]
            self._fail(failed, f"the engine failed: {type(error).__name__}")
            return
        self._deliver(plan, sampled)

    def _without_broken(self, plan: StepPlan, result: StepResult) -> StepResult:
        """End those whose scores are not numbers, before any of what was computed for them is committed."""
        usable = result.logits.amax(dim=-1).isfinite()
        broken = [sequence for sequence, good in zip(result.sequences, usable.tolist(), strict=True) if not good]
        if not broken:
            return result
        self._fail(broken, "the model's scores for the next token are not numbers")
        plan.decodes = [sequence for sequence in plan.decodes if sequence not in broken]
        plan.prefills = [chunk for chunk in plan.prefills if chunk.sequence not in broken]
        return StepResult([each for each in result.sequences if each not in broken], result.logits[usable])

    def _sample(self, result: StepResult) -> dict[str, SampledToken]:
        ids = [sequence.request_id for sequence in result.sequences]
        tokens = self._sampler.sample(result.logits, [self._live[request_id].state for request_id in ids])
        return dict(zip(ids, tokens, strict=True))

    def _deliver(self, plan: StepPlan, sampled: dict[str, SampledToken]) -> None:
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
            if request_id in stopped:
                self._send(live, finish_reason=FinishReason.STOP)
            else:
                self._send(live, token=token, finish_reason=live.sequence.finish_reason)

    def _fail(self, sequences: Iterable[Sequence], error: str) -> None:
        for request_id in {sequence.request_id for sequence in sequences}:
            self._scheduler.finish(request_id, FinishReason.ERROR)
            self._send(self._live[request_id], finish_reason=FinishReason.ERROR, error=error)

    def _send(
        self,
        live: _Live,
        *,
        token: SampledToken | None = None,
        finish_reason: FinishReason | None = None,
        error: str | None = None,
    ) -> None:
        first = not live.answered
        live.answered = True
        if finish_reason is not None:
            self._forget(live)
        live.listener(
            TokenOutput(
                live.request.request_id,
                token_ids=(token.token_id,) if token is not None else (),
                logprobs=(token.logprobs,) if token is not None and token.logprobs is not None else (),
                usage=self._usage(live.sequence),
                finish_reason=finish_reason,
                error=error,
                queue_seconds=live.admitted_at - live.submitted_at if first and live.admitted_at is not None else None,
            )
        )

    def _usage(self, sequence: Sequence) -> CacheUsage:
        cache = self._scheduler.cache
        full = sequence.prompt_tokens - sequence.prompt_tokens % cache.pool.block_size
        created = full - sequence.cached_tokens if cache.enabled else 0
        return CacheUsage(sequence.prompt_tokens, sequence.cached_tokens, created)

    def _forget(self, live: _Live) -> None:
        with self._wake:
            self._ids.discard(live.request.request_id)
        del self._live[live.request.request_id]

    def _end_all(self) -> None:
        with self._wake:
            self._stopping = True
            arrived, self._arrived = self._arrived, []
        for live in arrived:
            self._live[live.request.request_id] = live
        for live in list(self._live.values()):
            self._scheduler.finish(live.request.request_id, FinishReason.ABORT)
            self._send(live, finish_reason=FinishReason.ABORT)
        self._publish_stats()

    def _publish_stats(self) -> None:
        pool, stats = self._scheduler.cache.pool, self._scheduler.stats
        self._stats = EngineStats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            total_blocks=pool.num_blocks,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_evictable,
            prefix_query_tokens=stats.query_tokens,
            prefix_hit_tokens=stats.hit_tokens,
            evictions=stats.evicted_blocks,
            preemptions=stats.preemptions,
            prefill_tokens=stats.prefill_tokens,
            decode_tokens=stats.decode_tokens,
        )

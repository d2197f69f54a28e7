"""The engine's thread: takes requests in, runs step after step, and hands tokens out."""

import logging
import random
import threading
import time
from collections import abc
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

from emberkv.core.events import Event, EventLog
from emberkv.core.hashing import BlockHash, PublicPrefixes, TokenChain
from emberkv.core.scheduler import Scheduler, StepPlan
from emberkv.core.sequence import FinishReason, Sequence
from emberkv.engine.active_requests import ActiveRequest, ActiveRequests
from emberkv.engine.commands import CacheControl, Command
from emberkv.engine.constraints import AnswerMasks, ConstraintCompiler, MaskCounts
from emberkv.engine.executor import Executor, SamplingState
from emberkv.engine.mailbox import Mail, Mailbox
from emberkv.engine.recent_chains import RecentChains
from emberkv.engine.request import EngineStats, GenerationRequest, ModelLimits, OutputListener, PrefillProgress
from emberkv.engine.tier_link import TierLink
from emberkv.errors import RequestError

R = TypeVar("R")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheUpdate:
    """What a step changed.

    time: seconds since 1970. admitted: the sequences admitted for the first time; their ``admission`` and
    ``cached_tokens`` are set, and they belong to the engine's thread. events: of the pool and the tiers below it, in
    order; those that admissions caused are among them. missed: events before these are lost, so that only a snapshot
    says what is cached.
    """

    time: float
    admitted: abc.Sequence[Sequence]
    events: abc.Sequence[Event]
    missed: bool = False


CacheObserver = Callable[[CacheUpdate], None]
"""Called on the engine's thread after a step is planned and after it is done, where anything has changed; it must
return at once. It gets a request's admission before the request's first output, and before what the request commits.
"""


class CacheEventPublisher:
    """Hands the events of a log on to observers. admitted: the sequences admitted for the first time since the last
    `publish`, to be filled in by the loop.
    """

    def __init__(self, log: EventLog, wall_clock: Callable[[], float]) -> None:
        self.admitted: list[Sequence] = []
        self._log = log
        self._wall_clock = wall_clock
        self._observers: tuple[CacheObserver, ...] = ()
        self._changing = threading.Lock()  # of the observers, which any thread may add to
        self._published = log.last_sequence

    def add(self, observer: CacheObserver) -> None:
        """From any thread."""
        with self._changing:
            self._observers = (*self._observers, observer)

    def publish(self) -> None:
        """An observer that raises is not called again."""
        admitted, self.admitted = self.admitted, []
        events = self._log.since(self._published) if self._observers else ()
        self._published = self._log.last_sequence
        if not (admitted or events or events is None):
            return
        update = CacheUpdate(self._wall_clock(), admitted, events or (), missed=events is None)
        for observer in self._observers:
            try:
                observer(update)
            except Exception:  # noqa: BLE001 - logged; answers do not depend on observers
                _log.exception("an observer of the cache failed and is not called again: %s", _name(observer))
                with self._changing:
                    self._observers = tuple(each for each in self._observers if each is not observer)


def _name(observer: CacheObserver) -> str:
    """Of its function or method, or else of its class."""
    return f"{observer.__module__}.{getattr(observer, '__qualname__', type(observer).__qualname__)}"


class EngineLoop:
    """Owns the scheduler and everything below it; no other thread touches them.

    root: of the model's block hashes. clock: seconds, for queue times and how long steps take. wall_clock: seconds
    since 1970, of updates. rng: draws for requests that bring no seed. on_crash: called on the engine's thread when the
    loop itself fails, not just a step; every request then ends with ABORT. tiers: what lies below the pool; the
    scheduler's own. control: carries out commands; None: one over ``scheduler`` and ``tiers``. public: which prefixes
    all tenants share. constraints: compiles those of requests; None: such requests are refused.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        limits: ModelLimits,
        *,
        root: BlockHash,
        tiers: TierLink | None = None,
        control: CacheControl | None = None,
        public: PublicPrefixes | None = None,
        constraints: ConstraintCompiler | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        on_crash: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._limits = limits
        self._root = root
        self._tiers = tiers
        self._control = control or CacheControl(
            scheduler,
            lower=tiers.peeking if tiers is not None else None,
            manager=tiers.manager if tiers is not None else None,
            clock=clock,
        )
        self._public = public
        self._constraints = constraints
        self._uncompiled: list[ActiveRequest] = []  # whose constraints are being compiled
        self._clock = clock
        self._rng = rng if rng is not None else random.Random()
        self._on_crash = on_crash
        self._chains = RecentChains(scheduler.cache.pool.block_size)
        self._mailbox = Mailbox()
        self._live = ActiveRequests(
            scheduler,
            clock=clock,
            forget=self._mailbox.forget,
        )
        self._updates = CacheEventPublisher(scheduler.cache.pool.events, wall_clock)
        self._listeners: tuple[Callable[[], None], ...] = ()
        self._listening = threading.Lock()  # of the listeners, which any thread may add to
        self._stats = EngineStats()
        self._publish_stats()
        self._thread = threading.Thread(target=self._run, name="emberkv-engine", daemon=True)
        if tiers is not None:
            tiers.on_ended = self._mailbox.wake

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
        self._mailbox.stop()
        if self._thread.ident is None:
            self._end_all()  # never started, so that its thread does not
        elif self._thread.is_alive():
            self._thread.join()

    def stats(self) -> EngineStats:
        """As of the last step; the tiers' own statistics as of now."""
        if self._tiers is None:
            return self._stats
        manager = self._tiers.manager
        return replace(self._stats, tiers=manager.stats(), stack=manager.stack_stats())

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        """Queue a request; hashing the prompt's blocks happens here, on the caller's thread.

        A request with a constraint waits, and others do not, until that is compiled; one that cannot be is the
        ``refusal`` of its only output.

        Raises PromptTooLongError, RequestError, DuplicateRequestError or EngineStoppedError; then no output follows.
        """
        self._limits.check(request, self._scheduler.max_sequence_tokens)
        chain = self._chain(request, remember=True)
        sequence = Sequence(
            request.request_id,
            chain,
            request.params.max_tokens - request.answered,
            request.priority,
            tenant=request.tenant,
            # the engine that began the answer has sent them
            wants_prompt_logits=request.params.prompt_logprobs is not None and not request.answered,
            checkpoints=request.checkpoints,
        )
        tokens, prompt_end = request.prompt_token_ids, len(request.prompt_token_ids) - request.answered
        masks = self._masks(request, tokens[prompt_end:])
        state = SamplingState(
            request.params,
            tokens[:prompt_end],
            self._rng,
            request.allowed_tokens,
            answer=tokens[prompt_end:],
            end_token_ids=self._limits.end_token_ids(request.params),
            masks=masks,
        )
        self._mailbox.submit(ActiveRequest(request, sequence, state, listener, self._clock(), masks))
        if masks is not None:
            masks.on_ready(self._mailbox.wake)

    def _masks(self, request: GenerationRequest, answer: abc.Sequence[int]) -> AnswerMasks | None:
        """Those of the request's constraint, which begin to be compiled; None without one."""
        if request.params.constraint is None:
            return None
        if self._constraints is None:
            raise RequestError(
                "this engine has no tokenizer, and so no constraints; leave them out", param="constraint"
            )
        if request.allowed_tokens is not None:
            raise RequestError("constraint and allowed_tokens are both given; send one of them", param="constraint")
        return self._constraints.begin(request.params.constraint, answer)

    def chain(self, request: GenerationRequest) -> TokenChain:
        """The prompt under the block hashes by which the cache knows its blocks."""
        return self._chain(request, remember=False)

    def _chain(self, request: GenerationRequest, *, remember: bool) -> TokenChain:
        tokens = request.prompt_token_ids
        return self._chains.chain(
            self._root,
            tokens,
            owner=request.tenant,
            salt=request.salt,
            public_blocks=self._public.blocks_of(tokens) if self._public is not None else 0,
            remember=remember,
        )

    def abort(self, request_id: str) -> None:
        self._mailbox.abort(request_id)

    def progress(self, request_id: str) -> PrefillProgress | None:
        active = self._mailbox.find(request_id)
        return None if active is None else active.progress

    def execute(self, command: Command[R]) -> "Future[R]":
        """Have ``command`` carried out on the engine's thread, between two steps. The future raises what it raises, and
        EngineStoppedError where the engine stops before.

        Raises EngineStoppedError after `stop`.
        """
        return self._mailbox.command(command)

    def on_update(self, observer: CacheObserver) -> None:
        """Have ``observer`` called with what changes in the cache from now on; not again once it has raised."""
        self._updates.add(observer)

    def on_stats(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called, on the engine's thread, whenever `stats` have changed; it must return at once."""
        with self._listening:
            self._listeners = (*self._listeners, listener)

    def _run(self) -> None:
        try:
            while self._take_in():
                self._step()
                self._updates.publish()
                self._publish_stats()
        except Exception as error:  # noqa: BLE001 - the thread ends here, and on_crash gets the reason
            _log.exception("the engine failed and has stopped")
            self._on_crash(error)
        finally:
            self._end_all()

    def _take_in(self) -> bool:
        """Wait for something to do, and move what came to the scheduler; False when it is time to stop."""
        mail = self._mailbox.collect(self._idle_seconds())
        if mail is None:
            return False
        self._accept(mail)
        if self._uncompiled:
            self._queue_compiled()
        self._log_tier_events()
        for command in mail.commands:
            command.execute(self._control)
        if self._tiers is not None:
            for load, exact in self._tiers.completed():
                self._scheduler.loaded(load, exact)
            for lookup in self._tiers.looked_up():
                self._scheduler.looked_up(lookup)
        if mail:
            self._publish_stats()
        return True

    def _log_tier_events(self) -> None:
        log = self._scheduler.cache.pool.events
        for event in self._tiers.take_events() if self._tiers is not None else ():
            log.append(event)

    def _idle_seconds(self) -> float | None:
        """How long there is nothing to do unless mail comes; None: until then."""
        if self._scheduler.has_work or (self._tiers is not None and self._tiers.has_ended):
            return 0.0
        left = self._tiers.seconds_left if self._tiers is not None else None
        return None if left is None else max(0.0, left)

    def _accept(self, mail: Mail) -> None:
        # All are known before any is queued, so that each gets its last output even if queueing one fails.
        self._live.add(mail.arrived)
        for active in mail.arrived:
            if active.masks is None:
                self._scheduler.add(active.sequence)
            else:
                self._uncompiled.append(active)
        for request_id in mail.aborted:
            self._live.end(request_id, FinishReason.ABORT)

    def _queue_compiled(self) -> None:
        waiting, self._uncompiled = self._uncompiled, []
        for active in waiting:
            if not self._live.is_in_flight(active):
                continue  # aborted meanwhile
            if active.masks is not None and not active.masks.is_ready:
                self._uncompiled.append(active)
            elif active.masks is not None and (refusal := active.masks.refusal) is not None:
                self._live.refuse(active, refusal)
            else:
                self._scheduler.add(active.sequence)

    def _step(self) -> None:
        began = self._clock()
        self._scheduler.cache.pool.policy.expire(began)
        plan = self._scheduler.schedule()
        self._begin(plan, began)
        self._updates.publish()  # of admissions, before any output can ask why
        if not plan:
            return
        try:
            output = self._executor.execute(plan, self._live.sampling)
        except Exception as error:  # noqa: BLE001 - whatever failed, these requests end with it and others go on
            _log.exception("a step failed")
            failed = [*plan.decodes, *(chunk.sequence for chunk in plan.prefills)]
            self._live.fail(failed, f"the engine failed: {type(error).__name__}")
            return
        seconds = self._clock() - began
        self._control.step_times.observe(plan, seconds)
        self._live.end_failed(plan, output)
        self._live.deliver(plan, output)
        if self._tiers is not None:
            self._tiers.offload(self._scheduler.cache.pool.take_committed())
            if plan.prefills:
                self._tiers.computed(plan.num_tokens, self._clock() - began)

    def _begin(self, plan: StepPlan, now: float) -> None:
        first_time = list(self._live.admitted(plan.admitted, now))
        self._updates.admitted += first_time
        if self._tiers is not None:
            for sequence in first_time:
                self._tiers.used(_reused(sequence, checkpoints=self._scheduler.cache.keeps_branches))
            for load in plan.loads:
                self._tiers.onboard(load)
            for lookup in plan.lookups:
                self._tiers.look_up(lookup)

    def _end_all(self) -> None:
        mail = self._mailbox.close()
        self._live.add(mail.arrived)
        self._live.end_all()
        for command in mail.commands:
            command.drop()
        for load in self._scheduler.loads:
            self._scheduler.loaded(load, ())
        if self._tiers is not None:
            self._tiers.close()
        if self._constraints is not None:
            self._constraints.close()
        self._publish_stats()

    def _publish_stats(self) -> None:
        before = self._stats
        counts = self._constraints.counts if self._constraints is not None else MaskCounts()
        self._stats = _engine_stats(self._scheduler, self._tiers, self._executor.pool.block_bytes, counts)
        if self._listeners and self._stats != before:
            for listener in self._listeners:
                listener()


def _reused(sequence: Sequence, *, checkpoints: bool) -> abc.Sequence[BlockHash]:
    """Of the full blocks that a sequence reuses that was just admitted, and of the checkpoint that it goes on from."""
    full = sequence.chain.block_hashes[: sequence.cached_tokens // sequence.chain.block_size]
    copy = sequence.held.copy if checkpoints else None
    # a victim of the same plan may have left a longer checkpoint in its place
    if copy is None or copy.source.block_hash is None:
        return full
    return [*full, copy.source.block_hash]


def _engine_stats(scheduler: Scheduler, tiers: TierLink | None, block_bytes: int, masks: MaskCounts) -> EngineStats:
    """All but the tiers' own counts, which any thread may read."""
    pool, stats = scheduler.cache.pool, scheduler.stats
    return EngineStats(
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        block_size=pool.block_size,
        block_bytes=block_bytes,
        total_blocks=pool.num_blocks,
        free_blocks=pool.num_free,
        cached_blocks=pool.num_evictable,
        prefix_query_tokens=stats.query_tokens,
        prefix_bypass_tokens=stats.bypass_tokens,
        prefix_hit_tokens=stats.hit_tokens,
        evictions=stats.evicted_blocks,
        preemptions=stats.preemptions,
        compiled_constraints=masks.compiled,
        masks_ready=masks.ready,
        masks_waited=masks.waited,
        prefill_tokens=stats.prefill_tokens,
        decode_tokens=stats.decode_tokens,
        checkpoints=stats.checkpoints if scheduler.cache.keeps_branches else {},
        loads=len(scheduler.loads),
        tier_hit_tokens=dict(stats.tier_hit_tokens),
        load_choices={choice.value: count for choice, count in stats.load_choices.items()},
        loaded_blocks=stats.loaded_blocks,
        unloaded_blocks=stats.unloaded_blocks,
        exported_blocks=stats.exported_blocks,
        imported_blocks=stats.imported_blocks,
        refused_imports=dict(stats.refused_imports),
        transfer_errors=dict(tiers.errors) if tiers is not None else {},
        pool_bytes_by_owner={owner: int(size) for owner, size in pool.policy.bytes_by_owner().items()},
    )

"""What an engine has to do, and how fast it is at that: what a router weighs one engine against another by."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass

from emberkv.core.block import Block
from emberkv.core.loading import LatencyModel
from emberkv.core.scheduler import Scheduler, StepPlan
from emberkv.core.sequence import BACKGROUND_PRIORITY, Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Of all requests but those of `BACKGROUND_PRIORITY`, which make way for others.

    sequence: of the cache's last event. waiting, running: requests.

    waiting_tokens: of the prompts that wait, what the pool has not got, by an estimate. prefill_tokens: of the prompts
    that are being computed, what is left. decoding: requests of which each step computes one token. total_blocks,
    free_blocks, cached_blocks: of the pool; the cached ones are among the free, as are those that background requests
    alone hold. prefill_rate: prompt tokens a second. step_seconds: of a step that decodes and computes no prompt. Rates
    are None until they are measured.
    """

    sequence: int = 0
    waiting: int = 0
    running: int = 0
    waiting_tokens: int = 0
    prefill_tokens: int = 0
    decoding: int = 0
    total_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    prefill_rate: float | None = None
    step_seconds: float | None = None


class StepTimes:
    """How long steps take, by what they compute. It belongs to the engine's thread."""

    def __init__(self) -> None:
        self._prefill = LatencyModel()
        self._decode = LatencyModel()

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step was computed in so many seconds."""
        model = self._prefill if plan.prefills else self._decode
        if plan.num_tokens:
            model.observe(plan.num_tokens, max(0.0, seconds))

    def prefill_rate(self, step_tokens: int) -> float | None:
        """Prompt tokens a second, in steps of so many."""
        seconds = self._prefill.seconds_for(step_tokens)
        return step_tokens / seconds if seconds else None

    def step_seconds(self, decoding: int) -> float | None:
        """Of a step that computes one token of each of so many requests."""
        return self._decode.seconds_for(max(1, decoding))


def load_of(scheduler: Scheduler, times: StepTimes) -> EngineLoad:
    """The load as of now. It takes some microseconds for each request in flight, and more for background requests."""
    pool = scheduler.cache.pool
    waiting_tokens = prefill_tokens = decoding = 0
    waiting, running = scheduler.num_waiting, scheduler.num_running
    background = Counter[Block]()  # the background requests that hold each block
    for sequence in scheduler.sequences:
        if sequence.priority >= BACKGROUND_PRIORITY:
            if sequence.lease is None:
                waiting -= 1
            else:
                running -= 1
                background.update(sequence.lease.blocks)
        elif sequence.status is SequenceStatus.DECODING:
            decoding += 1
        elif sequence.lease is not None:
            prefill_tokens += len(sequence.chain) - sequence.num_computed
        else:
            waiting_tokens += _uncached_tokens(scheduler, sequence)
    return EngineLoad(
        sequence=pool.events.last_sequence,
        waiting=waiting,
        running=running,
        waiting_tokens=waiting_tokens,
        prefill_tokens=prefill_tokens,
        decoding=decoding,
        total_blocks=pool.num_blocks,
        free_blocks=pool.num_free + sum(block.ref_count == count for block, count in background.items()),
        cached_blocks=pool.num_evictable,
        prefill_rate=times.prefill_rate(scheduler.config.max_step_tokens),
        step_seconds=times.step_seconds(decoding),
    )


def _uncached_tokens(scheduler: Scheduler, sequence: Sequence) -> int:
    """By bisection, which takes a prompt to be cached up to a block that is."""
    pool, block_hashes = scheduler.cache.pool, sequence.chain.block_hashes
    if not scheduler.cache.enabled or sequence.wants_prompt_logits:
        return len(sequence.chain)
    cached = bisect_left(block_hashes, True, key=lambda block_hash: pool.lookup(block_hash) is None)
    return len(sequence.chain) - cached * pool.block_size

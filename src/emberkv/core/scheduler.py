"""Continuous batching: what the next step computes, for whom, and who has to wait.

A step decodes every running sequence together, then spends what is left of its token budget on prefill chunks. Chunks
are computed one sequence at a time. They end at multiples of the cache's alignment, which divides the chunk size, or
at the prompt's end, and begin there or where the hit ends. A hit ends at such a multiple, too, unless no cut changes a
bit; that is what makes its logits equal a cold run's.
"""

from collections.abc import Container, Iterable, Mapping
from collections.abc import Sequence as Batch

from emberkv.core.hashing import Identity
from emberkv.core.loads import Loads
from emberkv.core.matching import Match, MatchEnd
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.promotion import Load, LowerTiers
from emberkv.core.sequence import BACKGROUND_PRIORITY, FinishReason, Sequence, SequenceStatus
from emberkv.core.stats import CacheStats
from emberkv.core.step_plan import PrefillChunk, SchedulerConfig, StepPlan
from emberkv.core.waiting_queue import WaitingQueue
from emberkv.errors import ConfigError, DuplicateRequestError, PromptTooLongError, RequestError

__all__ = ["PrefillChunk", "Scheduler", "SchedulerConfig", "StepPlan"]


class Scheduler:
    """First come, first served within a priority. Not thread-safe: one engine drives it.

    The caller repeats: `schedule`, compute the plan, `complete`. Between the two nothing else may be called.
    lower: the tiers below the pool. A sequence that waits for blocks from there holds nothing and keeps its place in
    the line, but does not block it; the caller tells the end of each of a plan's loads by `loaded`.
    """

    def __init__(self, cache: PrefixCache, config: SchedulerConfig, lower: LowerTiers | None = None) -> None:
        self.cache = cache
        self.config = config
        if self.config.max_running < 1 or self.config.max_step_tokens < 1:
            raise ConfigError(
                f"max_running is {config.max_running}, max_step_tokens {config.max_step_tokens}; at least 1"
            )
        if config.prefill_chunk < 1 or config.prefill_chunk % cache.alignment:
            raise ConfigError(f"prefill_chunk is {config.prefill_chunk}; it must be a multiple of {cache.alignment}")
        self._waiting = WaitingQueue(self._free_for)
        self._running: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._loads = Loads(cache, lower)
        self._arrivals = 0

    @property
    def stats(self) -> CacheStats:
        return self.cache.pool.stats

    @property
    def loads(self) -> list[Load]:
        """Those in flight."""
        return self._loads.in_flight

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may plan anything now; if not, only an arrival or the end of a load changes that."""
        return bool(self._running) or self._admissible() is not None

    @property
    def num_waiting(self) -> int:
        return len(self._by_id) - len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def running(self) -> list[Sequence]:
        return list(self._running)

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt and answer together that the pool can hold, beside what floors keep for others."""
        return self.cache.pool.max_sequence_blocks * self.cache.pool.block_size

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises DuplicateRequestError, PromptTooLongError if the pool could never hold it, or
        RequestError if there is nothing to compute.
        """
        if sequence.request_id in self._by_id:
            raise DuplicateRequestError(f"request id {sequence.request_id!r} is in flight already")
        if not len(sequence.chain):
            raise RequestError("the prompt has no tokens; it must have at least 1", param="prompt")
        if sequence.max_new_tokens < 1:
            raise RequestError(f"max_tokens is {sequence.max_new_tokens}; it must be at least 1", param="max_tokens")
        total = len(sequence.chain) + sequence.max_new_tokens
        if total > self.max_sequence_tokens:
            raise PromptTooLongError(
                f"{len(sequence.chain)} prompt tokens and {sequence.max_new_tokens} to generate are {total}; "
                f"the KV pool holds {self.max_sequence_tokens}",
                param="max_tokens",
            )
        self._arrivals += 1
        sequence.order = self._arrivals
        self._by_id[sequence.request_id] = sequence
        self._waiting.push(sequence)

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """End a sequence wherever it is and free its blocks. An id that is not here (any more) is ignored."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._finish(sequence, reason)

    def loaded(self, load: Load, exact: Batch[bool]) -> None:
        """A load has ended. exact: of the leading blocks whose bytes are in their slots, each; none if it failed.

        These stay cached, nobody holding them, and who waited for them is admitted in its turn. Raises IntegrityError
        for a load that is not in flight.
        """
        for sequence in self._loads.end(load, exact):
            if sequence.status is SequenceStatus.LOADING:
                self._waiting.push(sequence)
        self._waiting.forget_refusal()

    def remove(self, identities: Iterable[Identity]) -> int:
        """Forget cached blocks, and what of them is being loaded; how many were cached."""
        wanted = list(identities)
        self._loads.revoke(wanted)
        self._waiting.forget_refusal()
        return self.cache.pool.remove(wanted)

    def schedule(self) -> StepPlan:
        """The next step, its blocks allocated. Computes nothing when there is nothing to do but wait."""
        plan = StepPlan()
        self._plan_decodes(plan)
        self._plan_prefills(plan)
        return plan

    def complete(self, plan: StepPlan, sampled: Mapping[str, int], stopped: Container[str] = ()) -> list[Sequence]:
        """Account for a computed plan: commit full blocks, append tokens, finish who is done.

        sampled: the next token by request id, for each decode and each sampling chunk. stopped: ids that end here;
        their sampled token (an end-of-sequence token) is not appended. Returns the sequences that finished.
        """
        self.stats.decode_tokens += len(plan.decodes)
        for sequence in plan.decodes:
            sequence.num_computed += 1
            sequence.held.commit_decoded(sequence.num_computed)
        for chunk in plan.prefills:
            chunk.sequence.num_computed = chunk.stop
            self.stats.prefill_tokens += chunk.stop - chunk.start
            chunk.sequence.held.commit_prefilled(chunk.stop)
        if plan.prefills:
            self._waiting.forget_refusal()  # whoever waits may share what was just committed
        finished = []
        ready = plan.decodes + [chunk.sequence for chunk in plan.prefills if chunk.samples]
        for sequence in ready:
            sequence.status = SequenceStatus.DECODING
            if sequence.request_id in stopped:
                self._finish(sequence, FinishReason.STOP)
                finished.append(sequence)
                continue
            sequence.chain.append(sampled[sequence.request_id])
            if sequence.num_generated >= sequence.max_new_tokens:
                self._finish(sequence, FinishReason.LENGTH)
                finished.append(sequence)
        return finished

    def _plan_decodes(self, plan: StepPlan) -> None:
        for sequence in sorted(self._running, key=lambda each: each.rank):
            if sequence.status is not SequenceStatus.DECODING:
                continue
            if self._make_room(sequence, plan):
                sequence.held.extend(len(sequence.chain))
                plan.decodes.append(sequence)

    def _make_room(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Preempt from the back until ``sequence`` can grow; False if it was itself the one to go."""
        while (missing := sequence.held.missing_blocks(len(sequence.chain))) and missing > self._free_for(sequence):
            victim = max(self._running, key=lambda each: each.rank)
            self._preempt(victim)
            plan.preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def _plan_prefills(self, plan: StepPlan) -> None:
        budget = self.config.max_step_tokens - len(plan.decodes)
        while True:
            sequence = self._next_to_prefill(plan)
            if sequence is None:
                return
            while sequence.num_computed < len(sequence.chain):
                chunk = self._next_chunk(sequence)
                length = chunk.stop - chunk.start
                # One chunk always goes, so that decoding sequences never starve those that wait to begin.
                if plan.prefills and (length > budget or sequence.priority >= BACKGROUND_PRIORITY):
                    return
                budget -= length
                sequence.num_computed = chunk.stop
                plan.prefills.append(chunk)

    def _next_chunk(self, sequence: Sequence) -> PrefillChunk:
        adopted = 0 if sequence.wants_prompt_logits else sequence.held.adopt(sequence.num_computed)
        if adopted:
            sequence.num_computed += adopted
            self.stats.hit_tokens += adopted
            self.stats.late_hit_tokens += adopted
            if sequence.num_preemptions == 0:
                sequence.cached_tokens += adopted
        start = sequence.num_computed
        stop = start - start % self.cache.alignment + self.config.prefill_chunk
        copy = sequence.held.copy if start % self.cache.pool.block_size else None
        return PrefillChunk(sequence, start, min(stop, len(sequence.chain)), copy)

    def _next_to_prefill(self, plan: StepPlan) -> Sequence | None:
        """The admitted sequence that still has tokens to plan, or else the next one admitted.

        Who is of a sooner priority is admitted before another's prompt is gone on with.
        """
        begun = [
            each
            for each in self._running
            if each.status is SequenceStatus.PREFILLING and each.num_computed < len(each.chain)
        ]
        if not begun:
            return self._admit(plan)
        first = min(begun, key=lambda each: each.rank)
        waiting = self._admissible()
        if waiting is not None and waiting.priority < first.priority:
            return self._admit(plan) or first
        return first

    def _admissible(self) -> Sequence | None:
        """Who is next in line, if one more may run and it is not known not to fit."""
        return self._waiting.first() if len(self._running) < self.config.max_running else None

    def _free_for(self, sequence: Sequence) -> int:
        pool = self.cache.pool
        return pool.free_for(sequence.chain.owner(pool.blocks_for(len(sequence.chain)) - 1))

    def _admit(self, plan: StepPlan) -> Sequence | None:
        while sequence := self._admissible():
            match = Match([], MatchEnd.OFF) if sequence.wants_prompt_logits else self.cache.match(sequence.chain)
            if not self._fits(sequence, match):
                self._waiting.refuse(sequence)
                return None
            self._waiting.pop()
            if self._loads.wait(sequence, match, plan.loads):
                sequence.status = SequenceStatus.LOADING
                continue
            self._take_in(sequence, match)
            plan.admitted.append(sequence)
            return sequence
        return None

    def _fits(self, sequence: Sequence, match: Match) -> bool:
        # Each decoding sequence may need a block before this one is done; without that slack, admission would
        # preempt at once what it has just admitted.
        slack = sum(each.status is SequenceStatus.DECODING for each in self._running)
        missing = self.cache.pool.blocks_for(len(sequence.chain)) + slack - self._free_for(sequence)
        if missing <= 0:
            return True
        # What others hold already costs nothing; all else comes out of the free blocks.
        return missing <= sum(block.ref_count > 0 for block in match.blocks[: self.cache.whole(len(match.blocks))])

    def _take_in(self, sequence: Sequence, match: Match) -> None:
        found = match.blocks[: self.cache.whole(len(match.blocks))]
        lease = self.cache.lease(sequence.chain, found, reads_cache=not sequence.wants_prompt_logits)
        lease.extend(len(sequence.chain))
        sequence.lease = lease
        sequence.num_computed = lease.hit_tokens
        sequence.status = SequenceStatus.PREFILLING
        self._running.append(sequence)
        if sequence.wants_prompt_logits:
            self.stats.bypass_tokens += len(sequence.chain)
        else:
            self.stats.query_tokens += len(sequence.chain)
        self.stats.hit_tokens += lease.hit_tokens
        if sequence.num_preemptions == 0:
            sequence.cached_tokens = lease.hit_tokens
            self._loads.account(sequence, match)

    def _preempt(self, sequence: Sequence) -> None:
        self._let_go(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.stats.preemptions += 1
        self._waiting.push(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._let_go(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        del self._by_id[sequence.request_id]

    def _let_go(self, sequence: Sequence) -> None:
        if sequence.lease is not None:
            sequence.lease.release()
            sequence.lease = None
            self._running.remove(sequence)
            self._waiting.forget_refusal()

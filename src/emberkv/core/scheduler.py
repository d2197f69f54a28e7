"""Continuous batching: which tokens the next step computes, for which sequences.

A step decodes every running sequence together, then spends what is left of its token budget on prefill chunks. Chunks
end at multiples of the cache's alignment, which divides the chunk size, or of a chunk size that divides it, or at the
prompt's end, and begin there or where the hit ends. A hit ends at a multiple of the alignment, too, unless no cut
changes a bit; that is what makes its logits equal a cold run's.

Chunks and admissions are shared between tenants by token counters (`TokenCounters`). A tenant's own sequences wait
in two lines, which take turns in the same way: those with at most a step's tokens to compute, and the others. So a long
prompt delays neither another tenant nor a short prompt by more than a few chunks, and within a line the order is first
come, first served.
"""

from collections import abc
from collections.abc import Container, Iterable, Mapping

from emberkv.core.block import Match, MatchEnd
from emberkv.core.hashing import BlockHash
from emberkv.core.loading import Load, LowerTiers, PendingLookup
from emberkv.core.pending_loads import PendingLoads
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.sequence import (
    BACKGROUND_PRIORITY,
    FinishReason,
    PrefillChunk,
    RunningSequences,
    SchedulerConfig,
    Sequence,
    SequenceStatus,
    StepPlan,
    advance_leases,
    is_being_computed,
)
from emberkv.core.waiting_queue import Claims, Line, WaitingQueue
from emberkv.errors import ConfigError, DuplicateRequestError, PromptTooLongError, RequestError

__all__ = ["PrefillChunk", "Scheduler", "SchedulerConfig", "StepPlan"]


class Scheduler:
    """Lower priorities first, then the tenant and the line with the lowest token counter. Not thread-safe.

    The caller repeats: `schedule`, compute the plan, `complete`. Between the two nothing else may be called.
    lower: the tiers below the pool. A sequence that waits for blocks from there holds nothing and keeps its place in
    the line, but does not block it; the caller reports the end of each of a plan's loads by `loaded`, and of each of
    its look-ups by `looked_up`.

    A sequence that does not fit holds up its own line only. Another line may be admitted past it until it is ahead by
    a pool's worth of tokens; from then on it waits, unless its tenant stays within its floor, so that large sequences
    do not starve. A tenant below its share of running sequences and blocks does not wait for the end of those above
    theirs: their latest sequences are preempted for it.
    """

    def __init__(self, cache: PrefixCache, config: SchedulerConfig, lower: LowerTiers | None = None) -> None:
        self.cache = cache
        self.stats = cache.pool.stats
        self.config = config
        if self.config.max_running < 1 or self.config.max_step_tokens < 1:
            raise ConfigError(
                f"max_running is {config.max_running}, max_step_tokens {config.max_step_tokens}; at least 1"
            )
        chunk, unit = config.prefill_chunk, cache.alignment
        if chunk < 1 or (chunk % unit and not (cache.batch_invariant and unit % chunk == 0)):
            raise ConfigError(f"prefill_chunk is {chunk}; it must be a multiple of {unit}")
        self._waiting = WaitingQueue(self._free_for, config.weights)
        self._running = RunningSequences()
        self._by_id: dict[str, Sequence] = {}
        self._loads = PendingLoads(cache, lower)
        self._arrivals = 0
        self._held_back = False

    @property
    def loads(self) -> list[Load]:
        """Those in flight."""
        return self._loads.in_flight

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may plan anything now; if not, only an arrival or the end of a load changes that."""
        return len(self._running) > 0 or self._may_admit()

    @property
    def num_waiting(self) -> int:
        return len(self._by_id) - len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def sequences(self) -> list[Sequence]:
        """All that have not ended, in the order of their arrival."""
        return list(self._by_id.values())

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
        length = len(sequence.chain)
        if not length:
            raise RequestError("the prompt has no tokens; it must have at least 1", param="prompt")
        if sequence.max_new_tokens < 1:
            raise RequestError(f"max_tokens is {sequence.max_new_tokens}; it must be at least 1", param="max_tokens")
        total = length + sequence.max_new_tokens
        if total > self.max_sequence_tokens:
            raise PromptTooLongError(
                f"{length} prompt tokens and {sequence.max_new_tokens} to generate are {total}; "
                f"the KV pool holds {self.max_sequence_tokens}",
                param="max_tokens",
            )
        self._arrivals += 1
        sequence.order = self._arrivals
        self._by_id[sequence.request_id] = sequence
        self._enqueue(sequence)
        self._waiting.forget_refusals()  # shares have changed, if the tenant is new

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """End a sequence wherever it is and free its blocks. An id that is not here (any more) is ignored."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._finish(sequence, reason)

    def loaded(self, load: Load, exact: abc.Sequence[bool]) -> None:
        """A load has ended. Blocks that arrived stay cached without a holder, and the sequences that waited for them
        are admitted in turn.

        exact: for each of the leading blocks whose bytes have arrived, whether it is exact; empty if the load failed.
        Raises IntegrityError for a load that is not in flight.
        """
        for sequence in self._loads.end(load, exact):
            if sequence.status is SequenceStatus.LOADING:
                self._enqueue(sequence)
        self._waiting.forget_refusals()

    def looked_up(self, lookup: PendingLookup) -> None:
        """A look-up is answered, or is waited for no longer: the sequence that waited is admitted in its turn.

        From now on, what a tier still cannot tell counts as a miss. Raises IntegrityError for a look-up that is not in
        progress.
        """
        sequence = self._loads.end_lookup(lookup)
        if sequence.status is SequenceStatus.LOADING:
            self._enqueue(sequence)
        self._waiting.forget_refusals()

    def remove(self, block_hashes: Iterable[BlockHash]) -> int:
        """Forget cached blocks, and what of them is being loaded; how many were cached."""
        wanted = list(block_hashes)
        self._loads.cancel_load([*wanted, *self.cache.pool.cached.siblings_among(wanted)])
        self._waiting.forget_refusals()
        return self.cache.pool.remove(wanted)

    def schedule(self) -> StepPlan:
        """The next step, its blocks allocated. Computes nothing when there is nothing to do but wait."""
        plan = StepPlan()
        self._plan_decodes(plan)
        self._plan_prefills(plan)
        return plan

    def complete(
        self, plan: StepPlan, sampled: Mapping[str, int], stopped: Container[str] = (), *, steps: int = 1
    ) -> list[Sequence]:
        """Account for a computed plan: commit full blocks, append tokens, finish sequences that are done.

        sampled: the next token by request id, for each decode and each sampling chunk. stopped: ids that end here;
        their sampled token (an end-of-sequence token) is not appended. steps: how many of the plan's `steady_steps`
        were computed since `advance`; the chains have the tokens of all but the last. Returns the sequences that
        finished.
        """
        self.advance(plan, steps, planned=False)
        ready = plan.decodes.copy()
        for chunk in plan.prefills:
            sequence = chunk.sequence
            sequence.num_computed = chunk.stop
            self.stats.prefill_tokens += chunk.stop - chunk.start
            held = sequence.held  # sequences may have been admitted since the chunk was planned
            held.commit_prefilled(chunk.stop, has_room=chunk.stop != held.checkpoint or self._has_spare(sequence))
            if chunk.samples:
                self._running.begin_decoding(sequence)
                ready.append(sequence)
        if plan.prefills:
            self._waiting.forget_refusals()  # waiting sequences may share what was just committed
        finished = []
        for sequence in ready:
            if sequence.request_id in stopped:
                self._finish(sequence, FinishReason.STOP)
                finished.append(sequence)
                continue
            sequence.chain.append(sampled[sequence.request_id])
            if sequence.num_generated >= sequence.max_new_tokens:
                self._finish(sequence, FinishReason.LENGTH)
                finished.append(sequence)
        return finished

    def steady_steps(self, plan: StepPlan, most: int, *, within_blocks: bool = False) -> int:
        """How many times in a row, from 1 to ``most``, ``plan`` would be planned if no sequence came, ended or was
        loaded: until its sequences need blocks that may not be free, or that another one waits for.

        within_blocks: not beyond a step that fills a block.
        """
        if plan.prefills or plan.admitted or plan.preempted or self._held_back:
            return 1
        size, decodes = self.cache.pool.block_size, plan.decodes
        steps = 1 + min([-len(sequence.chain) % size for sequence in decodes])
        if steps < most and not within_blocks and not self._waiting.lines:
            steps = max(steps, min([self._free_for(sequence) for sequence in decodes]) // len(decodes) * size)
        return min(steps, most)

    def advance(self, plan: StepPlan, steps: int, *, planned: bool = True) -> None:
        """Account for ``steps`` of a plan's `steady_steps`, before `complete` ends the last. The sequences' chains
        have the tokens that these steps appended. planned: whether the step that follows them is planned, too.
        """
        advance_leases(plan.decodes, steps, self.cache.pool.block_size, planned=planned)
        self.stats.decode_tokens += steps * len(plan.decodes)
        self._waiting.charge(plan.decodes, steps)

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.short = self._is_short(sequence)
        self._waiting.push(sequence, self._begun())

    def _is_short(self, sequence: Sequence) -> bool:
        """An estimate: a chain is taken to be cached up to a block if that block is."""
        long_part = len(sequence.chain) - self.config.max_step_tokens
        if long_part <= 0 or not self.config.separate_long_prompts:
            return True
        if sequence.wants_prompt_logits:
            return False
        block, block_hashes = self.cache.pool.blocks_for(long_part) - 1, sequence.chain.block_hashes
        return (
            self.cache.enabled and block < len(block_hashes) and self.cache.pool.lookup(block_hashes[block]) is not None
        )

    def _plan_decodes(self, plan: StepPlan) -> None:
        block_size = self.cache.pool.block_size
        for sequence in self._running.decoding.copy():
            lease = sequence.lease
            if lease is None:
                continue  # preempted for one before it
            length = len(sequence.chain)
            if length > len(lease.blocks) * block_size:
                if not self._make_room(sequence, plan):
                    continue
                lease.extend(length)
            plan.decodes.append(sequence)

    def _make_room(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Preempt until ``sequence`` can grow; False if it was itself the one to go.

        None is preempted for another tenant while it is within its own tenant's floor. See `Claims.next_victim`.
        """
        while (missing := sequence.held.missing_blocks(len(sequence.chain))) and missing > self._free_for(sequence):
            claims = self._claims()
            victim = claims.next_victim(
                each for each in self._running if each.tenant == sequence.tenant or self._is_above_floor(each, claims)
            )
            self._drop_from(plan, victim)
            if victim is sequence:
                return False
        return True

    def _claims(self) -> Claims:
        present = {each.tenant for each in self._running} | {line.tenant for line in self._waiting.lines}
        weights = {tenant: self._waiting.tenants.weight(tenant) for tenant in present}
        num_blocks = self.cache.pool.num_blocks
        return Claims.of(self._running, weights, max_sequences=self.config.max_running, num_blocks=num_blocks)

    def _is_above_floor(self, sequence: Sequence, claims: Claims) -> bool:
        return claims.blocks(sequence.tenant) > self.cache.pool.guaranteed_to(sequence.tenant)

    def _plan_prefills(self, plan: StepPlan) -> None:
        budget = self.config.max_step_tokens - len(plan.decodes)
        self._held_back = False
        while turn := self._next_to_prefill(plan):
            line, sequence = turn
            chunk = self._next_chunk(sequence, just_admitted=sequence in plan.admitted)
            length = chunk.stop - chunk.start
            # One chunk always goes, so that decoding sequences never starve those that wait to begin.
            if plan.prefills and (length > budget or sequence.priority >= BACKGROUND_PRIORITY):
                break
            budget -= length
            sequence.num_computed = chunk.stop
            plan.prefills.append(chunk)
            self._waiting.serve(line, length)
        if len(plan.prefills) > 2:  # the chunks of one sequence side by side
            begins = {chunk.sequence: at for at, chunk in reversed(list(enumerate(plan.prefills)))}
            plan.prefills.sort(key=lambda chunk: begins[chunk.sequence])

    def _next_chunk(self, sequence: Sequence, *, just_admitted: bool) -> PrefillChunk:
        """just_admitted: in this step, so that nothing was committed since its prompt was looked up."""
        looks_up = not sequence.wants_prompt_logits and (not just_admitted or self.cache.keeps_branches)
        if looks_up and (adopted := sequence.held.adopt(sequence.num_computed)):
            sequence.num_computed += adopted
            self.stats.hit_tokens += adopted
            self.stats.late_hit_tokens += adopted
            if sequence.num_preemptions == 0:
                sequence.cached_tokens += adopted
        start, chunk = sequence.num_computed, self.config.prefill_chunk
        stop = min(start - start % min(self.cache.alignment, chunk) + chunk, len(sequence.chain))
        copy = sequence.held.copy_before(start) if start % self.cache.pool.block_size else None
        if sequence.held.checkpoint is not None:
            stop = sequence.held.cut(start, stop, has_room=self._has_spare(sequence))
        return PrefillChunk(sequence, start, stop, copy)

    def _has_spare(self, sequence: Sequence) -> bool:
        """Whether a block is free beside those that running sequences, one each, may need before the next step."""
        return self._free_for(sequence) > len(self._running)

    def _begun(self) -> list[Sequence]:
        """The running sequences with prompt tokens that are not planned yet."""
        return [each for each in self._running.prefilling if each.num_computed < len(each.chain)]

    def _next_to_prefill(self, plan: StepPlan) -> tuple[Line, Sequence] | None:
        """The line whose turn it is, and the sequence to compute a chunk of; it is admitted first if it waited.

        A waiting sequence with a sooner priority is admitted before prefill of another in its line continues.
        """
        if not self._running.prefilling and not self._waiting.lines:
            return None
        begun_sequences = [each for each in self._begun() if each.num_computed != each.held.checkpoint]
        if not begun_sequences and not self._waiting.lines:
            return None
        refused: list[Sequence] = []
        for line, first in self._waiting.turns(begun_sequences):
            begun = first if first is not None and first.lease is not None else None  # not preempted for a line before
            waiting = self._waiting.first(line)
            sequence = None
            if waiting is not None and (begun is None or waiting.priority < begun.priority):
                sequence = self._admit(line, refused, plan)
            if sequence := sequence or begun:
                return line, sequence
            waiting = self._waiting.first(line)  # another one, if that one waits for a load now
            if waiting is not None and self._waiting.is_refused(line):
                refused.append(waiting)
        return None

    def _may_admit(self) -> bool:
        """Whether a waiting sequence is not known to have to wait, when none is running."""
        refused = []
        for line, _ in self._waiting.turns([]):
            sequence = self._waiting.first(line)
            if sequence is None:
                continue
            if self._waiting.is_refused(line):
                refused.append(sequence)
            elif not self._is_held_back(sequence, refused):
                return True
        return False

    def _free_for(self, sequence: Sequence) -> int:
        pool = self.cache.pool
        return pool.free_for(sequence.chain.owner(pool.blocks_for(len(sequence.chain)) - 1))

    def _admit(self, line: Line, refused: list[Sequence], plan: StepPlan) -> Sequence | None:
        """Admit the next sequence of a line, if it fits and is not held back for one of the ``refused``."""
        while sequence := self._waiting.first(line):
            if self._waiting.is_refused(line):
                return None
            if self._is_held_back(sequence, refused):
                self._held_back = True
                return None
            match = self._match_if_it_fits(sequence, plan)
            if match is None:
                self._waiting.refuse(line)
                return None
            if is_being_computed(sequence, match, self._running.prefilling):
                return None
            self._waiting.pop(line)
            if self._loads.wait(sequence, match, plan):
                sequence.status = SequenceStatus.LOADING
                continue
            self._take_in(sequence, match)
            plan.admitted.append(sequence)
            return sequence
        return None

    def _is_held_back(self, sequence: Sequence, refused: list[Sequence]) -> bool:
        """Whether ``sequence`` must not take what one of the ``refused`` waits for."""
        for other in refused:
            if other.priority != sequence.priority:
                if other.priority < sequence.priority:
                    return True
            elif self._waiting.lead(sequence, other) > self.cache.pool.num_blocks * self.cache.pool.block_size:
                return not self._stays_within_floor(sequence)
        return False

    def _stays_within_floor(self, sequence: Sequence) -> bool:
        pool = self.cache.pool
        occupied = self._claims().blocks(sequence.tenant) + pool.blocks_for(len(sequence.chain))
        return occupied <= pool.guaranteed_to(sequence.tenant)

    def _match_if_it_fits(self, sequence: Sequence, plan: StepPlan) -> Match | None:
        """What is cached of ``sequence``, if there is room for it or tenants above their share can make some."""
        is_full = len(self._running) >= self.config.max_running
        if is_full and all(each.tenant == sequence.tenant for each in self._running):
            return None
        match = Match([], MatchEnd.OFF) if sequence.wants_prompt_logits else self.cache.match(sequence.chain)
        if not is_full and self._missing(sequence, match) <= 0:
            return match
        for victim in self._victims_for(sequence, match, plan):
            self._drop_from(plan, victim)
        is_full = len(self._running) >= self.config.max_running
        return match if not is_full and self._missing(sequence, match) <= 0 else None

    def _victims_for(self, sequence: Sequence, match: Match, plan: StepPlan) -> list[Sequence]:
        """The sequences to preempt for ``sequence``; none if that is not due to its tenant, or would not be enough.

        They are of tenants above their share, while its own tenant stays within its share. So what a tenant gets in
        this way is never taken back in the same way.
        """
        claims = self._claims()
        blocks = claims.excess_blocks(sequence.tenant) + self.cache.pool.blocks_for(len(sequence.chain))
        if claims.excess_sequences(sequence.tenant) > -1 or blocks > 0:
            return []
        planned = {chunk.sequence for chunk in plan.prefills} | set(plan.admitted)
        candidates = [
            each
            for each in self._running
            if each.tenant != sequence.tenant and each.priority >= sequence.priority and each not in planned
        ]
        victims: list[Sequence] = []
        missing = self._missing(sequence, match)
        while (is_full := len(self._running) - len(victims) >= self.config.max_running) or missing > 0:
            excess = claims.excess_sequences if is_full else claims.excess_blocks
            above = [each for each in candidates if excess(each.tenant) > 0 and self._is_above_floor(each, claims)]
            if not above:
                return []
            victim = claims.next_victim(above)
            victims.append(victim)
            candidates.remove(victim)
            claims.remove(victim)
            missing -= sum(block.ref_count == 1 for block in victim.held.blocks)
        return victims

    def _missing(self, sequence: Sequence, match: Match) -> int:
        """How many blocks more than are free ``sequence`` needs to be admitted."""
        # Each decoding sequence may need a block before this one is done; without that slack, admission would
        # preempt at once what it has just admitted.
        pool, blocks = self.cache.pool, self.cache.pool.blocks_for(len(sequence.chain))
        missing = blocks + len(self._running.decoding) - pool.free_for(sequence.chain.owner(blocks - 1))
        if missing <= 0:
            return missing
        # What others hold already costs nothing; all else comes out of the free blocks.
        return missing - sum(block.ref_count > 0 for block in match.blocks[: self.cache.whole(len(match.blocks))])

    def _take_in(self, sequence: Sequence, match: Match) -> None:
        found = match.blocks[: self.cache.whole(len(match.blocks))]
        bypasses = sequence.wants_prompt_logits
        lease = self.cache.lease(sequence.chain, found, reads_cache=not bypasses, checkpoints=sequence.checkpoints)
        lease.notes_use = sequence.num_preemptions == 0
        lease.extend(len(sequence.chain))
        sequence.lease = lease
        sequence.num_computed = lease.hit_tokens
        self._running.admit(sequence)
        if bypasses:
            self.stats.bypass_tokens += len(sequence.chain)
        else:
            self.stats.query_tokens += len(sequence.chain)
        self.stats.hit_tokens += lease.hit_tokens
        if sequence.num_preemptions == 0:
            sequence.cached_tokens = lease.hit_tokens
            self._loads.account(sequence, match)

    def _drop_from(self, plan: StepPlan, sequence: Sequence) -> None:
        """Preempt a sequence of which the plan has no chunk, but perhaps a decode."""
        if sequence in plan.decodes:
            plan.decodes.remove(sequence)
        plan.preempted.append(sequence)
        self._preempt(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.stats.preemptions += 1
        self._enqueue(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._release(sequence, step_failed=reason is FinishReason.ERROR)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        del self._by_id[sequence.request_id]

    def _release(self, sequence: Sequence, *, step_failed: bool = False) -> None:
        if sequence.lease is not None:
            sequence.lease.release(step_failed=step_failed)
            sequence.lease = None
            self._running.remove(sequence)
            self._waiting.forget_refusals()

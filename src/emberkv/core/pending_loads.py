"""The loads in progress: which blocks lower tiers are bringing, and which sequences wait for them."""

from collections import Counter, abc
from collections.abc import Iterable
from dataclasses import replace

from emberkv.core.block import Match, MatchEnd
from emberkv.core.hashing import BlockHash, Chain
from emberkv.core.loading import (
    NOTHING_BELOW,
    Admission,
    BlockRun,
    Load,
    LoadChoice,
    LoadDecision,
    LoadWait,
    LookupStatus,
    LowerTiers,
    PendingLookup,
    StoredPartial,
    choose,
    trim,
)
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.sequence import Sequence, StepPlan
from emberkv.errors import IntegrityError

PROBE_EVERY = 32
"""One in so many loads that are expected to be too slow is begun all the same; otherwise a tier that has become faster
would never be measured again. `Load.break_even_seconds` bounds what that costs."""


class LoadSavings:
    """What loading blocks of ``chain`` saves, of which the pool has the first ``first``."""

    def __init__(self, cache: PrefixCache, lower: LowerTiers, chain: Chain, first: int) -> None:
        self._cache = cache
        self._lower = lower
        self._chain = chain
        self._first = first
        self._block_size = chain.block_size

    def useful(self, count: int) -> int:
        """Of the next ``count`` blocks, how many a hit can use: hits end at whole alignment units."""
        return max(0, self._cache.whole(self._first + count) - self._first)

    def seconds(self, count: int, more: int = 0) -> float | None:
        """Expected time to compute the next ``count`` blocks, and ``more`` tokens; None before any was measured."""
        computed = self._first + count - self._cache.whole(self._first)
        return self._lower.recompute_seconds(computed * self._block_size + more)

    def choose(self, runs: abc.Sequence[BlockRun]) -> LoadDecision:
        """Which of ``runs``, which are the next blocks, to load."""
        return choose(runs, self.useful, self.seconds)

    def checkpoint(self, decision: LoadDecision) -> tuple[StoredPartial | None, int]:
        """The longest checkpoint that a tier has behind the blocks that are loaded, if it is worth a block, and how
        many tokens it saves beyond the pool's own.
        """
        if not self._cache.keeps_branches or decision.choice not in (LoadChoice.LOAD, LoadChoice.ABSENT):
            return None, 0
        position = self.stop(decision)
        child = self._cache.longest_child(self._chain, position)
        known = 0 if child is None else child[1]
        least = known + self._cache.branch_tokens
        most = min(self._block_size - 1, len(self._chain) - 1 - position * self._block_size)
        found = self._lower.find_partial(self._chain, position, least, most) if least <= most else None
        return found, 0 if found is None else found.count - known

    def checkpoint_to_load(self, decision: LoadDecision) -> tuple[StoredPartial | None, int]:
        """As `checkpoint`, if loading it is expected to be faster than computing; else None, and how many tokens are
        computed although a tier has them.
        """
        partial, saved = self.checkpoint(decision)
        is_loaded = partial is None or self.is_faster(partial, saved)
        return (partial, 0) if is_loaded else (None, saved)

    def stop(self, decision: LoadDecision) -> int:
        """The block behind those that are loaded."""
        return self._first + sum(run.count for run in decision.runs)

    def is_faster(self, partial: StoredPartial, saved: int) -> bool:
        """Whether loading it is expected to take less time than to compute the ``saved`` tokens, or either is not
        known.
        """
        computing = self._lower.recompute_seconds(saved)
        return partial.seconds is None or computing is None or partial.seconds < computing


class PendingLoads:
    """Begins loads and ends them. A sequence waits once for a load that another began, once for a look-up that a tier
    answers later, and then once for its own load.
    """

    def __init__(self, cache: PrefixCache, lower: LowerTiers | None) -> None:
        self._cache = cache
        self._lower = lower
        self._waiting: dict[Load, list[Sequence]] = {}
        self._by_hash: dict[BlockHash, Load] = {}
        self._lookups: dict[PendingLookup, Sequence] = {}
        self._declined = 0

    @property
    def in_flight(self) -> list[Load]:
        return list(self._waiting)

    def wait(self, sequence: Sequence, match: Match, plan: StepPlan) -> bool:
        """Whether ``sequence``, of which the pool has ``match``, waits for a load or a look-up; a new one is added to
        the plan.

        The sequence's blocks must fit into the free ones. Those found stay the pool's, but become recent.
        """
        if self._lower is None or match.end in (MatchEnd.TOKENS_DIFFER, MatchEnd.OFF):
            return False
        stop = self._cache.whole(self._cache.usable_blocks(sequence.chain))
        has_all = len(match.blocks) >= stop
        is_decided = sequence.admission is not None or any(wait.choice is LoadChoice.LOAD for wait in sequence.waits)
        if is_decided or (has_all and not self._cache.keeps_branches):
            return False
        decision, load = self._decide(sequence, match, stop, self._lower)
        if has_all and decision.choice is LoadChoice.ABSENT:
            return False
        if isinstance(load, PendingLookup):
            sequence.lookup = load
            self._lookups[load] = sequence
            plan.lookups.append(load)
            return True
        self._cache.pool.stats.load_choices[decision.choice] += 1
        sequence.load_decision = decision
        if load is None:
            return False
        if decision.choice is LoadChoice.LOAD:
            plan.loads.append(load)
            self._waiting[load] = []
            self._by_hash.update(dict.fromkeys(load.block_hashes, load))
        covered = self._covered(load, sequence.chain, len(match.blocks), stop)
        checkpoint_end = load.checkpoint_end(sequence.chain)
        sequence.waits.append(LoadWait(load, len(match.blocks) + covered, decision.choice, checkpoint_end))
        self._waiting[load].append(sequence)
        return True

    def _decide(
        self, sequence: Sequence, match: Match, stop: int, lower: LowerTiers
    ) -> tuple[LoadDecision, Load | PendingLookup | None]:
        """What to do about blocks ``[found, stop)``, and the load or look-up to wait for."""
        chain, first, cache = sequence.chain, len(match.blocks), self._cache

        savings = LoadSavings(cache, lower, chain, first)
        shared = None if sequence.waits or first >= stop else self._by_hash.get(chain.block_hashes[first])
        if shared is not None and savings.useful(covered := self._covered(shared, chain, first, stop)):
            decision = savings.choose([BlockRun(LoadChoice.SHARED.value, covered, shared.seconds)])
            if decision.choice is LoadChoice.LOAD:
                return LoadDecision(LoadChoice.SHARED), shared
            return decision, None
        runs = lower.find(chain.block_hashes[first:stop], exact=cache.exact) if first < stop else []
        end = first + sum(run.count for run in runs)
        if end < stop and sequence.lookup is None and self._is_pending(lower, chain.block_hashes[end]):
            break_even_seconds = lower.recompute_seconds((stop - end) * chain.block_size)
            return NOTHING_BELOW, PendingLookup(chain, end, stop, cache.exact, break_even_seconds)
        decision = savings.choose(runs)
        if decision.choice is LoadChoice.RECOMPUTE_CHEAPER and self._is_time_to_probe():
            decision = LoadDecision(LoadChoice.LOAD, trim(runs, decision.declined))
        decision, partial, saved = self._with_checkpoint(savings, decision)
        if partial is not None and (other := self._by_hash.get(partial.block_hash)) is not None:
            if not decision.runs and not sequence.waits:
                return LoadDecision(LoadChoice.SHARED), other
            partial = None
        if not decision.runs and partial is None:
            return decision, None
        if not decision.runs:
            decision = LoadDecision(LoadChoice.LOAD)
        count = sum(run.count for run in decision.runs)
        cache.pool.pin(match.blocks)
        owner = chain.owner(cache.pool.blocks_for(len(chain)) - 1)
        blocks = cache.pool.reserve_for_load(count + (partial is not None), owner)
        cache.pool.free(match.blocks)
        break_even_seconds = savings.seconds(count, 0 if partial is None else saved)
        return decision, Load(chain, first, decision.runs, blocks, break_even_seconds, partial)

    def _with_checkpoint(
        self, savings: LoadSavings, decision: LoadDecision
    ) -> tuple[LoadDecision, StoredPartial | None, int]:
        """The decision about full blocks, with that about the checkpoint behind them; the one to load, and what it
        saves: `LoadSavings.checkpoint`.
        """
        partial, saved = savings.checkpoint(decision)
        if partial is None or savings.is_faster(partial, saved) or self._is_time_to_probe():
            return decision, partial, saved
        choice = LoadChoice.LOAD if decision.runs else LoadChoice.RECOMPUTE_CHEAPER
        checkpoint_end = savings.stop(decision) * self._cache.pool.block_size + partial.count
        return replace(decision, choice=choice, checkpoint_end=checkpoint_end), None, 0

    def _is_pending(self, lower: LowerTiers, block_hash: BlockHash) -> bool:
        return lower.status(block_hash, exact=self._cache.exact) is LookupStatus.PENDING

    def _is_time_to_probe(self) -> bool:
        self._declined += 1
        due = self._declined % PROBE_EVERY == 0
        self._cache.pool.stats.load_probes += due
        return due

    def _covered(self, load: Load, chain: Chain, first: int, stop: int) -> int:
        """How many blocks of ``chain[first:stop]`` the load brings, in one run."""
        position = first
        while position < stop and self._by_hash.get(chain.block_hashes[position]) is load:
            position += 1
        return position - first

    def end(self, load: Load, exact: abc.Sequence[bool]) -> list[Sequence]:
        """Make visible what arrived and free the rest; returns the waiting sequences. See `Scheduler.loaded`."""
        if load not in self._waiting or len(exact) > len(load.blocks):
            raise IntegrityError(
                f"a load of {len(load.blocks)} blocks ended with {len(exact)}, in flight: {load in self._waiting}"
            )
        pool, full = self._cache.pool, load.num_full
        load.arrived = pool.complete_load(load.blocks[:full], load.chain, load.start, exact[:full])
        if load.partial is not None:
            arrived = load.arrived == full and len(exact) > full and exact[full]
            load.partial_arrived = pool.complete_partial_load(load, load.partial, arrived=arrived)
            pool.stats.loaded_checkpoints += load.partial_arrived
            if not load.partial_arrived and pool.lookup(load.partial.block_hash) is None:
                pool.stats.unloaded_checkpoints += 1
        pool.stats.loaded_blocks += load.arrived
        pool.stats.unloaded_blocks += full - load.arrived
        for block_hash in load.block_hashes:
            if self._by_hash.get(block_hash) is load:
                del self._by_hash[block_hash]
        return self._waiting.pop(load)

    def end_lookup(self, lookup: PendingLookup) -> Sequence:
        """The sequence that waited for a look-up. See `Scheduler.looked_up`."""
        if lookup not in self._lookups:
            raise IntegrityError(f"a look-up of {lookup.stop - lookup.start} blocks has ended that is not in progress")
        return self._lookups.pop(lookup)

    def cancel_load(self, block_hashes: Iterable[BlockHash]) -> None:
        """These blocks are not wanted any more: each load that brings one of them ends before it."""
        wanted = set(block_hashes)
        for load in self._waiting:
            pairs = zip(load.block_hashes, load.blocks, strict=True)
            gone = [block for block_hash, block in pairs if block_hash in wanted]
            if load.partial_is_removed_with(wanted):
                gone.append(load.blocks[-1])
            self._cache.pool.cancel_load(gone)

    def account(self, sequence: Sequence, match: Match) -> None:
        """Record where the hit of a sequence that is being admitted comes from."""
        size, known = self._cache.pool.block_size, len(match.blocks)
        hit, in_blocks = sequence.held.hit_tokens, sequence.held.num_committed * size
        last = self._cache.usable_blocks(sequence.chain) * size  # where the last block begins
        tier_tokens: dict[str, int] = {}
        cheaper = lost = in_last = 0
        if sequence.waits or sequence.load_decision is not NOTHING_BELOW:
            tier_tokens = self._tier_tokens(sequence, hit)
            blocks = self._not_loaded(sequence, known, copied=hit - in_blocks)
            checkpoint = self._checkpoint_not_loaded(sequence, hit)
            cheaper, lost = blocks[0] + checkpoint[0], blocks[1] + checkpoint[1]
            if sequence.load_decision.choice not in (LoadChoice.LOAD, LoadChoice.SHARED):
                lost = max(0, lost - checkpoint[0])  # decided after the wait: these may be the first that did not come
            in_last = max(0, hit + cheaper + lost - max(hit, last))
        sequence.admission = Admission(
            pool_tokens=hit - sum(tier_tokens.values()),
            tier_tokens=tier_tokens,
            end=match.end,
            recompute_cheaper_tokens=cheaper,
            load_failed_tokens=lost,
            alignment_tokens=known * size - in_blocks + sequence.load_decision.rounded * size,
            partial_tokens=sequence.prompt_tokens - max(hit, last) - in_last,
        )

    def _tier_tokens(self, sequence: Sequence, hit: int) -> dict[str, int]:
        """How many of the ``hit`` tokens the loads that ``sequence`` waited for brought, by tier."""
        size = self._cache.pool.block_size
        brought: Counter[str] = Counter()
        border = hit // size
        for wait in reversed(sequence.waits):  # what an earlier load brought, a later one need not have brought again
            brought.update(wait.load.tiers(0, min(wait.stop, border)))
            border = min(border, wait.load.start)
        tier_tokens = {tier: count * size for tier, count in brought.items()}
        copy = sequence.held.copy
        loaded = [each.load.partial for each in sequence.waits if each.load.partial_arrived]
        source = [each for each in loaded if each and copy and each.block_hash == copy.source.block_hash]
        for partial in source[:1]:
            tier_tokens[partial.tier] = tier_tokens.get(partial.tier, 0) + partial.count
        self._cache.pool.stats.tier_hit_tokens.update(tier_tokens)
        return tier_tokens

    def _checkpoint_not_loaded(self, sequence: Sequence, hit: int) -> tuple[int, int]:
        """As `_not_loaded`, of the checkpoint behind the full blocks. Where its tokens begin a full block that a tier
        has, too, they count with that.
        """
        decision, waits = sequence.load_decision, sequence.waits
        if decision.declined:
            return 0, 0
        cheaper = self._behind(hit, decision.checkpoint_end)
        lost = self._behind(hit, waits[-1].checkpoint_end) if waits else 0
        return cheaper, lost

    def _behind(self, hit: int, checkpoint_end: int) -> int:
        """Of the tokens of a checkpoint, which are of one block, those behind a hit."""
        size = self._cache.pool.block_size
        return max(0, checkpoint_end - max(hit, (checkpoint_end - 1) // size * size))

    def _not_loaded(self, sequence: Sequence, known: int, copied: int) -> tuple[int, int]:
        """Tokens that a tier has and that computing is cheaper for, and tokens that a load was to bring and did not,
        both of full blocks.

        known: blocks found in the pool. copied: tokens of the hit that are copied from the beginning of a block.
        """
        size = self._cache.pool.block_size
        decision, declined = sequence.load_decision, sequence.load_decision.declined
        failed = sequence.waits[-1].stop - max(sequence.waits[-1].load.end, known) if sequence.waits else 0
        if decision.choice is LoadChoice.LOAD:  # declined was what follows the load; others may have computed it since
            declined -= max(0, known - sequence.waits[-1].stop)
        elif decision.choice is not LoadChoice.SHARED:  # decided after the wait, about the same blocks
            failed -= declined + decision.rounded
        cheaper, lost = max(0, declined) * size, max(0, failed) * size
        # The tokens copied are the first of what a tier has: of what a load did not bring, or of what was declined.
        if decision.choice is LoadChoice.LOAD:
            return max(0, cheaper - max(0, copied - lost)), max(0, lost - copied)
        return max(0, cheaper - copied), max(0, lost - max(0, copied - cheaper))

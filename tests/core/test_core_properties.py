"""Random operations on pool, cache and scheduler together; the books and the content must be right after each."""

from collections import Counter
from random import Random
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.core.policies.fair_shares import FairShares, Share
from emberkv.core.sequence import FinishReason, Sequence, SequenceStatus
from emberkv.errors import DuplicateRequestError, PromptTooLongError
from tests.core.harness import Harness, random_token
from tests.core.lower import FakeTiers
from tests.core.mirror import Mirror

REACHED = (
    "branch_checkpoints", "speculative_checkpoints", "speculative_used", "speculative_unused", "checkpoint_hits",
    "loaded_blocks", "loaded_checkpoints",
)  # fmt: skip
"""Counters of `SchedulerStats` without which a run of all operations shows too little."""
LEAST = 20

ANYWHERE = st.integers(0, 1_000_000)
SHARES = st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3), st.none() | st.integers(3, 6)).map(
    lambda sizes: {"": Share(sizes[0]), "other": Share(sizes[1], sizes[2])}
)


class CoreMachine(RuleBasedStateMachine):
    """Tiny pools, two tokens, two salts, shares or none: eviction, preemption, sharing and duplicates happen all along.

    What is committed goes to lower tiers, which forget at random; loads arrive whole, partly, late, after a clear, or
    not before the end. reached: how often something has happened, in all runs.
    """

    reached: ClassVar[Counter[str]] = Counter()

    @initialize(
        policy=st.sampled_from(POLICY_NAMES),
        num_blocks=st.integers(3, 14),
        block_size=st.sampled_from([1, 2, 4]),
        units=st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 2), (2, 4), (3, 3)]),
        flags=st.tuples(st.booleans(), st.sampled_from([True, True, True, False]), st.booleans(), st.booleans()),
        branch_tokens=st.integers(1, 3),
        is_hybrid=st.booleans(),
        tiers=st.booleans(),
        shares=SHARES,
        max_step_tokens=st.integers(1, 24),
        max_running=st.integers(1, 6),
        seed=ANYWHERE,
    )
    def build(
        self,
        policy: str,
        num_blocks: int,
        block_size: int,
        units: tuple[int, int],
        flags: tuple[bool, bool, bool, bool],
        branch_tokens: int,
        is_hybrid: bool,
        tiers: bool,
        shares: dict[str, Share] | None,
        max_step_tokens: int,
        max_running: int,
        seed: int,
    ) -> None:
        """is_hybrid: hits end at blocks, which are larger, and at checkpoints, which few of the other flags lead to."""
        self.random = Random(seed)
        self.tiers = FakeTiers()
        if is_hybrid:
            block_size, units, flags = 4 * block_size, (1, units[1]), (flags[0], True, True, False)
        parts_of_blocks = flags[2] and units == (1, 1) and block_size > 1
        self.harness = Harness(
            num_blocks=num_blocks,
            block_size=block_size,
            alignment=units[0] * block_size,
            chunk=block_size // 2 if parts_of_blocks else units[1] * block_size,
            policy=policy,
            exact=flags[0],
            enabled=flags[1],
            batch_invariant=flags[2],
            within_blocks=flags[3],
            branch_tokens=branch_tokens,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            lower=self.tiers if tiers else None,
            shares=shares,
            next_token=random_token(self.random),
        )
        self.scheduler = self.harness.scheduler
        self.pool = self.harness.pool
        self.mirror = Mirror(self.pool)
        self.live: dict[str, Sequence] = {}
        self.prompts: list[list[int]] = [[]]
        self.others: set[bytes] = set()
        self.added = 0

    @rule(
        shared=ANYWHERE,
        kept=st.integers(0, 60),
        tail=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        new=st.integers(1, 12),
        priority=st.integers(0, 2),
        salt=st.sampled_from([b"", b"", b"other"]),
        restored=st.integers(0, 14),
        borders=st.tuples(st.booleans(), st.booleans()),
    )
    def add(
        self,
        shared: int,
        kept: int,
        tail: list[int],
        new: int,
        priority: int,
        salt: bytes,
        restored: int,
        borders: tuple[bool, bool],
    ) -> None:
        """restored: as many of its blocks are in a lower tier already, as after a restart. borders: whether it wants a
        checkpoint behind what it shares, and one before its last token.
        """
        name = self._add(self.prompts[shared % len(self.prompts)][:kept], tail, new, priority, salt, borders)
        if restored and name is not None:
            chain = self.live[name].chain
            stored = chain.block_hashes[:restored]
            self.tiers.put([block_hash for block_hash in stored if block_hash not in self.tiers.places])
            most = min(len(chain) - len(stored) * chain.block_size, chain.block_size)
            if not self.harness.within_blocks and most > 1:
                count = self.random.randrange(1, most)
                self.tiers.put_partial(chain, len(stored), count)

    def _add(
        self,
        shared: list[int],
        tail: list[int],
        new: int,
        priority: int,
        salt: bytes,
        borders: tuple[bool, bool],
    ) -> str | None:
        """The request's name; None: it is refused."""
        tokens = shared + tail
        name = f"r{self.added}"
        self.added += 1
        if len(tokens) + new > self.scheduler.max_sequence_tokens:
            with pytest.raises(PromptTooLongError):
                self.harness.add(name, tokens, new, priority=priority, salt=salt)
            return None
        wanted = zip(borders, (len(shared), len(tokens) - 1), strict=True)
        checkpoints = tuple(at for is_wanted, at in wanted if is_wanted)
        self.live[name] = self.harness.add(name, tokens, new, priority=priority, salt=salt, checkpoints=checkpoints)
        self.prompts.append(tokens)
        if salt:
            self.others.update(self.live[name].chain.block_hashes)
        return name

    @precondition(lambda self: not self.harness.within_blocks)
    @rule(
        shared=ANYWHERE,
        cuts=st.lists(st.integers(0, 40), min_size=2, max_size=5),
        borders=st.tuples(st.booleans(), st.booleans()),
    )
    def part(self, shared: int, cuts: list[int], borders: tuple[bool, bool]) -> None:
        """Several begin alike, one after the other: they leave checkpoints, and go on from those of others."""
        known = self.prompts[shared % len(self.prompts)]
        for cut in cuts:
            tail = [self.random.randrange(2) for _ in range(self.random.randrange(1, 14))]
            self._add(known[:cut], tail, 1, 0, b"", borders)
            known = self.prompts[-1]
            for _ in range(3):
                self._step(set())

    @precondition(lambda self: self.live)
    @rule(pick=ANYWHERE)
    def add_twice(self, pick: int) -> None:
        with pytest.raises(DuplicateRequestError):
            self.harness.add(self._pick(pick), [1], 1)

    @rule(stop_one_in=st.sampled_from([4, 16, 1_000_000]), count=st.integers(1, 6))
    def step(self, stop_one_in: int, count: int) -> None:
        for _ in range(count):
            self._step({name for name in self.live if not self.random.randrange(stop_one_in)})

    @rule(computed=st.booleans())
    def fail(self, computed: bool) -> None:
        """A step fails before it has copied or computed anything, or behind that: all that it was for ends."""
        plan = self.scheduler.schedule()
        if computed:
            self.harness.compute(plan)
        for sequence in {*plan.decodes, *(chunk.sequence for chunk in plan.prefills)}:
            self.scheduler.finish(sequence.request_id, FinishReason.ERROR)
            del self.live[sequence.request_id]
        self.harness.check()

    @precondition(lambda self: self.live)
    @rule(pick=ANYWHERE)
    def abort(self, pick: int) -> None:
        name = self._pick(pick)
        sequence = self.live.pop(name)
        self.scheduler.finish(name, FinishReason.ABORT)
        assert sequence.finish_reason is FinishReason.ABORT
        self.scheduler.finish(name, FinishReason.ERROR)  # no longer here: ignored
        assert sequence.finish_reason is FinishReason.ABORT
        self.harness.check()

    @precondition(lambda self: self.live)
    @rule(pick=ANYWHERE, count=st.integers(0, 5), until=st.integers(0, 9))
    def retain(self, pick: int, count: int, until: int) -> None:
        self.pool.policy.retain(self.live[self._pick(pick)].chain.block_hashes[:count], until)
        self.pool.policy.expire(5)
        self.harness.check()

    @rule(arrive=st.booleans())
    def clear(self, arrive: bool) -> None:
        """What is on its way up when the cache is cleared does not come back."""
        self.pool.clear()
        assert self.pool.num_cached == 0
        self.harness.check()
        for load in self.scheduler.loads if arrive else []:
            self.harness.arrive(load)
            assert load.arrived == 0
            assert not load.partial_arrived
        assert self.pool.num_cached == 0

    @precondition(lambda self: self.scheduler.loads)
    @rule(pick=ANYWHERE, count=st.integers(0, 14))
    def arrive(self, pick: int, count: int) -> None:
        load = self.scheduler.loads[pick % len(self.scheduler.loads)]
        self.harness.arrive(load, count)
        assert load.arrived + load.partial_arrived <= count
        assert load not in self.scheduler.loads

    @precondition(lambda self: self.live)
    @rule(pick=ANYWHERE, at=ANYWHERE)
    def remove(self, pick: int, at: int) -> None:
        block_hashes = self.live[self._pick(pick)].chain.block_hashes
        if block_hashes:
            block_hash = block_hashes[at % len(block_hashes)]
            self.scheduler.remove([block_hash])
            assert self.pool.lookup(block_hash) is None
            self.harness.check()

    @precondition(lambda self: self.tiers.places)
    @rule(pick=ANYWHERE, tier=st.sampled_from(["", "ram", "disk"]))
    def move_below(self, pick: int, tier: str) -> None:
        """A tier forgets a block, or another one has it from now on."""
        block_hash = list(self.tiers.places)[pick % len(self.tiers.places)]
        _, exact = self.tiers.places.pop(block_hash)
        if tier:
            self.tiers.put([block_hash], tier, exact=exact)

    @precondition(lambda self: self.harness.lower)
    @rule(ram=st.integers(0, 9), disk=st.integers(0, 9), compute=st.integers(0, 9))
    def measure(self, ram: int, disk: int, compute: int) -> None:
        self.tiers.block_seconds = {"ram": float(ram), "disk": float(disk)}
        self.tiers.token_seconds = compute or None

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "harness"):
            return
        waiting = [
            each for each in self.live.values() if each.status in (SequenceStatus.WAITING, SequenceStatus.LOADING)
        ]
        assert self.scheduler.num_waiting == len(waiting)
        assert self.scheduler.num_running == len(self.live) - len(waiting)
        assert all(each.lease is None and each.num_computed == 0 for each in waiting)
        loading = sum(len(load.blocks) for load in self.scheduler.loads)
        assert self.live or self.pool.num_free + loading == self.pool.num_blocks
        assert self.scheduler.loads or not any(each.status is SequenceStatus.LOADING for each in waiting)
        self._check_shares()
        self.mirror.follow()
        assert self.mirror.parents == self.pool.snapshot().parents

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        for _ in range(2000):
            if not self.live:
                break
            self._step(set())
            if not self.scheduler.has_work and self.scheduler.loads:
                self.harness.arrive(self.scheduler.loads[0], self.random.randrange(4))
        assert not self.live, "somebody starves"
        for load in self.scheduler.loads:
            self.harness.arrive(load, 0)
        assert self.pool.num_free == self.pool.num_blocks
        assert self.pool.stats.collisions == 0
        for field in REACHED:
            self.reached[field] += getattr(self.pool.stats, field)

    def _check_shares(self) -> None:
        if isinstance(self.pool.policy, FairShares):
            used = self.pool.policy.bytes_by_owner()
            assert sum(used.values()) == sum(block.block_hash is not None for block in self.pool.blocks)
            quota = (self.harness.shares or {})["other"].quota_bytes
            if quota is not None and used.get("other", 0) > quota:
                blocks = [self.pool.lookup(block_hash) for block_hash in self.others]
                assert all(block is None or block.ref_count for block in blocks), "released, and above the quota"

    def _pick(self, number: int) -> str:
        return list(self.live)[number % len(self.live)]

    def _step(self, stopped: set[str]) -> None:
        had_work = self.scheduler.has_work
        plan = self.scheduler.schedule()
        self.harness.check()
        assert had_work or not (plan or plan.loads)
        assert plan or plan.preempted or not self.scheduler.has_work
        assert plan or self.scheduler.loads or not self.live, "a step does something unless all wait for loads"
        self.harness.compute(plan)
        for sequence in self.harness.complete(plan, stopped):
            if sequence.chain.owner(0):
                self.others.update(sequence.chain.block_hashes)
            self.prompts.append(sequence.chain.slice(0, len(sequence.chain)))  # others leave it within its answer
            self._check_finished(self.live.pop(sequence.request_id), stopped)

    def _check_finished(self, sequence: Sequence, stopped: set[str]) -> None:
        assert sequence.status is SequenceStatus.FINISHED
        if sequence.request_id in stopped:
            assert sequence.finish_reason is FinishReason.STOP
            assert sequence.num_generated < sequence.max_new_tokens
        else:
            assert sequence.finish_reason is FinishReason.LENGTH
            assert sequence.num_generated == sequence.max_new_tokens
        if not sequence.num_preemptions:
            computed = self.harness.prefilled[sequence.request_id]
            assert computed == sequence.prompt_tokens - sequence.cached_tokens


def test_any_operations_keep_books_and_content_right() -> None:
    CoreMachine.reached.clear()
    run_state_machine_as_test(
        CoreMachine,
        settings=settings(
            max_examples=340,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
    rare = {field: count for field, count in CoreMachine.reached.items() if count < LEAST}
    assert not rare, "the operations hardly ever reach these"

"""The loop above tiers that keep a hybrid's checkpoints: blocks of 4 tokens, a checkpoint that saves 2 is worth one."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from emberkv.core.hashing import PUBLIC_OWNER, PublicPrefixes, TokenChain, partial_hash, partial_siblings_hash
from emberkv.core.sequence import StepPlan
from emberkv.engine.commands import Remove, Statistics
from emberkv.engine.request import CacheUsage, FinishReason
from emberkv.engine.tier_link import TierLink
from emberkv.tiers.base import Tier
from emberkv.tiers.manager import TierManager
from emberkv.tiers.memory import MemoryTier
from emberkv.tiers.remote.tier import RemoteTier
from tests.engine.loop_harness import BLOCK, ROOT, FakeExecutor, Harness, Inbox, running
from tests.engine.tier_harness import NAMESPACE
from tests.engine.tiny_executor import ArrayPool
from tests.tiers.redis_process import RedisProcess, needs_server
from tests.waiting import DEADLINE, eventually

PROMPT = [*range(2, 9)]  # a block and 3 tokens, which are a checkpoint when the answer has one token
FIRST = TokenChain(ROOT, PROMPT, BLOCK).block_hashes[0]
CHECKPOINT = partial_hash(FIRST, TokenChain(ROOT, PROMPT, BLOCK).encoded_slice(4, 7))


class TouchedTier(MemoryTier):
    """touched: each batch."""

    def __init__(self) -> None:
        super().__init__(2**20)
        self.touched: list[list[bytes]] = []

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        self.touched.append(list(block_hashes))
        super().touch(block_hashes)


class Hybrid(Harness):
    """A `Harness` of a model with a state, whose blocks' bytes are garbage."""

    def __init__(self, tier: Tier, **how: Any) -> None:
        self.stack = TierManager([tier], namespace=NAMESPACE, queue_bytes=2**20)
        self.bytes = ArrayPool(24, BLOCK)
        self.link = TierLink(self.stack, self.bytes, step_tokens=16)
        super().__init__(tiers=self.link, batch_invariant=True, within_blocks=False, branch_tokens=2, **how)

    def ask(self, request_id: str, prompt: Sequence[int], tenant: str = "") -> Inbox:
        inbox = self.submit(request_id, prompt, 1, salt=tenant.encode(), tenant=tenant)
        inbox.wait()
        return inbox


@contextmanager
def hybrid(tier: Tier, **how: Any) -> Iterator[Hybrid]:
    harness = Hybrid(tier, **how)
    with running(harness):
        yield harness
    assert harness.stack.close(DEADLINE)


def test_the_next_engine_on_the_tier_goes_on_from_the_checkpoint() -> None:
    tier = MemoryTier(2**20)
    with hybrid(tier) as first:
        first.ask("a", PROMPT)
    assert tier.partial_counts(FIRST) == [3]
    with hybrid(tier) as second:
        inbox = second.ask("b", [*PROMPT, 30, 31])
    assert {output.usage for output in inbox.outputs} == {CacheUsage(9, 7, 1, {"ram": 7})}
    stats = second.loop.stats()
    assert (stats.loaded_blocks, stats.checkpoints["loaded"], dict(stats.transfer_errors)) == (1, 1, {})


@needs_server
def test_an_engine_goes_on_from_a_checkpoint_that_another_left_in_redis(redis_server: RedisProcess) -> None:
    """A look-up may be given up on a busy machine, so prompts are asked until one is answered in time."""
    redis_server.client().flushall()

    def connected() -> RemoteTier:
        return RemoteTier(redis_server.address, 2**20, namespace=NAMESPACE).connect()

    with hybrid(connected()) as first, hybrid(connected()) as second:
        for start in itertools.count(10):
            prompt = [start, *PROMPT]  # a block and 4 tokens less the one that is not computed
            first.ask(f"a{start}", prompt[:7])
            first.loop.execute(Statistics()).result(DEADLINE)
            assert first.stack.flush(DEADLINE)
            parent = TokenChain(ROOT, prompt, BLOCK).block_hashes[0]
            eventually(lambda parent=parent: second.stack.workers[0].tier.partial_counts(parent) == [3])
            for _ in range(100):
                second.link.computed(16, 1000.0)  # so loading is chosen, and has all the time it needs
            usage = second.ask(f"b{start}", prompt).wait().usage
            if usage == CacheUsage(8, 7, 1, {"remote": 7}) or start == 40:
                break
    assert usage == CacheUsage(8, 7, 1, {"remote": 7})
    assert second.loop.stats().checkpoints["loaded"] == 1
    assert first.loop.stats().tiers["remote"].corrupt == second.loop.stats().tiers["remote"].corrupt == {}


def test_all_tenants_go_on_from_one_within_a_public_prefix_until_it_is_removed() -> None:
    """Declared prefixes part within their second block; what a tenant leaves there itself is not found by another."""
    declared = [[*range(2, 14)], [*range(2, 9), *range(20, 25)]]
    public = PublicPrefixes(declared, BLOCK)
    tier = MemoryTier(2**20)
    with hybrid(tier, public=public) as first:
        for tenant, tokens in zip(("ann", "bob"), declared, strict=True):
            first.ask(tenant, [*tokens, 30], tenant)
        first.ask("carl", [*range(2, 8), 45], "carl")
    assert tier.partial_counts(FIRST) == [3]
    checkpoint = partial_hash(FIRST, TokenChain(ROOT, declared[0], BLOCK).encoded_slice(4, 7))
    assert tier.partial_owner(checkpoint) == PUBLIC_OWNER
    with hybrid(tier, public=public) as second:
        inbox = second.ask("dora", [*range(2, 9), 40, 41, 42], "dora")
        assert {output.usage for output in inbox.outputs} == {CacheUsage(10, 7, 1, {"ram": 7})}
        assert second.loop.stats().checkpoints["loaded"] == 1
        second.loop.execute(Remove([partial_siblings_hash(FIRST)])).result(DEADLINE)
        inbox = second.ask("emil", [*range(2, 8), 45, 46, 47], "emil")
        assert {output.usage for output in inbox.outputs} == {CacheUsage(9, 4, 4, {})}
        inbox = second.ask("fred", [*range(2, 9), 40, 41, 42], "fred")
        assert {output.usage for output in inbox.outputs} == {CacheUsage(10, 4, 4, {})}
    assert tier.partial_counts(FIRST) == []


def test_one_that_was_left_where_prompts_part_is_that_in_the_next_engine_too() -> None:
    """A prompt that goes on from it does not make a speculative one of it."""
    tier = MemoryTier(2**20)
    with hybrid(tier) as first:
        first.ask("a", range(2, 14))
        first.ask("b", [*PROMPT, 30, 31, 32])
    with hybrid(tier) as second:
        inbox = second.ask("c", [*PROMPT, 40, 41, 42])
        assert {output.usage for output in inbox.outputs} == {CacheUsage(10, 7, 1, {"ram": 7})}
    block = second.pool.lookup(CHECKPOINT)
    assert block is not None
    assert (block.keep_when_extended, second.pool.stats.speculative_checkpoints) == (True, 0)


def test_what_the_pool_serves_of_one_is_as_recent_in_the_tiers() -> None:
    tier = TouchedTier()
    with hybrid(tier) as harness:
        harness.ask("a", PROMPT)
        harness.ask("b", [*PROMPT, 30, 31])
    assert tier.touched == [[FIRST, CHECKPOINT]]


def test_a_removal_names_to_the_tiers_what_is_beside_a_cached_block() -> None:
    """The removed block may begin as the checkpoint does, so both go; what is before them stays."""
    tier = MemoryTier(2**20)
    beside = [*PROMPT[:BLOCK], 30, 31, 32, 33, 34]
    with hybrid(tier) as harness:
        harness.ask("a", PROMPT)
        harness.ask("b", beside)
        harness.loop.execute(Statistics()).result(DEADLINE)  # the last step has ended
        assert harness.stack.flush(DEADLINE)
        chain = TokenChain(ROOT, beside, BLOCK)
        assert (tier.lookup(chain.block_hashes), tier.partial_counts(FIRST)) == (2, [3])
        removed = harness.loop.execute(Remove(chain.block_hashes[1:])).result(DEADLINE)
        assert removed.tiers["ram"].result(DEADLINE).count == 1
    assert (tier.lookup(chain.block_hashes), tier.partial_counts(FIRST)) == (1, [])


def test_a_victim_may_supersede_the_checkpoint_of_a_sequence_that_the_same_plan_admits() -> None:
    """The checkpoint has no hash any more when the tiers are to be told that it was reused."""
    prompt = PROMPT[: BLOCK + 1]
    others: list[Inbox] = []

    def submit_two(plan: StepPlan, number: int) -> None:
        if not others and any(each.request_id == "victim" and each.num_generated for each in plan.decodes):
            others.append(harness.submit("reuses", [*prompt, 40, 41], tenant="carl"))
            others.append(harness.submit("preempts", range(12, 18), tenant="ann"))

    with hybrid(MemoryTier(2**20), executor=FakeExecutor(on_step=submit_two), max_running=3) as harness:
        harness.ask("leaves", prompt)
        other = harness.submit("other", range(20, 30), 20, tenant="bob", ignore_eos=True)
        victim = harness.submit("victim", [*prompt, 30], 20, tenant="bob", ignore_eos=True)
        long = [inbox.wait() for inbox in (other, victim)]
        reuses, preempts = (inbox.wait() for inbox in others)
    assert [each.finish_reason for each in (*long, reuses, preempts)] == [FinishReason.LENGTH] * 4
    assert reuses.usage is not None
    assert (reuses.usage.cached_tokens, harness.pool.stats.preemptions) == (len(prompt), 1)


def test_a_checkpoint_without_memory_for_its_copy_keeps_no_full_block_from_the_tiers() -> None:
    class Full(ArrayPool):
        def read_beginning(self, block_id: int, num_tokens: int, /) -> memoryview:
            raise MemoryError("no memory")

    tier = MemoryTier(2**20)
    with hybrid(tier) as harness:
        harness.link._blocks = Full(24, BLOCK)
        harness.ask("a", PROMPT)
    assert (tier.block_hashes(), dict(harness.link.errors)) == ([FIRST], {"memory": 1})

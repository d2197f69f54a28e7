"""The loop above tiers that keep a hybrid's checkpoints: blocks of 4 tokens, a checkpoint that saves 2 is worth one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from emberkv.core.hashing import TokenChain, partial_hash
from emberkv.engine.commands import Remove, Statistics
from emberkv.engine.request import CacheUsage
from emberkv.engine.tier_link import TierLink
from emberkv.tiers.manager import TierManager
from emberkv.tiers.memory import MemoryTier
from tests.engine.loop_harness import BLOCK, ROOT, Harness, Inbox, running
from tests.engine.tier_harness import NAMESPACE
from tests.engine.tiny_executor import ArrayPool
from tests.waiting import DEADLINE

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

    def __init__(self, tier: MemoryTier) -> None:
        self.stack = TierManager([tier], namespace=NAMESPACE, queue_bytes=2**20)
        self.bytes = ArrayPool(24, BLOCK)
        self.link = TierLink(self.stack, self.bytes, step_tokens=16)
        super().__init__(tiers=self.link, batch_invariant=True, within_blocks=False, branch_tokens=2)

    def ask(self, request_id: str, prompt: Sequence[int]) -> Inbox:
        inbox = self.submit(request_id, prompt, 1)
        inbox.wait()
        return inbox


@contextmanager
def hybrid(tier: MemoryTier) -> Iterator[Hybrid]:
    harness = Hybrid(tier)
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

"""A loop over tiers, with an executor that writes each block's hash as its bytes, and tiers that a test may block."""

import threading
from collections.abc import Callable, Sequence

from emberkv.core.hashing import TokenChain
from emberkv.core.scheduler import StepPlan
from emberkv.core.sequence import Sequence as Prompt
from emberkv.engine.tier_link import TierLink
from emberkv.tiers.base import TierEntry
from emberkv.tiers.codec import BlockRecord
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.memory import MemoryTier
from tests.engine.loop_harness import BLOCK, CHUNK, ROOT, FakeExecutor, Harness, Inbox
from tests.waiting import DEADLINE

NAMESPACE = b"model"
HASH_BYTES = 32


class FakeBytes:
    """Blocks of 32 bytes. failing: read and write raise what torch raises without memory."""

    def __init__(self) -> None:
        self.block_ids: dict[int, bytes] = {}
        self.failing = False

    @property
    def block_bytes(self) -> int:
        return HASH_BYTES

    @property
    def layer_bytes(self) -> int:
        return HASH_BYTES // 2

    def read_blocks(self, block_ids: Sequence[int]) -> list[memoryview]:
        self._check()
        return [memoryview(self.block_ids[block_id]) for block_id in block_ids]

    def read_beginning(self, block_id: int, num_tokens: int) -> memoryview:
        return self.read_blocks([block_id])[0]

    def write_block(self, block_id: int, content: bytes | memoryview) -> None:
        self._check()
        self.block_ids[block_id] = bytes(content)

    def _check(self) -> None:
        if self.failing:
            raise MemoryError("no memory")


class GatedTier(MemoryTier):
    """Loads wait while the gate is shut. entered: a load has come to the gate."""

    def __init__(self, name: str = "ram") -> None:
        super().__init__(2**20, name=name)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.loads = 0

    def load(self, block_hashes: Sequence[bytes]) -> list[TierEntry | None]:
        self.loads += 1
        self.entered.set()
        assert self.gate.wait(DEADLINE)
        return super().load(block_hashes)


class TieredHarness(Harness):
    """A `Harness` above one tier. Each step checks that what a sequence reuses holds its own blocks' bytes."""

    def __init__(
        self, tier: GatedTier | None = None, *, exact: bool = False, clock: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.tier = tier or GatedTier()
        self.stack = TierManager([self.tier], namespace=NAMESPACE, queue_bytes=2**20)
        self.bytes = FakeBytes()
        self.link = TierLink(self.stack, self.bytes, step_tokens=2 * CHUNK, exact=exact, clock=clock)
        super().__init__(FakeExecutor(on_step=self._compute), clock=clock, tiers=self.link, exact=exact)

    def _compute(self, plan: StepPlan, number: int) -> None:
        for chunk in plan.prefills:
            self._write(chunk.sequence, chunk.start, chunk.stop)
        for sequence in plan.decodes:
            self._write(sequence, len(sequence.chain) - 1, len(sequence.chain))

    def _write(self, sequence: Prompt, start: int, stop: int) -> None:
        blocks, block_hashes = sequence.held.blocks, sequence.chain.block_hashes
        for position in range(start // BLOCK):
            assert self.bytes.block_ids[blocks[position].block_id] == block_hashes[position], (
                "another block's bytes are reused"
            )
        for position in range(start // BLOCK, stop // BLOCK):
            self.bytes.block_ids[blocks[position].block_id] = block_hashes[position]

    def chain(self, tokens: Sequence[int]) -> TokenChain:
        return TokenChain(ROOT, tokens, BLOCK)

    def stock(self, tokens: Sequence[int], *, exact: bool = True, payload: bytes | None = None) -> None:
        """Put a prompt's blocks into the tier, as an earlier process would have."""
        chain = self.chain(tokens)
        for position, block_hash in enumerate(chain.block_hashes):
            record = BlockRecord(
                block_hash, chain.parent(position), chain.block_tokens(position), position, exact, payload or block_hash
            )
            self.stack.offload([OffloadedBlock(record)])
        assert self.stack.flush(DEADLINE)

    def ask(self, request_id: str, prompt: Sequence[int], new: int = 2) -> Inbox:
        inbox = self.submit(request_id, prompt, new)
        inbox.wait()
        return inbox

"""A scheduler with an engine that writes down, instead of KV state, everything that the KV state depends on."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

from emberkv.core.block import Block, BlockState
from emberkv.core.block_pool import BlockPool
from emberkv.core.hashing import TOKEN_BYTES, Chain, TokenChain, hash_blocks, partial_hash, root_hash, salted
from emberkv.core.loading import Load
from emberkv.core.policies.eviction import EvictionPolicy, make_policy
from emberkv.core.policies.fair_shares import FairShares, Share
from emberkv.core.policies.retention import Retaining
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig, StepPlan
from emberkv.core.sequence import Sequence
from tests.core.lower import FakeTiers
from tests.machine import COMPILED

ROOT_BYTES = 32


def root(block_size: int, salt: bytes = b"") -> bytes:
    return salted(root_hash("weights", block_size), salt)


def chain(tokens: Iterable[int], block_size: int = 4, salt: bytes = b"", owner: str = "") -> TokenChain:
    return TokenChain(root(block_size, salt), tokens, block_size, owner=owner)


def store(pool: BlockPool, tokens: TokenChain, *, exact: bool = True) -> list[Block]:
    """All full blocks of a chain, computed and committed; still held."""
    blocks = pool.allocate(len(tokens.block_hashes))
    return [pool.commit(block, tokens, position, exact=exact) for position, block in enumerate(blocks)]


@lru_cache(maxsize=1 << 16)
def _last_hash(prefix: bytes, block_size: int) -> bytes:
    """The hash of the block that ends a prefix, its root first; cached, as each check asks for the same prefixes."""
    return hash_blocks(prefix[:ROOT_BYTES], prefix[ROOT_BYTES:], block_size)[-1]


@dataclass(frozen=True)
class Cell:
    """What one position of a slot holds: the root and all tokens up to this one, encoded."""

    prefix: bytes
    exact: bool


class FloorsHold(FairShares[bytes]):
    """Fair shares of blocks, one byte each, that look at every eviction. Where modules are compiled, nothing does."""

    def evict_for(self, owner: str) -> bytes:
        before = self.bytes_by_owner()
        key = super().evict_for(owner)
        after = self.bytes_by_owner()
        for name, share in self._shares.items():
            if name != owner:
                assert after.get(name, 0) >= min(before.get(name, 0), share.floor_bytes), f"{owner} takes from {name}"
        return key


@dataclass
class Harness:
    """Defaults: 16 blocks of 4 tokens, chunks of 4, 16 tokens a step, 8 running. Each salt is a tenant. shares: in
    blocks; each tenant is an owner then. weights: of tenants. within_blocks: without it each block has a state, too.

    states: of each slot, what its state depends on: the root and all tokens up to the last one that was computed into
    it, encoded.
    """

    num_blocks: int = 16
    block_size: int = 4
    alignment: int = 4
    chunk: int = 4
    policy: str = "lru"
    exact: bool = False
    enabled: bool = True
    batch_invariant: bool = False
    within_blocks: bool = True
    branch_tokens: int = 1
    max_step_tokens: int = 16
    max_running: int = 8
    lower: FakeTiers | None = None
    shares: Mapping[str, Share] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    separate_long_prompts: bool = True
    next_token: Callable[[Sequence], int] = lambda sequence: 1000 + len(sequence.chain)
    cells: dict[tuple[int, int], Cell] = field(default_factory=dict)
    sound: dict[int, tuple[bytes | None, bytes, bool]] = field(default_factory=dict)
    """By block id, what a check of its content depends on besides its cells, as of the check that it passed; none where
    a cell has changed since.
    """
    states: dict[int, bytes] = field(default_factory=dict)
    prefilled: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, self.block_size, policy=self._make_policy(), journal=True)
        self.cache = PrefixCache(
            self.pool,
            alignment=self.alignment,
            batch_invariant=self.batch_invariant,
            within_blocks=self.within_blocks,
            branch_tokens=self.branch_tokens,
            exact=self.exact,
            enabled=self.enabled,
        )
        config = SchedulerConfig(
            self.chunk,
            self.max_step_tokens,
            self.max_running,
            self.weights,
            separate_long_prompts=self.separate_long_prompts,
        )
        self.scheduler = Scheduler(self.cache, config, self.lower)

    def _make_policy(self) -> EvictionPolicy[bytes]:
        if self.shares is None:
            return make_policy(self.policy)
        shares = FairShares[bytes] if COMPILED else FloorsHold  # Python code cannot subclass a compiled class
        return shares(lambda: Retaining(make_policy(self.policy), max_bytes=3), self.shares, Share())

    def add(
        self,
        request_id: str,
        tokens: Iterable[int],
        new: int = 1,
        *,
        priority: int = 0,
        salt: bytes = b"",
        checkpoints: tuple[int, ...] = (),
    ) -> Sequence:
        tenant = salt.decode()
        owner = tenant if self.shares is not None else ""
        prompt = chain(tokens, self.block_size, salt, owner)
        sequence = Sequence(request_id, prompt, new, priority, tenant, checkpoints=checkpoints)
        self.scheduler.add(sequence)
        return sequence

    def step(self, stopped: Container[str] = ()) -> StepPlan:
        """One whole step, checked on the way."""
        plan = self.scheduler.schedule()
        self.check()
        self.compute(plan)
        self.complete(plan, stopped)
        return plan

    def complete(self, plan: StepPlan, stopped: Container[str] = ()) -> list[Sequence]:
        ready = plan.decodes + [chunk.sequence for chunk in plan.prefills if chunk.samples]
        sampled = {each.request_id: self.next_token(each) for each in ready}
        finished = self.scheduler.complete(plan, sampled, stopped)
        self.check()
        for block in self.pool.take_committed():
            assert block.block_hash is not None
            if block.partial:
                self._check_partial(block)
            else:
                self._check_content(block.block_hash)
            if self.lower is not None:
                self.lower.put([block.block_hash], exact=block.exact)
        return finished

    def arrive(self, load: Load, count: int | None = None) -> None:
        """The first ``count`` blocks of a load reach their slots, as far as the tiers still have them."""
        assert self.lower is not None
        exact: list[bool] = []
        for index, (block, block_hash) in enumerate(zip(load.blocks, load.block_hashes, strict=True)):
            if block_hash not in self.lower.places or (count is not None and index >= count):
                break
            assert block.ref_count == 1
            assert block.block_hash is None
            exact.append(self.lower.places[block_hash][1])
            is_partial = load.partial is not None and index == load.num_full
            count_in_block = load.partial.count if load.partial is not None and is_partial else self.block_size
            self._fill(block, load.chain, load.start + index, exact[-1], count_in_block)
        self.scheduler.loaded(load, exact)
        self.check()

    def _fill(self, block: Block, source: Chain, position: int, exact: bool, count: int) -> None:
        """What a cold run leaves in block ``position`` of a chain with the first ``count`` tokens of that; a chain of
        the tests starts at its root.
        """
        assert isinstance(source, TokenChain)
        stream = source.root + source.encoded()
        for offset in range(count):
            end = ROOT_BYTES + (position * self.block_size + offset + 1) * TOKEN_BYTES
            self._set(block, offset, Cell(stream[:end], exact))
            self.states[block.block_id] = stream[:end]

    def finish(self, max_steps: int = 2000) -> None:
        """Step until nothing is left; a sequence that starves fails here."""
        for _ in range(max_steps):
            if not self.scheduler.num_running + self.scheduler.num_waiting:
                break
            assert self.step(), "work is left, but the plan is empty"
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert self.pool.num_free == self.pool.num_blocks

    def compute(self, plan: StepPlan) -> None:
        """Write what an engine would, over a context that must hold exactly the chain's own tokens."""
        self.check_plan(plan)
        targets = {copy.target.block_id for copy in plan.copies}
        assert not targets & {copy.source.block_id for copy in plan.copies}
        for copy in plan.copies:
            assert copy.source.ref_count > 0, "the block may be evicted before it is copied"
            assert (copy.target.state, copy.target.ref_count) == (BlockState.ALLOCATED, 1)
            for offset in range(self.block_size):
                cell = self.cells.get((copy.source.block_id, offset))
                self._set(copy.target, offset, cell)
            if not self.within_blocks:
                self.states[copy.target.block_id] = self.states[copy.source.block_id]
        for sequence in plan.decodes:
            length = len(sequence.chain)
            self._write(sequence, length - 1, length, whole=length if self.batch_invariant else 0)
        for chunk in plan.prefills:
            whole = chunk.stop if self.batch_invariant else chunk.stop - chunk.stop % self.alignment
            self._write(chunk.sequence, chunk.start, chunk.stop, whole=whole)
            self.prefilled[chunk.sequence.request_id] += chunk.stop - chunk.start

    def _write(self, sequence: Sequence, start: int, stop: int, *, whole: int) -> None:
        """Up to ``whole``, what is written is what a cold run writes, if what it is computed from is."""
        blocks = sequence.held.blocks
        assert len(blocks) * self.block_size >= stop
        assert isinstance(sequence.chain, TokenChain)
        stream = sequence.chain.root + sequence.chain.encoded()
        exact = True
        if start and not self.within_blocks:
            before = self.states[blocks[(start - 1) // self.block_size].block_id]
            assert before == stream[: ROOT_BYTES + start * TOKEN_BYTES], f"{sequence.request_id} has another's state"
        for position in range(stop):
            index, offset = divmod(position, self.block_size)
            block = blocks[index]
            prefix = stream[: ROOT_BYTES + (position + 1) * TOKEN_BYTES]
            if position < start:
                cell = self.cells[block.block_id, offset]
                assert cell.prefix == prefix, f"{sequence.request_id} reads another's state at {position}"
                exact = exact and cell.exact
            else:
                assert (block.state, block.ref_count) == (BlockState.ALLOCATED, 1), "written while others may read"
                self._set(block, offset, Cell(prefix, exact and position < whole))
                self.states[block.block_id] = prefix

    def _set(self, block: Block, offset: int, cell: Cell | None) -> None:
        self.sound.pop(block.block_id, None)
        if cell is None:
            self.cells.pop((block.block_id, offset), None)
        else:
            self.cells[block.block_id, offset] = cell

    def check_plan(self, plan: StepPlan) -> None:
        planned: dict[str, int] = {}
        for chunk in plan.prefills:
            request_id, start, stop = chunk.sequence.request_id, chunk.start, chunk.stop
            assert self.batch_invariant or start % self.alignment == 0
            end = min(start - start % min(self.alignment, self.chunk) + self.chunk, len(chunk.sequence.chain))
            assert start < stop
            assert stop == end or (stop < end and stop == chunk.sequence.held.checkpoint)
            assert chunk.copy is None or chunk.copy.num_tokens == start % self.block_size
            assert planned.get(request_id, 0) != chunk.sequence.held.checkpoint, "a chunk behind what is to be kept"
            assert planned.get(request_id, start) == start, "a gap between two chunks"
            planned[request_id] = stop
        names = [sequence.request_id for sequence in plan.decodes]
        assert len({*names, *planned}) == len(names) + len(planned), "a sequence is planned twice"
        assert len(plan.prefills) <= 1 or plan.num_tokens <= self.max_step_tokens

    def check(self) -> None:
        """The conservation law, and that every block found under a hash holds what the hash says."""
        running = self.scheduler.running
        loading = [load.blocks for load in self.scheduler.loads]
        self.pool.check_integrity([*(each.held.pinned for each in running), *loading])
        assert len(running) <= self.max_running
        for sequence in running:
            assert sequence.cached_tokens <= sequence.prompt_tokens - 1
            assert self.batch_invariant or sequence.cached_tokens % self.alignment == 0
            self._check_admission(sequence)
        for block_hash in self.pool.snapshot().parents:
            self._check_content(block_hash)
        for block in self.pool.blocks:
            if block.partial:
                self._check_partial(block)

    def _check_admission(self, sequence: Sequence) -> None:
        admission = sequence.admission
        assert admission is not None
        counts = {name: value for name, value in admission._asdict().items() if name.endswith("_tokens")}
        by_tier = counts.pop("tier_tokens")
        assert min([*counts.values(), *by_tier.values()]) >= 0, admission
        assert sum(counts.values()) + sum(by_tier.values()) <= sequence.prompt_tokens, admission
        assert admission.pool_tokens + sum(by_tier.values()) <= sequence.cached_tokens

    def _check_content(self, block_hash: bytes) -> None:
        block = self.pool.lookup(block_hash)
        assert block is not None
        checked = block_hash, block.tokens, block.exact
        if self.sound.get(block.block_id) != checked:
            assert _last_hash(self._prefix_of(block, self.block_size), self.block_size) == block_hash
            self.sound[block.block_id] = checked

    def _check_partial(self, block: Block) -> None:
        prefix = self._prefix_of(block, len(block.tokens) // TOKEN_BYTES)
        before = prefix[: -len(block.tokens)]
        parents = [before[:ROOT_BYTES], *hash_blocks(before[:ROOT_BYTES], before[ROOT_BYTES:], self.block_size)]
        assert (block.parent, block.block_hash) == (parents[-1], partial_hash(parents[-1], block.tokens))
        assert block.num_tokens == len(block.tokens) // TOKEN_BYTES < self.block_size
        assert block.position == len(parents) - 1

    def _prefix_of(self, block: Block, count: int) -> bytes:
        """What all of a block's ``count`` positions depend on: each holds what the tokens say, and is exact."""
        cells = [self.cells[block.block_id, offset] for offset in range(count)]
        prefix = cells[-1].prefix
        ends = range(len(prefix) - (count - 1) * TOKEN_BYTES, len(prefix) + 1, TOKEN_BYTES)
        assert [cell.prefix for cell in cells] == [prefix[:end] for end in ends]
        assert prefix.endswith(block.tokens)
        assert self.within_blocks or self.states[block.block_id] == prefix
        assert not block.exact or all(cell.exact for cell in cells)
        return prefix


def random_token(random: Random, vocabulary: int = 2) -> Callable[[Sequence], int]:
    """Sampling from so few tokens that unrelated requests often share prefixes."""
    return lambda sequence: random.randrange(vocabulary)

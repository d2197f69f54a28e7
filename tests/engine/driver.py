"""Runs requests through the real scheduler and the real executor on the caller's thread, keeping all logits."""

from collections import abc
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from emberkv.core.block_pool import BlockPool
from emberkv.core.hashing import TokenChain, root_hash
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig, StepPlan
from emberkv.core.sequence import Sequence
from emberkv.core.stats import SchedulerStats
from emberkv.engine.torch.attention.paged_attention import shared_prefixes
from emberkv.engine.torch.engine import TorchEngine
from emberkv.engine.torch.model.loader import LoadedModel
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.self_check import Findings, tokens_that_count

BLOCK = 8
TILE = 16
CHUNK = 64
NUM_BLOCKS = 256

_found: dict[tuple[object, ...], Findings] = {}
"""What self-checks have found in this process, by all that they depend on here. A check takes longer than most tests
compute, so each is made once."""


@dataclass
class Run:
    """What became of one prompt. logits: of each generated token; kv: its blocks' state after prefill."""

    sequence: Sequence
    logits: list[Tensor] = field(default_factory=list)
    kv: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def tokens(self) -> list[int]:
        """The generated ones."""
        return self.sequence.chain.slice(self.sequence.prompt_tokens, len(self.sequence.chain))

    @property
    def cached(self) -> int:
        return self.sequence.cached_tokens


STALE_BYTE = 0x45
"""Finite in each type: about 3,000 in float32 and bfloat16, 5 in float16, 69 in int8."""


class Driver:
    """A greedy engine over blocks of 8 tokens, tiles of 16 with torch's attention, and chunks of 64.

    shared_decodes: decode steps in which some sequences had a common prefix long enough to be attended over once, of
    ``least_shared`` tokens.
    mixed_steps: those that both decoded and prefilled.
    executor: one that is made already, of the same model and kernels, whose blocks no other driver uses any more. Their
    keys and values are filled with others, so that a block that is not written does not pass for one that is.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_blocks: int = NUM_BLOCKS,
        exact: bool = False,
        prefix_cache: bool = True,
        max_step_tokens: int = 256,
        kernels: Kernels | None = None,
        block_size: int = BLOCK,
        executor: TorchEngine | None = None,
    ) -> None:
        self.root = root_hash(loaded.fingerprint, block_size)
        self.executor = executor or _engine(loaded, num_blocks, block_size, kernels)
        if executor is not None:
            executor.pool.storage.view(torch.uint8).fill_(STALE_BYTE)
        self.pool = BlockPool(num_blocks, block_size)
        alignment, batch_invariant = self.executor.alignment, self.executor.batch_invariant
        self.cache = PrefixCache(
            self.pool,
            alignment=alignment,
            batch_invariant=batch_invariant,
            within_blocks=self.executor.hits_within_blocks,
            exact=exact,
            enabled=prefix_cache,
        )
        self.scheduler = Scheduler(self.cache, SchedulerConfig(self.executor.prefill_chunk, max_step_tokens))
        self.least_shared = 256 if kernels is None else kernels.span
        self.shared_decodes = 0
        self.mixed_steps = 0
        self._runs = 0

    @property
    def stats(self) -> SchedulerStats:
        return self.pool.stats

    def chain(self, prompt: abc.Sequence[int], salt: bytes = b"") -> TokenChain:
        return TokenChain(self.root, prompt, self.pool.block_size, salt=salt)

    def run(
        self, *prompts: abc.Sequence[int], new: int = 1, salt: bytes = b"", checkpoints: tuple[int, ...] = ()
    ) -> list[Run]:
        """Serve the prompts together until each has ``new`` tokens; nothing is left allocated."""
        runs = {}
        for prompt in prompts:
            self._runs += 1
            sequence = Sequence(str(self._runs), self.chain(prompt, salt), new, checkpoints=checkpoints)
            runs[sequence.request_id] = Run(sequence)
            self.scheduler.add(sequence)
        while self.scheduler.num_running + self.scheduler.num_waiting:
            self._step(runs)
        self.pool.check_integrity(holders=[])
        return list(runs.values())

    def run_one(
        self, prompt: abc.Sequence[int], *, new: int = 1, salt: bytes = b"", checkpoints: tuple[int, ...] = ()
    ) -> Run:
        return self.run(prompt, new=new, salt=salt, checkpoints=checkpoints)[0]

    def _step(self, runs: dict[str, Run]) -> None:
        plan = self.scheduler.schedule()
        assert plan, "work is left, but the plan is empty"
        self._count_shared(plan)
        self.mixed_steps += bool(plan.decodes and plan.prefills)
        result = self.executor.forward(plan)
        sampled = {}
        if result is not None:
            for sequence, row in zip(result.sequences, result.logits, strict=True):
                runs[sequence.request_id].logits.append(row.clone())
                sampled[sequence.request_id] = int(row.argmax())
        for chunk in plan.prefills:
            block_ids = [block.block_id for block in chunk.sequence.held.blocks]
            runs[chunk.sequence.request_id].kv = self.executor.pool.blocks[block_ids].clone()
        self.scheduler.complete(plan, sampled)
        self.pool.check_integrity([each.held.pinned for each in self.scheduler.running])

    def _count_shared(self, plan: StepPlan) -> None:
        tables = [[block.block_id for block in each.held.blocks] for each in plan.decodes]
        lengths = [len(each.chain) for each in plan.decodes]
        self.shared_decodes += bool(shared_prefixes(tables, lengths, BLOCK, self.least_shared))


class Engines:
    """Two engines of a kind over the same weights, for all tests of them: most compute for less time than it takes to
    make an engine.

    Each driver has a cache of its own. load: gives a model for one engine, of ``arch`` and ``dtype``. kernels: see
    `TorchEngine`.
    """

    def __init__(
        self, arch: str, dtype: str, load: abc.Callable[[str, str], LoadedModel], kernels: Kernels | None
    ) -> None:
        self.arch = arch
        self.dtype = dtype
        self.name = f"{arch} {dtype}"
        self._load = load
        self._kernels = kernels

    @cached_property
    def _first(self) -> TorchEngine:
        return _engine(self._load(self.arch, self.dtype), NUM_BLOCKS, BLOCK, self._kernels)

    @cached_property
    def _second(self) -> TorchEngine:
        return _engine(self._load(self.arch, self.dtype), NUM_BLOCKS, BLOCK, self._kernels)

    def warm(self, *, num_blocks: int = NUM_BLOCKS, exact: bool = False, max_step_tokens: int = 256) -> Driver:
        """num_blocks: that it uses of the engine's."""
        return Driver(
            self._first.loaded,
            num_blocks=num_blocks,
            exact=exact,
            max_step_tokens=max_step_tokens,
            kernels=self._kernels,
            executor=self._first,
        )

    def cold(self) -> Driver:
        """One without a cache, over the engine in whose blocks no warm driver has computed anything."""
        return Driver(self._second.loaded, prefix_cache=False, kernels=self._kernels, executor=self._second)


def _engine(loaded: LoadedModel, num_blocks: int, block_size: int, kernels: Kernels | None) -> TorchEngine:
    """An engine with the findings of the first one of the same kind."""
    tokens = min(num_blocks * block_size, tokens_that_count(CHUNK, block_size))
    key = (loaded.fingerprint, loaded.dtypes, kernels is None, tokens, block_size, torch.get_num_threads())
    engine = TorchEngine(
        loaded,
        cache_bytes=num_blocks * loaded.geometry.block_bytes(loaded.dtypes.kv, block_size),
        block_size=block_size,
        prefill_chunk=CHUNK,
        kernels=kernels,
        tile=TILE,
        known=_found.get(key),
    )
    _found.setdefault(key, engine.findings)
    return engine

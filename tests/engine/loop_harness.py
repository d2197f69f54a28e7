"""An engine loop over an executor that knows what comes next without a model, and records of what it hands out."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from emberkv.core.block_pool import BlockPool
from emberkv.core.checkpoints import BRANCH_TOKENS
from emberkv.core.hashing import BlockHash, PublicPrefixes, root_hash
from emberkv.core.policies.eviction import EvictionPolicy
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig, StepPlan
from emberkv.core.sequence import FinishReason, Sequence
from emberkv.engine.commands import CacheControl
from emberkv.engine.executor import SamplingState, StepOutput
from emberkv.engine.loop import EngineLoop
from emberkv.engine.request import GenerationRequest, ModelLimits, SamplingParams, TokenOutput
from emberkv.engine.tier_link import TierLink
from tests.engine.tiny_executor import TinyExecutor
from tests.waiting import DEADLINE

VOCAB = 50
EOS = 1
BLOCK = 4
CHUNK = 8
CONTEXT = 100
ROOT = root_hash("model", BLOCK)


def successor(sequence: Sequence) -> int:
    """What follows a sequence; never the end of sequence."""
    return 2 + (7 * sequence.chain[-1] + len(sequence.chain)) % (VOCAB - 2)


class FakeExecutor(TinyExecutor):
    """Computes no KV state: what comes next follows from the sequence alone.

    on_step: called with each plan and its number (from 0) before it is computed, on the engine's thread. scores: the
    logit of the next token, all others being 0.
    """

    def __init__(
        self,
        next_token: Callable[[Sequence], int] = successor,
        on_step: Callable[[StepPlan, int], None] = lambda plan, number: None,
        scores: Callable[[Sequence], float] = lambda sequence: 1.0,
    ) -> None:
        super().__init__(num_blocks=1, block_size=BLOCK, vocab=VOCAB)
        self.next_token = next_token
        self.on_step = on_step
        self.scores = scores
        self.steps = 0
        self.prefilled: Counter[str] = Counter()

    def execute(self, plan: StepPlan, sampling: Mapping[str, SamplingState]) -> StepOutput:
        self.steps += 1
        self.on_step(plan, self.steps - 1)
        for chunk in plan.prefills:
            self.prefilled[chunk.sequence.request_id] += chunk.stop - chunk.start
        without_copies = StepPlan()
        without_copies.decodes = plan.decodes
        without_copies.prefills = [each._replace(copy=None) for each in plan.prefills]
        return super().execute(without_copies, sampling)

    def compute(self, sequence: Sequence, start: int, stop: int) -> NDArray[np.float32]:
        logits = np.zeros((stop - start, VOCAB), dtype=np.float32)
        if stop == len(sequence.chain):
            logits[-1, self.next_token(sequence)] = self.scores(sequence)
        return logits


class Inbox:
    """One request's outputs. on_output: called for each one, on the engine's thread."""

    def __init__(self, on_output: Callable[[TokenOutput], None] = lambda output: None) -> None:
        self.outputs: list[TokenOutput] = []
        self._on_output = on_output
        self._ended = threading.Event()

    def __call__(self, output: TokenOutput) -> None:
        assert not self._ended.is_set(), "an output after the last"
        self.outputs.append(output)
        if output.finish_reason is not None:
            self._ended.set()
        self._on_output(output)

    def wait(self) -> TokenOutput:
        """The last output."""
        assert self._ended.wait(DEADLINE), "the request did not end in time"
        return self.outputs[-1]

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def reason(self) -> FinishReason | None:
        return self.wait().finish_reason


class Harness:
    """A loop over 24 blocks of 4 tokens, chunks of 8 and steps of 16; not started yet."""

    def __init__(
        self,
        executor: FakeExecutor | None = None,
        *,
        num_blocks: int = 24,
        clock: Callable[[], float] = lambda: 0.0,
        on_crash: Callable[[Exception], None] = lambda error: None,
        prefix_cache: bool = True,
        exact: bool = False,
        batch_invariant: bool = False,
        within_blocks: bool = True,
        branch_tokens: int = BRANCH_TOKENS,
        max_running: int = 16,
        tiers: TierLink | None = None,
        policy: EvictionPolicy[BlockHash] | None = None,
        public: PublicPrefixes | None = None,
        control: type[CacheControl] | None = None,
    ) -> None:
        self.executor = executor or FakeExecutor()
        self.pool = BlockPool(num_blocks, BLOCK, policy=policy, journal=tiers is not None)
        cache = PrefixCache(
            self.pool,
            alignment=BLOCK,
            batch_invariant=batch_invariant,
            within_blocks=within_blocks,
            branch_tokens=branch_tokens,
            exact=exact,
            enabled=prefix_cache,
        )
        self.scheduler = Scheduler(cache, SchedulerConfig(CHUNK, 16, max_running), tiers)
        self.loop = EngineLoop(
            self.executor,
            self.scheduler,
            ModelLimits(CONTEXT, VOCAB, frozenset({EOS})),
            root=ROOT,
            tiers=tiers,
            control=control(self.scheduler) if control is not None else None,
            public=public,
            clock=clock,
            wall_clock=lambda: 1000.0,
            on_crash=on_crash,
        )

    def submit(
        self,
        request_id: str,
        prompt: Iterable[int],
        new: int = 4,
        *,
        inbox: Inbox | None = None,
        ignore_eos: bool = False,
        stop_token_ids: tuple[int, ...] = (),
        salt: bytes = b"",
        tenant: str = "",
    ) -> Inbox:
        inbox = inbox or Inbox()
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=ignore_eos, stop_token_ids=stop_token_ids)
        self.loop.submit(GenerationRequest(request_id, list(prompt), params, salt, tenant=tenant), inbox)
        return inbox

    def check_idle(self) -> None:
        """Once the loop has stopped: nothing is left of any request."""
        assert self.scheduler.num_running + self.scheduler.num_waiting == 0
        self.pool.check_integrity(holders=[])
        assert self.pool.num_free == self.pool.num_blocks
        assert (self.loop.stats().running, self.loop.stats().waiting) == (0, 0)
        assert self.loop.stats().free_blocks == self.pool.num_blocks


H = TypeVar("H", bound=Harness)


@contextmanager
def running(harness: H) -> Iterator[H]:
    """Start the loop, stop it at the end, and check that nothing is left."""
    harness.loop.start()
    try:
        yield harness
    finally:
        harness.loop.stop()
    harness.check_idle()

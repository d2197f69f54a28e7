"""An engine of the real core without tensors: it answers each request at once, on the caller's thread."""

from collections.abc import Sequence
from concurrent.futures import Future
from itertools import count, takewhile
from typing import TypeVar

from emberkv.core.block_pool import BlockPool
from emberkv.core.explaining.explain import admission_outcome
from emberkv.core.explaining.ledger import Ledger
from emberkv.core.hashing import TokenChain
from emberkv.core.loading import LowerTiers
from emberkv.core.policies.eviction import LRU
from emberkv.core.policies.retention import Retaining
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig
from emberkv.core.sequence import Sequence as Served
from emberkv.engine.commands import CacheControl, Command
from emberkv.engine.request import (
    CacheUsage,
    EngineStats,
    GenerationRequest,
    OutputListener,
    PrefillProgress,
    TokenOutput,
)
from emberkv.errors import RequestError
from emberkv.serving.cache.ledger_store import LedgerStore
from emberkv.serving.cache.service import CacheService
from emberkv.serving.tenancy import Tenant
from tests.serving.fakes import BOS

R = TypeVar("R")

ROOT = b"the model's root"
BLOCK = 4
UNIT = 8
ANSWER = list(b"ok")


class CoreEngine:
    """``public``: tokens that all tenants share. ``checkpoints``: each block has a state, too, and hits end at blocks
    and checkpoints; else at units. ``now``: seconds since 1970, and of the clock."""

    context_length = 1000
    max_prompt_tokens = 990

    def __init__(
        self,
        blocks: int = 200,
        *,
        lower: LowerTiers | None = None,
        public: Sequence[int] = (),
        checkpoints: bool = False,
    ) -> None:
        self.policy = Retaining[bytes](LRU(), max_bytes=blocks)
        self.pool = BlockPool(blocks, BLOCK, policy=self.policy)
        unit = BLOCK if checkpoints else UNIT
        cache = PrefixCache(self.pool, alignment=unit, batch_invariant=checkpoints, within_blocks=not checkpoints)
        self.scheduler = Scheduler(cache, SchedulerConfig(UNIT), lower)
        self.submitted: list[GenerationRequest] = []
        self.answer = ANSWER
        self.now = 1000.0
        self.ledger_store = LedgerStore(Ledger(), clock=lambda: self.now)
        self._control = CacheControl(self.scheduler, lower=lower, clock=lambda: self.now)
        self.service = CacheService(self.ledger_store, self.execute, self.chain)
        self._public = list(public)
        self._seen = 0

    def chain(self, tokens: Sequence[int], tenant: Tenant) -> TokenChain:
        common = takewhile(lambda at: tokens[at : at + 1] == self._public[at : at + 1] != [], count())
        blocks = len(list(common)) // BLOCK
        return TokenChain(ROOT, tokens, BLOCK, owner=tenant.name, salt=tenant.salt, public_blocks=blocks)

    def execute(self, command: Command[R]) -> "Future[R]":
        future: Future[R] = Future()
        future.set_result(self._control.execute(command))
        self._tell_events()
        return future

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        if max(request.prompt_token_ids) > BOS:
            raise RequestError("prompt has a token id outside the vocabulary", param="prompt")
        self.submitted.append(request)
        chain = self.chain(list(request.prompt_token_ids), Tenant(request.tenant, request.salt))
        answer = self.answer[: request.params.max_tokens]
        sequence = Served(request.request_id, chain, len(answer))
        self.scheduler.add(sequence)
        while sequence.finish_reason is None:
            self._step(sequence, answer, listener)

    def _step(self, sequence: Served, answer: list[int], listener: OutputListener) -> None:
        plan = self.scheduler.schedule()
        for each in plan.admitted:
            assert each.admission is not None
            outcome = admission_outcome(each.admission, each.prompt_tokens)
            self.ledger_store.admitted(each.request_id, self._prompt(each), each.prompt_tokens, outcome, hit_unit=UNIT)
        samples = bool(plan.decodes) or any(chunk.samples for chunk in plan.prefills)
        token = answer[sequence.num_generated] if samples else None
        self.scheduler.complete(plan, {} if token is None else {sequence.request_id: token})
        for load in plan.loads:
            self.scheduler.loaded(load, [True] * len(load.blocks))
        self._tell_events()
        if token is not None:
            usage = CacheUsage(
                sequence.prompt_tokens, sequence.cached_tokens, tokens_by_tier=dict(sequence.tier_tokens)
            )
            listener(TokenOutput(sequence.request_id, (token,), usage=usage, finish_reason=sequence.finish_reason))

    @staticmethod
    def _prompt(sequence: Served) -> TokenChain:
        assert isinstance(sequence.chain, TokenChain)
        return sequence.chain

    def _tell_events(self) -> None:
        events = self.pool.events.since(self._seen)
        assert events is not None
        self._seen = self.pool.events.last_sequence
        self.ledger_store.apply(events)

    def abort(self, request_id: str) -> None:
        return None

    def progress(self, request_id: str) -> PrefillProgress | None:
        return None

    def stats(self) -> EngineStats:
        return EngineStats(block_size=BLOCK, total_blocks=self.pool.num_blocks, free_blocks=self.pool.num_free)

"""Workers in this process, whose answers are a function of their prompts, and which fail where a test sets them to."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from emberkv.cluster.cache_operations import CacheOperation
from emberkv.cluster.wire import LoadReport, SharedTier, StoredBlocks, TokenizerFiles, WorkerDescription
from emberkv.core.events import Event
from emberkv.core.feed import EventBatch, EventsLost, FeedMessage, SnapshotChunk
from emberkv.core.hashing import root_hash
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import CacheUsage, GenerationRequest, PrefillProgress, TokenOutput
from emberkv.errors import EmberError, WorkerLostError, WorkerUnreachableError
from emberkv.serving.cache.service import CacheService
from emberkv.serving.errors import ModelNotLoadedError, NotReadyError
from tests.serving.fakes import ByteTokenizer

BLOCK_SIZE = 4


def token_after(tokens: list[int], seed: int | None) -> int:
    """The token that every worker gives after these."""
    return sha256(repr((tokens, seed)).encode()).digest()[0]


def expected(prompt: list[int], count: int, seed: int | None = None) -> list[int]:
    """The answer of a worker that nothing happens to."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(token_after(tokens, seed))
    return tokens[len(prompt) :]


@dataclass
class FakeWorker:
    """A process that may be reached or not. epoch: another one after each start.

    dies_after: tokens of an answer after which it is gone; None: never. refuses: what it answers each request with.
    hangs: it accepts requests and sends nothing but their progress. running: what it reports. is_loaded: it has its
    model; without it, its events end. cache: carries out operations on the cache. shared_tiers: what it says of them.
    stored: the blocks in a shared tier, which it gives one at a time; None: its server does not answer. scans: the
    tiers whose blocks it was asked for, from the first one. log: the events of its cache. unkept: how many of them it
    does not give any more. ends_scans_at: the cursor at which it ends when it is asked for its stored blocks.
    """

    worker_id: str
    fingerprint: str = "f"
    block_size: int = BLOCK_SIZE
    epoch: bytes = b"e1"
    alive: bool = True
    dies_after: int | None = None
    refuses: EmberError | None = None
    hangs: bool = False
    draining: bool = False
    running: int = 0
    is_loaded: bool = True
    cache: CacheService | None = None
    shared_tiers: dict[str, SharedTier] = field(default_factory=dict)
    stored: Sequence[bytes] | None = ()
    scans: list[str] = field(default_factory=list)
    log: Sequence[Event] = ()
    unkept: int = 0
    ends_scans_at: int | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def change(self, **values: object) -> None:
        """Set attributes and have streams notice."""
        for name, value in values.items():
            setattr(self, name, value)
        self.changed.set()
        self.changed = asyncio.Event()

    def die(self) -> None:
        self.change(alive=False)

    def restart(self) -> None:
        self.change(alive=True, epoch=self.epoch + b"+", dies_after=None)


class FakeConnection:
    """A `WorkerConnection` to a `FakeWorker`."""

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker
        self.closed = False

    async def worker(self) -> WorkerDescription:
        self._check()
        worker = self._worker
        if not worker.is_loaded:
            raise ModelNotLoadedError("it loads its model on demand")
        return WorkerDescription(
            worker_id=worker.worker_id,
            epoch=worker.epoch,
            sequence=len(worker.log),
            version="0",
            names=("tiny",),
            fingerprint=worker.fingerprint,
            root=root_hash(worker.fingerprint, worker.block_size),
            namespace=b"n",
            block_size=worker.block_size,
            context_length=1000,
            max_prompt_tokens=999,
            hit_unit=1,
            exact=True,
            shared_tiers=worker.shared_tiers,
        )

    async def tokenizer(self, etag: str = "") -> TokenizerFiles | None:
        return TokenizerFiles(etag="t", files={})

    async def snapshot(self, cursor: str = "") -> SnapshotChunk:
        worker = self._worker
        return SnapshotChunk(worker.epoch, len(worker.log), cursor, None, worker.block_size, (), ())

    async def stored(self, tier: str, cursor: int = 0) -> StoredBlocks:
        worker = self._worker
        if not cursor:
            worker.scans.append(tier)
        if worker.stored is None:
            raise NotReadyError("the server of the remote tier: no connection")
        if cursor == worker.ends_scans_at:
            worker.die()
        self._check_stream()
        following = cursor + 1 if cursor + 1 < len(worker.stored) else None
        return StoredBlocks(tuple(worker.stored[cursor : cursor + 1]), following)

    async def events(self, after: int = 0) -> AsyncGenerator[FeedMessage | LoadReport, None]:
        worker = self._worker
        while worker.is_loaded:
            self._check()
            changed = worker.changed
            if after < worker.unkept:
                yield EventsLost(worker.epoch, worker.unkept + 1, len(worker.log))
            else:
                yield EventBatch(worker.epoch, after + 1, worker.log[after:])
            after = len(worker.log)
            yield LoadReport(
                worker_id=worker.worker_id,
                epoch=worker.epoch,
                sequence=after,
                draining=worker.draining,
                running=worker.running,
                shared_tiers=worker.shared_tiers,
            )
            await changed.wait()

    async def generate(
        self, request: GenerationRequest, on_progress: Callable[[PrefillProgress], None] = lambda _: None
    ) -> AsyncGenerator[TokenOutput, None]:
        self._check()
        worker = self._worker
        worker.requests.append(request)
        worker.asked.set()
        if worker.refuses is not None:
            raise worker.refuses
        tokens = list(request.prompt_token_ids)
        left = request.params.max_tokens - request.answered
        usage = CacheUsage(len(tokens), 0)
        try:
            on_progress(PrefillProgress(len(tokens) // 2, len(tokens)))
            while worker.hangs:
                await worker.changed.wait()
                on_progress(PrefillProgress(len(tokens) // 2, len(tokens)))
            for number in range(left):
                if number == worker.dies_after:
                    worker.die()
                self._check_stream()
                tokens.append(token_after(tokens, request.params.seed))
                ended = FinishReason.LENGTH if number == left - 1 else None
                yield TokenOutput(request.request_id, tokens[-1:] and (tokens[-1],), usage=usage, finish_reason=ended)
                await asyncio.sleep(0)
        except (GeneratorExit, asyncio.CancelledError):
            worker.aborted.append(request.request_id)
            raise

    async def explain(self, prompt_token_ids: Sequence[int], *, tenant: str = "", salt: bytes = b"") -> dict[str, Any]:
        return {"hit_tokens": 0}

    async def wake(self) -> None:
        self._check()

    async def operate(self, operation: CacheOperation) -> dict[str, Any]:
        self._check()
        assert self._worker.cache is not None
        return await operation.carry_out(self._worker.cache, ByteTokenizer())

    async def close(self) -> None:
        self.closed = True

    def _check(self) -> None:
        if not self._worker.alive:
            raise WorkerUnreachableError(f"{self._worker.worker_id} cannot be reached")

    def _check_stream(self) -> None:
        if not self._worker.alive:
            raise WorkerLostError(f"{self._worker.worker_id} is lost")

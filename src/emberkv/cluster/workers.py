"""A worker as a gateway knows it: its status, what it serves, what it has to do, and the connection to it."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol

from emberkv.cluster.cache_operations import CacheOperation
from emberkv.cluster.feed import FeedReader
from emberkv.cluster.policies import ReplicaState
from emberkv.cluster.wire import LoadReport, StoredBlocks, TokenizerFiles, WorkerDescription
from emberkv.core.feed import FeedMessage, SnapshotChunk
from emberkv.engine.request import GenerationRequest, PrefillProgress, TokenOutput

REPORT_SECONDS = 0.25
"""A report that comes this long after a request was sent counts that request."""

EXACT = "exact"
DEGRADED = "degraded"


class WorkerStatus(StrEnum):
    """Only a worker that is ``UP`` gets new requests."""

    STARTING = "starting"  # it has not said yet what it serves
    IDLE = "idle"  # it loads its model when a request needs it
    UP = "up"
    SILENT = "silent"  # it has sent nothing within the deadline
    DRAINING = "draining"  # it finishes what it has
    INCOMPATIBLE = "incompatible"  # it serves another model, or has blocks of another size
    DOWN = "down"  # it cannot be reached


class WorkerConnection(Protocol):
    """What membership and engine ask a worker; `emberkv.cluster.worker_client.WorkerClient` is one."""

    async def worker(self) -> WorkerDescription: ...
    async def tokenizer(self, etag: str = "") -> TokenizerFiles | None: ...
    async def snapshot(self, cursor: str = "") -> SnapshotChunk: ...
    async def stored(self, tier: str, cursor: int = 0) -> StoredBlocks: ...
    async def explain(
        self, prompt_token_ids: Sequence[int], *, tenant: str = "", salt: bytes = b""
    ) -> dict[str, Any]: ...
    async def operate(self, operation: CacheOperation) -> dict[str, Any]: ...
    async def wake(self) -> None: ...
    def events(self, after: int = 0) -> AsyncGenerator[FeedMessage | LoadReport, None]: ...
    def generate(
        self, request: GenerationRequest, on_progress: Callable[[PrefillProgress], None] = ...
    ) -> AsyncGenerator[TokenOutput, None]: ...
    async def close(self) -> None: ...


class RoutedWorker(ABC):
    """What routing and its reports know of any worker, whatever protocol it speaks.

    worker_id: "" before it is known. slot: its number in the router, once it is compatible. detail: why it is not up.
    heard: when it last sent anything, by the membership's clock; None: never. running: ids of the requests that it
    answers for this gateway. requests, lost: how many it was sent, and of these how many it did not finish. background:
    how many more it was sent to compute while it had nothing to do.
    """

    def __init__(self, url: str, worker_id: str) -> None:
        self.url = url
        self.worker_id = worker_id
        self.slot: int | None = None
        self.status = WorkerStatus.STARTING
        self.detail = "it has not answered yet"
        self.heard: float | None = None
        self.running: set[str] = set()
        self.requests = 0
        self.lost = 0
        self.background = 0
        self._unreported: dict[str, tuple[float, int]] = {}

    def __str__(self) -> str:
        return f"{self.worker_id} ({self.url})" if self.worker_id else self.url

    @property
    @abstractmethod
    def index(self) -> str:
        """How well the gateway's index knows what the worker has cached: "exact", or "degraded" and why."""

    @abstractmethod
    def state(self) -> ReplicaState:
        """What routing decides from."""

    @property
    def shared(self) -> Mapping[str, bytes]:
        """The ids of the stores that its tiers share with other workers, by the tiers' names."""
        return {}

    @property
    def exact(self) -> bool:
        """Whether the index has just what the worker's pool has, as far as anything is known of it."""
        return self.index == EXACT

    @property
    def unreported_tokens(self) -> int:
        """Tokens that it has yet to compute for requests that no report of its own counts."""
        return sum(tokens for _, tokens in self._unreported.values())

    def sent(self, request_id: str, tokens: int, now: float) -> None:
        """It is sent a request with so many tokens to compute."""
        self.requests += 1
        self.running.add(request_id)
        self._unreported[request_id] = now, tokens

    def begun(self, request_id: str) -> None:
        """The request has its first token: nothing of its prompt is left to compute."""
        self._unreported.pop(request_id, None)

    def ended(self, request_id: str) -> None:
        self.running.discard(request_id)
        self._unreported.pop(request_id, None)


class Worker(RoutedWorker):
    """One emberkv worker. `Membership` alone changes its status."""

    def __init__(self, url: str, connection: WorkerConnection, worker_id: str = "") -> None:
        super().__init__(url, worker_id)
        self.connection = connection
        self.reader: FeedReader | None = None
        self.description: WorkerDescription | None = None
        self.report: LoadReport | None = None
        self.registered: float | None = None
        self.is_leaving = False  # it has deregistered, and drains though its reports may not say so yet
        self.follower: asyncio.Task[None] | None = None

    @property
    def index(self) -> str:
        heard_of = self.status in (WorkerStatus.UP, WorkerStatus.DRAINING)
        return EXACT if heard_of and self.reader is not None and self.reader.exact else DEGRADED

    @property
    def shared(self) -> Mapping[str, bytes]:
        tiers = {} if self.description is None else self.description.shared_tiers
        return {name: tier.store_id for name, tier in tiers.items()}

    @property
    def listed_tiers(self) -> list[str]:
        """Those of the tiers that it may share whose whole content its snapshots list."""
        tiers = {} if self.description is None else self.description.shared_tiers
        return [name for name, tier in tiers.items() if tier.is_listed]

    def shares_as(self, report: LoadReport) -> bool:
        """Whether it shares the tiers of its description still: a server's id is not known before it is reached."""
        described = {} if self.description is None else self.description.shared_tiers
        return report.shared_tiers is None or report.shared_tiers == described

    def take_report(self, report: LoadReport, now: float) -> None:
        self.report = report
        self._unreported = {each: sent for each, sent in self._unreported.items() if now - sent[0] < REPORT_SECONDS}

    def state(self) -> ReplicaState:
        """The last report, and what was sent since."""
        sent = self.unreported_tokens
        report, is_up = self.report, self.status is WorkerStatus.UP
        if report is None or self.description is None:
            return ReplicaState(load=sent, up=is_up, queued_tokens=sent)
        block_size = self.description.block_size
        held = (report.total_blocks - report.free_blocks) * block_size
        token_bytes = report.block_bytes / block_size
        return ReplicaState(
            load=held + report.waiting_tokens + sent,
            up=is_up,
            queued_tokens=report.waiting_tokens + report.prefill_tokens + sent,
            prefill_rate=report.prefill_rate,
            step_seconds=report.step_seconds or 0.0,
            load_rates={tier: rate / token_bytes for tier, rate in report.load_rates.items()} if token_bytes else {},
        )

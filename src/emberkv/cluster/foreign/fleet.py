"""Health checks of a gateway's foreign workers, and the models that each of them serves."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from emberkv.cluster.foreign.kv_events import KvBlocks, KvSequence
from emberkv.cluster.foreign.prompts import PromptReader
from emberkv.cluster.foreign.worker import ForeignSpec, ForeignWorker
from emberkv.cluster.membership import Membership
from emberkv.cluster.wire import WorkerDescription
from emberkv.cluster.workers import WorkerStatus
from emberkv.errors import ConfigError, EmberError, WorkerTimeoutError, WorkerUnreachableError
from emberkv.serving.errors import NotReadyError

if TYPE_CHECKING:  # an extra
    from emberkv.cluster.foreign.client import ForeignClient

_log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""Seconds between two health checks of a worker."""

MODELS_SECONDS = 15.0
"""Seconds after which the model list of a worker that is up is read again."""

GIVEN_UP_AFTER = 3
"""Consecutive health checks without an answer after which a worker's running requests are aborted."""

HAS_NO_HEALTH = (404, 405, 501)
"""Statuses by which a server shows that it has no ``/health``; its model list is read instead."""


class ForeignFleet:
    """Checks foreign workers and registers them with the router of ``membership``. All methods run on one event loop.

    client: makes the client of a worker. reader: has the block hashes of prompts. own: the description of the emberkv
    workers; None while no worker has sent one. seconds: between two checks. clock: monotonic seconds.

    Raises ConfigError for two workers with one id.
    """

    def __init__(
        self,
        membership: Membership,
        specs: Sequence[ForeignSpec],
        client: "Callable[[ForeignSpec], ForeignClient]",
        reader: PromptReader,
        *,
        own: Callable[[], WorkerDescription | None] = lambda: None,
        seconds: float = CHECK_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._membership = membership
        self._reader = reader
        self._own = own
        self.seconds = seconds
        self._clock = clock
        index = membership.router.index
        self.workers = [
            ForeignWorker(spec, client(spec), index, block_size=reader.block_size, usual_step=self._usual_step)
            for spec in specs
        ]
        names = [worker.worker_id for worker in self.workers]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(
                f"--foreign-worker: two workers have the id {twice!r}; give one of them another by id=NAME"
            )
        self._silent: dict[ForeignWorker, int] = {}
        self._due = {worker: asyncio.Event() for worker in self.workers}
        self._feeds: dict[ForeignWorker, KvSequence] = {}
        for worker in self.workers:
            if worker.spec.kv_events is not None:
                blocks = KvBlocks(reader.root, reader.block_size, worker.publish_own)
                worker.feed = self._feeds[worker] = KvSequence(blocks)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def up(self) -> list[ForeignWorker]:
        """The workers that are up."""
        return [worker for worker in self.workers if worker.status is WorkerStatus.UP]

    def _usual_step(self) -> float:
        steps = [worker.rates.step for worker in self.workers if worker.rates.step]
        return sum(steps) / len(steps) if steps else 0.0

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """The model cards of the workers that are up, by model id; of several cards for one id, the first worker's."""
        return {name: card for worker in reversed(self.up) for name, card in worker.models.items()}

    def start(self) -> None:
        """Start checking the workers."""
        for worker in self.workers:
            self._tasks.append(asyncio.create_task(self._follow(worker), name=f"follow {worker.url}"))

    def _subscribe(self, worker: ForeignWorker, sequence: KvSequence) -> None:
        """Subscribe to the worker's KV events, which need its slot in the index."""
        from emberkv.cluster.foreign.subscriber import KvSubscriber, follow  # noqa: PLC0415 - ZeroMQ, where asked for

        assert worker.spec.kv_events is not None, "only these have a feed"
        subscriber = KvSubscriber(worker.spec.kv_events, worker.spec.kv_replay, sequence)
        self._tasks.append(asyncio.create_task(follow(subscriber), name=f"events of {worker.url}"))

    async def stop(self) -> None:
        """Stop checking the workers, and close all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers:
            await worker.client.close()

    def suspect(self, worker: ForeignWorker, error: EmberError) -> None:
        """Handle a failed request: a worker that cannot be reached, or is silent, gets no further requests until a
        check succeeds. A connection that ended may be due to the request alone, so the worker is checked at once.
        """
        if worker.status is not WorkerStatus.UP:
            return
        if isinstance(error, WorkerUnreachableError | WorkerTimeoutError):
            self.failed(worker, error)
        else:
            self._due[worker].set()

    async def _follow(self, worker: ForeignWorker) -> None:
        while True:
            try:
                await self._check(worker)
            except EmberError as error:
                self.failed(worker, error)
            except Exception:  # noqa: BLE001 - an invalid answer must not end a worker's checks
                _log.exception("following worker %s failed", worker)
                self._membership.set_status(worker, WorkerStatus.DOWN, "the gateway failed to follow it; see its log")
            await self._until_due(worker)

    async def _until_due(self, worker: ForeignWorker) -> None:
        """Wait for the next check, which `suspect` may ask for."""
        due = self._due[worker]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.seconds):
                await due.wait()
        due.clear()

    async def _check(self, worker: ForeignWorker) -> None:
        """Check the worker's health and, every `MODELS_SECONDS`, its model list."""
        status = await worker.client.health()
        if status != 200 and status not in HAS_NO_HEALTH:
            self._membership.set_status(worker, WorkerStatus.STARTING, f"its /health answers with status {status}")
            return
        now, read = self._clock(), worker.models_read
        is_new = worker.status is not WorkerStatus.UP or read is None or now - read > MODELS_SECONDS
        if is_new or status in HAS_NO_HEALTH:
            cards = await worker.client.models()
            worker.models = {card["id"]: card for card in cards if isinstance(card.get("id"), str)}
            worker.models_read = now
        worker.heard = self._clock()
        self._silent.pop(worker, None)
        is_first = worker.slot is None
        if worker.slot is None:
            worker.slot = self._membership.router.join(worker.worker_id)
        if worker in self._feeds:
            self._name_as_requests_do(worker, self._feeds[worker])
        if worker in self._feeds and is_first:
            self._subscribe(worker, self._feeds[worker])
        self._membership.set_status(worker, WorkerStatus.UP, "")

    def failed(self, worker: ForeignWorker, error: EmberError) -> None:
        """Handle a failed check."""
        if isinstance(error, WorkerTimeoutError):
            self._membership.set_status(worker, WorkerStatus.SILENT, str(error))
            self._silent[worker] = self._silent.get(worker, 0) + 1
            if self._silent[worker] >= GIVEN_UP_AFTER:
                worker.give_up()
            return
        if isinstance(error, WorkerUnreachableError) and worker.status is not WorkerStatus.DOWN:
            worker.forget()  # its process has ended, and its cache with it
            if worker in self._feeds:
                self._feeds[worker].restart()
        is_loading = isinstance(error, NotReadyError)
        status = WorkerStatus.STARTING if is_loading else WorkerStatus.DOWN
        self._membership.set_status(worker, status, str(error))

    def _name_as_requests_do(self, worker: ForeignWorker, sequence: KvSequence) -> None:
        """Use the block hashes of the emberkv workers if these serve the same model."""
        own = self._own()
        root, block_size = self._reader.root, self._reader.block_size
        if own is not None and worker.models.keys() & set(own.names):
            root, block_size = own.root, own.block_size
        if sequence.blocks.root != root:
            sequence.blocks.clear()
            sequence.blocks = KvBlocks(root, block_size, worker.publish_own)
            sequence.restart()

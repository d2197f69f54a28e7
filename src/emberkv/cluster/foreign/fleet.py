"""The foreign workers of a gateway: which of them are up, and what they serve."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from emberkv.cluster.foreign.kv_events import KvBlocks, KvSequence
from emberkv.cluster.foreign.prompts import PromptReader
from emberkv.cluster.foreign.worker import ForeignSpec, ForeignWorker
from emberkv.cluster.membership import Membership, WorkerStatus
from emberkv.cluster.wire import WorkerDescription
from emberkv.errors import ConfigError, EmberError, WorkerTimeoutError, WorkerUnreachableError
from emberkv.serving.errors import NotReadyError

if TYPE_CHECKING:  # an extra
    from emberkv.cluster.foreign.client import ForeignClient

_log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""Between two looks at whether a worker is there."""

MODELS_SECONDS = 15.0
"""How long what a worker serves is taken to stay the same while it is up."""

GIVEN_UP_AFTER = 3
"""Checks in turn that a worker does not answer, until its answers under way are given up: by then it hangs."""

HAS_NO_HEALTH = (404, 405, 501)


class ForeignFleet:
    """Follows foreign workers, and has them join the router of ``membership``. Belongs to one event loop.

    client: makes the connection to a worker. reader: names the blocks of prompts. own: what the emberkv workers serve;
    None while that is not known. clock: monotonic seconds. Raises ConfigError for two workers of one id.
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
            raise ConfigError(f"--foreign-worker: two are called {twice!r}; give one of them another name by id=NAME")
        self._silent: dict[ForeignWorker, int] = {}
        self._feeds: dict[ForeignWorker, KvSequence] = {}
        for worker in self.workers:
            if worker.spec.kv_events is not None:
                blocks = KvBlocks(reader.root, reader.block_size, worker.publish_own)
                worker.feed = self._feeds[worker] = KvSequence(blocks)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def up(self) -> list[ForeignWorker]:
        return [worker for worker in self.workers if worker.status is WorkerStatus.UP]

    def _usual_step(self) -> float:
        steps = [worker.rates.step for worker in self.workers if worker.rates.step]
        return sum(steps) / len(steps) if steps else 0.0

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """All models that workers which are up serve, by id, as the first of them describes each."""
        return {name: card for worker in reversed(self.up) for name, card in worker.models.items()}

    def start(self) -> None:
        """Begin to follow the workers."""
        for worker in self.workers:
            self._tasks.append(asyncio.create_task(self._follow(worker), name=f"follow {worker.url}"))

    def _subscribe(self, worker: ForeignWorker, sequence: KvSequence) -> None:
        """Follow its events, now that it has a slot that they can be for."""
        from emberkv.cluster.foreign.subscriber import KvSubscriber, follow  # noqa: PLC0415 - ZeroMQ, where asked for

        assert worker.spec.kv_events is not None, "only these have a feed"
        subscriber = KvSubscriber(worker.spec.kv_events, worker.spec.kv_replay, sequence)
        self._tasks.append(asyncio.create_task(follow(subscriber), name=f"events of {worker.url}"))

    async def stop(self) -> None:
        """Follow them no longer, and close all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers:
            await worker.client.close()

    def suspect(self, worker: ForeignWorker, error: EmberError) -> None:
        """A request has failed there, so that it gets no more before it answers a check."""
        if worker.status is WorkerStatus.UP:
            self.failed(worker, error)

    async def _follow(self, worker: ForeignWorker) -> None:
        while True:
            try:
                await self._check(worker)
            except EmberError as error:
                self.failed(worker, error)
            except Exception:  # noqa: BLE001 - a fault in what one worker sent must not end that it is followed
                _log.exception("following worker %s failed", worker)
                self._membership.set_status(worker, WorkerStatus.DOWN, "the gateway failed to follow it; see its log")
            await asyncio.sleep(self.seconds)

    async def _check(self, worker: ForeignWorker) -> None:
        """Ask whether it is there and, now and then, what it serves."""
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
        """A check has failed there."""
        if isinstance(error, WorkerTimeoutError):
            self._membership.set_status(worker, WorkerStatus.SILENT, str(error))
            self._silent[worker] = self._silent.get(worker, 0) + 1
            if self._silent[worker] >= GIVEN_UP_AFTER:
                worker.give_up()
            return
        if isinstance(error, WorkerUnreachableError) and worker.status is not WorkerStatus.DOWN:
            worker.forget()  # its process has ended, and with it what it had cached
            if worker in self._feeds:
                self._feeds[worker].restart()
        is_loading = isinstance(error, NotReadyError)
        status = WorkerStatus.STARTING if is_loading else WorkerStatus.DOWN
        self._membership.set_status(worker, status, str(error))

    def _name_as_requests_do(self, worker: ForeignWorker, sequence: KvSequence) -> None:
        """Blocks have the hashes that emberkv workers give them, where such serve the same model."""
        own = self._own()
        root, block_size = self._reader.root, self._reader.block_size
        if own is not None and worker.models.keys() & set(own.names):
            root, block_size = own.root, own.block_size
        if sequence.blocks.root != root:
            sequence.blocks.clear()
            sequence.blocks = KvBlocks(root, block_size, worker.publish_own)
            sequence.restart()

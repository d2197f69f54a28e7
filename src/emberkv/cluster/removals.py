"""Removals from the caches of all workers of a gateway; one that a worker has missed is made up for when it answers."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from emberkv.cluster.cache_operations import CacheOperation, FindUnshared, RemoveBlocks
from emberkv.cluster.membership import Membership, Worker, WorkerStatus
from emberkv.core.hashing import BlockHash
from emberkv.errors import ClusterError, EmberError, EngineStoppedError, WorkerUnreachableError
from emberkv.serving.errors import NotReadyError

_log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
"""Between two attempts at a worker that has missed a removal."""

MAX_WORKERS = 1000
"""Workers of which missed removals are remembered; those of the one that has missed none for longest are dropped."""

MAX_BLOCKS = 100_000
"""Blocks that one worker may have missed; beyond them, everything is removed there."""

MISSED = (ClusterError, EngineStoppedError, NotReadyError)
"""Errors after which a worker may come back with what it had."""

Outcome = Mapping[str, Any] | EmberError
"""What a worker has answered, or why it has not."""


async def operate(workers: Sequence[Worker], operation: CacheOperation) -> dict[Worker, Outcome]:
    """Ask workers at once. One that is known not to answer is not waited for."""

    async def ask(worker: Worker) -> Outcome:
        if worker.status in (WorkerStatus.DOWN, WorkerStatus.SILENT):
            return WorkerUnreachableError(f"it is {worker.status}: {worker.detail}")
        try:
            return await worker.connection.operate(operation)
        except EmberError as error:
            return error

    return dict(zip(workers, await asyncio.gather(*map(ask, workers)), strict=True))


class ClusterRemovals:
    """Removals at all workers of ``membership``. Belongs to its event loop.

    What a worker has missed is remembered in this process alone, by the worker's id, and done when the worker is up
    again: `missed` says of whom.
    """

    def __init__(self, membership: Membership, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self._membership = membership
        self._retry_seconds = retry_seconds
        self._missed: OrderedDict[str, set[BlockHash] | None] = OrderedDict()  # None: all blocks
        self._task: asyncio.Task[None] | None = None

    @property
    def missed(self) -> Collection[str]:
        """The workers that have missed a removal, by id, or by URL where that is not known."""
        return self._missed.keys()

    @property
    def workers(self) -> Sequence[Worker]:
        """The workers that have, or may have, blocks of the model."""
        return [each for each in self._membership.workers if each.status is not WorkerStatus.INCOMPATIBLE]

    async def remove_prefix(self, path: Sequence[BlockHash]) -> dict[Worker, Outcome]:
        """Remove a prefix and all that goes on from it at any worker, but no block that another one shares at any."""
        found = await operate(self.workers, FindUnshared(tuple(path)))
        gone = set(path)
        shared = 0
        for outcome in found.values():
            if not isinstance(outcome, EmberError):
                unshared = set(outcome["block_hashes"])
                gone |= unshared
                shared = max(shared, sum(block_hash not in unshared for block_hash in path))
        return await self.remove(gone.difference(path[:shared]))

    async def remove(self, block_hashes: Collection[BlockHash] | None) -> dict[Worker, Outcome]:
        """Remove blocks, or with None everything, at all workers. Outcomes of `MISSED` are made up for later."""
        wanted = None if block_hashes is None else tuple(block_hashes)
        outcomes = await operate(self.workers, RemoveBlocks(wanted))
        for worker, outcome in outcomes.items():
            if isinstance(outcome, MISSED):
                self._miss(worker, wanted)
        return outcomes

    async def close(self) -> None:
        if self._missed:
            _log.warning("removals that these workers have missed are not made up for: %s", ", ".join(self._missed))
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def _miss(self, worker: Worker, block_hashes: Collection[BlockHash] | None) -> None:
        name = worker.worker_id or worker.url
        before = self._missed.pop(name, set())
        missed = None if before is None or block_hashes is None else before.union(block_hashes)
        self._missed[name] = None if missed is not None and len(missed) > MAX_BLOCKS else missed
        if len(self._missed) > MAX_WORKERS:
            forgotten, _ = self._missed.popitem(last=False)
            _log.warning("a removal that worker %s has missed is not made up for: too many others have", forgotten)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._make_up(), name="missed removals")

    async def _make_up(self) -> None:
        while self._missed:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._retry_seconds):
                    await self._membership.changed()
            back = [each for each in self._membership.up if self._missed.keys() & _names(each)]
            await asyncio.gather(*map(self._try_again, back))

    async def _try_again(self, worker: Worker) -> None:
        found = [self._missed.pop(name) for name in _names(worker) if name in self._missed]
        wanted = None if None in found else tuple(set[BlockHash]().union(*filter(None, found)))
        try:
            await worker.connection.operate(RemoveBlocks(wanted))
        except MISSED:
            self._miss(worker, wanted)
        except EmberError as error:
            _log.warning("worker %s refuses a removal that it had missed: %s", worker, error)
        else:
            _log.info("worker %s has made up for a removal that it had missed", worker)


def _names(worker: Worker) -> set[str]:
    """What a removal that it has missed may be remembered by: its id may not have been known then."""
    return {worker.worker_id, worker.url}

"""Removals from the caches of all workers of a gateway. A worker that misses one gets it again when it is up."""

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from emberkv.cluster.cache_operations import CacheOperation, RemoveBlocks, find_unshared
from emberkv.cluster.membership import Membership
from emberkv.cluster.workers import Worker, WorkerStatus
from emberkv.core.hashing import BlockHash
from emberkv.errors import ClusterError, ConfigError, EmberError, EngineStoppedError, WorkerUnreachableError
from emberkv.files import read_own_file, remove_leftovers, replace_file
from emberkv.serving.cache.service import PrefixPath
from emberkv.serving.errors import NotReadyError

_log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
"""Seconds between two attempts to repeat missed removals."""

MAX_WORKERS = 1000
"""Workers whose missed removals are remembered. Beyond that, the worker whose last miss is oldest is dropped."""

MAX_BLOCKS = 100_000
"""Missed blocks that are remembered for one worker. Beyond that, all of its blocks are removed."""

MISSED = (ClusterError, EngineStoppedError, NotReadyError)
"""Errors after which a worker may come back with the blocks that should have been removed."""

WorkerAnswer = Mapping[str, Any] | EmberError
"""A worker's answer, or the error."""


async def operate(workers: Sequence[Worker], operation: CacheOperation) -> dict[Worker, WorkerAnswer]:
    """Send an operation to workers in parallel. A worker that is down or silent gets WorkerUnreachableError at once."""

    async def ask(worker: Worker) -> WorkerAnswer:
        if worker.status in (WorkerStatus.DOWN, WorkerStatus.SILENT):
            return WorkerUnreachableError(f"it is {worker.status}: {worker.detail}")
        try:
            return await worker.connection.operate(operation)
        except EmberError as error:
            return error

    return dict(zip(workers, await asyncio.gather(*map(ask, workers)), strict=True))


class ClusterRemovals:
    """Removals at all workers of ``membership``. All methods are called from its event loop.

    Missed removals are kept by the worker's id, and repeated when the worker is up again. retry_seconds: between two
    attempts. path: a file that keeps them over a restart; None: they are kept in memory alone.

    Raises ConfigError for a file that cannot be read or written, or is no such file.
    """

    def __init__(
        self, membership: Membership, *, path: Path | None = None, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        self._membership = membership
        self._retry_seconds = retry_seconds
        self._path = path
        self._missed: OrderedDict[str, set[BlockHash] | None] = OrderedDict()  # None: all blocks
        self._task: asyncio.Task[None] | None = None
        if path is not None:
            try:
                self._missed.update(_read(path))
                self._save()
            except OSError as error:
                raise ConfigError(f"--missed-removals {path} cannot be used: {error.strerror}") from error

    def start(self) -> None:
        """Begin to repeat the removals that the file had; from the event loop."""
        if self._missed:
            self._repeat()

    @property
    def missed(self) -> Collection[str]:
        """The workers that have missed a removal: their ids, or their URLs if the id is not known."""
        return self._missed.keys()

    @property
    def workers(self) -> Sequence[Worker]:
        """The workers that may have blocks of the model."""
        return [each for each in self._membership.workers if each.status is not WorkerStatus.INCOMPATIBLE]

    async def remove_prefix(self, path: PrefixPath) -> dict[Worker, WorkerAnswer]:
        """Remove a prefix and its continuations at all workers, except blocks another prefix shares at any worker."""
        found = await operate(self.workers, find_unshared(path))
        gone = set(path.block_hashes)
        shared = 0
        for outcome in found.values():
            if not isinstance(outcome, EmberError):
                unshared = set(outcome["block_hashes"])
                gone |= unshared
                shared = max(shared, sum(block_hash not in unshared for block_hash in path.block_hashes))
        gone -= set(path.block_hashes[:shared])
        return await self.remove(gone.union(path.removed_with(shared)))

    async def remove(self, block_hashes: Collection[BlockHash] | None) -> dict[Worker, WorkerAnswer]:
        """Remove blocks at all workers; None: all blocks. After an error of `MISSED`, the removal is repeated later."""
        wanted = None if block_hashes is None else tuple(block_hashes)
        outcomes = await operate(self.workers, RemoveBlocks(wanted))
        self._miss([worker for worker, outcome in outcomes.items() if isinstance(outcome, MISSED)], wanted)
        return outcomes

    async def close(self) -> None:
        """Stop repeating missed removals, and log the workers that still need one."""
        if self._missed and self._path is None:
            _log.warning("these workers have missed removals that will not be repeated: %s", ", ".join(self._missed))
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def _miss(self, workers: Sequence[Worker], block_hashes: Collection[BlockHash] | None) -> None:
        """Keep a removal for workers that have missed it. The file, which has all of them, is written once."""
        for worker in workers:
            self._remember(worker.worker_id or worker.url, block_hashes)
        if workers:
            self._try_save()
            self._repeat()

    def _remember(self, name: str, block_hashes: Collection[BlockHash] | None) -> None:
        before = self._missed.pop(name, set())
        missed = None if before is None or block_hashes is None else before.union(block_hashes)
        self._missed[name] = None if missed is not None and len(missed) > MAX_BLOCKS else missed
        if len(self._missed) > MAX_WORKERS:
            forgotten, _ = self._missed.popitem(last=False)
            _log.warning("a removal that worker %s has missed will not be repeated: too many others have", forgotten)

    def _repeat(self) -> None:
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
            self._miss([worker], wanted)
        except EmberError as error:
            _log.warning("worker %s refuses a repeated removal: %s", worker, error)
            self._try_save()
        else:
            _log.info("worker %s has repeated the removals that it had missed", worker)
            self._try_save()

    def _try_save(self) -> None:
        try:
            self._save()
        except OSError as error:
            _log.error("missed removals cannot be written to %s: %s", self._path, error.strerror)

    def _save(self) -> None:
        if self._path is None:
            return
        missed = {
            name: None if hashes is None else sorted(each.hex() for each in hashes)
            for name, hashes in self._missed.items()
        }
        replace_file(self._path, msgspec.json.encode(missed))


def _read(path: Path) -> dict[str, set[BlockHash] | None]:
    """The missed removals in a file; none if there is no such file."""
    remove_leftovers(path.parent, re.escape(path.name))
    if not path.exists():
        return {}
    try:
        kept = msgspec.json.decode(read_own_file(path), type=dict[str, list[str] | None])
        return {
            name: None if hashes is None else {BlockHash(bytes.fromhex(each)) for each in hashes}
            for name, hashes in kept.items()
        }
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(
            f"--missed-removals {path} is not a file of missed removals: {error}; delete it, and remove again what was "
            "removed while a worker was away"
        ) from error


def _names(worker: Worker) -> set[str]:
    """The keys under which a worker's missed removals may be kept. Its id may have been unknown at that time."""
    return {worker.worker_id, worker.url}

"""What is in stores that workers share and that no snapshot lists, such as a Redis server: read through a worker."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from emberkv.cluster.block_index import BlockIndex
from emberkv.cluster.workers import Worker, WorkerStatus
from emberkv.errors import EmberError

_log = logging.getLogger(__name__)

_Store = tuple[str, bytes]
"""The tier's name and the store's id: what `BlockIndex.share` knows a shared tier by."""


class SharedStores:
    """Keeps an index as recent as the stores that its workers share: reads each once when a worker with that store is
    met, and again when events were missed that may have reported it. Between these, the workers' events say what
    changes. Belongs to one event loop.

    One task reads a store, whichever worker is asked for its parts. It goes on with another worker where one fails, and
    ends when it has read all, or when no worker has the store any more.

    workers: all of the gateway's. pause: what to wait for after no worker has answered.
    """

    def __init__(
        self, index: BlockIndex, workers: Callable[[], Iterable[Worker]], pause: Callable[[], Awaitable[None]]
    ) -> None:
        self._index = index
        self._workers = workers
        self._pause = pause
        self._known: set[_Store] = set()  # that were read, or are to be
        self._due: set[_Store] = set()  # to be read from the beginning
        self._outdated: set[_Store] = set()  # of these, where what is known may be wrong
        self._tasks: dict[_Store, asyncio.Task[None]] = {}

    def update(self) -> None:
        """A worker's stores have changed: read those that are new, and forget those that no worker has any more."""
        held = {store for worker in self._workers() for store in _stores(worker)}
        for store in self._known - held:
            self._due.discard(store)
            self._outdated.discard(store)
            if (task := self._tasks.pop(store, None)) is not None:
                task.cancel()
        new = held - self._known
        self._known = held
        self._read(new)

    def read_again(self, worker: Worker) -> None:
        """Events of this worker are not known, and may have reported changes in its stores."""
        self._read(self._known.intersection(_stores(worker)))

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()

    def _read(self, stores: Iterable[_Store]) -> None:
        for store in stores:
            self._due.add(store)
            self._outdated.add(store)
            if store not in self._tasks:
                self._tasks[store] = asyncio.create_task(self._follow(store), name=f"read the {store[0]} tier")

    async def _follow(self, store: _Store) -> None:
        try:
            await self._read_until_complete(store)
        finally:
            if self._tasks.get(store) is asyncio.current_task():
                del self._tasks[store]

    async def _read_until_complete(self, store: _Store) -> None:
        failed: set[Worker] = set()  # since the last pause
        while store in self._due:
            members = [each for each in self._workers() if store in _stores(each) and each.status is WorkerStatus.UP]
            others = [each for each in members if each not in failed]
            if not others:
                failed.clear()
                await self._pause()
                continue
            worker = others[0]
            self._due.discard(store)
            try:
                if await self._scan(store, worker):
                    continue
            except EmberError as error:
                _log.warning("worker %s does not say what its %s tier has: %s", worker, store[0], error)
            except Exception:  # noqa: BLE001 - a fault in what one worker sent must not end that the store is read
                _log.exception("reading the %s tier through worker %s failed", store[0], worker)
            self._due.add(store)
            failed.add(worker)

    async def _scan(self, store: _Store, worker: Worker) -> bool:
        """Whether all was read. What was known before may be wrong, so that it is forgotten first, and only once: no
        event that comes meanwhile, or between two attempts, is forgotten with it.
        """
        tier, slot = store[0], worker.slot
        assert slot is not None, "a worker without a slot has no stores"
        if store in self._outdated:
            self._outdated.discard(store)
            self._index.clear(slot, tier)
        cursor: int | None = 0
        while cursor is not None:
            some = await worker.connection.stored(tier, cursor)
            if worker.slot != slot or store not in _stores(worker):
                return False
            self._index.add(slot, some.block_hashes, tier)
            cursor = some.next_cursor
        return True


def _stores(worker: Worker) -> list[_Store]:
    """The stores of a worker that are read here; none of one that has no place in the index."""
    if worker.slot is None or worker.description is None:
        return []
    tiers = worker.description.shared_tiers.items()
    return [(name, tier.store_id) for name, tier in tiers if tier.is_scanned and not tier.is_listed]

"""The workers of a gateway: which there are, what they serve, what each has cached, and what each has to do."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import aclosing, suppress
from typing import TypeVar

from emberkv.cluster.feed import FeedReader, NeedChunk, NeedEvents, ReplicaBlocks
from emberkv.cluster.routing import Decision, ReplicaState, Router, RoutingRequest
from emberkv.cluster.shared_stores import SharedStores
from emberkv.cluster.wire import LoadReport, WorkerDescription
from emberkv.cluster.workers import RoutedWorker, Worker, WorkerConnection, WorkerStatus
from emberkv.core.events import Event
from emberkv.core.feed import SnapshotChunk
from emberkv.errors import EmberError, RequestError, WireError, WorkerLostError, WorkerTimeoutError
from emberkv.serving.errors import ModelNotLoadedError, NotReadyError

_log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
"""Between two attempts to reach a worker."""

FORGET_SECONDS = 60.0
"""How long a worker that registered itself stays listed after it was last heard of."""

AnyWorker = TypeVar("AnyWorker", bound=RoutedWorker)
NOT_THERE = ReplicaState(up=False)


class Membership:
    """Follows workers: those that it is given, which it tries to reach for ever, and those that register themselves.
    Belongs to one event loop.

    connect: makes the connection to a URL. on_model: is awaited with the first worker that serves a model, before any
    worker is up. on_change: is called when the status of a worker has changed. clock: monotonic seconds.

        membership = Membership(make_router(DEFAULT_ROUTING, Random()), lambda url: WorkerClient(url, secret))
        membership.add("http://127.0.0.1:8081")
        ...
        await membership.close()
    """

    def __init__(
        self,
        router: Router,
        connect: Callable[[str], WorkerConnection],
        *,
        on_model: Callable[[Worker, WorkerDescription], Awaitable[None]],
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.router = router
        self._connect = connect
        self._on_model = on_model
        self._on_change = on_change
        self._clock = clock
        self._workers: dict[str, Worker] = {}  # by URL
        self._model: WorkerDescription | None = None
        self._model_lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._woken: set[Worker] = set()  # by `wake_idle`, and not up since
        self._closing: set[asyncio.Task[None]] = set()
        index = router.index
        self._stores = None if index is None else SharedStores(index, lambda: self.workers, self._pause)

    @property
    def model(self) -> WorkerDescription | None:
        """What the workers serve; None before one was reached."""
        return self._model

    @property
    def workers(self) -> Sequence[Worker]:
        return tuple(self._workers.values())

    @property
    def up(self) -> Sequence[Worker]:
        """The workers that get requests."""
        return [worker for worker in self._workers.values() if worker.status is WorkerStatus.UP]

    def named(self, worker_id: str) -> Worker | None:
        return next((worker for worker in self._workers.values() if worker.worker_id == worker_id), None)

    def silent_seconds(self, worker: RoutedWorker) -> float | None:
        """Since it last sent anything; None: it never has."""
        return None if worker.heard is None else max(0.0, self._clock() - worker.heard)

    def add(self, url: str) -> Worker:
        """Follow the worker at ``url``, from now on and for ever."""
        url = url.rstrip("/")
        if url not in self._workers:
            self._begin(Worker(url, self._connect(url)))
        return self._workers[url]

    def register(self, worker_id: str, url: str) -> None:
        """A worker says where it listens, again and again. One that has moved is followed at its new address.

        Raises RequestError while another worker of that id is up: each needs an id of its own.
        """
        url = url.rstrip("/")
        before = self.named(worker_id)
        if before is not None and before.url != url:
            if before.status is WorkerStatus.UP:
                raise RequestError(
                    f"worker_id {worker_id!r} is that of the worker at {before.url}, which is up; give the one at "
                    f"{url} another --worker-id",
                    param="worker_id",
                )
            _log.info("worker %s has moved to %s", before, url)
            self._remove(before)
        if url not in self._workers:
            self._begin(Worker(url, self._connect(url), worker_id))
        self._workers[url].registered = self._clock()
        self._workers[url].is_leaving = False

    def deregister(self, worker_id: str, url: str | None = None) -> bool:
        """A worker is about to stop: it gets no more requests, and may finish those that it has. False: it is not
        known. url: where it listens; None: wherever the worker of that id does.
        """
        worker = self.named(worker_id)
        if worker is None or (url is not None and worker.url != url.rstrip("/")):
            return False
        worker.is_leaving = True
        self.set_status(worker, WorkerStatus.DRAINING, "it has deregistered")
        return True

    def suspect(self, worker: Worker, error: EmberError) -> None:
        """A request has failed at a worker, so that it gets no more before it reports again; unless its message was not
        understood, on either side, which says nothing about other requests.
        """
        if worker.status is not WorkerStatus.UP or isinstance(error, WireError):
            return
        match error:
            case WorkerTimeoutError():
                self.set_status(worker, WorkerStatus.SILENT, str(error))
            case NotReadyError():
                self.set_status(worker, WorkerStatus.DRAINING, str(error))
            case _:
                self.set_status(worker, WorkerStatus.DOWN, str(error))

    def decide(
        self, request: RoutingRequest, without: Collection[Worker] = (), *, only_asks: bool = False
    ) -> tuple[Worker, Decision] | None:
        """Where a request goes, other than to ``without``; None while there is no such worker. only_asks: there is no
        such request, so that it does not count for those that follow.
        """
        candidates = [worker for worker in self._workers.values() if worker not in without]
        return self.choose(request, candidates, lambda _: not only_asks)

    def choose(
        self,
        request: RoutingRequest,
        candidates: Iterable[AnyWorker],
        counts: Callable[[AnyWorker], bool] = lambda _: True,
    ) -> tuple[AnyWorker, Decision] | None:
        """Which of these a request goes to. counts: whether it does so now, if it is this one."""
        by_slot = {each.slot: each for each in candidates if each.slot is not None}
        states = [by_slot[slot].state() if slot in by_slot else NOT_THERE for slot in range(self.router.slots)]
        decision = self.router.decide(request, states, lambda made: counts(by_slot[made.replica]))
        return None if decision is None else (by_slot[decision.replica], decision)

    async def wake_idle(self) -> None:
        """Where no worker is up, have those that are idle load their models, and wait until one is up or none loads."""
        for _ in range(2):  # an answer that was on its way may call a worker idle once more
            if self.up:
                return
            idle = [worker for worker in self._workers.values() if worker.status is WorkerStatus.IDLE]
            await asyncio.gather(*map(self._wake, idle))
            while not self.up and any(worker.status is WorkerStatus.STARTING for worker in self._woken):
                await self.changed()
            self._woken = {worker for worker in self._woken if worker.status is WorkerStatus.STARTING}

    async def _wake(self, worker: Worker) -> None:
        try:
            await worker.connection.wake()
        except EmberError as error:
            _log.warning("worker %s does not load its model: %s", worker, error)
        else:
            self._woken.add(worker)
            self.set_status(worker, WorkerStatus.STARTING, "it is loading its model")

    async def changed(self) -> None:
        """Wait until the status of any worker changes."""
        await self._changed.wait()

    async def close(self) -> None:
        for worker in self.workers:
            self._remove(worker)
        if self._stores is not None:
            self._stores.close()
        await asyncio.gather(*self._closing)

    def _begin(self, worker: Worker) -> None:
        self._workers[worker.url] = worker
        worker.follower = asyncio.create_task(self._follow(worker), name=f"follow {worker.url}")

    def _remove(self, worker: Worker) -> None:
        del self._workers[worker.url]
        self.set_status(worker, WorkerStatus.DOWN, "it is not followed any more")
        self._leave(worker)
        closing = asyncio.create_task(_close(worker))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _leave(self, worker: Worker) -> None:
        if worker.slot is not None:
            self.router.leave(worker.slot)
            worker.slot = worker.reader = None
            self._update_stores()

    def _update_stores(self) -> None:
        if self._stores is not None:
            self._stores.update()

    def _read_stores_again(self, worker: Worker) -> None:
        if self._stores is not None:
            self._stores.read_again(worker)

    async def _pause(self) -> None:
        """Until the status of a worker changes, or for a while."""
        with suppress(TimeoutError):
            async with asyncio.timeout(RETRY_SECONDS):
                await self.changed()

    def set_status(self, worker: RoutedWorker, status: WorkerStatus, detail: str) -> None:
        """For those that follow workers."""
        worker.detail = detail
        if worker.status is status:
            return
        level = logging.INFO if status in (WorkerStatus.UP, WorkerStatus.DRAINING) else logging.WARNING
        _log.log(level, "worker %s is %s%s", worker, status, f": {detail}" if detail else "")
        worker.status = status
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._on_change()

    async def _follow(self, worker: Worker) -> None:
        """Meet the worker and listen to it, again whenever that ends."""
        while not self._is_forgotten(worker):
            try:
                if await self._meet(worker):
                    await self._listen(worker)
            except _EventsEndedError as error:
                if error.has_reported:  # it may have unloaded its model: `_meet` reads its new state
                    continue
                self.set_status(worker, WorkerStatus.DOWN, str(error))
            except ModelNotLoadedError as error:
                self.set_status(worker, WorkerStatus.IDLE, str(error))
            except NotReadyError as error:
                self.set_status(worker, WorkerStatus.STARTING, str(error))
            except WorkerTimeoutError as error:
                self.set_status(worker, WorkerStatus.SILENT, str(error))
            except EmberError as error:
                self.set_status(worker, WorkerStatus.DOWN, str(error))
            except Exception:  # noqa: BLE001 - a fault in what one worker sent must not end that it is followed
                _log.exception("following worker %s failed", worker)
                self.set_status(worker, WorkerStatus.DOWN, "the gateway failed to follow it; see its log")
            await asyncio.sleep(RETRY_SECONDS)
        self._remove(worker)

    def _is_forgotten(self, worker: Worker) -> bool:
        """Whether the worker once registered, and has neither done so nor sent anything for long."""
        if worker.registered is None:
            return False
        return self._clock() - max(worker.registered, worker.heard or 0.0) > FORGET_SECONDS

    async def _meet(self, worker: Worker) -> bool:
        """Ask what it serves; whether that is what the others serve."""
        before, shared_before = worker.description, worker.shared
        description = await worker.connection.worker()
        worker.heard = self._clock()
        if before is None or before.epoch != description.epoch:  # one that leaves goes on to leave until it has ended
            worker.is_leaving = False
        async with self._model_lock:
            if self._model is None:
                await self._on_model(worker, description)
                self._model = description
        fault = self._fault(worker, description)
        if fault is not None:
            self._leave(worker)
            worker.worker_id, worker.description = description.worker_id, description
            self.set_status(worker, WorkerStatus.INCOMPATIBLE, fault)
            return False
        if worker.slot is not None and worker.worker_id != description.worker_id:
            self._leave(worker)
        worker.worker_id, worker.description = description.worker_id, description
        if worker.slot is None:
            worker.slot = self.router.join(worker.worker_id)
            index = self.router.index
            blocks = (
                _NoIndex()
                if index is None
                else ReplicaBlocks(
                    index,
                    worker.slot,
                    unkept=lambda: self._unkept(worker),
                    listed=lambda: worker.listed_tiers,
                    on_snapshot=lambda: self._read_stores_again(worker),
                )
            )
            worker.reader = FeedReader(blocks)
        assert worker.reader is not None, "a worker with a slot has a reader"
        if self.router.index is not None:
            self.router.index.share(worker.slot, worker.shared)
        self._update_stores()
        if before is not None and (before.epoch != description.epoch or worker.shared != shared_before):
            # The last events of a process that has ended may not have come, and what a worker has stored before it
            # shared the store counted for it alone.
            self._read_stores_again(worker)
        # Of a store that is neither listed nor read, events alone tell; without an index, nothing comes of a snapshot.
        unread = any(not (tier.is_listed or tier.is_scanned) for tier in description.shared_tiers.values())
        worker.reader.begin(description.epoch, 0 if self.router.index is None or unread else description.sequence)
        return True

    def _unkept(self, worker: Worker) -> list[str]:
        """The shared tiers that no other worker that is up has: shared memory, say, may have gone with the last of its
        processes. A server that lists no blocks keeps them by itself.
        """
        kept = self.shared_with_others(worker)
        return [tier for tier in worker.listed_tiers if tier not in kept]

    def shared_with_others(self, worker: Worker) -> list[str]:
        """The names of its tiers that another worker that is up has, too."""
        theirs = {
            shared
            for other in self._workers.values()
            if other is not worker and other.status in (WorkerStatus.UP, WorkerStatus.DRAINING)
            for shared in other.shared.items()
        }
        return [tier for tier, store_id in worker.shared.items() if (tier, store_id) in theirs]

    def _fault(self, worker: Worker, description: WorkerDescription) -> str | None:
        """Why a worker cannot stand for the others; None: it can."""
        model = self._model
        assert model is not None, "a worker is met first"
        if description.fingerprint != model.fingerprint:
            return f"it serves {description.names[0]!r}, whose weights are not those of {model.names[0]!r} served here"
        if description.block_size != model.block_size:
            return f"its blocks have {description.block_size} tokens, those of the other workers {model.block_size}"
        for other in self._workers.values():
            if other is not worker and other.slot is not None and other.worker_id == description.worker_id:
                return f"the worker at {other.url} has the same id, {other.worker_id!r}"
        return None

    async def _listen(self, worker: Worker) -> None:
        """Take in events and reports, and ask beside them for what is missing, until the worker is to be met again:
        events are missing in between, or it shares other tiers than before. Raises _EventsEndedError when the worker
        ends them.
        """
        reader, has_reported = worker.reader, False
        assert reader is not None, "a worker is met first"
        is_missing = asyncio.Event()
        mending = asyncio.create_task(_mend(worker.connection, reader, is_missing))
        try:
            after = reader.sequence
            async with aclosing(worker.connection.events(after)) as messages:
                async for message in messages:
                    if mending.done():
                        mending.result()  # raises what has ended it; a worker reports at least every second
                    worker.heard = self._clock()
                    if isinstance(message, LoadReport):
                        self._take_report(worker, message)
                        has_reported = True
                        if not worker.shares_as(message):
                            return
                        continue
                    reader.take(message)
                    match reader.need():
                        case NeedChunk():
                            is_missing.set()
                        case NeedEvents():  # the stream has a gap; the next one begins behind what is known
                            return
        finally:
            mending.cancel()
        raise _EventsEndedError(f"{worker.url} has ended its events", has_reported=has_reported)

    def _take_report(self, worker: Worker, report: LoadReport) -> None:
        worker.take_report(report, self._clock())
        if report.draining or worker.is_leaving:
            self.set_status(worker, WorkerStatus.DRAINING, "it is about to stop")
        else:
            self.set_status(worker, WorkerStatus.UP, "")


class _EventsEndedError(WorkerLostError):
    """A worker has ended the stream of its events in order. has_reported: it has reported its load before."""

    def __init__(self, message: str, *, has_reported: bool) -> None:
        super().__init__(message)
        self.has_reported = has_reported


async def _close(worker: Worker) -> None:
    if worker.follower is not None and worker.follower is not asyncio.current_task():
        worker.follower.cancel()
    await worker.connection.close()


async def _mend(connection: WorkerConnection, reader: FeedReader, is_missing: asyncio.Event) -> None:
    """Read a snapshot, chunk by chunk, whenever one is needed."""
    while True:
        await is_missing.wait()
        is_missing.clear()
        try:
            while isinstance(need := reader.need(), NeedChunk):
                reader.take(await connection.snapshot(need.cursor))
        except EmberError as error:
            _log.warning("a snapshot broke off, and begins again: %s", error)
            await asyncio.sleep(RETRY_SECONDS)
            is_missing.set()


class _NoIndex:
    """For policies that do not ask what is cached."""

    def apply(self, event: Event) -> None: ...
    def merge(self, chunk: SnapshotChunk) -> None: ...
    def clear(self) -> None: ...
    def restart(self) -> None: ...

"""Asks a worker: one method for each of its internal routes."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

from emberkv import errors, event_wire
from emberkv.cluster import wire, wire_commands
from emberkv.cluster.cache_operations import CacheOperation
from emberkv.cluster.loop_clock import ClockTimeout
from emberkv.cluster.request_channel import RequestChannel
from emberkv.core.feed import CHUNK_BLOCKS, FeedMessage, SnapshotChunk
from emberkv.engine.commands import Command
from emberkv.engine.request import GenerationRequest, PrefillProgress, TokenOutput
from emberkv.serving import errors as serving_errors
from emberkv.serving.errors import UnauthorizedError

_log = logging.getLogger(__name__)

R = TypeVar("R")
T = TypeVar("T")
Body = bytes | AsyncGenerator[bytes, None]

_REFUSALS: Mapping[str, type[errors.EmberError]] = {
    kind.__name__: kind
    for kind in (
        errors.ConfigError,
        errors.DuplicateRequestError,
        errors.EngineStoppedError,
        errors.PromptTooLongError,
        errors.RequestError,
        errors.WireError,
        serving_errors.BodyTooLargeError,
        serving_errors.NotFoundError,
        serving_errors.ModelNotLoadedError,
        serving_errors.NotReadyError,
        serving_errors.OverloadedError,
        serving_errors.TooManyRequestsError,
        serving_errors.UnauthorizedError,
    )
}
"""The errors that a worker refuses by, which the client raises again as they were."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """In seconds. connect: until a connection stands. answer: until a response begins. silence: between two frames of
    a stream, heartbeats included. clock: by which answer and silence are measured, such as a `LoopClock`.
    """

    connect: float = 2.0
    answer: float = 10.0
    silence: float = 5.0
    clock: Callable[[], float] = time.monotonic


class WorkerClient:
    """Asks one worker, over kept connections. Belongs to one event loop.

    url: where the worker listens, as ``http://127.0.0.1:8080``. secret: the cluster's.

    Each method raises what the worker refuses by, as the class that it was there (PromptTooLongError,
    OverloadedError, NotReadyError ...), UnauthorizedError for a wrong secret, WorkerUnreachableError,
    WorkerTimeoutError and WorkerLostError where the worker does not answer, and WireError where it answers something
    else.

        async with WorkerClient(url, secret) as worker:
            async with aclosing(worker.generate(request)) as outputs:
                async for output in outputs:
                    ...
    """

    def __init__(self, url: str, secret: str, *, deadlines: Deadlines | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {secret}", "accept": wire.MEDIA_TYPE}
        self._deadlines = deadlines or Deadlines()
        self._http: aiohttp.ClientSession | None = None
        self._channel: RequestChannel | None = None
        self._serving: asyncio.Task[None] | None = None
        self._is_closed = False

    async def close(self) -> None:
        """Close all connections; what runs on them ends by WorkerLostError."""
        self._is_closed = True
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])
        if self._http is not None:
            await self._http.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def worker(self) -> wire.WorkerDescription:
        """What the worker serves, and how. Raises NotReadyError before its model is loaded, ModelNotLoadedError where
        that waits for `wake`.
        """
        return wire.decode(await self._ask("GET", "worker"), wire.WorkerDescription)

    async def tokenizer(self, etag: str = "") -> wire.TokenizerFiles | None:
        """The files of the model's tokenizer; None where they have this ``etag``, and so are known."""
        data = await self._ask("GET", "tokenizer", headers={"if-none-match": f'"{etag}"'} if etag else None)
        return wire.decode(data, wire.TokenizerFiles) if data else None

    async def load(self) -> wire.LoadReport:
        return wire.decode(await self._ask("GET", "load"), wire.LoadReport)

    async def snapshot(self, cursor: str = "", limit: int = CHUNK_BLOCKS) -> SnapshotChunk:
        """The chunk of a snapshot of the pool at ``cursor``; see `CacheFeed.snapshot`."""
        data = await self._ask("GET", "snapshot", query={"cursor": cursor, "limit": str(limit)})
        message = event_wire.decode(data)
        if not isinstance(message, SnapshotChunk):
            raise errors.WireError(f"{self.url} answered a {type(message).__name__} where a snapshot was asked for")
        return message

    async def stored(self, tier: str, cursor: int = 0) -> wire.StoredBlocks:
        """Some of the blocks in a tier that snapshots do not list, a server's."""
        data = await self._ask("GET", "stored", query={"tier": tier, "cursor": str(cursor)})
        return wire.decode(data, wire.StoredBlocks)

    async def events(self, after: int = 0) -> AsyncGenerator[FeedMessage | wire.LoadReport, None]:
        """The cache's events after number ``after``, as they come, and the load whenever it has changed, for as long as
        the worker lives.
        """
        async with aclosing(self._stream("GET", "events", query={"after": str(after)})) as messages:
            async for data in messages:
                yield wire.decode_event(data)

    async def generate(
        self, request: GenerationRequest, on_progress: Callable[[PrefillProgress], None] = lambda _: None
    ) -> AsyncGenerator[TokenOutput, None]:
        """The outputs of one request, of which the last has a ``finish_reason``. To close the generator before that
        aborts the request. on_progress: is called with how far the prompt is computed, now and then before the first.

        WorkerLostError, WorkerTimeoutError and EngineStoppedError may come after some outputs: the answer can be gone
        on with elsewhere, by ``answered``.
        """
        async with aclosing(self._open_channel().outcomes(request)) as outcomes:
            async for outcome in outcomes:
                if isinstance(outcome, wire.Failure):
                    raise refusal(outcome)
                if isinstance(outcome, PrefillProgress):
                    on_progress(outcome)
                else:
                    yield outcome

    def _open_channel(self) -> RequestChannel:
        """The one that requests are sent over now; what it fails by, they do."""
        if self._is_closed:
            raise errors.WorkerLostError(f"the connections to {self.url} are closed")
        if self._channel is None or self._channel.failed is not None:
            self._channel = RequestChannel(self._deadlines.clock)
            # not in the context of the request that happens to be the first
            self._serving = asyncio.create_task(self._serve(self._channel), context=Context())
            self._serving.add_done_callback(partial(self._served, self._channel))
        return self._channel

    async def _serve(self, channel: RequestChannel) -> None:
        """Send what the channel has and give it what comes, until the connection ends."""
        frames, seconds = wire.FrameReader(), self._deadlines
        async with self._response("POST", "channel", body=channel.frames()) as response:
            while data := await self._within(seconds.silence, response.content.readany()):
                try:
                    for message in frames.feed(data):
                        channel.receive(message)
                except errors.WireError as error:
                    raise errors.WorkerLostError(f"{self.url} sent what is no message: {error}") from error
                since = channel.sending_since
                if since is not None and seconds.clock() - since > seconds.answer:
                    raise errors.WorkerTimeoutError(
                        f"{self.url} took nothing of what it was sent for {seconds.answer:g} s"
                    )
        raise errors.WorkerLostError(f"{self.url} ended the connection")

    def _served(self, channel: RequestChannel, serving: "asyncio.Task[None]") -> None:
        error = None if serving.cancelled() else serving.exception()
        if error is not None and not isinstance(error, errors.EmberError):
            _log.error("the connection to %s failed", self.url, exc_info=error)
        ended = errors.WorkerLostError(f"the connection to {self.url} has ended")
        channel.end(error if isinstance(error, errors.EmberError) else ended)

    async def execute(self, command: Command[R]) -> R:
        """Have one of the engine's commands carried out; those that read events, a snapshot or the load have methods of
        their own.

            records = [each for each in await one.execute(ExportBlocks(chain.block_hashes)) if each is not None]
            checkpoint = await one.execute(ExportCheckpoint(chain, len(records)))
            await other.execute(ImportBlocks(chain, records if checkpoint is None else [*records, checkpoint]))
        """
        return wire_commands.decode_answer(
            await self._ask("POST", "command", body=wire_commands.encode_command(command)), command
        )

    async def explain(self, prompt_token_ids: Sequence[int], *, tenant: str = "", salt: bytes = b"") -> dict[str, Any]:
        """What the prompt would hit on this worker, and why not more: as ``/v1/cache/explain`` answers it."""
        body = wire.encode(wire.TenantPrompt(prompt=wire.encode_prompt(prompt_token_ids), salt=salt, tenant=tenant))
        return wire.decode(await self._ask("POST", "explain", body=body), dict[str, Any])

    async def wake(self) -> None:
        """Have the worker begin to load its model, where it does that on demand."""
        await self._ask("POST", "wake")

    async def operate(self, operation: CacheOperation) -> dict[str, Any]:
        """What the worker's cache service answers to an operation of `emberkv.cluster.cache_operations`."""
        return wire.decode(await self._ask("POST", "operate", body=wire.encode(operation)), dict[str, Any])

    async def _ask(
        self,
        method: str,
        route: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> bytes:
        """The body of a whole answer; empty for one that is known."""
        async with self._response(method, route, query=query, headers=headers, body=body) as response:
            return await self._within(self._deadlines.answer, response.read())

    async def _stream(
        self, method: str, route: str, *, query: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The messages of a stream until the worker ends it."""
        frames = wire.FrameReader()
        async with self._response(method, route, query=query, body=body) as response:
            while data := await self._within(self._deadlines.silence, response.content.readany()):
                for message in frames.feed(data):
                    yield message
        if not frames.is_between_frames:
            raise errors.WorkerLostError(f"{self.url} ended a stream within a message")

    @asynccontextmanager
    async def _response(
        self,
        method: str,
        route: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        """An answer that is no refusal. Leaving before its end closes the connection, by which the worker aborts the
        request.
        """
        sent = {**self._headers, **(headers or {}), **({"content-type": wire.MEDIA_TYPE} if body is not None else {})}
        asked = self._session().request(
            method, f"{self.url}{wire.PREFIX}/{route}", params=query, headers=sent, data=body, allow_redirects=False
        )
        response = await self._within(self._deadlines.answer, asked)
        async with response:
            if response.status >= 400:
                data = await self._within(self._deadlines.answer, response.read())
                raise self._refused(response.status, data)
            yield response

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._deadlines.connect)
            # one connection a stream; how many streams there may be is limited before they come here
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=timeout,
                trust_env=False,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._http

    async def _within(self, seconds: float, answer: Awaitable[T]) -> T:
        return await within(self.url, self._deadlines, seconds, answer)

    def _refused(self, status: int, data: bytes) -> errors.EmberError:
        if status == 401:
            return UnauthorizedError(f"{self.url} refuses the cluster's secret; give all parts the same one")
        try:
            return refusal(wire.decode(data, wire.Failure))
        except errors.WireError:
            if status >= 500:
                return errors.WorkerLostError(f"{self.url} failed with status {status}")
            return errors.WireError(
                f"{self.url} answered with status {status} and not as a worker does; it must be started with a "
                "cluster secret, and be of this version"
            )


async def within(url: str, deadlines: Deadlines, seconds: float | None, answer: Awaitable[T]) -> T:
    """What is awaited of the server at ``url``; None: however long it takes.

    Raises WorkerUnreachableError, WorkerTimeoutError or WorkerLostError where it does not come.
    """
    try:
        async with ClockTimeout(seconds, deadlines.clock):
            return await answer
    except aiohttp.ClientConnectorError as error:
        raise errors.WorkerUnreachableError(f"{url} cannot be reached: {error.strerror}") from error
    except aiohttp.ConnectionTimeoutError as error:
        raise errors.WorkerUnreachableError(
            f"{url} cannot be reached: no connection within {deadlines.connect:g} s"
        ) from error
    except TimeoutError as error:
        raise errors.WorkerTimeoutError(f"{url} sent nothing for {seconds or 0:g} s") from error
    except aiohttp.ClientError as error:
        raise errors.WorkerLostError(
            f"the connection to {url} ended before the answer: {errors.reason_of(error)}"
        ) from error


def refusal(failure: wire.Failure) -> errors.EmberError:
    """The error that a worker refused by. retry_after: of an overloaded worker, seconds after which to ask again."""
    kind = _REFUSALS.get(failure.kind, serving_errors.GenerationFailedError)
    if issubclass(kind, errors.RequestError):
        return kind(failure.message, param=failure.param)
    if issubclass(kind, serving_errors.OverloadedError):
        return kind(failure.message, retry_after=failure.retry_after)
    return kind(failure.message)

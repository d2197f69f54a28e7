"""An HTTP client for one server with the OpenAI API."""

from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import aiohttp
import msgspec

from emberkv.cluster.worker_client import Deadlines, within
from emberkv.errors import WireError, WorkerLostError
from emberkv.serving.errors import NotReadyError

T = TypeVar("T")

FORWARDED = frozenset({"accept", "accept-language", "content-type", "traceparent", "tracestate", "user-agent"})
"""Request headers that are forwarded, in addition to those that begin with ``x-``."""

NOT_FORWARDED = frozenset({"x-api-key", "x-real-ip"})


class ForeignClient:
    """A client of one server, with persistent connections. All methods are called from one event loop.

    A request on a connection that was kept from an earlier one is sent again once if the connection ends before the
    response begins: servers close such connections at any time, which says nothing about the request.

    url: without ``/v1``. key: sent as ``Authorization: Bearer KEY``. forwards_keys: whether clients' own keys are
    forwarded if there is no ``key``.

    Each method raises WorkerUnreachableError, WorkerTimeoutError or WorkerLostError if the server does not answer.
    """

    def __init__(
        self, url: str, *, key: str | None = None, forwards_keys: bool = False, deadlines: Deadlines | None = None
    ) -> None:
        self.url = url
        self._own = {"authorization": f"Bearer {key}"} if key else {}
        self._forwards_keys = forwards_keys and not key
        self._deadlines = deadlines or Deadlines()
        self._http: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close all connections, which ends the requests on them."""
        if self._http is not None:
            await self._http.close()

    async def health(self) -> int:
        """The status of ``GET /health``."""
        async with self._response("GET", "/health", self._own, None, self._deadlines.answer) as response:
            return response.status

    async def models(self) -> list[dict[str, Any]]:
        """The model cards of ``GET /v1/models``. Raises NotReadyError for status 503, and WireError for any
        other invalid answer.
        """
        seconds = self._deadlines.answer
        async with self._response("GET", "/v1/models", self._own, None, seconds) as response:
            data = await self._within(seconds, response.read())
            if response.status == 503:
                raise NotReadyError("it is loading its model")
            if response.status != 200:
                raise WireError(f"{self.url}/v1/models answers with status {response.status}")
        try:
            return msgspec.json.decode(data, type=_Models).data
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WireError(f"{self.url}/v1/models lists no models: {error}") from error

    @asynccontextmanager
    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        """Send a client's request, without a deadline, and yield the response. On exit, the connection is closed unless
        the body was read to its end.
        """
        kept = {
            name: value
            for name, value in headers.items()
            if name in FORWARDED or (name.startswith("x-") and name not in NOT_FORWARDED)
            or (self._forwards_keys and name in ("authorization", "x-api-key"))
        }  # fmt: skip
        async with self._response("POST", path, {**kept, **self._own}, body, None) as response:
            yield response

    async def read(self, response: aiohttp.ClientResponse) -> bytes:
        """The next bytes of a response's body; empty at its end."""
        return await self._within(None, response.content.readany())

    async def read_all(self, response: aiohttp.ClientResponse) -> bytes:
        """The whole body of a response."""
        return await self._within(None, response.read())

    @asynccontextmanager
    async def _response(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, seconds: float | None
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        kept = _KeptConnection()

        def asked() -> Awaitable[aiohttp.ClientResponse]:
            return self._session().request(
                method,
                f"{self.url}{path}",
                headers={"accept-encoding": "identity", **headers},
                data=body,
                allow_redirects=False,
                trace_request_ctx=kept,
            )

        try:
            begun = await self._within(seconds, asked())
        except WorkerLostError:
            if not kept.was_used:
                raise
            begun = await self._within(seconds, asked())
        async with begun as response:
            yield response

    async def _within(self, seconds: float | None, answer: Awaitable[T]) -> T:
        return await within(self.url, self._deadlines, seconds, answer)

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._deadlines.connect)
            connector = aiohttp.TCPConnector(limit=0)
            trace = aiohttp.TraceConfig()
            trace.on_connection_reuseconn.append(_note_kept)
            self._http = aiohttp.ClientSession(
                connector=connector, timeout=timeout, trust_env=False, trace_configs=[trace]
            )
        return self._http


@dataclass(slots=True)
class _KeptConnection:
    """was_used: whether the request went out on a connection that was kept."""

    was_used: bool = False


async def _note_kept(
    _session: aiohttp.ClientSession, context: SimpleNamespace, _params: aiohttp.TraceConnectionReuseconnParams
) -> None:
    context.trace_request_ctx.was_used = True


class _Models(msgspec.Struct):
    data: list[dict[str, Any]]

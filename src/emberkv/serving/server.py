"""Runs the app, within limits of connections. The socket is bound before anything slow begins, and a shutdown ends
every answer properly.
"""

import asyncio
import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from emberkv.errors import ConfigError
from emberkv.serving.errors import HttpFailure, NotReadyError, anthropic_error, error_response, openai_error
from emberkv.serving.lifecycle import Lifecycle

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """head_bytes: of a request's first line and headers together. url_bytes, headers: of these, the URL's length and
    the number of headers. head_seconds: from a connection's beginning, or a request's first byte, to the end of its
    headers. body_seconds: from there to the end of the body, and one second more for each ``body_bytes_per_second``
    that arrived. send_seconds: how long a client may read nothing of an answer that fills the buffers. close_seconds:
    how long it may take to read the rest of what was its last response. connections: at once; beyond, the one that has
    waited longest without a request is closed for a new one.
    """

    head_bytes: int = 64 * 1024
    url_bytes: int = 8 * 1024
    headers: int = 100
    head_seconds: float = 20.0
    body_seconds: float = 30.0
    body_bytes_per_second: int = 16 * 1024
    send_seconds: float = 60.0
    close_seconds: float = 5.0
    connections: int = 1024


class LimitedState(ServerState):
    """What a server's connections share."""

    def __init__(self, limits: ConnectionLimits) -> None:
        super().__init__()
        self.limits = limits

    def enforce(self, now: float) -> None:
        """Close the connections that have taken too long. Call this a few times a second."""
        for connection in tuple(self.connections):
            if isinstance(connection, LimitedProtocol):
                connection.enforce(now)

    def cut_stuck(self) -> None:
        """Cut the connections whose clients do not read what was written."""
        for connection in tuple(self.connections):
            if isinstance(connection, LimitedProtocol) and connection.flow.write_paused:
                connection.transport.abort()


class LimitedProtocol(HttpToolsProtocol):
    """One connection. A request beyond a limit is refused with 408, 414, 431 or 503, and the connection closed.

    A client that closes its sending side after a request gets its answer. A client that has gone looks the same, so
    it is sent bytes that mean nothing: the reset that they cause shows that it has gone.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(server_state, LimitedState)
        self._state = server_state
        self._limits = server_state.limits
        self._due: float | None = None  # when what the client is to send must be there
        self._stuck_since: float | None = None
        self._waiting_since = 0.0
        self._in_head = False
        self._in_body = False
        self._head_bytes = 0
        self._refusal: tuple[int, str] | None = None
        self._half_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast("asyncio.Transport", transport))  # uvloop's are no subclass of it
        self._waiting_since = self._now()
        self._await_head()
        if len(self._state.connections) > self._limits.connections:
            self._make_room()

    def _make_room(self) -> None:
        others = (each for each in self._state.connections if isinstance(each, LimitedProtocol) and each is not self)
        waiting = [each for each in others if each.is_waiting]
        if waiting:
            min(waiting, key=lambda each: each._waiting_since).transport.abort()
        else:
            self._refuse(503, f"the server has {self._limits.connections} connections, as many as it may; try again")

    @property
    def is_waiting(self) -> bool:
        """Whether no request is under way, beyond headers that have not ended."""
        return not self._in_body and (self.cycle is None or self.cycle.response_complete)

    def enforce(self, now: float) -> None:
        """Close the connection if its client has taken too long, or cut it if that one has gone."""
        is_stuck = self._stuck_since is not None and now - self._stuck_since > self._limits.send_seconds
        if is_stuck or (self._half_closed and self._has_reset()):
            self.transport.abort()
        elif self.transport.is_closing():
            if self._due is None:
                self._due = now + self._limits.close_seconds
            elif now > self._due:
                self.transport.abort()
        elif self._due is not None and now > self._due:
            self._too_late(now)

    def _too_late(self, now: float) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        is_awaited = self._in_body and not (is_answering and self.cycle.response_started)
        if self.pipeline or self.flow.read_paused or (is_answering and not is_awaited):
            # this server does not read on, or answers already without the rest of the body
            self._due = now + self._limits.head_seconds
        elif self._in_head or (self._in_body and is_answering):
            self._refuse(408, "the request took too long to arrive")
        else:  # there was no request, or it has been answered
            self._close()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        was_in_head = self._in_head
        if not self._in_body:
            self._await_head()
        super().data_received(data)
        if was_in_head and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.head_bytes and not self.transport.is_closing():
                self._refuse(431, self._too_large_head())

    def eof_received(self) -> Any:  # uvicorn's says None; asyncio keeps the connection open for True
        if self._in_head or self._in_body or self.is_waiting or self.scheme == "https":
            return False  # TLS cannot be closed on one side
        self._half_closed = True
        self._probe()
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck_since = self._now()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stuck_since = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self._await_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self._limits.url_bytes:
            self._refuse_head(414, f"the URL is too long; at most {self._limits.url_bytes} bytes are accepted")

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.head_bytes:
            self._refuse_head(431, self._too_large_head())
        if len(self.headers) > self._limits.headers:
            self._refuse_head(431, f"the request has too many headers; at most {self._limits.headers} are accepted")
        self._in_head, self._in_body = False, True
        self._due = self._now() + self._limits.body_seconds
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._due is not None:
            self._due += len(body) / self._limits.body_bytes_per_second
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._due = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._waiting_since = self._now()
        if self._half_closed and self.cycle.response_complete:
            self._close()
        elif self._in_body:  # refused unread: the client may take the refusal, but need not send all
            self._due = self._now() + self._limits.close_seconds

    def send_400_response(self, msg: str) -> None:
        status, message = self._refusal or (400, "the request is not valid HTTP")
        self._refuse(status, message)

    def _await_head(self) -> None:
        if self._due is None:
            self._due = self._now() + self._limits.head_seconds

    def _too_large_head(self) -> str:
        return f"the request's headers are too large; at most {self._limits.head_bytes} bytes are accepted"

    def _refuse_head(self, status: int, message: str) -> None:
        """End the parser's work, which calls `send_400_response` then."""
        self._refusal = status, message
        raise ValueError(message)

    def _refuse(self, status: int, message: str) -> None:
        """Answer and close; only close where another answer has begun."""
        _log.info("refused a connection's request with %d: %s", status, message)
        if self.cycle is None or self.cycle.response_complete or not (self.cycle.response_started or self._in_head):
            self.transport.write(self._refusal_response(status, message))
        self._close()

    def _refusal_response(self, status: int, message: str) -> bytes:
        url = getattr(self, "url", b"")
        shape = anthropic_error if url.startswith(b"/v1/messages") else openai_error
        content = json.dumps(shape(HttpFailure(status, message))).encode()
        headers = [
            *self._state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
        ]
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        return STATUS_LINE[status] + lines + b"\r\n" + content

    def _close(self) -> None:
        self.transport.close()
        self._due = self._now() + self._limits.close_seconds

    def _probe(self) -> None:
        if not self.cycle.response_started:
            if self.cycle.scope["http_version"] == "1.1":
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif self.cycle.chunked_encoding:
            self.transport.write(b"3\r\n:\n\n\r\n")  # a chunk that holds a comment of an event stream

    def _has_reset(self) -> bool:
        connection = self.transport.get_extra_info("socket")
        return connection is not None and connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    def _now(self) -> float:
        return self.loop.time()


DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8080
DEFAULT_DRAIN_SECONDS = 30.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if sys.platform != "win32" else []))
_OTHER_FILES = 256
"""Open files that are left to all but connections."""


def bind_socket(host: str = DEFAULT_HOST, port: int = DEFAULT_PORT) -> socket.socket:
    """A bound TCP socket; port 0 takes any free port. Raises ConfigError naming host and port."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; it must be from 0 (any free port) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"host is {host!r}; it must be an address of this machine ({error.strerror})") from error
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise ConfigError(_bind_problem(host, port, error)) from error
    return bound


def _bind_problem(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{host}:{port} is already in use; stop what listens there, or choose another port (0 is any free one)"
    return f"cannot listen on {host}:{port}: {error.strerror}"


def openable_connections(wanted: int) -> int:
    """How many of ``wanted`` connections this process may have open; its own limit is raised as far as it may be."""
    if sys.platform == "win32":
        return wanted
    import resource  # noqa: PLC0415 - there is none on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    needed = wanted + _OTHER_FILES
    if soft != unlimited and soft < needed:
        soft = needed if hard == unlimited else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == unlimited or soft >= needed:
        return wanted
    possible = max(1, soft - min(_OTHER_FILES, soft // 2))
    _log.warning("this process may open %d files, so that it takes %d connections, not %d", soft, possible, wanted)
    return possible


class HttpServer(uvicorn.Server):
    """Serves an app on a bound socket until SIGINT, SIGTERM, SIGHUP or ``stop``; then drains.

    New requests are refused at once, running answers have ``drain_seconds`` to finish, and what is left is
    ended with an error event. A second SIGINT ends it without waiting; other signals repeated change nothing. ``run``
    then returns, so that the caller can stop the engine. ``url`` is where the server listens.

    tls: PEM files of a certificate and its key, for HTTPS. Raises ConfigError for files that are no such pair.
    """

    def __init__(
        self,
        app: ASGIApp,
        lifecycle: Lifecycle,
        bound: socket.socket,
        *,
        drain_seconds: float = DEFAULT_DRAIN_SECONDS,
        limits: ConnectionLimits | None = None,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        certificate, key = tls or (None, None)
        config = uvicorn.Config(
            self._ended_quietly(app),
            http=LimitedProtocol,
            access_log=False,
            log_config=None,  # uvicorn's messages go where all others go
            log_level="warning",
            lifespan="off",
            timeout_keep_alive=75,  # longer than clients keep idle connections, so that they close first
            timeout_graceful_shutdown=5,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"tls_cert {certificate} and tls_key {key} cannot be used: {error}") from error
        super().__init__(config)
        self.server_state = LimitedState(limits or ConnectionLimits())
        self._has_signals = False
        self._lifecycle = lifecycle
        self._bound = bound
        self._drain_seconds = drain_seconds
        self._draining_loop: asyncio.AbstractEventLoop | None = None
        host, port = bound.getsockname()[:2]
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets or [self._bound])

    def stop(self) -> None:
        """Begin to shut down; from any thread."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._draining_loop = asyncio.get_running_loop()
        seconds = 0 if self.force_exit else self._drain_seconds
        running = self._lifecycle.tracked
        if running:
            _log.info("draining %d request%s, at most %g s", running, "s" * (running > 1), seconds)
        else:
            _log.info("stopping")
        await self._lifecycle.drain(seconds)
        self._limited_state.cut_stuck()
        await super().shutdown(sockets)

    @property
    def _limited_state(self) -> LimitedState:
        assert isinstance(self.server_state, LimitedState)
        return self.server_state

    async def on_tick(self, counter: int) -> bool:
        self._limited_state.enforce(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self, *, until_exit: bool = False) -> Generator[None, None, None]:
        """Stop on signals for as long as the context lasts, which a caller can make longer than `run` takes: a signal
        that comes while the engine stops must not end the process. SIGHUP (nohup) and SIGINT (a shell's background
        job) stay ignored where they are; SIGTERM never does, so that a supervisor can stop every server.

        until_exit: the process ends next, and does so by itself: SIGTERM and SIGHUP are ignored from then on.
        """
        # not uvicorn's own, which would raise the signals again after the shutdown and kill the caller
        if self._has_signals or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._has_signals = True
        wanted = [each for each in _SIGNALS if each == signal.SIGTERM or signal.getsignal(each) is not signal.SIG_IGN]
        before = {each: signal.signal(each, self.handle_exit) for each in wanted}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, signal.SIG_IGN if until_exit and each != signal.SIGINT else handler)
            self._has_signals = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
            if self._draining_loop is not None and not self._draining_loop.is_closed():
                self._draining_loop.call_soon_threadsafe(self._lifecycle.interrupt_answers)
        self.should_exit = True

    def _ended_quietly(self, app: ASGIApp) -> ASGIApp:
        """The app; a request that the shutdown cancels is refused, where it has no answer yet, and no error."""

        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            has_started = False

            async def noted_send(message: Message) -> None:
                nonlocal has_started
                has_started = True
                await send(message)

            try:
                await app(scope, receive, noted_send)
            except asyncio.CancelledError:
                if not self.should_exit:
                    raise
                if not has_started:
                    response = await error_response(Request(scope), NotReadyError("the server is shutting down"))
                    await response(scope, receive, send)

        return run

"""Runs the app: the socket is bound before anything slow begins, and a shutdown ends every answer properly."""

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emberkv.errors import ConfigError
from emberkv.serving.errors import NotReadyError, error_response
from emberkv.serving.http_protocol import ConnectionLimits, LimitedProtocol, LimitedState
from emberkv.serving.lifecycle import Lifecycle

_log = logging.getLogger(__name__)

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
        running = self._lifecycle.running
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

"""ASGI middleware for every HTTP request: its id, route, count and log line, and its body's size and encoding."""

import re
import zlib
from collections.abc import Callable
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emberkv.errors import RequestError
from emberkv.serving.errors import (
    CLIENT_GONE,
    REQUEST_ID_HEADERS,
    SCOPE_KEY,
    BodyTooLargeError,
    NotReadyError,
    RequestInfo,
    UnsupportedEncodingError,
)
from emberkv.serving.metrics import HttpMetrics
from emberkv.serving.request_context import log_refused, random_id

_VALID_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_KNOWN_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"))
_UNMATCHED = "unmatched"
_POLLED = ("/ready", "/internal/v1/worker")
"""Answer 503, again and again, for as long as the server is not ready, which is no failure of the request."""


class RequestScope:
    """ASGI middleware, the outermost one. clock: monotonic seconds.

    A path with a trailing slash is routed as the one without, HEAD as GET without a body, and a path that a proxy has
    left ``root_path`` in front of as the rest of it.
    """

    def __init__(self, app: ASGIApp, *, metrics: HttpMetrics, clock: Callable[[], float], root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = self._clock()
        info = RequestInfo(_request_id(Headers(scope=scope)), scope["method"], began)
        is_head = info.method == "HEAD"
        scope[SCOPE_KEY] = info  # in the server's own scope, too, which an unforeseen exception's handler is given
        routed = {
            **scope,
            "path": _routed_path(scope["path"], self._root_path),
            "method": "GET" if is_head else info.method,
        }
        status = CLIENT_GONE

        async def marked_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name in REQUEST_ID_HEADERS:
                    headers[name] = info.request_id
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(routed, receive, marked_send)
        except Exception:
            status = 500
            raise
        finally:
            self._ended(routed, info, status, self._clock() - began)

    def _ended(self, scope: Scope, info: RequestInfo, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", _UNMATCHED)
        method = info.method if info.method in _KNOWN_METHODS else "other"
        self._metrics.ended(route, method, status, seconds)
        if status >= 400 and not (status == 503 and route in _POLLED):
            log_refused(
                request_id=info.request_id,
                method=method,
                path=quote(scope["path"])[:100] if route == _UNMATCHED else route,
                status=status,
                code=info.code,
                param=info.param,
                seconds=seconds,
            )


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _VALID_ID.fullmatch(given) else f"req_{random_id()}"


def _routed_path(path: str, root_path: str) -> str:
    if path == root_path or path.startswith(f"{root_path}/"):
        path = path[len(root_path) :]
    return path.rstrip("/") or "/"


LEAST_BYTES = 16 * 2**20
BYTES_PER_TOKEN = 64
"""A token of text has some 4 bytes, and 6 to 24 where JSON escapes its characters."""

UNFINISHED_BODIES = 16

ENDLESS_BODY = "emberkv.endless_body"
"""Set in the scope of a request whose handler takes the body as messages, of which it bounds each one."""


def default_max_bytes(context_length: int) -> int:
    """The largest body by default: several times what fills a context of so many tokens."""
    return max(LEAST_BYTES, BYTES_PER_TOKEN * context_length)


class BodyLimit:
    """ASGI middleware: reading a body beyond ``max_bytes`` raises BodyTooLargeError in the handler that reads it.

    A declared Content-Length that is too large is refused at once; bytes are counted in any case. All bodies that have
    not ended may hold `UNFINISHED_BODIES` times as much; beyond, one that has more than its equal share raises
    NotReadyError.
    """

    def __init__(self, app: ASGIApp, max_bytes: Callable[[], int]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._unfinished: dict[int, int] = {}  # bytes by body
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        body = id(scope)

        async def counted_receive() -> Message:
            most = self._max_bytes()
            if declared.isdigit():
                self._check(declared.lstrip(b"0") or b"0", most)
            message = await receive()
            if scope.get(ENDLESS_BODY):
                return message
            self._count(body, len(message.get("body", b"")), most)
            if not message.get("more_body", False):
                self._forget(body)
            return message

        try:
            await self._app(scope, counted_receive, send)
        finally:
            self._forget(body)

    @staticmethod
    def _check(declared: bytes, most: int) -> None:
        """declared: decimal digits, without zeros before them."""
        if len(declared) > len(str(most)) or int(declared) > most:
            raise BodyTooLargeError(
                f"the request's body has {declared[:20].decode()}{'...' * (len(declared) > 20)} bytes or more; "
                f"at most {most} are accepted"
            )

    def _count(self, body: int, size: int, most: int) -> None:
        has = self._unfinished.get(body, 0) + size
        self._unfinished[body] = has
        self._held += size
        self._check(str(has).encode(), most)
        budget = UNFINISHED_BODIES * most
        if self._held > budget and has > budget // len(self._unfinished):
            raise NotReadyError("too many large requests arrive at once; try again")

    def _forget(self, body: int) -> None:
        self._held -= self._unfinished.pop(body, 0)


_GZIP = 16 + zlib.MAX_WBITS  # zlib's way to ask for gzip's header and checksum


class ContentDecoding:
    """ASGI middleware: reading a compressed body raises what is wrong with it in the handler that reads it.

    max_bytes: of the expanded body, so that a small body cannot fill the memory.
    """

    def __init__(self, app: ASGIApp, max_bytes: Callable[[], int]) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        encoding = Headers(scope=scope).get("content-encoding", "").strip().lower() if scope["type"] == "http" else ""
        if encoding in ("", "identity"):
            await self._app(scope, receive, send)
            return
        expander = _Expander(self._max_bytes())

        async def expanding_receive() -> Message:
            if encoding not in ("gzip", "x-gzip"):
                raise UnsupportedEncodingError(f"content-encoding is {encoding[:50]!r}; use gzip, or none")
            message = await receive()
            if message["type"] == "http.request":
                body = expander.expand(message.get("body", b""))
                if not message.get("more_body", False):
                    expander.check_complete()
                message = {**message, "body": body}
            return message

        await self._app(scope, expanding_receive, send)


class _Expander:
    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._member = zlib.decompressobj(_GZIP)

    def expand(self, data: bytes) -> bytes:
        parts: list[bytes] = []
        while data:
            if self._member.eof:  # a gzip file may be several, one after another
                self._member = zlib.decompressobj(_GZIP)
            try:
                part = self._member.decompress(data, self._left + 1)
            except zlib.error as error:
                raise RequestError("the body is not what its content-encoding says: it is no gzip") from error
            self._left -= len(part)
            if self._left < 0:
                raise BodyTooLargeError(
                    f"the request's body has more than {self._max_bytes} bytes once it is expanded; "
                    f"at most {self._max_bytes} are accepted"
                )
            parts.append(part)
            data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
        return b"".join(parts)

    def check_complete(self) -> None:
        if not self._member.eof:
            raise RequestError("the body is cut short: its gzip has no end")

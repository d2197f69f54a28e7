"""Middleware for every HTTP request: its id, the path and method that it is routed by, its count and its log line.

``X-Request-Id`` is taken from the client where it is valid, and made otherwise. Each response bears it, under
Anthropic's name ``request-id`` as well; so do error bodies and the log.
"""

import re
import uuid
from collections.abc import Callable
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emberkv.serving.errors import CLIENT_GONE, REQUEST_ID_HEADERS, SCOPE_KEY, RequestInfo
from emberkv.serving.metrics.request_metrics import HttpMetrics
from emberkv.serving.request_log import log_refused

_VALID_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_KNOWN_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"))
_UNMATCHED = "unmatched"
_POLLED = ("/ready",)  # answers 503 for as long as the server is not ready, which is no failure of the request


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
        if status >= 400 and route not in _POLLED:
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
    return given if _VALID_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


def _routed_path(path: str, root_path: str) -> str:
    if path == root_path or path.startswith(f"{root_path}/"):
        path = path[len(root_path) :]
    return path.rstrip("/") or "/"

"""Request bodies that are compressed: gzip is undone as the bytes arrive, anything else is refused with 415."""

import zlib
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emberkv.errors import RequestError
from emberkv.serving.api.failures import BodyTooLargeError, UnsupportedEncodingError

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

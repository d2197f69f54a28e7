"""Request bodies: how large they may be, counted as the bytes arrive."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emberkv.serving.api.failures import BodyTooLargeError


class BodyLimit:
    """ASGI middleware: reading a body beyond ``max_bytes`` raises BodyTooLargeError in whoever reads it.

    A declared Content-Length is believed at once; bytes are counted in any case.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received = 0
        declared = dict(scope["headers"]).get(b"content-length", b"0")

        async def counted_receive() -> Message:
            nonlocal received
            if declared.isdigit():
                self._check(int(declared))
            message = await receive()
            received += len(message.get("body", b""))
            self._check(received)
            return message

        await self._app(scope, counted_receive, send)

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise BodyTooLargeError(
                f"the request's body has {size} bytes or more; at most {self._max_bytes} are accepted"
            )

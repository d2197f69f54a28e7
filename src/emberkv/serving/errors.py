"""Every way a request can fail, and how each API words it for the client."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response

from emberkv.errors import EmberError, EngineStoppedError, PromptTooLongError, RequestError

CLIENT_GONE = 499  # the client does not read it, but a proxy's log may show it

logger = logging.getLogger(__name__)


class UnauthorizedError(RequestError):
    """The request has no API key, or a wrong one."""


class ForbiddenError(RequestError):
    """No key that the client could send would make this allowed."""


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""


class NotFoundError(RequestError):
    """What the request names is not here, or not any more, or not the asker's to see."""


class BodyTooLargeError(RequestError):
    """The request's body exceeds the server's limit."""


class UnsupportedEncodingError(RequestError):
    """The request's body is compressed in a way that is not read here."""


class NotReadyError(EmberError):
    """The model is not loaded yet, or the server is shutting down."""


class ModelNotLoadedError(NotReadyError):
    """The model is loaded on demand, and is not loaded now."""


class OverloadedError(EmberError):
    """More requests wait than the server takes on. retry_after: when to send it again, in seconds, if that is known."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooManyRequestsError(OverloadedError):
    """As many requests as are taken are being answered; fewer at a time would be accepted."""


class RateLimitedError(OverloadedError):
    """The tenant has used up its own allowance, whatever others use. kind: "requests" or "tokens"."""

    def __init__(self, message: str, *, kind: str, retry_after: float) -> None:
        super().__init__(message, retry_after=retry_after)
        self.kind = kind


class GenerationFailedError(EmberError):
    """The engine failed while it worked on a request."""


class RequestTimeoutError(EmberError):
    """The answers to a request took longer than the server lets them."""


@dataclass(frozen=True, slots=True)
class HttpFailure:
    """A failure as an HTTP status and a message, which each API puts into its own error body.

    overflow: a prompt that is too long, which each API words as its clients expect it. limited: "requests" or "tokens"
    where the tenant has reached its limit of these; "" where it has not.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    overflow: PromptTooLongError | None = None
    limited: str = ""


_KINDS: tuple[tuple[type[EmberError], int, str | None], ...] = (
    (PromptTooLongError, 400, "context_length_exceeded"),
    (UnauthorizedError, 401, "invalid_api_key"),
    (ForbiddenError, 403, "forbidden"),
    (UnknownModelError, 404, "model_not_found"),
    (NotFoundError, 404, "not_found"),
    (BodyTooLargeError, 413, "request_too_large"),
    (UnsupportedEncodingError, 415, "unsupported_encoding"),
    (RequestError, 400, None),
    (NotReadyError, 503, "not_ready"),
    (EngineStoppedError, 503, "stopped"),
    (RateLimitedError, 429, "rate_limit_exceeded"),
    (TooManyRequestsError, 429, "too_many_requests"),
    (OverloadedError, 429, "overloaded"),
    (GenerationFailedError, 500, "generation_failed"),
    (RequestTimeoutError, 504, "request_timeout"),
)  # the first match counts

_HEADERS: Mapping[int, Mapping[str, str]] = {
    429: {"retry-after": "1"},
    503: {"retry-after": "1"},
    415: {"accept-encoding": "gzip"},
}

_ANTHROPIC_STATUS = {429: 529}
"""Of an overloaded server. The API's 429 means that the client has used up its own allowance."""

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def failure_of(error: Exception) -> HttpFailure:
    """The failure that the client is sent. Of an error that is not emberkv's own, it shows no detail."""
    if isinstance(error, HTTPException):
        return HttpFailure(error.status_code, str(error.detail), headers=error.headers or {})
    for kind, status, code in _KINDS:
        if isinstance(error, kind):
            param = error.param if isinstance(error, RequestError) else None
            headers = _HEADERS.get(status, {})
            if isinstance(error, OverloadedError) and error.retry_after is not None:
                headers = {"retry-after": str(max(1, ceil(error.retry_after)))}
            overflow = error if isinstance(error, PromptTooLongError) else None
            limited = error.kind if isinstance(error, RateLimitedError) else ""
            return HttpFailure(status, str(error), code, param, headers, overflow, limited)
    return HttpFailure(500, "an internal error occurred; the server's log has the details", "internal_error")


def failure_mid_stream(error: Exception) -> HttpFailure:
    """As ``failure_of``, for an answer that has begun. The error is logged here, because no caller handles it."""
    failure = failure_of(error)
    if not isinstance(error, EmberError):
        logger.error("a streamed answer failed", exc_info=error)
    return failure


def openai_error(failure: HttpFailure) -> dict[str, Any]:
    kind = failure.limited or ("server_error" if failure.status >= 500 else "invalid_request_error")
    message = _openai_overflow(failure.overflow) if failure.overflow else failure.message
    return {"error": {"message": message, "type": kind, "param": failure.param, "code": failure.code}}


def anthropic_error(failure: HttpFailure) -> dict[str, Any]:
    default = "api_error" if failure.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if failure.limited else _ANTHROPIC_TYPES.get(anthropic_status(failure), default)
    message = _anthropic_overflow(failure.overflow) if failure.overflow else failure.message
    return {"type": "error", "error": {"type": kind, "message": message}}


def anthropic_status(failure: HttpFailure) -> int:
    """The HTTP status by which the API's clients know what to do."""
    return failure.status if failure.limited else _ANTHROPIC_STATUS.get(failure.status, failure.status)


def _openai_overflow(error: PromptTooLongError) -> str:
    """In OpenAI's words, which LiteLLM, opencode and qwen-code search for to learn that the context is full."""
    if error.prompt_tokens is None or error.limit is None:
        return str(error)
    begin = f"This model's maximum context length is {error.limit} tokens. However, "
    if error.wanted is None:
        return (
            f"{begin}your messages resulted in {error.prompt_tokens} tokens. Please reduce the length of the messages."
        )
    return (
        f"{begin}you requested {error.prompt_tokens + error.wanted} tokens ({error.prompt_tokens} in the messages, "
        f"{error.wanted} in the completion). Please reduce the length of the messages or completion."
    )


def _anthropic_overflow(error: PromptTooLongError) -> str:
    """In Anthropic's words: Claude Code compacts the conversation after the one, and asks for fewer tokens after the
    other.
    """
    if error.prompt_tokens is None or error.limit is None:
        return str(error)
    if error.wanted is None:
        return f"prompt is too long: {error.prompt_tokens} tokens > {error.limit} maximum"
    return (
        f"input length and `max_tokens` exceed context limit: {error.prompt_tokens} + {error.wanted} > {error.limit}, "
        "decrease input length or `max_tokens` and try again"
    )


def speaks_anthropic(connection: HTTPConnection) -> bool:
    """Whether the client expects the Anthropic API's shapes."""
    return connection.scope["path"].startswith("/v1/messages") or "anthropic-version" in connection.headers


async def error_response(request: Request, error: Exception) -> Response:
    """The exception handler of all routes. The error bodies of both APIs have the request's id."""
    info = request_info(request)
    path = request.scope["path"]
    if isinstance(error, HTTPException) and error.status_code == 404:
        error = HTTPException(404, f"there is no {path} here")
    if isinstance(error, HTTPException) and error.status_code == 405:
        methods = _allowed_methods(error)
        allow = {"allow": ", ".join([*methods, "OPTIONS"])}
        if info.method == "OPTIONS":
            return Response(status_code=204, headers=allow)
        error = HTTPException(405, f"{info.method} cannot be used on {path}; use {' or '.join(methods)}", allow)
    failure = failure_of(error)
    info.code, info.param = failure.code, failure.param
    is_anthropic = speaks_anthropic(request)
    body = {**(anthropic_error if is_anthropic else openai_error)(failure), "request_id": info.request_id}
    headers = {**failure.headers, **dict.fromkeys(REQUEST_ID_HEADERS, info.request_id)}
    status = anthropic_status(failure) if is_anthropic else failure.status
    return JSONResponse(body, status_code=status, headers=headers)


def _allowed_methods(error: HTTPException) -> list[str]:
    methods = (error.headers or {}).get("Allow", "").split(", ")
    return ["GET", "HEAD"] if methods == ["GET"] else methods


async def client_disconnected(_request: Request, _error: Exception) -> Response:
    """For a client that left before its request was read."""
    return Response(status_code=CLIENT_GONE)


REQUEST_ID_HEADERS = ("x-request-id", "request-id")
SCOPE_KEY = "emberkv.request"


@dataclass(slots=True)
class RequestInfo:
    """What is known about an HTTP request beside its body, from the outermost middleware to the log line at its end.

    request_id: the client's, or else the server's. method: as the client sent it. arrived: monotonic seconds of the
    app's clock. code, param: of the error that refused the request.
    """

    request_id: str
    method: str
    arrived: float
    code: str | None = None
    param: str | None = None


def request_info(connection: HTTPConnection) -> RequestInfo:
    """The info of a request that came through `RequestScope`."""
    info = connection.scope[SCOPE_KEY]
    assert isinstance(info, RequestInfo)
    return info

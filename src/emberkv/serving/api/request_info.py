"""What is known of an HTTP request besides its body, from the outermost middleware to the log line at its end."""

from dataclasses import dataclass

from starlette.requests import HTTPConnection

REQUEST_ID_HEADERS = ("x-request-id", "request-id")
SCOPE_KEY = "emberkv.request"


@dataclass(slots=True)
class RequestInfo:
    """request_id: the client's or ours. method: as the client sent it. code, param: of the error that refused it."""

    request_id: str
    method: str
    code: str | None = None
    param: str | None = None


def request_info(connection: HTTPConnection) -> RequestInfo:
    """The info of a request that came through `RequestScope`."""
    info = connection.scope[SCOPE_KEY]
    assert isinstance(info, RequestInfo)
    return info

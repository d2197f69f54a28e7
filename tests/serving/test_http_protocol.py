"""Clients that send too much, too slowly or nothing at all, by real sockets."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import pytest

from emberkv.serving.app import ServingSettings
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.server import ConnectionLimits, HttpServer
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import serving
from tests.waiting import DEADLINE, eventually

SHORT = ConnectionLimits(
    head_seconds=0.3, body_seconds=0.3, body_bytes_per_second=10**9, send_seconds=0.3, close_seconds=0.3
)
COMPLETION = b'{"model":"tiny","prompt":"a","max_tokens":2}'


def connect(server: HttpServer) -> socket.socket:
    address = urlsplit(server.url)
    assert address.port is not None
    return socket.create_connection(("127.0.0.1", address.port), timeout=DEADLINE)


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    received = b""
    with suppress(ConnectionResetError):  # the server closed before it had read all
        while piece := connection.recv(65536):
            received += piece
    return received


def exchange(server: HttpServer, sent: bytes) -> tuple[int, str]:
    """The status and the error's message of the answer to raw bytes, after which the server closes."""
    with closing(connect(server)) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent
            connection.sendall(sent)
        answer = everything(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def post(body: bytes, path: str = "/v1/completions", more: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n{more}content-length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def limited(lifecycle: Lifecycle, **limits: int) -> Iterator[HttpServer]:
    with serving(lifecycle, limits=replace(ConnectionLimits(), **limits)) as server:
        yield server


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n", 414, "the URL is too long; at most 8192 bytes are accepted"),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 101 + b"\r\n", 431, "the request has too many headers; at most 100"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", 431, "the request's headers are too large; at most"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 5_000_000, 431, "the request's headers are too large; at most 65536 bytes"),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 500_000, 431, "the request's headers are too large; at most 65536"),
        (b"\x16\x03\x01 this is TLS\r\n\r\n", 400, "the request is not valid HTTP"),
    ],
    ids=["url", "many", "long", "one-without-end", "many-without-end", "tls"],
)
def test_a_head_that_is_too_large(server: HttpServer, sent: bytes, status: int, message: str) -> None:
    answered, error_text = exchange(server, sent)
    assert (answered, error_text[: len(message)]) == (status, message)
    assert httpx.get(f"{server.url}/health", timeout=DEADLINE).status_code == 200


def test_a_head_at_the_limits_is_served(server: HttpServer) -> None:
    fields = b"".join(b"x-%d: %s\r\n" % (number, b"y" * 500) for number in range(98))
    head = b"GET /health?" + b"q" * 8000 + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + fields + b"\r\n"
    with closing(connect(server)) as connection:
        connection.sendall(head)
        assert everything(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sent", [b"", b"\r\n"], ids=["nothing", "an-empty-line"])
def test_a_client_that_asks_nothing_is_left(lifecycle: Lifecycle, sent: bytes) -> None:
    with serving(lifecycle, limits=SHORT) as server, closing(connect(server)) as connection:
        connection.sendall(sent)
        assert everything(connection) == b""


@pytest.mark.parametrize(
    "begun", [b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n", post(COMPLETION)[:-5]], ids=["line", "headers", "body"]
)
def test_a_slow_request_is_refused(lifecycle: Lifecycle, engine: FakeEngine, begun: bytes) -> None:
    with serving(lifecycle, limits=SHORT) as server:
        assert exchange(server, begun) == (408, "the request took too long to arrive")
        with closing(connect(server)) as connection:
            connection.sendall(post(COMPLETION, more="connection: close\r\n"))
            assert everything(connection).startswith(b"HTTP/1.1 200")
    assert len(engine.submitted) == 1


def test_many_slow_clients_keep_nobody_out(lifecycle: Lifecycle) -> None:
    """A slowloris: more connections than there may be, each with a request that goes on a byte at a time."""
    with limited(lifecycle, connections=8) as server, ExitStack() as stack:
        slow = [stack.enter_context(closing(connect(server))) for _ in range(40)]
        for connection in slow:
            with suppress(BrokenPipeError, ConnectionResetError):  # closed for a later one
                connection.sendall(b"GET / HTTP/1.1\r\nx")
        for _ in range(3):
            assert httpx.get(f"{server.url}/health", timeout=DEADLINE).status_code == 200
        assert len(server.server_state.connections) <= 9


def test_requests_under_way_are_not_closed_for_new_ones(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script("Hello", pause_after=0)
    with limited(lifecycle, connections=2) as server, ExitStack() as stack:
        busy = [stack.enter_context(closing(connect(server))) for _ in range(2)]
        for connection in busy:
            connection.sendall(post(COMPLETION, more="connection: close\r\n"))
        eventually(lambda: engine.running == 2)
        assert exchange(server, b"") == (503, "the server has 2 connections, as many as it may; try again")
        engine.resume()
        assert all(everything(connection).startswith(b"HTTP/1.1 200") for connection in busy)


def test_a_refused_body_is_not_read_for_ever(lifecycle: Lifecycle) -> None:
    with serving(lifecycle, ServingSettings(max_body_bytes=1000), limits=SHORT) as server:
        with closing(connect(server)) as connection:
            connection.sendall(post(b"x" * 2000)[:-1000])
            answer = everything(connection)  # ends though the body did not
        assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_closes_its_sending_side_gets_its_answer(
    lifecycle: Lifecycle, engine: FakeEngine, stream: bool
) -> None:
    engine.script = Script("Hello", pause_after=0)
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 5, "stream": stream}).encode()
    with serving(lifecycle) as server, closing(connect(server)) as connection:
        connection.sendall(post(body))
        connection.shutdown(socket.SHUT_WR)
        eventually(lambda: engine.running == 1)
        engine.resume()
        answer = everything(connection)
    assert b"HTTP/1.1 200 OK" in answer
    assert b'"text":"Hello' in answer
    assert engine.aborted == []
    assert (b"[DONE]" in answer) == stream


def test_the_answer_to_the_last_of_several_requests_at_once(server: HttpServer) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(post(COMPLETION) * 3)
        connection.shutdown(socket.SHUT_WR)
        answer = everything(connection)
    assert answer.count(b"HTTP/1.1 200 OK") == 3


def test_a_client_that_reads_nothing_is_cut(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script("Hello " * 150)
    body = b'{"model":"tiny","prompt":"a","max_tokens":900,"stream":true,"n":4,"logprobs":5}'
    with serving(lifecycle, limits=SHORT) as server, closing(socket.socket()) as connection:
        server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", urlsplit(server.url).port))
        connection.sendall(post(body))
        eventually(lambda: engine.submitted)
        eventually(lambda: not server.server_state.connections)

"""Sockets and signals."""

import json
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from emberkv.errors import ConfigError
from emberkv.serving.app import create_app
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.server import HttpServer, bind_socket
from tests.machine import free_ports
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import serving, sse_blocks
from tests.waiting import DEADLINE, eventually

ROOT = Path(__file__).parents[2]
CHAT = b'{"model":"tiny","messages":[{"role":"user","content":"Hi"}],"stream":true}'
POST_CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(CHAT), CHAT)


def test_a_port_in_use_is_named() -> None:
    with closing(bind_socket("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^127.0.0.1:{port} is already in use; stop what listens there"):
            bind_socket("127.0.0.1", port)


def test_a_port_is_free_again_at_once() -> None:
    port = free_ports()
    with closing(bind_socket("127.0.0.1", port)):
        pass
    with closing(bind_socket("127.0.0.1", port)) as second:
        assert second.getsockname()[1] == port


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range(port: int) -> None:
    with pytest.raises(ConfigError, match=f"port is {port}; it must be from 0"):
        bind_socket("127.0.0.1", port)


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
        bind_socket("192.0.2.1", 0)


def test_a_host_that_is_no_address() -> None:
    with pytest.raises(ConfigError, match="host is 'no such host'; it must be an address of this machine"):
        bind_socket("no such host", 0)


def test_an_unexpected_exception_is_a_500_that_tells_nothing(server: HttpServer) -> None:
    # the fake template looks for an argument that this call does not have
    body = {"model": "tiny", "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=DEADLINE)
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "an internal error occurred; the server's log has the details",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert httpx.get(f"{server.url}/health", timeout=DEADLINE).status_code == 200


def test_sixteen_streams_at_once(server: HttpServer, engine: FakeEngine) -> None:
    engine.script = Script("Hello " * 20)
    with ThreadPoolExecutor(16) as pool:
        ask = partial(httpx.post, f"{server.url}/v1/completions", timeout=DEADLINE)
        body = {"model": "tiny", "stream": True, "max_tokens": 200}
        responses = list(pool.map(lambda index: ask(json={**body, "prompt": f"{index}"}), range(16)))
    for response in responses:
        *chunks, done = sse_blocks(response)
        assert done == "data: [DONE]"
        texts = [json.loads(chunk.removeprefix("data: "))["choices"][0]["text"] for chunk in chunks]
        assert "".join(texts) == "Hello " * 20


def signalled_server(stdin: int = subprocess.DEVNULL, *, ignored: str = "") -> "subprocess.Popen[str]":
    """ignored: the signals that the process inherits as ignored."""
    command = [sys.executable, "-m", "tests.serving.signalled_server"]
    if ignored:
        command = ["sh", "-c", f"trap '' {ignored}; exec \"$@\"", "sh", *command]
    return subprocess.Popen(command, cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, text=True)


def read_port(process: "subprocess.Popen[str]") -> int:
    assert process.stdout is not None
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)\n", process.stdout.readline())
    assert found
    return int(found[1])


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_server_and_returns_to_the_caller(sent: signal.Signals) -> None:
    with signalled_server() as process:
        port = read_port(process)
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=DEADLINE).json() == {"status": "alive"}
        process.send_signal(sent)
        assert process.stdout is not None
        assert process.stdout.read() == "stopping the engine\nreturned\n"
    assert process.returncode == 0


def test_a_server_that_inherits_ignored_signals_outlives_its_terminal_and_can_be_stopped() -> None:
    with signalled_server(ignored="HUP TERM") as process:
        port = read_port(process)
        process.send_signal(signal.SIGHUP)
        assert httpx.get(f"http://127.0.0.1:{port}/ready", timeout=DEADLINE).json()["status"] == "ready"
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0


def test_a_second_interrupt_does_not_wait_for_answers() -> None:
    with signalled_server() as process:
        port = read_port(process)
        with closing(socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)) as connection:
            connection.sendall(POST_CHAT)
            received = b""
            while b'"content":"He' not in received and b'"content":"e"' not in received:
                received += connection.recv(65536)
            process.send_signal(signal.SIGINT)
            ready = f"http://127.0.0.1:{port}/ready"
            while (status := httpx.get(ready, timeout=DEADLINE).json()["status"]) != "draining":
                assert status == "ready"
            process.send_signal(signal.SIGINT)
            while b"[DONE]" not in received:
                received += connection.recv(65536)
        assert b"the server shut down before the answer was finished" in received
        assert process.stdout is not None
        assert process.stdout.read() == "stopping the engine\nreturned\n"
    assert process.returncode == 0


def test_signals_while_the_engine_stops_do_not_end_the_process() -> None:
    with signalled_server(subprocess.PIPE) as process:
        read_port(process)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopping the engine\n"
        for sent in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            process.send_signal(sent)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "returned\n"
        process.send_signal(signal.SIGTERM)
        process.stdin.close()
        assert process.stdout.read() == ""
    assert process.returncode == 0


def test_readers_that_do_not_read_do_not_hold_up_the_shutdown(
    lifecycle: Lifecycle, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = Script("Hello " * 150)
    body = b'{"model":"tiny","prompt":"a","max_tokens":900,"stream":true,"n":4,"logprobs":5}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with ExitStack() as stack:
        server = stack.enter_context(serving(lifecycle, drain_seconds=0))
        server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for _ in range(3):
            connection = stack.enter_context(closing(socket.socket()))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", urlsplit(server.url).port))
            connection.sendall(head + body)
        eventually(lambda: len(engine.submitted) == 12 and engine.running == 0)
        assert len(server.server_state.connections) == 3
    assert server.server_state.tasks == set()
    assert not [record for record in caplog.records if record.exc_info]


def test_a_request_that_the_shutdown_cancels_is_refused_without_a_traceback(
    lifecycle: Lifecycle, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(lifecycle, drain_seconds=0))
        server.config.timeout_graceful_shutdown = 0
        connection = stack.enter_context(closing(socket.create_connection(("127.0.0.1", urlsplit(server.url).port))))
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
        eventually(lambda: server.server_state.tasks)
        server.stop()
        assert connection.recv(65536).startswith(b"HTTP/1.1 503")
    assert not [record for record in caplog.records if record.exc_info]


def test_files_that_are_no_certificate(lifecycle: Lifecycle, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("no key")
    for certificate in (key, tmp_path / "missing.pem"):
        with closing(bind_socket(port=0)) as bound, pytest.raises(ConfigError, match=r"tls_cert .* cannot be used"):
            HttpServer(create_app(lifecycle), lifecycle, bound, tls=(certificate, key))

"""The command as a user runs it, over real sockets."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from emberkv.cli.main import app

ANSWER = (
    b'data: {"choices": [{"delta": {"content": "one"}, "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 1}}\n\n'
    b"data: [DONE]\n\n"
)


class _Handler(BaseHTTPRequestHandler):
    """Answers chats with one token, but long ones with an error when the key is ``breaks``."""

    def log_message(self, format: str, *args: object) -> None:
        return None

    def do_GET(self) -> None:
        self._reply(200, b'{"data": [{"id": "fake"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        breaks = self.headers.get("authorization") == "Bearer breaks" and len(body["messages"]) > 2
        self._reply(500 if breaks else 200, b"boom" if breaks else ANSWER)

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "--sessions", "2", "--turns", "2", *arguments], env={"COLUMNS": "200"})


def test_a_run_prints_a_table_writes_json_and_exits_with_0(url: str, tmp_path: Path) -> None:
    result = invoke("--url", f"{url}/v1/", "--nonce", "n", "--seed", "3", "--json", str(tmp_path / "run.json"))
    assert result.exit_code == 0, result.output
    assert "TTFT cold" in result.stdout
    assert "4 (0 failed, 0 not sent)" in result.stdout
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["target"]["model"] == "fake"
    assert (run["workload"]["nonce"], run["workload"]["seed"]) == ("n", 3)
    assert len(run["requests"]) == 4


@pytest.mark.parametrize("option", ["--key", "--api-key"])
def test_failed_requests_are_shown_and_exit_with_1(url: str, option: str) -> None:
    result = invoke("--url", url, option, "breaks")
    assert result.exit_code == 1
    assert "4 (2 failed, 0 not sent)" in result.stdout
    assert "2 x AnswerError: HTTP 500: boom" in result.stderr


def test_what_is_no_server_is_named_and_exits_with_2() -> None:
    result = invoke("--url", "http://127.0.0.1:1")  # no service may use port 1
    assert result.exit_code == 2
    assert "http://127.0.0.1:1/v1/models gives ConnectError" in result.stderr

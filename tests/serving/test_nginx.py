"""Behind nginx with its defaults: a stream arrives as it is made, and a client that leaves frees the engine."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from emberkv.serving.server import HttpServer
from tests.machine import free_ports
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL
from tests.waiting import DEADLINE, eventually

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
pytestmark = pytest.mark.skipif(not Path(NGINX).exists(), reason="nginx is not installed")

CONFIG = """
daemon off; master_process off; worker_processes 1;
pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass {url}; proxy_http_version 1.1; proxy_read_timeout 600s; }}
  }}
}}
"""
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}


def accepts(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def proxy(server: HttpServer, tmp_path: Path) -> Iterator[str]:
    """The URL of an nginx before the server."""
    port = free_ports()
    config = tmp_path / "nginx.conf"
    parts = urlsplit(server.url)
    config.write_text(CONFIG.format(folder=tmp_path, port=port, url=f"http://{parts.hostname}:{parts.port}"))
    process = subprocess.Popen([NGINX, "-c", str(config), "-p", str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: accepts(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(DEADLINE)


def test_a_stream_arrives_as_it_is_made(proxy: str, engine: FakeEngine) -> None:
    engine.script = Script("Hello", pause_after=3)
    with httpx.stream("POST", f"{proxy}/v1/chat/completions", json=BODY, timeout=DEADLINE) as response:
        lines = response.iter_lines()
        begun = next(line for line in lines if '"content":"H' in line)
        assert engine.running == 1  # the engine waits, so nginx has passed on the first part of the answer
        engine.resume()
        rest = list(lines)
    assert begun.startswith("data: ")
    assert "data: [DONE]" in rest


def test_a_client_that_leaves_frees_the_engine(proxy: str, engine: FakeEngine) -> None:
    engine.script = Script("Hello", pause_after=3)
    with httpx.stream("POST", f"{proxy}/v1/chat/completions", json=BODY, timeout=DEADLINE) as response:
        next(response.iter_lines())
        assert engine.running == 1
    eventually(lambda: engine.running == 0)
    assert len(engine.aborted) == 1

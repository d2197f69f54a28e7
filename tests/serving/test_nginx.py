"""Behind nginx with its defaults: a stream arrives as it is made, and a client that leaves frees the engine."""

import asyncio
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from emberkv.cluster.worker_api import worker_routes
from emberkv.cluster.worker_client import WorkerClient
from emberkv.engine.request import GenerationRequest, SamplingParams
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.server import HttpServer
from tests.machine import free_ports
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, serving
from tests.waiting import DEADLINE, eventually

ROOT = Path(__file__).parents[2]
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
    location / {{ proxy_pass {url}; proxy_http_version 1.1; proxy_read_timeout 600s; {more} }}
  }}
}}
"""
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}


def accepts(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def nginx_before(server: HttpServer, folder: Path, more: str = "") -> Iterator[str]:
    """The URL of an nginx before the server. more: directives of its location."""
    port = free_ports()
    config = folder / "nginx.conf"
    parts = urlsplit(server.url)
    url = f"http://{parts.hostname}:{parts.port}"
    config.write_text(CONFIG.format(folder=folder, port=port, url=url, more=more))
    process = subprocess.Popen([NGINX, "-c", str(config), "-p", str(folder)], stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: accepts(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(DEADLINE)


@pytest.fixture
def proxy(server: HttpServer, tmp_path: Path) -> Iterator[str]:
    with nginx_before(server, tmp_path) as url:
        yield url


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


def test_a_gateways_requests_pass_with_the_directives_of_the_docs(
    lifecycle: Lifecycle, engine: FakeEngine, tmp_path: Path
) -> None:
    documented = re.search(r"\(nginx: (.*?)\)", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    assert documented is not None
    directives = "".join(f"{each}; " for each in re.findall(r"`([^`]*)`", documented[1]) if "http_version" not in each)

    async def ask(url: str) -> bytes:
        async with asyncio.timeout(DEADLINE), WorkerClient(url, "secret") as client:
            request = GenerationRequest("r", [1, 2], SamplingParams(max_tokens=4))
            return bytes([token async for output in client.generate(request) for token in output.token_ids])

    routers = [worker_routes("w", "secret")]
    with serving(lifecycle, routers=routers) as worker, nginx_before(worker, tmp_path, directives) as url:
        assert asyncio.run(ask(url)) == b"Hell"
    assert len(engine.submitted) == 1

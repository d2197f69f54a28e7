"""scripts/local_dev.sh, over a stand-in for the emberkv command."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import free_ports

SCRIPT = Path(__file__).parents[1] / "scripts" / "local_dev.sh"
SECONDS = 250.0

STAND_IN = """
import json, signal, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status":"ok"}')

    def log_message(self, *_):
        pass

signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("terminated", flush=True)))
given = sys.argv[1:]
print(json.dumps(given), flush=True)
ports = [int(given[at + 1]) for at, each in enumerate(given) if each in ("--port", "--coordinator-port")]
servers = [ThreadingHTTPServer(("127.0.0.1", port), Healthy) for port in ports]
for server in servers[1:]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
servers[0].serve_forever()
"""


class Script:
    """The script with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cluster"
        stand_in = folder / "stand_in.py"
        stand_in.write_text(STAND_IN)
        first = free_ports(4)  # the last two are the workers'
        self.ports = [first, first + 1, first + 2]
        gateway, coordinator, worker = map(str, self.ports)
        self.environment = {
            **os.environ,
            "LOCAL_DEV_DIR": str(self.folder),
            "LOCAL_DEV_EMBERKV": f"{sys.executable} {stand_in}",
            "GATEWAY_PORT": gateway,
            "COORDINATOR_PORT": coordinator,
            "WORKER_PORT": worker,
        }

    def run(self, *arguments: str, status: int = 0, **environment: str) -> str:
        command = [SCRIPT, *arguments]
        answer = subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        assert answer.returncode == status, answer.stdout + answer.stderr
        return answer.stdout + answer.stderr

    def running(self) -> dict[str, int]:
        """The process ids that ``status`` shows, by service."""
        return {name: int(pid) for name, pid in re.findall(r"^(\S+) +(\d+) ", self.run("status"), re.MULTILINE)}

    def arguments(self, service: str) -> list[str]:
        """What the service was last started with."""
        started = [line for line in self.log(service) if line.startswith("[")]
        given: list[str] = json.loads(started[-1])
        return given

    def log(self, service: str) -> list[str]:
        return (self.folder / f"{service}.log").read_text().splitlines()


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    script = Script(tmp_path)
    yield script
    script.run("stop")


def test_a_cluster_starts_scales_and_stops(script: Script) -> None:
    gateway, coordinator, worker = script.ports
    script.run("start", WORKERS="1", KV_MAX_ENTRIES="7", MODEL="a-model")
    before = script.running()
    assert set(before) == {"coordinator", "gateway", "worker-0"}
    assert before["coordinator"] == before["gateway"]
    secret = ["--cluster-secret-file", str(script.folder / "secret")]
    assert script.arguments("gateway") == [
        "gateway", "--port", str(gateway), "--coordinator-port", str(coordinator), "--kv-routes", *secret,
    ]  # fmt: skip
    assert script.arguments("worker-0") == [
        "serve", "--port", str(worker), "--worker-id", "worker-0", "--kv-routes", "--kv-max-entries", "7", *secret,
        "--gateway", f"http://127.0.0.1:{gateway}", "a-model",
    ]  # fmt: skip
    assert (script.folder / "secret").stat().st_mode & 0o077 == 0

    script.run("scale-workers", "2")
    scaled = script.running()
    assert {**before, "worker-1": scaled["worker-1"]} == scaled  # the others are left alone
    script.run("scale-workers", "1")
    assert script.running() == before
    assert script.log("worker-1")[-1] == "terminated"

    script.run("stop")
    assert script.running() == {}
    assert script.log("gateway")[-1] == "terminated"


def test_restart_keeps_the_secret_and_clean_removes_all(script: Script) -> None:
    script.run("start", WORKERS="1")
    before, secret = script.running(), (script.folder / "secret").read_text()
    script.run("restart", WORKERS="1")
    after = script.running()
    assert set(after) == set(before)
    assert not set(after.values()) & set(before.values())
    assert (script.folder / "secret").read_text() == secret
    script.run("clean")
    assert not script.folder.exists()


def test_a_process_that_does_not_start_is_reported_with_its_log(script: Script) -> None:
    output = script.run("start", status=1, LOCAL_DEV_EMBERKV=f"{sys.executable} -c print('bad_luck')")
    assert "gateway has stopped" in output
    assert "bad_luck" in output


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ((), 0, "usage:"),
        (("help",), 0, "usage:"),
        (("--help",), 0, "usage:"),
        (("-h",), 0, "usage:"),
        (("scale-workers",), 1, "name the number of workers"),
        (("scale-workers", "2"), 1, "does not run"),
        (("shell",), 1, "name a service"),
        (("logs", "worker"), 1, "there is no log"),
        (("dance",), 1, "Unknown command: dance"),
    ],
)
def test_commands_say_what_they_need(script: Script, arguments: tuple[str, ...], status: int, text: str) -> None:
    assert text in script.run(*arguments, status=status)

"""What a server process writes to its log."""

import json
import signal
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import CheckpointFactory
from tests.e2e.process import serving
from tests.waiting import DEADLINE


def test_a_json_log_is_json_alone(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    with serving(tmp_path, str(folder), "--cache-ram", "8MiB", "--log-format", "json") as server:
        body = {"model": folder.name, "prompt": "Once", "max_tokens": 2, "ignore_eos": True}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=DEADLINE).raise_for_status()
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
        lines: list[dict[str, Any]] = [json.loads(line) for line in server.log.read_text().splitlines()]
    (ready,) = (line for line in lines if line.get("message") == "ready")
    assert ready["url"] == server.url
    assert ready["model"].startswith(f"{folder.name} (float32, cpu")
    (answer,) = (line for line in lines if line["logger"] == "emberkv.requests")
    assert (answer["finish"], answer["completion_tokens"]) == ("length", 2)
    assert [line["message"] for line in lines[-2:]] == ["stopping", "stopped"]


def test_a_text_log_says_what_a_stop_waits_for(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    with serving(tmp_path, str(folder), "--cache-ram", "8MiB", "--drain-seconds", "0") as server:
        body = {"model": folder.name, "prompt": "Once", "max_tokens": 4000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=DEADLINE) as response:
            received = response.iter_bytes()
            next(received)
            server.process.send_signal(signal.SIGTERM)
            list(received)
        assert server.exit_code() == 0
        log = server.log.read_text()
    assert "INFO draining 1 request, at most 0 s" in log
    assert "  abort\n" in log
    assert log.endswith("INFO stopped\n")

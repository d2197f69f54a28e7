"""A server process from its settings to its end."""

import random
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import CheckpointFactory
from tests.e2e.process import Forked, serving
from tests.models import VOCAB_SIZE
from tests.waiting import DEADLINE, eventually

KEY = {"Authorization": "Bearer first"}


def test_settings(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """Keys, a name of one's own, and a pool of 16 blocks of 16 tokens under more requests than it can hold."""
    folder = checkpoint("llama")
    settings = ("--api-key", "first", "--api-key", "second", "--served-name", "mini", "--cache-ram", str(16 * 16 * 768))
    with (
        serving(tmp_path, str(folder), *settings) as server,
        httpx.Client(base_url=server.url, timeout=DEADLINE) as client,
    ):

        def complete(prompt: list[int], headers: dict[str, str] = KEY, **fields: Any) -> httpx.Response:
            body = {"model": "mini", "prompt": prompt, "max_tokens": 50, "ignore_eos": True, **fields}
            return client.post("/v1/completions", json=body, headers=headers)

        assert complete([5]).status_code == 200
        assert complete([5], {"x-api-key": "second"}).status_code == 200
        assert complete([5], model=folder.name).status_code == 200
        for headers in ({}, {"Authorization": "Bearer third"}):
            assert complete([5], headers).status_code == 401
        assert [each["id"] for each in client.get("/v1/models", headers=KEY).json()["data"]] == ["mini", folder.name]

        too_long = complete([5] * 256)
        assert too_long.status_code == 400
        assert "your messages resulted in 256 tokens" in too_long.json()["error"]["message"]
        clipped = complete([5] * 250)
        assert clipped.headers["x-emberkv-max-tokens"] == "6"
        assert clipped.json()["usage"]["completion_tokens"] == 6

        rng = random.Random(0)
        prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(40)] for _ in range(8)]

        def preempts() -> bool:
            """False where the requests came one after the other."""
            with ThreadPoolExecutor(len(prompts)) as threads:
                asked = threads.map(lambda prompt: complete(prompt, max_tokens=120, temperature=0).json(), prompts)
                assert [answer["usage"]["completion_tokens"] for answer in asked] == [120] * 8
            eventually(server.is_idle)
            return server.metric("emberkv_preemptions_total") > 0

        eventually(preempts)

        log = tmp_path / "second.log"
        assert Forked("serve", ("--port", str(httpx.URL(server.url).port)), log).wait(DEADLINE) == 2
        assert f"error: {httpx.URL(server.url).netloc.decode()} is already in use" in log.read_text()


@pytest.mark.parametrize(
    ("drain_seconds", "new", "expected"),
    [("100", 400, b'"finish_reason":"length"'), ("0", 4000, b"the server shut down before the answer was finished")],
    ids=["finished", "cut short"],
)
def test_a_signal_ends_running_streams_cleanly(
    checkpoint: CheckpointFactory, tmp_path: Path, drain_seconds: str, new: int, expected: bytes
) -> None:
    folder = checkpoint("llama")
    settings = ("--cache-ram", "8MiB", "--drain-seconds", drain_seconds)
    with serving(tmp_path, str(folder), *settings) as server:
        body = {"model": folder.name, "prompt": "Once", "max_tokens": new, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=DEADLINE) as response:
            received = response.iter_bytes()
            events = next(received)
            server.process.send_signal(signal.SIGTERM)
            events += b"".join(received)
        assert expected in events
        assert events.endswith(b"data: [DONE]\n\n")
        assert server.exit_code() == 0
        with (
            pytest.raises(ConnectionRefusedError),
            socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port or 0)),
        ):
            pass
        assert "Traceback" not in server.log.read_text()

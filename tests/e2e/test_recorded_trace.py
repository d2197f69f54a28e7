"""``--record-trace`` from a real server's requests to a trace that simulations read."""

import signal
from pathlib import Path

import httpx
import pytest

from emberkv.workload.ember_trace import read
from tests.conftest import CheckpointFactory
from tests.e2e.process import serving
from tests.waiting import DEADLINE


@pytest.mark.parametrize("unit", [16, 1])
def test_a_server_writes_what_it_was_asked(checkpoint: CheckpointFactory, tmp_path: Path, unit: int) -> None:
    trace = tmp_path / "served.jsonl"
    prompt = list(range(10, 60))
    flags = ("--served-name", "mini", "--record-trace", str(trace), "--trace-unit", str(unit), "--no-warmup")
    with serving(tmp_path, str(checkpoint("llama")), *flags) as server:
        for tokens in (prompt, [*prompt, *range(60, 90)]):
            body = {"model": "mini", "prompt": tokens, "max_tokens": 4, "ignore_eos": True, "temperature": 0}
            answer = httpx.post(
                f"{server.url}/v1/completions", json=body, headers={"X-Session-Id": "s"}, timeout=DEADLINE
            )
            assert answer.status_code == 200, answer.text
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
    first, second = read(trace)
    assert [(each.prompt_tokens, each.output_tokens, each.turn) for each in (first, second)] == [(50, 4, 0), (80, 4, 1)]
    assert first.session_id == second.session_id != ""
    root = bytes(32)
    assert first.block_references(root, 16)[:3] == second.block_references(root, 16)[:3]
    assert first.block_references(root, 16)[3] != second.block_references(root, 16)[3]
    assert (first.content.cut(0, 50) == second.content.cut(0, 50)) is (unit == 1)  # blocks end at 48

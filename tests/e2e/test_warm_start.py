"""A server process whose very first request is warm; and one that remembers, after a restart, what was worth most."""

import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from emberkv import get_standard_system_prompt
from tests.conftest import CheckpointFactory
from tests.e2e.process import Server, serving
from tests.models import CONTEXT
from tests.waiting import DEADLINE, eventually


def warmup(server: Server) -> dict[str, Any]:
    report: dict[str, Any] = httpx.get(f"{server.url}/ready", timeout=DEADLINE).json()["warmup"]
    return report


def chat(server: Server, model: str, system: str, *turns: str, key: str = "none") -> int:
    """How many tokens of the prompt were cached."""
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": "system", "content": system}]
    messages += [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    body = {"model": model, "messages": messages, "max_tokens": 1}
    headers = {"Authorization": f"Bearer {key}"}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=DEADLINE)
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def message(server: Server, model: str, system: str, text: str) -> int:
    body = {"model": model, "system": system, "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    usage = httpx.post(f"{server.url}/v1/messages", json=body, timeout=DEADLINE).json()["usage"]
    return int(usage["cache_read_input_tokens"])


def test_the_first_request_with_the_standard_prompt_is_warm(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    system = get_standard_system_prompt()
    with serving(tmp_path, str(folder), "--cache-ram", "24MiB") as server:
        report = warmup(server)
        assert (report["phase"], report["prompts"], report["warm_prompts"]) == ("done", 1, 1)
        assert report["tokens"] > 200
        assert report["computed_tokens"] == report["tokens"] == server.metric("emberkv_warmup_tokens_total")
        assert chat(server, folder.name, system, "Where are the lamps?") == report["tokens"]
        assert message(server, folder.name, system, "How many?") == report["tokens"]
        assert chat(server, folder.name, system, "1", "2", "\n3") == report["tokens"]
        assert chat(server, folder.name, "X" + system, "Where are the lamps?") < 16  # what the template begins with


def test_several_prompts_for_all_tenants(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    texts = ["You count lamps. " * 40, "You count rivers. " * 40]
    arguments = ["--api-key", "first", "--api-key", "second"]
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.txt"
        path.write_text(text)
        arguments += ["--warmup-system-file", str(path)]
    with serving(tmp_path, str(folder), "--cache-ram", "24MiB", "--warmup-required", *arguments) as server:
        ready = httpx.get(f"{server.url}/ready", timeout=DEADLINE)
        assert ready.status_code == 200
        report = ready.json()["warmup"]
        assert (report["required"], report["warm_prompts"]) == (True, 2)
        cached = [chat(server, folder.name, text, "How many?", key="first") for text in texts]
        assert min(cached) > 200
        assert sum(cached) == report["tokens"]
        # what another tenant finds is what the operator has warmed, and nothing more of the first one's prompts
        assert [chat(server, folder.name, text, "How many?", key="second") for text in texts] == cached


def test_a_prompt_that_cannot_be_warmed_stops_nobody(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    (tmp_path / "long.txt").write_text("zq" * CONTEXT)
    (tmp_path / "good.txt").write_text("You count lamps. " * 40)
    files = [argument for name in ("long", "good") for argument in ("--warmup-system-file", f"{tmp_path}/{name}.txt")]
    with serving(tmp_path, str(folder), "--cache-ram", "24MiB", *files) as server:
        ready = httpx.get(f"{server.url}/ready", timeout=DEADLINE)
        assert ready.status_code == 200
        report = ready.json()["warmup"]
        assert (report["phase"], report["prompts"], report["warm_prompts"]) == ("failed", 2, 1)
        assert f"the model's context holds {CONTEXT}" in report["problems"][0]
        assert chat(server, folder.name, "You count lamps. " * 40, "How many?") == report["tokens"] > 200
    with serving(tmp_path, str(folder), "--cache-ram", "24MiB", "--warmup-required", *files) as server:
        ready = httpx.get(f"{server.url}/ready", timeout=DEADLINE)
        assert (ready.status_code, ready.json()["status"]) == (503, "warming")
        assert chat(server, folder.name, "You count lamps. " * 40, "How many?") > 200  # it answers all the same


def test_switched_off_nothing_is_warm(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    with serving(tmp_path, str(folder), "--cache-ram", "24MiB", "--no-warmup") as server:
        assert warmup(server)["phase"] == "off"
        assert server.metric("emberkv_prefill_tokens_total") == 0
        assert chat(server, folder.name, get_standard_system_prompt(), "Where are the lamps?") == 0


@pytest.mark.parametrize("blocks", ["kept", "lost"])
def test_what_use_has_taught_is_warm_after_a_restart(
    blocks: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """From the blocks on disk, or without them by computing; and only the tenant that used it finds it."""
    folder, cache = checkpoint("llama"), tmp_path / "cache"
    system = "You know where the river goes. " * 60
    arguments = (
        str(folder),
        "--cache-ram",
        "24MiB",
        "--cache-dir",
        str(cache),
        "--api-key",
        "first",
        "--api-key",
        "other",
    )
    with serving(tmp_path, *arguments) as server:
        assert warmup(server)["learned"] == 0
        used = [chat(server, folder.name, system, f"{number}?", key="first") for number in range(3)]
        assert used[0] < 16  # it begins as the standard prompt does, which is warm
        assert used[1] == used[2] > 500
        full = used[1] // 16 * 16  # only full blocks are on disk, and only such are learned
        eventually(server.is_idle)
    if blocks == "lost":
        shutil.rmtree(cache / "blocks")
    with serving(tmp_path, *arguments) as server:
        report = warmup(server)
        assert (report["phase"], report["learned"], report["restored"]) == ("done", 1, 1)
        computed = server.metric("emberkv_prefill_tokens_total")
        assert computed < 100 if blocks == "kept" else computed >= full
        before = server.metric("emberkv_prefix_cache_hit_tokens_total")
        assert chat(server, folder.name, system, "4?", key="first") == full
        assert server.metric("emberkv_prefix_cache_hit_tokens_total") == before + full
        assert chat(server, folder.name, system, "4?", key="other") == used[0]

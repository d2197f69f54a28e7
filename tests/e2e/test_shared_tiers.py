"""Real servers that share blocks through a Redis server or through memory, and what becomes of them when it fails."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import CheckpointFactory
from tests.e2e.cluster_process import TEXT, cluster_in
from tests.e2e.process import Server, serving
from tests.e2e.users import PROMPTS, Choice, ask
from tests.tiers.mooncake_process import MooncakeMaster, needs_mooncake
from tests.tiers.redis_process import RedisProcess
from tests.waiting import DEADLINE, eventually

SMALL_POOL = ("--cache-ram", str(48 * 12 * 1024))
"""48 blocks; the prompts take 84, so that each round of them needs what lies below."""


@pytest.fixture(scope="module")
def flags(checkpoint: CheckpointFactory) -> Sequence[str]:
    return (str(checkpoint("llama")), "--served-name", "tiny", "--prefill-chunk", "32", "--no-warmup", *SMALL_POOL)


@pytest.fixture(scope="module")
def expected(flags: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Sequence[Choice]:
    """What a server without tiers answers."""
    with serving(tmp_path_factory.mktemp("plain"), *flags) as server:
        return answers(server)


@pytest.fixture(scope="module")
def shared(
    redis_server: RedisProcess, flags: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that offloads to Redis."""
    folder, url = tmp_path_factory.mktemp("shared"), redis_server.address.url
    with serving(folder, *flags, "--remote-tier", url, "--remote-tier-bytes", "64MiB") as server:
        yield server
    assert server.exit_code() == 0


def answers(server: Server) -> list[Choice]:
    with httpx.Client(base_url=server.url, timeout=DEADLINE) as client:
        return [ask(client, prompt) for prompt in PROMPTS]


def reused(server: Server, tier: str) -> float:
    """Tokens."""
    return server.total("emberkv_tier_reused_tokens_total", tier=tier)


def circuit(server: Server, state: str) -> bool:
    return server.metric("emberkv_tier_circuit", tier="remote", state=state) == 1


def asked_until(condition: Callable[[], bool], server: Server, expected: Sequence[Choice]) -> None:
    """Ask until it holds, because a load is left out where computing looks cheaper; each answer is right."""

    def holds() -> bool:
        assert answers(server) == expected
        return condition()

    eventually(holds)


def test_a_server_finds_in_redis_what_another_has_computed(
    redis_server: RedisProcess, shared: Server, flags: Sequence[str], expected: Sequence[Choice], tmp_path: Path
) -> None:
    assert answers(shared) == expected
    eventually(lambda: shared.metric("emberkv_tier_blocks", tier="remote") > 0)
    with serving(tmp_path, *flags, "--remote-tier", redis_server.address.url) as second:
        asked_until(lambda: reused(second, "remote") > 0, second, expected)
        assert second.total("emberkv_tier_corrupt_total") == 0
    assert second.exit_code() == 0


@needs_mooncake
def test_a_server_finds_in_mooncake_what_another_has_computed(
    flags: Sequence[str], expected: Sequence[Choice], tmp_path: Path
) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
    with MooncakeMaster() as master:
        options = (*flags, "--remote-tier", master.address.url, "--remote-tier-bytes", "64MiB")
        with serving(tmp_path / "a", *options) as first, serving(tmp_path / "b", *options) as second:
            for server in (first, second):
                eventually(lambda server=server: circuit(server, "closed"))
            assert answers(first) == expected
            asked_until(lambda: reused(second, "remote") > 0, second, expected)
            assert second.total("emberkv_tier_corrupt_total") == 0
            master.kill()
            asked_until(lambda: circuit(second, "open"), second, expected)
        assert (first.exit_code(), second.exit_code()) == (0, 0)


def test_answers_are_right_while_redis_hangs_is_emptied_and_dies_and_it_is_used_again(
    redis_server: RedisProcess, shared: Server, expected: Sequence[Choice]
) -> None:
    asked_until(lambda: reused(shared, "remote") > 0, shared, expected)
    redis_server.freeze()
    asked_until(lambda: circuit(shared, "open"), shared, expected)
    redis_server.thaw()
    eventually(lambda: circuit(shared, "closed"))
    redis_server.client().flushall()
    assert answers(shared) == expected
    redis_server.kill()
    asked_until(lambda: circuit(shared, "open"), shared, expected)
    redis_server.start()
    eventually(lambda: circuit(shared, "closed"))
    before = reused(shared, "remote")
    asked_until(lambda: reused(shared, "remote") > before, shared, expected)
    assert shared.total("emberkv_tier_failures_total") == 0


def test_servers_of_one_machine_share_memory(
    flags: Sequence[str], expected: Sequence[Choice], tmp_path_factory: pytest.TempPathFactory
) -> None:
    memory = ("--shm-tier", "64MiB")
    with serving(tmp_path_factory.mktemp("first"), *flags, *memory) as first:
        assert answers(first) == expected
        eventually(lambda: first.metric("emberkv_tier_blocks", tier="shm") > 0)
        with serving(tmp_path_factory.mktemp("second"), *flags, *memory) as second:
            asked_until(lambda: reused(second, "shm") > 0, second, expected)
            assert second.total("emberkv_tier_corrupt_total") == 0
        assert second.exit_code() == 0
    assert first.exit_code() == 0


def test_a_gateway_routes_to_what_a_killed_worker_has_left_in_redis_which_was_away_when_it_started(
    redis_server: RedisProcess, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    shared = ("--remote-tier", redis_server.address.url, "--remote-tier-bytes", "64MiB")
    prompts = [{"model": "tiny", "prompt": f"{tmp_path} {number} {TEXT}", "max_tokens": 4} for number in range(4)]
    with cluster_in(tmp_path, checkpoint("llama")) as cluster:
        redis_server.kill()
        first = cluster.start_worker("a", *shared)
        gateway = cluster.start_gateway("a", "b")
        with httpx.Client(base_url=gateway.url, timeout=DEADLINE) as client:
            cluster.until("a", "up")
            assert cluster.status("a")["shared_tiers"] == {}
            redis_server.start()
            eventually(lambda: cluster.status("a")["shared_tiers"] != {})
            computed = [completed(client, prompt)[0] for prompt in prompts]
            second = cluster.start_worker("b", *shared)
            cluster.until("b", "up")
            assert cluster.status("a")["shared_tiers"] == cluster.status("b")["shared_tiers"] != {}
            tokens = len(client.post("/tokenize", json=prompts[0]).json()["tokens"]) // 16 * 16
            eventually(lambda: known(client, prompts[0], "b") == {"remote": tokens})
            assert known(client, prompts[0], "a") == {"pool": tokens}
            with httpx.Client(base_url=cluster.start_gateway("b", "a", called="late").url, timeout=DEADLINE) as late:
                cluster.until("a", "up")
                eventually(lambda: known(late, prompts[0], "b") == {"remote": tokens})
            cluster.gateway = gateway
            first.process.kill()
            cluster.until("a", "down")
            text, route = completed(client, prompts[0])
            assert (text, route) == (computed[0], f"worker=b;why=least_cost;cached={tokens};remote={tokens}")
            for prompt, text in zip(prompts, computed, strict=True):  # an answer of Redis may come too late
                if reused(second, "remote"):
                    break
                assert completed(client, prompt)[0] == text
            assert reused(second, "remote") >= tokens


def completed(client: httpx.Client, body: Mapping[str, Any]) -> tuple[str, str]:
    """The answer's text and its route."""
    answer = client.post("/v1/completions", json={**body, "temperature": 0})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], answer.headers["x-emberkv-route"]


def known(client: httpx.Client, body: Mapping[str, Any], worker: str) -> Mapping[str, int]:
    """The prompt tokens that the gateway knows a worker to have, by tier."""
    found = client.post("/v1/cache/explain", json={"openai": body}).json()["workers"]
    (row,) = [each for each in found if each["worker"] == worker]
    assert row["shared_tiers"] == ["remote"]
    tokens: Mapping[str, int] = row["estimate"]["cached_tokens"]
    return tokens

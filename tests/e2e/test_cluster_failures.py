"""Clusters under load while something they share fails: bursts, a full gateway, a gateway killed, a shared tier that
hangs, is emptied and dies. Every request is answered, or refused so that it can be sent again.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from tests.conftest import CheckpointFactory
from tests.e2e.cluster_process import TEXT, Cluster, cluster_in
from tests.tiers.redis_process import RedisProcess
from tests.waiting import DEADLINE, eventually

SMALL_POOL = ("--cache-ram", str(96 * 12 * 1024))
"""Blocks for the prompts of one or two users: the others are to be found below."""


@pytest.fixture(scope="module")
def steady(checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers that nothing happens to."""
    with cluster_in(tmp_path_factory.mktemp("steady"), checkpoint("llama")) as it:
        for name in "ab":
            it.start_worker(name)
        it.start_gateway("a", "b")
        for name in "ab":
            it.until(name, "up")
        yield it


def completion(number: int, tokens: int = 5) -> dict[str, Any]:
    prompt = f"{number % 7}: {TEXT} {number}"
    return {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def ask(url: str, number: int, tokens: int = 5) -> None:
    """A request that must succeed, and get all its tokens."""
    response = httpx.post(f"{url}/v1/completions", json=completion(number, tokens), timeout=DEADLINE)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == tokens


def all_right(asked: list[Future[None]]) -> int:
    for each in asked:
        each.result(DEADLINE)
    return len(asked)


def test_two_requests_a_second_all_succeed(steady: Cluster, long: bool) -> None:
    assert steady.gateway is not None
    with ThreadPoolExecutor(20) as threads:
        asked = []
        for number in range(60 if long else 6):
            asked.append(threads.submit(ask, steady.gateway.url, number))
            time.sleep(0.5)  # the load itself: nothing waits for it
        assert all_right(asked) == (60 if long else 6)


def test_bursts_all_succeed(steady: Cluster) -> None:
    assert steady.gateway is not None
    with ThreadPoolExecutor(20) as threads:
        for burst in (15, 2, 20, 3):
            asked = [threads.submit(ask, steady.gateway.url, number) for number in range(burst)]
            assert all_right(asked) == burst


def test_mixed_lengths_all_succeed(steady: Cluster) -> None:
    assert steady.gateway is not None
    with ThreadPoolExecutor(15) as threads:
        asked = [threads.submit(ask, steady.gateway.url, number, (5, 10, 20)[number % 3]) for number in range(15)]
        assert all_right(asked) == 15


def test_beyond_its_capacity_a_gateway_refuses_with_the_time_to_come_back(steady: Cluster) -> None:
    full = steady.start_gateway("a", "b", called="small", max_requests="3")
    for name in "ab":
        steady.until(name, "up")

    def outcome(number: int) -> httpx.Response:
        return httpx.post(f"{full.url}/v1/completions", json=completion(number, 120), timeout=DEADLINE)

    answers: list[httpx.Response] = []

    def is_full() -> bool:
        """False where the requests came one after the other, so that none was refused."""
        with ThreadPoolExecutor(16) as threads:
            answers.extend(threads.map(outcome, range(16)))
        return {answer.status_code for answer in answers} == {200, 429}

    eventually(is_full)
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert "send it again later" in answer.json()["error"]["message"]
        else:
            assert answer.json()["usage"]["completion_tokens"] == 120
    ask(full.url, 0)
    assert full.metric("emberkv_gateway_refused_requests_total") == sum(each.status_code == 429 for each in answers)


def test_the_clients_of_one_gateway_go_on_when_another_is_killed(steady: Cluster) -> None:
    doomed = steady.start_gateway("a", "b", called="doomed")
    for name in "ab":
        steady.until(name, "up")
    kept = steady.start_gateway("a", "b", called="kept")
    for name in "ab":
        steady.until(name, "up")
    with ThreadPoolExecutor(12) as threads:
        begun = [Event() for _ in range(8)]
        streams = [
            threads.submit(stream, (doomed, kept)[number % 2].url, number, event) for number, event in enumerate(begun)
        ]
        for each in begun:
            assert each.wait(DEADLINE)
        doomed.process.kill()
        for each in streams[1::2]:
            assert each.result(DEADLINE) == LONG
        for each in streams[::2]:  # one that had ended before is right, and none ends short as if it were whole
            error = each.exception(DEADLINE)
            assert error is None or isinstance(error, httpx.HTTPError), error
    for worker in steady.workers.values():
        eventually(worker.is_idle)
    ask(kept.url, 1)


LONG = 300
"""Tokens of an answer during which a gateway is killed."""


def stream(url: str, number: int, begun: Event) -> int:
    """The tokens of a streamed answer that ends well. begun: set with the first one."""
    body = {**completion(number, LONG), "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=DEADLINE) as response:
        assert response.status_code == 200
        lines = []
        for line in response.iter_lines():
            lines.append(line)
            begun.set()
    assert lines[-2:] == ["data: [DONE]", ""]
    usage = json.loads(lines[-4].removeprefix("data: "))["usage"]
    return int(usage["completion_tokens"])


@contextmanager
def under_load(url: str) -> Iterator[None]:
    """Users ask without a pause, each for texts that others have asked for; all are answered."""
    stop = Event()

    def use(user: int) -> int:
        count = 0
        while not stop.is_set():
            ask(url, user + count)
            count += 1
        return count

    with ThreadPoolExecutor(4) as threads:
        users = [threads.submit(use, user) for user in range(4)]
        try:
            yield
        finally:
            stop.set()
        assert all(user.result(DEADLINE) for user in users)


def circuits(cluster: Cluster, state: str) -> Callable[[], bool]:
    """Whether any worker's, or with "closed" every worker's, circuit to the shared tier is in that state."""
    enough = all if state == "closed" else any
    return lambda: enough(
        worker.metric("emberkv_tier_circuit", tier="remote", state=state) == 1 for worker in cluster.workers.values()
    )


def test_no_request_fails_while_the_shared_tier_hangs_is_emptied_and_dies(
    redis_server: RedisProcess, checkpoint: CheckpointFactory, tmp_path: Path, long: bool
) -> None:
    shared = (*SMALL_POOL, "--remote-tier", redis_server.address.url, "--remote-tier-bytes", "64MiB")
    with cluster_in(tmp_path, checkpoint("llama")) as cluster:
        for name in "ab":
            cluster.start_worker(name, *shared)
        gateway = cluster.start_gateway("a", "b")
        for name in "ab":
            cluster.until(name, "up")
        with under_load(gateway.url):
            for _ in range(10 if long else 1):
                eventually(lambda: redis_server.client().dbsize() > 0)
                redis_server.freeze()
                eventually(circuits(cluster, "open"))
                redis_server.thaw()
                eventually(circuits(cluster, "closed"))
                redis_server.client().flushall()
                redis_server.kill()
                eventually(circuits(cluster, "open"))
                redis_server.start()
                eventually(circuits(cluster, "closed"))
        assert gateway.total("emberkv_worker_lost_requests_total") == 0
        assert sum(worker.total("emberkv_tier_corrupt_total") for worker in cluster.workers.values()) == 0

"""Two workers and a gateway, as processes: what clients are answered, also while workers die, hang and restart."""

import gzip
import json
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from emberkv.cluster.decision_log import read_decisions, replay
from tests.conftest import CheckpointFactory
from tests.e2e.cluster_process import TEXT, Cluster, cluster_in
from tests.e2e.process import Server, serving
from tests.models import EOS
from tests.waiting import DEADLINE, eventually

STREAMS = 20
LONG = 160
"""Tokens of an answer during which a worker is killed."""


@pytest.fixture
def cluster(checkpoint: CheckpointFactory, tmp_path: Path) -> Iterator[Cluster]:
    with cluster_in(tmp_path, checkpoint("llama")) as it:
        yield it


@pytest.fixture(scope="module")
def calm(checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One worker and a gateway, to which nothing happens."""
    with cluster_in(tmp_path_factory.mktemp("calm"), checkpoint("llama")) as it:
        it.start_worker("a")
        it.start_gateway("a", record_decisions=str(it.folder / "decisions"))
        it.until("a", "up")
        yield it


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 12, "temperature": 0}
COMPLETION = {"model": "tiny", "prompt": TEXT, "max_tokens": 12, "temperature": 0}
TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}
REQUESTS: tuple[tuple[str, str, Mapping[str, Any] | None], ...] = (
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    (
        "POST",
        "/v1/chat/completions",
        {**CHAT, "temperature": 1, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 3},
    ),
    ("POST", "/v1/completions", COMPLETION),
    ("POST", "/v1/completions", {**COMPLETION, "stream": True}),
    ("POST", "/v1/completions", {**COMPLETION, "echo": True, "logprobs": 1}),
    ("POST", "/v1/completions", {**COMPLETION, "temperature": 1, "seed": 3, "stop": ["e", "a"], "max_tokens": 60}),
    ("POST", "/v1/completions", {**COMPLETION, "prompt": [[5, 6, 7], [8, 9]], "presence_penalty": 1.5}),
    ("POST", "/v1/completions", {**COMPLETION, "max_tokens": 60, "guided_regex": "[a-z]{5}[0-9]{3}"}),
    ("POST", "/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}),
    ("POST", "/v1/chat/completions", {**CHAT, "tools": [TOOL], "stop_token_ids": [7], "min_tokens": 3}),
    ("POST", "/v1/chat/completions", {**CHAT, "tools": [TOOL], "logit_bias": {"8": 9}, "tool_choice": "none"}),
    ("POST", "/v1/completions", {**COMPLETION, "guided_json": {"type": "thing"}}),
    ("POST", "/v1/completions", {**COMPLETION, "guided_grammar": "start: <|nothing|>"}),
    ("POST", "/v1/completions", {**COMPLETION, "max_tokens": 100_000}),
    ("POST", "/v1/completions", {**COMPLETION, "prompt": [5, 100_000]}),
    ("POST", "/v1/completions", {**COMPLETION, "prompt": [5, 100_000], "stream": True}),
    ("POST", "/v1/completions", {**COMPLETION, "prompt": ""}),
    ("POST", "/v1/completions", {**COMPLETION, "model": "other"}),
    ("POST", "/v1/completions", {**COMPLETION, "temperature": -1}),
    ("POST", "/v1/messages", CHAT),
    ("POST", "/v1/messages", {**CHAT, "stream": True, "system": "Short."}),
    ("POST", "/v1/messages/count_tokens", {"model": "tiny", "messages": CHAT["messages"]}),
    ("POST", "/tokenize", {"prompt": TEXT + EOS}),
    ("POST", "/detokenize", {"tokens": [5, 6, 7, 300]}),
    ("GET", "/tokenizer_info", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/tiny", None),
    ("GET", "/no/such/path", None),
)


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
def test_a_gateway_answers_what_its_worker_answers(
    calm: Cluster, method: str, path: str, body: Mapping[str, Any] | None
) -> None:
    assert calm.gateway is not None
    answers = []
    for url in (calm.workers["a"].url, calm.workers["a"].url, calm.gateway.url):
        answers.append(httpx.request(method, f"{url}{path}", json=body, timeout=DEADLINE))
    _, direct, through = answers  # the first one fills the cache
    assert through.status_code == direct.status_code
    assert lasting(through) == lasting(direct)
    assert through.headers["content-type"] == direct.headers["content-type"]


def lasting(response: httpx.Response) -> tuple[list[Any], str]:
    """The answer without ids and times. A stream's text counts as a whole, in whatever pieces it came (also all in its
    last event): its events that say more than text, without it, each kind once, and the text of all.
    """
    if not response.headers["content-type"].startswith("text/event-stream"):
        return [without_names(response.json())], ""
    texts: list[str] = []
    events = [
        without_names(json.loads(line.removeprefix("data: ")), texts) if line.startswith("data: {") else line
        for line in response.text.splitlines()
        if not line.startswith(":")  # comments say where the answer came from
    ]
    kinds = [event for number, event in enumerate(events) if event not in events[:number]]
    return [event for event in kinds if not is_text_alone(event)], "".join(texts)


def is_text_alone(event: Any) -> bool:
    """Whether nothing of an event is left without its text."""
    choices = event.get("choices") if isinstance(event, dict) else None
    return bool(choices) and not any(
        choice.get("finish_reason") or choice.get("logprobs") or choice.get("delta") for choice in choices
    )


def without_names(value: Any, texts: list[str] | None = None) -> Any:
    """texts: takes what is under the names of an answer's text, which is then left out."""
    if isinstance(value, list):
        return [without_names(each, texts) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, each in value.items():
        if texts is not None and name in ("content", "text") and isinstance(each, str):
            texts.append(each)
        elif name not in ("id", "created", "request_id"):
            kept[name] = without_names(each, texts)
    return kept


def test_the_second_turn_is_cached_and_says_where(calm: Cluster) -> None:
    assert calm.gateway is not None
    messages = [{"role": "user", "content": "A second turn. " + TEXT}]
    with httpx.Client(base_url=calm.gateway.url, timeout=DEADLINE) as client:
        first = client.post("/v1/chat/completions", json={**CHAT, "messages": messages})
        answer = first.json()["choices"][0]["message"]
        messages += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "And then?"}]
        second = client.post("/v1/chat/completions", json={**CHAT, "messages": messages})
    usage = second.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= first.json()["usage"]["prompt_tokens"] - 1
    assert second.headers["x-emberkv-route"].startswith("worker=a;why=")


def test_a_gateway_has_no_torch(calm: Cluster, tmp_path: Path) -> None:
    options = ("--worker", calm.workers["a"].url, "--cluster-secret-file", str(calm.secret_file))
    with serving(tmp_path, *options, through=("env",), command="gateway") as gateway:
        assert "libtorch" not in Path(f"/proc/{gateway.process.pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{calm.workers['a'].process.pid}/maps").read_text()


def test_a_gateway_says_how_its_workers_are(calm: Cluster) -> None:
    assert calm.gateway is not None
    eventually(lambda: calm.status("a")["index"] == "exact")
    assert calm.gateway.metric("emberkv_worker_status", worker="a", status="up") == 1
    assert calm.gateway.metric("emberkv_worker_index_exact", worker="a") == 1
    assert calm.gateway.metric("emberkv_worker_lost_requests_total", worker="a") == 0


def test_the_grafana_dashboard_asks_for_metrics_and_labels_that_exist(calm: Cluster) -> None:
    assert calm.gateway is not None
    httpx.post(f"{calm.gateway.url}/v1/completions", json=COMPLETION, timeout=DEADLINE).raise_for_status()
    labels: dict[str, set[str]] = {}
    for server in (calm.gateway, calm.workers["a"]):
        for family in text_string_to_metric_families(server.metrics_text()):
            total = f"{family.name}_total" if family.type == "counter" else family.name
            labels.setdefault(total, set())
            for sample in family.samples:
                labels.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads((files("emberkv") / "examples" / "grafana" / "emberkv.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(queries) >= 40
    for query in queries:
        for metric, matchers in re.findall(r"((?:emberkv|process)_\w+)\{([^}]*)\}", query):
            known = labels.get(metric, labels.get(metric.removesuffix("_bucket")))
            assert known is not None, f"{metric} of {query}"
            asked = set(re.findall(r"(\w+)[=!]", matchers)) | {
                name.strip() for group in re.findall(r"by \(([^)]+)\)", query) for name in group.split(",")
            }
            assert not known or asked - {"job", "instance", "le"} <= known, query


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """The URL of an OpenTelemetry collector, and the spans that it has been sent by OTLP over HTTP."""
    spans: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        thread.join(DEADLINE)
        server.server_close()


def test_a_gateway_sends_spans_of_routing_and_of_the_workers_time(calm: Cluster, tmp_path: Path) -> None:
    secret = ("--cluster-secret-file", str(calm.secret_file))
    traced = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    with collector() as (url, spans):
        options = ("--worker", calm.workers["a"].url, "--otlp-endpoint", url, *secret)
        with serving(tmp_path, *options, command="gateway") as gateway:
            eventually(lambda: httpx.get(f"{gateway.url}/ready", timeout=DEADLINE).status_code == 200)
            httpx.post(
                f"{gateway.url}/v1/completions", json=COMPLETION, headers=traced, timeout=DEADLINE
            ).raise_for_status()
        *stages, request = spans
    assert [stage.name for stage in stages] == ["prepare", "route", "queue", "prefill", "decode"]
    assert {stage.parent_span_id for stage in stages} == {request.span_id}
    assert request.trace_id.hex() == traced["traceparent"].split("-")[1]
    route = {each.key: each.value.string_value for each in stages[1].attributes}
    assert route["emberkv.route"].startswith("worker=a;why=")


def test_explain_says_where_a_prompt_would_go(calm: Cluster) -> None:
    assert calm.gateway is not None
    question = {"openai": {**CHAT, "messages": [{"role": "user", "content": "To be explained. " + TEXT}]}}
    with httpx.Client(base_url=calm.gateway.url, timeout=DEADLINE) as client:
        asked = client.post("/v1/chat/completions", json=question["openai"]).json()["usage"]["prompt_tokens"]
        found = client.post("/v1/cache/explain", json=question).json()
        assert client.get("/v1/cache").json()["workers"]["a"]["total_blocks"] > 0
    assert (found["prompt_tokens"], found["hit_tokens"], found["worker"]) == (asked, asked - 1, "a")
    assert [(each["worker"], each["hit_tokens"]) for each in found["workers"]] == [("a", asked - 1)]


def test_a_gateway_suggests_rules_for_lines_that_change_with_each_session(calm: Cluster) -> None:
    assert calm.gateway is not None
    gateway, asked = calm.gateway, 0

    def suggested() -> list[Any]:
        nonlocal asked
        asked += 1
        system = f"Session number: {asked * 7919}\n{TEXT}"
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "Which lamps?"}]
        httpx.post(f"{gateway.url}/v1/messages", json={**CHAT, "messages": messages}, timeout=DEADLINE)
        data: list[Any] = httpx.get(f"{gateway.url}/v1/cache/suggestions", timeout=DEADLINE).json()["data"]
        return data

    eventually(suggested)
    (found,) = suggested()
    assert (found["rule"]["name"], found["rule"]["action"]) == ("session-number", "move")
    assert found["rule"]["match"].startswith("Session number:")


def test_recorded_decisions_are_made_again_as_they_were(calm: Cluster) -> None:
    assert calm.gateway is not None
    assert httpx.post(f"{calm.gateway.url}/v1/completions", json=COMPLETION, timeout=DEADLINE).status_code == 200
    found = replay(read_decisions(calm.folder / "decisions"))
    assert found.decisions == found.same >= 1


def test_the_routes_of_the_cache_reach_all_workers_and_one_that_is_away_later(cluster: Cluster) -> None:
    for name in "ab":
        cluster.start_worker(name, "--cache-dir", str(cluster.folder / f"{name}-cache"))
    gateway = cluster.start_gateway("a", "b", routing="round-robin")
    for name in "ab":
        cluster.until(name, "up")
    with httpx.Client(base_url=gateway.url, timeout=DEADLINE) as client:
        answers = [client.post("/v1/completions", json=COMPLETION) for _ in range(2)]
        assert {each.headers["x-emberkv-route"].split(";")[0] for each in answers} == {"worker=a", "worker=b"}
        for each in answers:
            past = client.post("/v1/cache/explain", json={"response_id": each.json()["id"]}).json()
            assert each.headers["x-emberkv-route"].startswith(f"worker={past['worker']};")
            assert (past["prompt_tokens"], past["hit_tokens"]) == (each.json()["usage"]["prompt_tokens"], 0)
        unknown = client.post("/v1/cache/explain", json={"response_id": "cmpl-none"})
        assert unknown.status_code == 404
        (listed,) = client.get("/v1/cache/prefixes", params={"by": "largest", "limit": 1}).json()["data"]
        assert listed["workers"] == ["a", "b"]
        prefix = {"block_hash": listed["block_hash"]}
        pinned = client.post("/v1/cache/pin", json=prefix)
        assert pinned.json()["retained_blocks"] == 2 * pinned.json()["blocks"]
        assert client.post("/v1/cache/unpin", json=prefix).status_code == 200
        new = {"openai": {**COMPLETION, "prompt": "A prompt that no worker has. " + TEXT}}
        pinned = client.post("/v1/cache/pin", json=new)
        assert sum(each["tokens_kept_warm"] > 0 for each in pinned.json()["workers"]) == 1
        for name in "ab":
            eventually(lambda name=name: cluster.workers[name].metric("emberkv_tier_blocks", tier="disk") > 0)
        cluster.workers["b"].process.kill()
        cluster.until("b", "down")
        removed = client.post("/v1/cache/remove", json=prefix)
        assert removed.status_code == 207
        assert {each["worker"]: each["status"] for each in removed.json()["workers"]} == {"a": "done", "b": "later"}
        assert removed.json()["blocks"]["pool"] > 0
        statistics = client.get("/v1/cache")
        assert (statistics.status_code, statistics.json()["missed_removals"]) == (207, ["b"])
        cluster.start_worker("b", "--cache-dir", str(cluster.folder / "b-cache"))
        eventually(lambda: "has repeated the removals" in gateway.log.read_text())
        question = {"openai": COMPLETION}
        for name in "ab":
            found = httpx.post(f"{cluster.workers[name].url}/v1/cache/explain", json=question, timeout=DEADLINE)
            assert found.json()["hit_tokens"] == 0
        cleared = client.post("/v1/cache/clear", json={})
        assert (cleared.status_code, [each["status"] for each in cleared.json()["workers"]]) == (200, ["done"] * 2)


def test_internal_routes_need_the_secret(calm: Cluster) -> None:
    assert calm.gateway is not None
    for headers in ({}, {"authorization": "Bearer wrong"}):
        refused = httpx.post(f"{calm.gateway.url}/internal/v1/register", headers=headers, timeout=DEADLINE)
        assert refused.status_code == 401


class Streams:
    """So many streamed completions at once, half of them seeded; each must end as a worker alone ends it."""

    def __init__(self, cluster: Cluster, expected: Mapping[int, str]) -> None:
        self._cluster = cluster
        self._expected = expected
        self._pool = ThreadPoolExecutor(len(expected))
        self.begun = [Event() for _ in expected]
        self.ended = [self._pool.submit(self._check, number) for number in expected]

    def _check(self, number: int) -> None:
        assert self._cluster.gateway is not None
        text = streamed(self._cluster.gateway.url, number, self.begun[number].set)
        assert text == self._expected[number]

    def all_right(self) -> None:
        for each in self.ended:
            each.result(DEADLINE)
        self._pool.shutdown()


def body(number: int) -> dict[str, Any]:
    sampled = {"temperature": 1.0, "seed": number, "presence_penalty": 0.5} if number % 2 else {"temperature": 0}
    return {"model": "tiny", "prompt": f"{number}: {TEXT}", "max_tokens": LONG, "ignore_eos": True, **sampled}


def streamed(url: str, number: int, begun: Callable[[], None] = lambda: None) -> str:
    """The text of an answer that comes token by token, and ends well."""
    text, reasons = "", []
    request = {**body(number), "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=DEADLINE) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            if usage := event.get("usage"):
                assert usage["completion_tokens"] == LONG
            for choice in event["choices"]:
                text += choice["text"]
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
                begun()
    assert reasons == ["length"]
    return text


def undisturbed(worker: Server) -> dict[int, str]:
    """The answers of a worker alone."""
    with ThreadPoolExecutor(STREAMS) as threads:
        return dict(enumerate(threads.map(lambda number: streamed(worker.url, number), range(STREAMS))))


def test_streams_survive_a_killed_worker_and_a_hung_one(cluster: Cluster, long: bool) -> None:
    cluster.start_worker("a")
    cluster.start_worker("b")
    gateway = cluster.start_gateway("a", "b", worker_timeout="3", routing="round-robin")
    cluster.until("a", "up")
    cluster.until("b", "up")
    expected = undisturbed(cluster.workers["a"])

    def is_killed_amid_answers(name: str) -> bool:
        """False where a fast worker had given all of its answers before it was killed."""
        resumed = gateway.metric("emberkv_gateway_resumed_answers_total")
        streams = Streams(cluster, expected)
        for each in streams.begun:
            assert each.wait(DEADLINE)
        cluster.workers[name].process.kill()
        streams.all_right()
        cluster.until(name, "down")
        cluster.start_worker(name)
        cluster.until(name, "up")
        return gateway.metric("emberkv_gateway_resumed_answers_total") > resumed

    for kill in range(30 if long else 1):
        eventually(lambda name="ab"[kill % 2]: is_killed_amid_answers(name))
    streams = Streams(cluster, expected)
    for each in streams.begun:
        assert each.wait(DEADLINE)
    cluster.workers["b"].process.send_signal(signal.SIGSTOP)
    try:
        streams.all_right()
        cluster.until("b", "silent")
        for number in range(4):
            assert streamed(gateway.url, number) == expected[number]
    finally:
        cluster.workers["b"].process.send_signal(signal.SIGCONT)
    cluster.until("b", "up")


def test_a_gateway_finds_workers_that_start_later_and_a_new_one_knows_what_they_have(cluster: Cluster) -> None:
    """One of the workers registers itself, at either gateway."""
    gateway = cluster.start_gateway("a")
    assert httpx.get(f"{gateway.url}/ready", timeout=DEADLINE).status_code == 503
    refused = httpx.post(f"{gateway.url}/v1/completions", json=body(0), timeout=DEADLINE)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    cluster.start_worker("a")
    cluster.start_worker("b", "--gateway", gateway.url)
    for name in "ab":
        cluster.until(name, "up")
    assert httpx.get(f"{gateway.url}/ready", timeout=DEADLINE).status_code == 200
    chosen = httpx.post(f"{gateway.url}/v1/completions", json=COMPLETION, timeout=DEADLINE).headers["x-emberkv-route"]
    gateway.process.terminate()
    assert gateway.exit_code() == 0
    again = cluster.start_gateway("a")
    for name in "ab":
        cluster.until(name, "up")
        eventually(lambda name=name: cluster.status(name)["index"] == "exact")
    for _ in range(3):
        response = httpx.post(f"{again.url}/v1/completions", json=COMPLETION, timeout=DEADLINE)
        assert response.headers["x-emberkv-route"].split(";")[0] == chosen.split(";")[0]
        assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_model_on_demand_is_loaded_by_a_request_to_the_gateway_and_what_it_is_asked_is_recorded(
    cluster: Cluster,
) -> None:
    trace = cluster.folder / "trace.jsonl"
    worker = cluster.start_worker("a", "--model-on-demand", "--kv-routes", "--record-trace", str(trace))
    gateway = cluster.start_gateway("a")
    cluster.until("a", "idle")
    assert httpx.get(f"{gateway.url}/ready", timeout=DEADLINE).status_code == 200
    with ThreadPoolExecutor(2) as threads:
        ask = partial(httpx.post, f"{gateway.url}/v1/completions", json=COMPLETION, timeout=DEADLINE)
        answers = [each.result() for each in [threads.submit(ask), threads.submit(ask)]]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert httpx.delete(f"{worker.url}/inference/model", timeout=DEADLINE).json()["status"] == "unloaded"
    cluster.until("a", "idle")
    assert ask().json()["choices"] == answers[0].json()["choices"]
    eventually(lambda: worker.total("emberkv_channel_requests_total", outcome="finished") == 3)
    eventually(lambda: len([line for line in trace.read_text().splitlines() if "prompt_tokens" in line]) == 3)


def test_a_rolling_restart_fails_no_request(cluster: Cluster) -> None:
    for name in "ab":
        cluster.start_worker(name)
    gateway = cluster.start_gateway("a", "b")
    for name in "ab":
        cluster.until(name, "up")
    stop = Event()

    def ask(user: int) -> int:
        count = 0
        with httpx.Client(base_url=gateway.url, timeout=DEADLINE) as client:
            while not stop.is_set():
                count += 1
                response = client.post("/v1/completions", json={**body(user), "max_tokens": 20})
                assert response.status_code == 200, response.text
                assert response.json()["usage"]["completion_tokens"] == 20
        return count

    with ThreadPoolExecutor(4) as threads:
        users = [threads.submit(ask, user) for user in range(4)]
        try:
            for name in "ab":
                cluster.workers[name].process.terminate()
                assert cluster.workers[name].exit_code() == 0
                cluster.start_worker(name)
                cluster.until(name, "up")
        finally:
            stop.set()
        assert all(user.result(DEADLINE) for user in users)

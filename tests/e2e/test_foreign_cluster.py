"""Servers known by the OpenAI API alone behind a gateway, as processes: ``emberkv serve`` stands for any of them."""

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import CheckpointFactory
from tests.e2e.process import Server, serving
from tests.waiting import DEADLINE, eventually

SECRET = "the-secret-of-these-tests"
TEXT = "the lamps along the street are lit at six and go out at dawn. " * 10
OPTIONS = ("--served-name", "tiny", "--no-warmup", "--cache-ram", "24MiB")
COMPLETION = {"model": "tiny", "prompt": TEXT, "max_tokens": 8, "temperature": 0}


class Foreign:
    """Two servers without a cluster's secret, a gateway that has the model's tokenizer, and its client."""

    def __init__(self, stack: ExitStack, folder: Path, model: Path) -> None:
        self.servers: dict[str, Server] = {}
        for name in ("a", "b"):
            (folder / name).mkdir()
            self.servers[name] = stack.enter_context(serving(folder / name, str(model), *OPTIONS))
        foreign = [
            part for name, server in self.servers.items() for part in ("--foreign-worker", f"{server.url},id={name}")
        ]
        (folder / "gateway").mkdir()
        self.trace = folder / "trace.jsonl"
        recorded = ("--record-trace", str(self.trace))
        self.gateway = stack.enter_context(
            serving(folder / "gateway", str(model), *foreign, *recorded, command="gateway")
        )
        self.client = stack.enter_context(httpx.Client(base_url=self.gateway.url, timeout=DEADLINE))
        eventually(lambda: set(self.statuses().values()) == {"up"})

    def statuses(self) -> dict[str, str]:
        return {each["worker_id"]: each["status"] for each in self.client.get("/v1/cluster").json()["workers"]}

    def ask(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json=COMPLETION | body)


@pytest.fixture(scope="module")
def foreign(checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    with ExitStack() as stack:
        yield Foreign(stack, tmp_path_factory.mktemp("foreign"), checkpoint("llama"))


def route(response: httpx.Response) -> dict[str, str]:
    return dict(pair.split("=") for pair in response.headers["x-emberkv-route"].split(";"))


def test_answers_are_the_servers_own_and_equal_beginnings_stay_together(foreign: Foreign) -> None:
    first = foreign.ask()
    direct = httpx.post(f"{foreign.servers['a'].url}/v1/completions", json=COMPLETION, timeout=DEADLINE)
    assert first.json()["choices"] == direct.json()["choices"]
    again = foreign.ask(prompt=f"{TEXT}Which of them?")
    assert route(again)["worker"] == route(first)["worker"]
    tokens, cached = (again.json()["usage"][name] for name in ("prompt_tokens", "prompt_tokens_details"))
    assert cached["cached_tokens"] >= first.json()["usage"]["prompt_tokens"] - 1
    assert cached["cached_tokens"] - 16 <= int(route(again)["pool"]) <= tokens
    assert again.headers["x-emberkv-cache"].startswith(f"hit={cached['cached_tokens']};")


def test_a_stream_has_the_usage_that_its_client_asked_for(foreign: Foreign) -> None:
    for options, has_usage in ({}, False), ({"stream_options": {"include_usage": True}}, True):
        answer = foreign.ask(stream=True, **options)
        assert answer.text.endswith("data: [DONE]\n\n")
        assert ('"prompt_tokens"' in answer.text) is has_usage


def test_messages_and_responses_say_what_a_server_with_these_routes_says(foreign: Foreign) -> None:
    server = next(iter(foreign.servers.values()))
    question = [{"role": "user", "content": TEXT}]
    asked = {"model": "tiny", "max_tokens": 8, "temperature": 0, "messages": question}
    answers = [
        httpx.post(f"{each.url}/v1/messages", json=asked, timeout=DEADLINE) for each in (server, foreign.gateway)
    ]
    direct, converted = (answer.json() for answer in answers)
    for name in ("content", "stop_reason", "stop_sequence"):
        assert converted[name] == direct[name]
    assert converted["usage"]["output_tokens"] == direct["usage"]["output_tokens"]
    assert route(answers[1])["worker"] in foreign.servers
    with httpx.stream(
        "POST", f"{foreign.gateway.url}/v1/messages", json={**asked, "stream": True}, timeout=DEADLINE
    ) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    assert text == direct["content"][0]["text"]
    body = {"model": "tiny", "max_output_tokens": 8, "temperature": 0, "input": TEXT}
    texts = [
        httpx.post(f"{each.url}/v1/responses", json=body, timeout=DEADLINE).json()["output"][0]["content"][0]["text"]
        for each in (server, foreign.gateway)
    ]
    assert texts[0] == texts[1]


def test_explain_compares_tokens(foreign: Foreign) -> None:
    question = {"prompt": f"{TEXT}and at noon, and at noon, and at noon, and at noon.", "model": "tiny"}
    foreign.ask(prompt=f"{TEXT}not at noon, not at noon, not at noon, not at noon.")
    found = foreign.client.post("/v1/cache/explain", json={"openai": question}).json()
    assert found["unit"] == "tokens"
    assert found["hit_tokens"] > 0
    assert found["divergence"]["found"].strip().startswith("and")
    assert found["divergence"]["expected"].strip().startswith("not")


def test_a_killed_server_ends_its_stream_with_an_error_and_the_others_go_on(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        foreign = Foreign(stack, tmp_path, checkpoint("llama"))
        body = COMPLETION | {"max_tokens": 4000, "stream": True, "ignore_eos": True}
        with foreign.client.stream("POST", "/v1/completions", json=body) as answer:
            owner = route(answer)["worker"]
            lines = answer.iter_lines()
            next(lines)
            foreign.servers[owner].process.send_signal(signal.SIGKILL)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["code"] == "generation_failed"
        answers = [foreign.ask(max_tokens=2) for _ in range(3)]
        assert [each.status_code for each in answers] == [200] * 3
        assert owner not in {route(each)["worker"] for each in answers}
        eventually(lambda: foreign.statuses()[owner] == "down")


def test_a_worker_of_emberkv_and_a_foreign_one_serve_the_same_model(
    foreign: Foreign, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    for name in ("own", "gateway"):
        (tmp_path / name).mkdir()
    internal = ("--cluster-secret-file", str(secret))
    beside = ("--foreign-worker", f"{foreign.servers['b'].url},id=b")
    with (
        serving(tmp_path / "own", str(checkpoint("llama")), *OPTIONS, "--worker-id", "own", *internal) as own,
        serving(tmp_path / "gateway", "--worker", own.url, *beside, *internal, command="gateway") as gateway,
        httpx.Client(base_url=gateway.url, timeout=DEADLINE) as client,
    ):

        def both_are_up() -> bool:
            listed = client.get("/v1/cluster").json()["workers"]
            return [each["status"] for each in listed] == ["up", "up"]

        eventually(both_are_up)
        prompts = [f"{number} {TEXT}" for number in range(12)]
        answers = [client.post("/v1/completions", json=COMPLETION | {"prompt": each}) for each in prompts]
        assert {route(each)["worker"] for each in answers} == {"own", "b"}
        assert {each.status_code for each in answers} == {200}
        again = [client.post("/v1/completions", json=COMPLETION | {"prompt": each}) for each in prompts]
        assert [route(each)["worker"] for each in again] == [route(each)["worker"] for each in answers]
        assert [each.json()["choices"] for each in again] == [each.json()["choices"] for each in answers]

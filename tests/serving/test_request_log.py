"""The log: a line for each finished request, as text or JSON, and never a word of a prompt."""

import json
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from emberkv.core.sequence import FinishReason
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.request_context import JsonFormatter, TextFormatter, duration, percent
from tests.serving.api.test_cache_explain import ANN, HERE, LONG, Server, text, two_tenants
from tests.serving.core_engine import CoreEngine
from tests.serving.fakes import ByteTokenizer, FakeEngine, Script
from tests.serving.harness import MODEL, Client

MARKER = "Rumpelstiltskin"


class Lines(logging.Handler):
    """Everything that is logged, each record as a formatter writes it."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture(params=[JsonFormatter(), logging.Formatter("%(name)s %(message)s")], ids=["json", "text"])
def log(request: pytest.FixtureRequest) -> Iterator[Lines]:
    handler = Lines(request.param)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


def requests(log: Lines) -> list[str]:
    return [line for line in log.lines if "emberkv.requests" in line]


@pytest.mark.parametrize("log", [JsonFormatter()], indirect=True)
def test_a_finished_request_in_json(log: Lines) -> None:
    server = two_tenants()
    response = server.complete(LONG, ANN)
    (line,) = requests(log)
    fields: dict[str, Any] = json.loads(line)
    assert fields.pop("time")[:2] == "20"
    assert fields.pop("first_token_seconds") <= fields.pop("total_seconds")
    assert fields.pop("request_id") == response.headers["x-request-id"]
    assert fields == {
        "level": "info",
        "logger": "emberkv.requests",
        "request": response.json()["id"],
        "api": "completions",
        "tenant": server.core.submitted[0].tenant,
        "finish": "length",
        "prompt_tokens": 46,
        "cached_tokens": 0,
        "completion_tokens": 2,
        "cache": "hit=0;miss=46;why=new@0",
        "canonical": {},
        "left_out": {},
    }


@pytest.mark.parametrize("log", [logging.Formatter("%(name)s %(message)s")], indirect=True)
def test_a_finished_request_in_text(log: Lines) -> None:
    server = Server()
    server.complete(LONG)
    server.complete(LONG)
    first, second = requests(log)
    assert re.fullmatch(r"emberkv.requests text  46 prompt, 0 cached \(0.0%\)  2 out  ttft \d+ ms", first)
    assert "  46 prompt, 40 cached (86.9%)  2 out" in second


def test_a_line_of_text_on_a_terminal() -> None:
    def line(level: int, columns: int = 80) -> str:
        record = logging.LogRecord("emberkv", level, "", 0, "the cache is %s", ("cold",), None)
        record.created = time.mktime((2026, 11, 28, 12, 42, 3, 0, 0, -1))
        return TextFormatter(lambda: columns).format(record)

    assert line(logging.INFO) == "12:42:03 the cache is cold"
    assert line(logging.WARNING) == "12:42:03 WARNING the cache is cold"
    assert line(logging.WARNING, 28) == "12:42:03 WARNING the cache\n         is cold"


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [(7515, 7516, "99.9%"), (7516, 7516, "100.0%"), (1, 10_000, "0.0%"), (2, 3, "66.6%"), (0, 0, "0.0%")],
)
def test_a_percentage_is_rounded_down(part: int, whole: int, expected: str) -> None:
    assert percent(part, whole) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.0621, "62 ms"), (1.0621, "1,062 ms"), (17.1084, "17.1 s"), (2350.9, "2,350.9 s")]
)
def test_a_duration_has_a_unit_that_fits(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize("log", [JsonFormatter()], indirect=True)
def test_each_answer_has_its_line(log: Lines) -> None:
    server = Server()
    body = {"model": MODEL, "prompt": [LONG, "x" * 50], "max_tokens": 2}
    request_id = server.client.post("/v1/completions", body).json()["id"]
    assert [json.loads(line)["request"] for line in requests(log)] == [request_id, f"{request_id}.1"]


@pytest.mark.parametrize("log", [JsonFormatter()], indirect=True)
def test_other_messages_and_failures_in_json(log: Lines) -> None:
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("emberkv.test").exception("it failed: %s", "badly")
    fields = json.loads(log.lines[-1])
    assert (fields["level"], fields["message"]) == ("error", "it failed: badly")
    assert fields["exception"].endswith("ValueError: no")


@pytest.mark.parametrize("log", [JsonFormatter()], indirect=True)
def test_a_refused_request_in_json(log: Lines) -> None:
    server = two_tenants()
    server.client.post("/v1/completions", {"model": MODEL}, headers={**ANN, "x-request-id": "mine-1"})
    server.client.post("/v1/completions", {"model": MODEL, "prompt": "x"}, headers={"x-api-key": "guess"})
    server.client.get("/v1/chat/%0Aforged?key=secret")
    lines = [json.loads(line) for line in requests(log)]
    logged_fields = [tuple(line[name] for name in ("method", "path", "status", "code", "param")) for line in lines]
    assert logged_fields == [
        ("POST", "/v1/completions", 400, None, "prompt"),
        ("POST", "/v1/completions", 401, "invalid_api_key", None),
        ("GET", "/v1/chat/%0Aforged", 404, None, None),
    ]
    assert lines[0]["request_id"] == "mine-1"


@pytest.mark.parametrize("log", [logging.Formatter("%(message)s")], indirect=True)
def test_a_refused_request_in_text(log: Lines) -> None:
    Server().client.post("/v1/completions", {"model": MODEL}, headers={"x-request-id": "mine-1"})
    assert "400  POST /v1/completions  prompt  mine-1" in log.lines


def test_no_word_of_a_prompt_reaches_any_log(log: Lines) -> None:
    rules = CanonicalRules.model_validate({"lines": [{"name": "x", "match": "Rumpel*", "action": "drop"}]})
    core = CoreEngine()
    server = Server(core, bound_to_loopback=True, canonical=rules)
    conversation = {
        "messages": [{"role": "system", "content": f"{MARKER}\nBe kind."}, {"role": "user", "content": MARKER}]
    }
    headers = {"x-session-id": MARKER}
    for stream in (False, True):
        ask = {"model": MODEL, "max_tokens": 2, "stream": stream}
        server.client.post("/v1/chat/completions", {**ask, **conversation}, headers=headers)
        server.client.post("/v1/completions", {**ask, "prompt": MARKER}, headers=headers)
        server.client.post("/v1/messages", {**ask, "system": MARKER, "messages": conversation["messages"][1:]})
        server.client.post("/v1/completions", {**ask, "prompt": MARKER, "temperature": MARKER})
        server.client.post("/v1/chat/completions", {**ask, "messages": [{"role": MARKER, "content": MARKER}]})
        offending = [{"role": "user", "content": "offend the template"}, {"role": "user", "content": MARKER}]
        server.client.post("/v1/chat/completions", {**ask, "messages": offending})
    server.client.post("/v1/cache/explain", text(MARKER * 3), headers=HERE)
    server.client.post("/v1/cache/explain", {"openai": conversation}, headers=HERE)
    server.client.post("/v1/cache/warm", text(MARKER * 3), headers=HERE)
    assert len(requests(log)) == 7 + 6  # answered, and refused
    assert not [line for line in log.lines if MARKER in line]


def test_nor_when_the_engine_fails(log: Lines) -> None:
    engine = FakeEngine(Script("no", finish=FinishReason.ERROR, error="the engine failed: RuntimeError"))
    lifecycle = Lifecycle()
    lifecycle.loaded(ServedModel((MODEL,), 0, engine, ByteTokenizer()))
    client = Client(create_app(lifecycle, ServingSettings()))
    for stream in (False, True):
        client.post("/v1/completions", {"model": MODEL, "prompt": MARKER, "stream": stream})
    engine.stop()
    whole, refused, streamed = requests(log)
    assert "error" in whole
    assert "generation_failed" in refused
    assert "error" in streamed
    assert not [line for line in log.lines if MARKER in line]

"""The Anthropic routes: values of messages, events, usage and token counts."""

import json
from typing import Any

import httpx
import pytest

from emberkv.core.sequence import FinishReason
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, Client, anthropic_error

USER = [{"role": "user", "content": "Hi"}]
PROMPT = "<user>Hi<assistant>"


def send(client: Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/messages", {"model": MODEL, "messages": USER, "max_tokens": 100, **fields})


def events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events; each must be named after its type."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parsed = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {parsed[-1]['type']}"
    return parsed


def test_message(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("Hello", cached=8, created=6)
    body = send(client).json()
    assert body["id"].startswith("msg_")
    del body["id"]
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(PROMPT) - 14,
            "cache_creation_input_tokens": 6,
            "cache_read_input_tokens": 8,
            "output_tokens": 5,
        },
    }


def test_parameters_reach_the_engine(client: Client, engine: FakeEngine) -> None:
    response = send(client, temperature=0.5, top_p=0.25, top_k=3, stop_sequences=["x"], metadata={"user_id": "1"})
    assert response.status_code == 200
    params = engine.submitted[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (100, 0.5, 0.25, 3)
    assert params.stop == ("x",)


def test_stop_reasons(client: Client) -> None:
    assert send(client, max_tokens=3).json()["stop_reason"] == "max_tokens"
    stopped = send(client, stop_sequences=["zz", "lo t"]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "lo t")
    assert stopped["content"] == [{"type": "text", "text": "Hel"}]


def test_stream(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("Hé\n.", cached=8, created=6)
    sequence = events(send(client, stream=True))
    deltas = [event for event in sequence if event["type"] == "content_block_delta"]
    assert [event["type"] for event in sequence if event not in deltas] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    prompt_usage = {
        "input_tokens": len(PROMPT) - 14,
        "cache_creation_input_tokens": 6,
        "cache_read_input_tokens": 8,
    }
    start = sequence[0]["message"]
    assert (start["content"], start["stop_reason"], start["model"]) == ([], None, MODEL)
    assert start["usage"] == {**prompt_usage, "output_tokens": 0}
    assert sequence[1] == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    assert "".join(event["delta"]["text"] for event in deltas) == "Hé\n."
    assert {event["delta"]["type"] for event in deltas} == {"text_delta"}
    assert sequence[-2] == {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "stop_sequence": None},
        "usage": {**prompt_usage, "output_tokens": 5},
    }


def test_a_failure_ends_a_stream_with_an_error_event(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("abc", finish=FinishReason.ERROR, error="out of memory")
    assert events(send(client, stream=True))[-1] == {
        "type": "error",
        "error": {"type": "api_error", "message": "generation failed: out of memory"},
    }


@pytest.mark.parametrize("system", ["Be brief", [{"type": "text", "text": "Be brief"}]])
def test_system_and_cache_control(client: Client, engine: FakeEngine, system: Any) -> None:
    block = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    assert send(client, system=system, messages=[{"role": "user", "content": [block]}]).status_code == 200
    assert bytes(engine.submitted[0].prompt_token_ids).decode() == "<system>Be brief" + PROMPT


def test_a_begun_answer_is_continued(client: Client, engine: FakeEngine) -> None:
    send(client, messages=[*USER, {"role": "assistant", "content": "Well,"}])
    assert bytes(engine.submitted[0].prompt_token_ids).decode() == PROMPT + "Well,"


def test_tools_are_shown_as_the_template_shows_them(client: Client, engine: FakeEngine) -> None:
    messages = [
        *USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "Adding."},
                {"type": "tool_use", "id": "1", "name": "add", "input": {"x": 2}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "3"}]},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    tools = [{"name": "add", "description": "adds", "input_schema": {"type": "object"}}]
    assert send(client, messages=messages, tools=tools).status_code == 200
    assert bytes(engine.submitted[0].prompt_token_ids).decode() == (
        "<tool add><user>Hi<assistant>Adding.[add 2]<tool>3<user>So?<assistant>"
    )


def test_count_tokens(client: Client, engine: FakeEngine) -> None:
    response = client.post("/v1/messages/count_tokens", {"model": MODEL, "messages": USER, "system": "Be"})
    assert response.json() == {"input_tokens": len("<system>Be" + PROMPT)}
    assert engine.submitted == []


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_asked_for_warms_the_cache(client: Client, engine: FakeEngine, stream: bool) -> None:
    engine.script = Script("Hello", created=8)
    answer = send(client, max_tokens=0, stream=stream)
    if stream:
        kinds = [line.removeprefix("event: ") for line in answer.text.split("\n") if line.startswith("event: ")]
        assert kinds == ["message_start", "message_delta", "message_stop"]
        return
    message = answer.json()
    assert (message["content"], message["stop_reason"]) == ([], "max_tokens")
    assert (message["usage"]["output_tokens"], message["usage"]["cache_creation_input_tokens"]) == (0, 8)


def test_cache_control_of_the_request_covers_all_of_it(client: Client, engine: FakeEngine) -> None:
    assert client.post(
        "/v1/messages",
        {"model": MODEL, "messages": USER, "max_tokens": 5, "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    ).is_success
    request = engine.submitted[-1]
    assert (request.retain_tokens, request.retain_seconds) == (len(request.prompt_token_ids), 3600.0)
    for bogus in ({"type": "forever"}, {"type": "ephemeral", "ttl": "2h"}):
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            refused = client.post(path, {"model": MODEL, "messages": USER, "max_tokens": 5, "cache_control": bogus})
            assert refused.status_code == 400
            assert "cache_control" in anthropic_error(refused)["message"]


def test_the_session_in_the_metadata_reaches_the_engine(client: Client, engine: FakeEngine) -> None:
    session = "0f8fad5b-d9cb-469f-a165-70867728950e"
    assert send(client, metadata={"user_id": f"user_1_account__session_{session}"}).is_success
    assert engine.submitted[0].session_id == session

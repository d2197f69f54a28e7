"""The Anthropic routes: values of messages, events, usage and token counts."""

import json
from typing import Any

import httpx
import pytest

from emberkv.core.sequence import FinishReason
from emberkv.serving.api.anthropic_schema import PromptRequest
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.canonical import rules_in_force
from emberkv.serving.lifecycle import Lifecycle
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, Client, anthropic_error, sse_blocks

USER = [{"role": "user", "content": "Hi"}]
PROMPT = "<user>Hi<assistant>"


def send(client: Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/messages", {"model": MODEL, "messages": USER, "max_tokens": 100, **fields})


def prompt_of(engine: FakeEngine, request: int = -1) -> str:
    return bytes(engine.submitted[request].prompt_token_ids).decode()


def events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events; each must be named after its type."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parsed = []
    for block in sse_blocks(response):
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


def test_a_begun_answer_keeps_its_thoughts(client: Client, engine: FakeEngine) -> None:
    thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    begun = {"role": "assistant", "content": [thought, {"type": "text", "text": "Well,"}]}
    wanted = PromptRequest(model=MODEL, messages=[*USER, begun]).conversation()
    assert wanted.messages[-1]["reasoning_content"] == "Hm."
    assert (wanted.continue_final_message, wanted.add_generation_prompt, wanted.begun) == (True, False, "")
    assert send(client, messages=[*USER, begun]).status_code == 200
    assert bytes(engine.submitted[0].prompt_token_ids).decode().endswith("<assistant>Well,...")


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


def test_system_messages_are_rendered_where_they_stand(client: Client, engine: FakeEngine) -> None:
    late = {"role": "system", "content": [{"type": "text", "text": "Stay"}, {"type": "text", "text": "brief"}]}
    assert send(client, system="Be kind", messages=[*USER, late]).is_success
    assert prompt_of(engine) == "<system>Be kind<user>Hi<system>Stay\nbrief<assistant>"


def test_what_is_left_out_is_named_in_a_header(client: Client, engine: FakeEngine) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    tools = [{"type": "web_search_20250305", "name": "web_search"}, {"type": "bash_20250124", "name": "bash"}]
    content = [image, {"type": "text", "text": "What is it?"}, image]
    answer = send(client, messages=[{"role": "user", "content": content}], tools=tools)
    assert prompt_of(engine) == "<user>[image left out]\nWhat is it?\n[image left out]<assistant>"
    assert answer.headers["x-emberkv-left-out"] == "image=2;web_search_20250305=1;bash_20250124=1"
    assert "x-emberkv-left-out" not in send(client).headers


def test_fields_that_are_not_known_are_named_in_a_header(client: Client) -> None:
    edits = [{"type": "clear_thinking_20251015", "keep": "all"}]
    known = {"service_tier": "auto", "context_management": {"edits": edits}}
    assert "x-emberkv-left-out" not in send(client, **known).headers
    unknown = {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}, "speed": "fast"}
    assert send(client, **unknown).headers["x-emberkv-left-out"] == "context_management=1;speed=1"


def test_whole_numbers_may_have_a_fraction_of_zero(client: Client, engine: FakeEngine) -> None:
    assert send(client, max_tokens=4.0, top_k=5.0).is_success
    (request,) = engine.submitted
    assert (request.params.max_tokens, request.params.top_k) == (4, 5)


def test_tools_stay_in_the_prompt_when_none_may_be_called(client: Client, engine: FakeEngine) -> None:
    tools = [{"name": "add", "input_schema": {"type": "object"}}]
    for choice in ("auto", "none"):
        assert send(client, tools=tools, tool_choice={"type": choice}).is_success
    assert prompt_of(engine, 0) == prompt_of(engine, 1) == "<tool add>" + PROMPT


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 4000}}, "{enable_thinking=True}"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
         "{enable_thinking=True}{reasoning_effort=low}"),
        ({"thinking": {"type": "disabled"}}, "{enable_thinking=False}"),
        ({}, ""),
    ],
)  # fmt: skip
def test_thinking_reaches_the_template(client: Client, engine: FakeEngine, fields: dict[str, Any], shown: str) -> None:
    assert send(client, **fields).is_success
    assert prompt_of(engine) == shown + PROMPT


def test_a_schema_of_the_answer_is_a_constraint(client: Client, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {"title": {"type": "string"}}}
    wanted = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": wanted}}, {"output_format": wanted}):
        assert send(client, **fields).is_success
        constraint = engine.submitted[-1].params.constraint
        assert constraint is not None
        assert (constraint.kind, json.loads(constraint.text)) == ("json_schema", schema)


def test_batches_are_refused_by_name(client: Client) -> None:
    for path in ("/v1/messages/batches", "/v1/messages/batches/b_1/results"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert anthropic_error(answer)["message"].startswith("message batches are not supported")


# What Claude Code sends at its start, as captured, with shorter texts: HEAD /, and a streamed message in whose history
# a system message stands behind the user's.
CLAUDE_CODE: dict[str, Any] = {
    "model": MODEL,
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "<system-reminder>The date is known.</system-reminder>"},
            {"type": "text", "text": "say hi", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ]},
        {"role": "system", "content": "Skills: none."},
    ],
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.f03; cc_entrypoint=sdk-cli;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    ],
    "tools": [{"name": "Bash", "description": "runs", "input_schema": {"type": "object", "properties": {}}}],
    "metadata": {"user_id": '{"device_id":"d","account_uuid":"","session_id":"0f8fad5b-d9cb-469f-a165-70867728950e"}'},
    "max_tokens": 32000,
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "stream": True,
}  # fmt: skip


def test_claude_codes_first_requests(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    rules = rules_in_force(None, for_agents=True)
    client = Client(create_app(lifecycle, ServingSettings(canonical=rules)))
    assert client.request("HEAD", "/").status_code == 200
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,mid-conversation-system-2026-04-07",
        "x-claude-code-session-id": "s",
        "authorization": "Bearer none",
    }
    answer = client.post("/v1/messages?beta=true", CLAUDE_CODE, headers=headers)
    assert [event["type"] for event in events(answer)][-2:] == ["message_delta", "message_stop"]
    assert prompt_of(engine) == (
        "{enable_thinking=True}{reasoning_effort=high}<tool Bash><system>You are an agent."
        "<user><system-reminder>The date is known.</system-reminder>\nsay hi<system>Skills: none.<assistant>"
    )
    assert engine.submitted[0].session_id == "s"


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

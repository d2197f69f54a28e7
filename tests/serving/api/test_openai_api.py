"""Chat completions and models: values of answers, streams and usage."""

import json
from typing import Any

import httpx
import pytest

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import Constraint
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, Client, openai_error, openai_events

USER = [{"role": "user", "content": "Hi"}]


def chat(client: Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", {"model": MODEL, "messages": USER, **fields})


def test_chat(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("Hello", cached=8)
    body = chat(client).json()
    assert body["id"].startswith("chatcmpl-")
    del body["id"]
    prompt = "<user>Hi<assistant>"
    assert body == {
        "object": "chat.completion",
        "created": 1_800_000_000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": 5,
            "total_tokens": len(prompt) + 5,
            "prompt_tokens_details": {"cached_tokens": 8},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    (request,) = engine.submitted
    assert bytes(request.prompt_token_ids) == prompt.encode()
    assert request.params.max_tokens == engine.context_length - len(prompt)


def test_chat_parameters_reach_the_engine(client: Client, engine: FakeEngine) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "seed": 42,
        "stop": ["x", "y"],
        "repetition_penalty": 1.5,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "ignore_eos": True,
    }
    assert chat(client, max_completion_tokens=3, max_tokens=99, some_unknown_field=1, **fields).status_code == 200
    params = engine.submitted[0].params
    assert params.max_tokens == 3
    assert params.stop == ("x", "y")
    assert {name: getattr(params, name) for name in fields if name != "stop"} == {
        name: value for name, value in fields.items() if name != "stop"
    }


def test_an_integer_is_a_valid_temperature(client: Client, engine: FakeEngine) -> None:
    assert chat(client, temperature=0, stop=None).status_code == 200
    assert engine.submitted[0].params.is_greedy


def test_max_tokens_gives_length(client: Client) -> None:
    body = chat(client, max_tokens=4).json()
    assert body["choices"][0]["message"]["content"] == "Hell"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_stop_string_spans_tokens_and_aborts_the_engine(
    client: Client, engine: FakeEngine, tokens_per_step: int
) -> None:
    engine.script = Script("one two three four " * 40, tokens_per_step=tokens_per_step, pause_after=30)
    body = chat(client, stop=" three").json()
    assert body["choices"][0]["message"]["content"] == "one two"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len("one two three")
    assert engine.aborted == [engine.submitted[0].request_id]


def test_chat_stream(client: Client, engine: FakeEngine) -> None:
    engine.script = Script('Hé "\n', cached=4)
    chunks = openai_events(chat(client, stream=True, stream_options={"include_usage": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["created"] for chunk in chunks} == {1_800_000_000}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == 'Hé "\n'
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 19,
        "completion_tokens": 6,
        "total_tokens": 25,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_a_stream_has_no_usage_unless_asked(client: Client) -> None:
    assert all("usage" not in chunk for chunk in openai_events(chat(client, stream=True)))


def test_chat_logprobs(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("é!")
    content = chat(client, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    alternatives = [
        {"token": "x", "logprob": -0.25, "bytes": [ord("x")]},
        {"token": "y", "logprob": -9999.0, "bytes": [ord("y")]},
    ]
    half = {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": alternatives}
    assert content == [half, {**half, "bytes": [0xA9]}, {**half, "token": "!", "bytes": [ord("!")]}]


def test_chat_logprobs_without_alternatives_and_streamed(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("ab")
    chunks = openai_events(chat(client, logprobs=True, stream=True))
    entries = [
        entry
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert [(entry["token"], entry["top_logprobs"]) for entry in entries] == [("a", []), ("b", [])]


def test_several_choices_share_a_prompt_and_differ_in_seed(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("abc", cached=2)
    body = chat(client, n=3, seed=10).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [request.params.seed for request in engine.submitted] == [10, 11, 12]
    assert body["usage"]["prompt_tokens"] == 19
    assert body["usage"]["completion_tokens"] == 9
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


def test_the_seeds_of_several_choices_go_on_after_the_largest(client: Client, engine: FakeEngine) -> None:
    assert chat(client, n=3, seed=2**63 - 2).status_code == 200
    assert [request.params.seed for request in engine.submitted] == [2**63 - 2, 2**63 - 1, -(2**63)]


def test_several_choices_streamed(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("abc")
    texts = {0: "", 1: ""}
    for chunk in openai_events(chat(client, n=2, stream=True)):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "abc", 1: "abc"}


def test_messages_reach_the_template(client: Client, engine: FakeEngine) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 2}'}}
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert chat(client, messages=messages, tools=tools, tool_choice="auto").status_code == 200
    assert chat(client, messages=messages, tools=tools, tool_choice="none").status_code == 200
    rendered = "<system>Be brief<user>a\nb<assistant>[add 2]<tool>3<assistant>"
    shown = [bytes(request.prompt_token_ids).decode() for request in engine.submitted]
    assert shown == ["<tool add>" + rendered] * 2  # so that the choice does not change the prefix


def test_models(client: Client) -> None:
    card = {"object": "model", "created": 1_700_000_000, "owned_by": "emberkv", "max_model_len": 1000}
    cards = [{"id": MODEL, **card}, {"id": "alias", **card}]
    assert client.get("/v1/models").json() == {"object": "list", "data": cards}
    assert client.get("/v1/models/alias").json() == cards[1]
    missing = client.get("/v1/models/org/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_an_alias_answers_under_the_models_first_name(client: Client) -> None:
    assert chat(client, model="alias").json()["model"] == "alias"


def test_an_engine_failure_is_a_500(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("abc", finish=FinishReason.ERROR, error="out of memory")
    response = chat(client)
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "generation failed: out of memory",
        "type": "server_error",
        "param": None,
        "code": "generation_failed",
    }


def test_an_engine_failure_ends_a_stream_with_an_error_event(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("abc", finish=FinishReason.ERROR, error="out of memory")
    assert openai_events(chat(client, stream=True))[-1]["error"]["code"] == "generation_failed"


def test_a_stopped_engine_is_a_503(client: Client, engine: FakeEngine) -> None:
    engine.stop()
    response = chat(client)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "stopped"


def test_a_large_prompt_is_prepared_off_the_event_loop(client: Client, engine: FakeEngine) -> None:
    response = chat(client, messages=[{"role": "user", "content": "x" * 30_000}])
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    padded = chat(client, metadata={"filler": "x" * 30_000})
    assert padded.json()["choices"][0]["message"]["content"] == "Hello there"


def rendered(engine: FakeEngine) -> str:
    return bytes(engine.submitted[-1].prompt_token_ids).decode()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, "{enable_thinking=False}<user>Hi<assistant>"),
        ({"reasoning_effort": "low"}, "{reasoning_effort=low}<user>Hi<assistant>"),
        ({"add_generation_prompt": False}, "<user>Hi"),
        ({"continue_final_message": True}, "<user>Hi..."),
        ({"continue_final_message": False, "add_generation_prompt": True}, "<user>Hi<assistant>"),
    ],
)
def test_options_reach_the_chat_template(
    client: Client, engine: FakeEngine, fields: dict[str, Any], expected: str
) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **fields}
    assert client.post("/v1/chat/completions", body).status_code == 200
    assert rendered(engine) == expected


def test_a_final_message_is_not_continued_and_answered(client: Client) -> None:
    body = {"model": MODEL, "messages": [{"role": "assistant", "content": "Hi"}]}
    both = {**body, "continue_final_message": True, "add_generation_prompt": True}
    assert openai_error(client.post("/v1/chat/completions", both))["param"] == "continue_final_message"


def test_a_cache_salt_is_a_further_salt(client: Client, engine: FakeEngine) -> None:
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 1}
    for salt in (None, "one", "one", "two"):
        assert client.post("/v1/completions", {**body, "cache_salt": salt}).status_code == 200
    plain, one, again, two = (request.salt for request in engine.submitted)
    assert one == again
    assert len({plain, one, two}) == 3
    assert openai_error(client.post("/v1/completions", {**body, "cache_salt": ""}))["param"] == "cache_salt"


@pytest.mark.parametrize(
    ("field", "value"),
    [("chat_template", "{{ 1 }}"), ("return_token_ids", True), ("skip_special_tokens", False), ("documents", [{}])],
)
def test_what_would_change_the_answer_is_refused_by_name(client: Client, field: str, value: object) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], field: value}
    assert openai_error(client.post("/v1/chat/completions", body))["param"] == field


def test_a_chats_logprobs_have_bytes_where_the_text_is_broken(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("ü")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "logprobs": True}
    content = client.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert [(each["token"], each["bytes"]) for each in content] == [("\ufffd", [0xC3]), ("\ufffd", [0xBC])]


def test_further_sampling_parameters_reach_the_engine(client: Client, engine: FakeEngine) -> None:
    given = {"logit_bias": {"5": -100}, "stop_token_ids": [7], "min_tokens": 2, "top_k": -1, "stop": ["", "x"]}
    assert chat(client, **given, max_tokens=4.0).status_code == 200
    params = engine.submitted[-1].params
    assert (params.logit_bias, params.stop_token_ids, params.min_tokens) == ({5: -100.0}, (7,), 2)
    assert (params.top_k, params.stop, params.max_tokens) == (0, ("x",), 4)


def test_a_stop_string_counts_from_the_least_tokens_on(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("a.b.c.d")
    body = chat(client, stop=".", min_tokens=3).json()
    assert body["choices"][0]["message"]["content"] == "a.b"


def test_a_response_format_is_a_constraint(client: Client, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    assert chat(client, response_format=asked).status_code == 200
    assert client.post("/v1/completions", {"model": MODEL, "prompt": "Hi", "guided_regex": "[ab]+"}).status_code == 200
    chatted, completed = (request.params.constraint for request in engine.submitted)
    assert chatted is not None
    assert (chatted.kind, json.loads(chatted.text)) == ("json_schema", schema)
    assert completed == Constraint("regex", "[ab]+")


def test_what_is_left_out_is_named_in_a_header(client: Client) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    response = chat(client, messages=[{"role": "user", "content": [part, part]}], verbosity="low", user="me")
    assert response.headers["x-emberkv-left-out"] == "image_url=2;verbosity=1"
    assert "x-emberkv-left-out" not in chat(client).headers


def test_a_variable_that_the_chat_template_does_not_read_is_left_out(client: Client) -> None:
    response = chat(client, chat_template_kwargs={"unread": 1, "mood": "kind"}, enable_thinking=False)
    assert response.headers["x-emberkv-left-out"] == "unread=1"


def test_embeddings_are_refused_by_name(client: Client) -> None:
    answer = client.post("/v1/embeddings", {"model": MODEL, "input": "Hi"})
    assert answer.status_code == 404
    assert openai_error(answer)["message"].startswith("embeddings are not supported")

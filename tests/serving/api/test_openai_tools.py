"""Thoughts and tool calls in OpenAI chats: out of the model's text, whole and streamed."""

import json
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from emberkv.core.sequence import FinishReason
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.parsing.formats import OutputFormat
from tests.serving.fakes import ByteTokenizer, FakeEngine, Script
from tests.serving.harness import MODEL, Client, openai_error, openai_events, serving
from tests.waiting import DEADLINE

ARGUMENTS = '{"city": "Paris", "days": 2}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
OTHER_CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>\nHm.\n</think>\n\n"
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("weather", "time")
]


@pytest.fixture
def lifecycle(engine: FakeEngine) -> Lifecycle:
    lifecycle = Lifecycle()
    lifecycle.loaded(ServedModel((MODEL,), 0, engine, ByteTokenizer(), output_format=OutputFormat("hermes", "think")))
    return lifecycle


def chat(client: Client, **fields: Any) -> httpx.Response:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, **fields}
    return client.post("/v1/chat/completions", json=asked)


def choice(client: Client, **fields: Any) -> dict[str, Any]:
    response = chat(client, **fields)
    assert response.status_code == 200, response.text
    (only,) = response.json()["choices"]
    return dict(only)


def deltas(client: Client, **fields: Any) -> tuple[list[dict[str, Any]], str]:
    """Of a stream: what is not empty of its deltas behind the opening one, and how it ended."""
    choices = [chunk["choices"][0] for chunk in openai_events(chat(client, stream=True, **fields))]
    assert [each["finish_reason"] for each in choices[:-1]] == [None] * (len(choices) - 1)
    return [each["delta"] for each in choices[1:] if each["delta"]], choices[-1]["finish_reason"]


def test_a_call_alone(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(THOUGHT + CALL)
    answer = choice(client)
    (call,) = answer["message"].pop("tool_calls")
    assert answer["message"] == {"role": "assistant", "content": None, "refusal": None, "reasoning_content": "Hm."}
    assert answer["finish_reason"] == "tool_calls"
    assert (call["type"], call["function"]) == ("function", {"name": "weather", "arguments": ARGUMENTS})
    assert call["id"].startswith("call_")
    assert len(call["id"]) == len("call_") + 24


def test_several_calls_behind_text(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(f"Let me look.\n{CALL}\n{OTHER_CALL}")
    message = choice(client)["message"]
    assert message["content"] == "Let me look."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather", "time"]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_only_the_first_call_is_made_where_calls_are_not_to_be_parallel(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(f"{CALL}\n{OTHER_CALL}", pause_after=len(CALL) + 3)
    answer = choice(client, parallel_tool_calls=False)
    assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["weather"]
    assert answer["finish_reason"] == "tool_calls"
    assert len(engine.aborted) == 1


def test_a_streamed_call(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(f"{THOUGHT}Look. {CALL}")
    pieces, finish = deltas(client)
    assert finish == "tool_calls"
    assert "".join(piece.get("reasoning_content", "") for piece in pieces) == "Hm."
    assert "".join(piece.get("content", "") for piece in pieces).rstrip() == "Look."
    calls = [call for piece in pieces for call in piece.get("tool_calls", ())]
    first, *others = calls
    assert first.pop("id").startswith("call_")
    assert first == {"index": 0, "type": "function", "function": {"name": "weather", "arguments": ""}}
    assert {tuple(call) for call in others} == {("index", "function")}
    assert "".join(call["function"]["arguments"] for call in others) == ARGUMENTS
    assert len(others) > 5  # they come as they are sampled


def test_a_call_that_is_cut_off_is_given_as_far_as_it_came(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(CALL, finish=FinishReason.STOP)
    answer = choice(client, max_tokens=len(CALL) - 20)
    assert answer["finish_reason"] == "length"
    (call,) = answer["message"]["tool_calls"]
    assert ARGUMENTS.startswith(call["function"]["arguments"]) or call["function"]["arguments"] == ARGUMENTS


@pytest.mark.parametrize(
    ("text", "finish"),
    [(CALL, "stop"), (f"{OTHER_CALL}\n{CALL}", "stop"), (f"{OTHER_CALL}\nIn Paris.", "tool_calls")],
)
def test_a_call_that_a_stop_string_cuts_off_is_none_to_be_made(
    client: Client, engine: FakeEngine, text: str, finish: str
) -> None:
    engine.script = Script(text)
    assert choice(client, stop="Paris")["finish_reason"] == finish
    assert deltas(client, stop="Paris")[1] == finish


@pytest.mark.parametrize("fields", [{"tools": None}, {"tool_choice": "none"}], ids=["no-tools", "none"])
def test_markup_is_text_where_no_tool_may_be_called(client: Client, engine: FakeEngine, fields: dict[str, Any]) -> None:
    engine.script = Script(CALL)
    answer = choice(client, **fields)
    assert answer["message"] == {"role": "assistant", "content": CALL, "refusal": None}
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [
        ("required", ["weather", "time"]),
        ({"type": "function", "function": {"name": "time"}}, ["time"]),
    ],
)
def test_calls_that_are_demanded_are_a_constraint(
    client: Client, engine: FakeEngine, choice: Any, allowed: list[str]
) -> None:
    assert chat(client, tool_choice=choice).is_success
    constraint = engine.submitted[-1].params.constraint
    assert constraint is not None
    assert [name for name in ("weather", "time") if f'"{name}' in constraint.text.replace("\\", "")] == allowed
    assert chat(client, tool_choice="auto").is_success
    assert engine.submitted[-1].params.constraint is None


def test_thoughts_are_counted(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(THOUGHT + "Hello")
    usage = chat(client).json()["usage"]
    thought = len("<think>\nHm.")
    assert usage["completion_tokens_details"] == {"reasoning_tokens": thought}
    assert usage["completion_tokens"] == len(THOUGHT + "Hello")


def test_a_stop_string_within_a_call_ends_the_answer(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(CALL)
    answer = choice(client, stop="Paris")
    assert answer["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "'


def test_the_sdk_assembles_streamed_calls(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script(f"{THOUGHT}{CALL}\n{OTHER_CALL}")
    with (
        serving(lifecycle) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=DEADLINE) as gpt,
        gpt.chat.completions.stream(model=MODEL, messages=[{"role": "user", "content": "Hi"}], tools=TOOLS) as stream,
    ):
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    calls = final.message.tool_calls or []
    assert final.finish_reason == "tool_calls"
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("weather", json.loads(ARGUMENTS)),
        ("time", {}),
    ]


def test_the_former_form_of_calls(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(f"{CALL}\n{OTHER_CALL}")
    functions = [tool["function"] for tool in TOOLS]
    expected = {"name": "weather", "arguments": ARGUMENTS}
    answer = choice(client, tools=None, functions=functions, function_call="auto")
    assert answer["message"] == {"role": "assistant", "content": None, "refusal": None, "function_call": expected}
    assert answer["finish_reason"] == "function_call"
    pieces, finish = deltas(client, tools=None, functions=functions)
    assert finish == "function_call"
    assert pieces[0]["function_call"] == {"name": "weather", "arguments": ""}
    assert "".join(piece["function_call"]["arguments"] for piece in pieces) == ARGUMENTS


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": TOOLS[1:]}}},
        {"tools": None, "functions": [TOOLS[1]["function"]], "function_call": {"name": "time"}},
    ],
    ids=["allowed", "former"],
)
def test_further_ways_to_demand_a_call(client: Client, engine: FakeEngine, fields: dict[str, Any]) -> None:
    engine.script = Script(OTHER_CALL)
    assert choice(client, **fields)["finish_reason"] in ("tool_calls", "function_call")
    constraint = engine.submitted[-1].params.constraint
    assert constraint is not None
    assert ("time" in constraint.text, "weather" in constraint.text) == (True, False)


def test_a_schema_holds_for_what_follows_the_thoughts(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(f'{THOUGHT}{{"age": 7}}')
    asked = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    message = choice(client, tools=None, response_format=asked)["message"]
    assert (message["content"], message["reasoning_content"]) == ('{"age": 7}', "Hm.")
    constraint = engine.submitted[-1].params.constraint
    assert constraint is not None
    assert "think" in constraint.text


def test_beside_tools_a_schema_leaves_calls_possible(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(CALL)
    asked = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    assert choice(client, response_format=asked)["finish_reason"] == "tool_calls"
    constraint = engine.submitted[-1].params.constraint
    assert constraint is not None
    assert all(text in constraint.text for text in ("weather", "age"))


def test_a_schema_that_cannot_be_compiled_is_refused_with_its_place(client: Client, engine: FakeEngine) -> None:
    wrong = {"type": "object", "properties": {"age": {"type": "wizard"}}}
    response = chat(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": wrong}})
    error = openai_error(response)
    assert (response.status_code, error["param"]) == (400, "response_format.json_schema.schema")
    assert "#/properties/age" in error["message"]
    assert engine.submitted == []


class Person(BaseModel):
    age: int


def test_the_sdk_parses_structured_answers(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script('{"age": 7}')
    with (
        serving(lifecycle) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=DEADLINE) as gpt,
    ):
        answer = gpt.chat.completions.parse(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], response_format=Person
        )
    assert answer.choices[0].message.parsed == Person(age=7)
    constraint = engine.submitted[-1].params.constraint
    assert constraint is not None
    assert "age" in constraint.text

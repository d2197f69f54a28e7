"""Thoughts and tool calls in Anthropic's messages: out of the model's text, whole and streamed, and back in."""

import json
from typing import Any

import anthropic
import httpx
import pytest
from pydantic import BaseModel

from emberkv.core.sequence import FinishReason
from emberkv.serving.api.anthropic_api import Signer, tool_input
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.parsing.events import ParsedCall
from emberkv.serving.parsing.formats import OutputFormat
from tests.serving.fakes import ByteTokenizer, FakeEngine, Script
from tests.serving.harness import MODEL, Client, anthropic_error, serving

CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
OTHER_CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>\nHm.\n</think>\n\n"
TOOLS: list[Any] = [{"name": name, "input_schema": {"type": "object"}} for name in ("add", "time")]


@pytest.fixture
def lifecycle(engine: FakeEngine) -> Lifecycle:
    lifecycle = Lifecycle()
    lifecycle.loaded(ServedModel((MODEL,), 0, engine, ByteTokenizer(), output_format=OutputFormat("hermes", "think")))
    return lifecycle


def send(client: Client, **fields: Any) -> httpx.Response:
    asked = {
        "model": MODEL,
        "max_tokens": 200,
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": TOOLS,
        **fields,
    }
    response = client.post("/v1/messages", asked)
    assert response.status_code == 200, response.text
    return response


def without_ids(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks without what differs each time; ids must have the API's form."""
    for block in blocks:
        if block["type"] == "tool_use":
            assert len(block["id"]) == len("toolu_") + 24
            assert block.pop("id").startswith("toolu_")
    return blocks


def test_thoughts_text_and_calls_are_blocks(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(f"{THOUGHT}Let me add.\n{CALL}\n{OTHER_CALL}")
    answer = send(client).json()
    signer = Signer(b"")
    signer.add("Hm.")
    assert without_ids(answer["content"]) == [
        {"type": "thinking", "thinking": "Hm.", "signature": signer.signature()},
        {"type": "text", "text": "Let me add."},
        {"type": "tool_use", "name": "add", "input": {"x": 1}},
        {"type": "tool_use", "name": "time", "input": {}},
    ]
    assert answer["stop_reason"] == "tool_use"


def test_a_call_alone_has_no_text_beside_it(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(CALL)
    assert [block["type"] for block in send(client).json()["content"]] == ["tool_use"]


def test_a_stream_has_block_after_block(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(f"{THOUGHT}Let me add.\n{CALL}")
    lines = [line for line in send(client, stream=True).text.split("\n") if line.startswith("data: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    started = [event for event in events if event["type"] == "content_block_start"]
    assert [event["index"] for event in started] == [0, 1, 2]
    assert without_ids([event["content_block"] for event in started]) == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": ""},
        {"type": "tool_use", "name": "add", "input": {}},
    ]
    kinds = [(event["index"], event["delta"]["type"]) for event in events if event["type"] == "content_block_delta"]
    assert list(dict.fromkeys(kinds)) == [
        (0, "thinking_delta"),
        (0, "signature_delta"),
        (1, "text_delta"),
        (2, "input_json_delta"),
    ]
    order = [event["type"] for event in events if event["type"] != "content_block_delta"]
    assert order == [
        "message_start",
        *["content_block_start", "content_block_stop"] * 3,
        "message_delta",
        "message_stop",
    ]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


@pytest.mark.parametrize(
    "text",
    [
        "Hello",
        THOUGHT,
        f"{THOUGHT}So.\n{CALL}\n{OTHER_CALL}",
        CALL,
        f"{CALL}\nDone.",
        f"So.\n{CALL}\nDone.\n{OTHER_CALL}",
    ],
)
def test_the_official_client_reads_the_stream_as_the_whole(lifecycle: Lifecycle, engine: FakeEngine, text: str) -> None:
    engine.script = Script(text)
    asked: Any = {"model": MODEL, "max_tokens": 200, "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
    with serving(lifecycle) as server, anthropic.Anthropic(api_key="none", base_url=server.url) as official:
        with official.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
        whole = official.messages.create(**asked)
    key = ("type", "text", "thinking", "signature", "name", "input")

    def shown(message: Any) -> list[Any]:
        return [[getattr(block, name, None) for name in key] for block in message.content]

    assert shown(streamed) == shown(whole)
    assert (streamed.stop_reason, streamed.usage.output_tokens) == (whole.stop_reason, len(text))


class Title(BaseModel):
    title: str


def test_the_official_client_parses_an_answer_by_its_schema(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script(THOUGHT + '{"title": "Lamps"}')
    asked: Any = {"model": MODEL, "max_tokens": 200, "messages": [{"role": "user", "content": "Hi"}]}
    with serving(lifecycle) as server, anthropic.Anthropic(api_key="none", base_url=server.url) as official:
        answer = official.messages.parse(**asked, output_format=Title)
    assert answer.parsed_output == Title(title="Lamps")
    constraint = engine.submitted[-1].params.constraint
    assert constraint is not None
    assert '"title"' in constraint.text


def test_a_call_that_is_cut_off_comes_back_as_far_as_it_goes(client: Client, engine: FakeEngine) -> None:
    engine.script = Script('<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": "long te')
    answer = send(client, max_tokens=len(engine.script.answer) - 1).json()
    assert answer["stop_reason"] == "max_tokens"
    (block,) = without_ids(answer["content"])
    assert block == {"type": "tool_use", "name": "add", "input": {"x": 1, "y": "long t"}}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ('{"x": 1}', {"x": 1}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        ("x = 1", {"INVALID_JSON": "x = 1"}),
        ('{"x": 1e999}', {"INVALID_JSON": '{"x": 1e999}'}),
        ('{"x": NaN}', {"INVALID_JSON": '{"x": NaN}'}),
    ],
)
def test_the_input_is_always_an_object(arguments: str, expected: dict[str, Any]) -> None:
    assert tool_input(ParsedCall("add", arguments, is_complete=False)) == expected


def test_one_call_at_a_time(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(f"{CALL}\n{OTHER_CALL}")
    answer = send(client, tool_choice={"type": "auto", "disable_parallel_tool_use": True}).json()
    assert [block["name"] for block in answer["content"]] == ["add"]
    assert answer["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("choice", "tools", "allowed"),
    [
        ({"type": "any"}, TOOLS, ("add", "time")),
        ({"type": "tool", "name": "time"}, TOOLS, ("time",)),
        ({"type": "auto", "disable_parallel_tool_use": True}, TOOLS, ("add", "time")),
        ({"type": "auto"}, [{**TOOLS[0], "strict": True}], ("add",)),
    ],
)
def test_demanded_and_strict_calls_are_constraints(
    client: Client, engine: FakeEngine, choice: Any, tools: Any, allowed: tuple[str, ...]
) -> None:
    send(client, tool_choice=choice, tools=tools)
    constraint = engine.submitted[-1].params.constraint
    assert constraint is not None
    assert [name for name in ("add", "time") if f'"{name}' in constraint.text.replace("\\", "")] == list(allowed)


def test_other_answers_are_free(client: Client, engine: FakeEngine) -> None:
    for choice in ({"type": "auto"}, {"type": "none"}):
        send(client, tool_choice=choice)
    assert [request.params.constraint for request in engine.submitted] == [None, None]


def test_a_schema_is_of_what_follows_the_thoughts(client: Client, engine: FakeEngine) -> None:
    wanted = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    send(client, output_config=wanted)
    constraint = engine.submitted[-1].params.constraint
    assert constraint is not None
    assert "think" in constraint.text
    refused = client.post(
        "/v1/messages",
        {
            "model": MODEL,
            "max_tokens": 5,
            "messages": [{"role": "user", "content": "Hi"}],
            "tools": TOOLS,
            "tool_choice": {"type": "any"},
            "output_config": wanted,
        },
    )
    assert refused.status_code == 400
    assert "send one of them" in anthropic_error(refused)["message"]


def test_markup_is_text_where_no_tool_may_be_called(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(CALL)
    answer = send(client, tool_choice={"type": "none"}).json()
    assert (answer["content"], answer["stop_reason"]) == ([{"type": "text", "text": CALL}], "end_turn")


def test_an_answer_comes_back_as_the_model_gave_it(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(f"{THOUGHT}Let me add.\n{CALL}")
    answer = send(client).json()
    (use,) = [block for block in answer["content"] if block["type"] == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "2"}
    history = [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}]
    send(client, messages=[{"role": "user", "content": "Hi"}, *history])
    shown = bytes(engine.submitted[-1].prompt_token_ids).decode()
    assert shown.endswith("<user>Hi<assistant>Let me add.[add 1]<tool>2<assistant>")


def test_a_failure_behind_an_open_block_is_the_last_event(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("abc", finish=FinishReason.ERROR, error="out of memory")
    last = send(client, stream=True).text.split("\n\n")[-2]
    assert last.startswith("event: error\n")

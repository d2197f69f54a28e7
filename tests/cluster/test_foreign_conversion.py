"""Messages and responses at a gateway whose workers have chat completions alone."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from emberkv.cluster.foreign.answers import ChatAnswer
from emberkv.serving.app import ServingSettings
from emberkv.serving.event_stream import StreamTimes
from emberkv.serving.parsing.events import CallArguments, CallBegin, CallEnd, ContentText, ParsedCall, joined
from tests.cluster.fake_openai import FakeOpenAI
from tests.cluster.foreign_gateway import Served, served
from tests.waiting import on_a_loop, until

TOOL = {"name": "read", "description": "", "input_schema": {"type": "object", "properties": {"path": {}}}}
MESSAGES: dict[str, Any] = {
    "model": "m",
    "max_tokens": 20,
    "system": "Be brief.",
    "tools": [TOOL],
    "tool_choice": {"type": "tool", "name": "read"},
    "stop_sequences": ["END"],
    "messages": [
        {"role": "user", "content": "Read a.py"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Let me look.", "signature": "x"},
                {"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"path": "a.py"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "pass"}]},
    ],
}
CALL = {"index": 0, "id": "call_7", "function": {"name": "read", "arguments": ""}}
DELTAS: list[dict[str, Any]] = [
    {"reasoning_content": "Hm"},
    {"content": "I "},
    {"content": "read"},
    {"tool_calls": [CALL]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"path": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"b.py"}'}}]},
]


def sent(it: Served) -> dict[str, Any]:
    """The last body that the worker got."""
    body: dict[str, Any] = json.loads(it.servers[0].requests[-1][0])
    return body


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@on_a_loop
async def test_messages_are_asked_as_a_chat_completion() -> None:
    async with served(FakeOpenAI(cached=60, message={"content": "Nothing to do."})) as it:
        answer = await it.ask(MESSAGES, "/v1/messages")
        body = sent(it)
        assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "tool"]
        (call,) = body["messages"][2]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"path": "a.py"}
        assert body["messages"][2]["reasoning_content"] == "Let me look."
        assert body["messages"][3] == {"role": "tool", "tool_call_id": "toolu_1", "content": "pass"}
        assert body["tools"][0]["function"]["name"] == "read"
        assert body["tool_choice"] == {"type": "function", "function": {"name": "read"}}
        assert (body["max_tokens"], body["stop"], body["stream"]) == (20, ["END"], False)
        message = answer.json()
        assert message["content"] == [{"type": "text", "text": "Nothing to do."}]
        assert (message["stop_reason"], message["model"]) == ("end_turn", "m")
        assert (message["usage"]["cache_read_input_tokens"], message["usage"]["input_tokens"]) == (60, 40)
        assert answer.headers["x-emberkv-route"].startswith("worker=a;")
        assert answer.headers["content-type"] == "application/json"
        explained = await it.client.post("/v1/cache/explain", json={"response_id": message["id"]})
        assert (explained.status_code, explained.json()["worker"]) == (200, "a")


@on_a_loop
async def test_a_stream_of_messages_has_thoughts_text_and_calls() -> None:
    async with served(FakeOpenAI(deltas=DELTAS, reason="tool_calls")) as it:
        answer = await it.ask({**MESSAGES, "stream": True}, "/v1/messages")
        assert sent(it)["stream_options"] == {"include_usage": True}
        found = events(answer)
        kinds = [event["type"] for event in found]
        assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
        blocks = [event["content_block"]["type"] for event in found if event["type"] == "content_block_start"]
        assert blocks == ["thinking", "text", "tool_use"]
        deltas = [event["delta"] for event in found if event["type"] == "content_block_delta"]
        assert "".join(delta.get("partial_json", "") for delta in deltas) == '{"path": "b.py"}'
        assert "".join(delta.get("text", "") for delta in deltas) == "I read"
        assert found[-2]["delta"]["stop_reason"] == "tool_use"
        assert found[-2]["usage"]["output_tokens"] == 3


@on_a_loop
async def test_a_stream_of_messages_that_breaks_off_ends_with_an_error_event() -> None:
    async with served(FakeOpenAI(dies_after=2)) as it:
        found = events(await it.ask({**MESSAGES, "stream": True}, "/v1/messages"))
        assert [event["type"] for event in found[:2]] == ["message_start", "content_block_start"]
        assert (found[-1]["type"], found[-1]["error"]["type"]) == ("error", "api_error")


@on_a_loop
async def test_a_late_stream_of_messages_gets_the_apis_own_pings() -> None:
    app = ServingSettings(bound_to_loopback=True, stream_times=StreamTimes(headers=0.0, ping=0.01))
    async with served(FakeOpenAI(), app=app) as it:
        held = it.servers[0].held = asyncio.Event()
        asked = asyncio.create_task(it.ask({**MESSAGES, "stream": True}, "/v1/messages"))
        await until(lambda: it.asked() == [1])
        await asyncio.sleep(0.1)
        held.set()
        kinds = [event["type"] for event in events(await asked)]
        assert (kinds[0], kinds[-1]) == ("ping", "message_stop")


@pytest.mark.parametrize(
    ("status", "expected", "kind"), [(400, 400, "invalid_request_error"), (429, 529, "overloaded_error")]
)
def test_a_workers_error_is_in_the_words_of_the_api(status: int, expected: int, kind: str) -> None:
    @on_a_loop
    async def ask() -> None:
        async with served(FakeOpenAI(status=status)) as it:
            answer = await it.ask(MESSAGES, "/v1/messages")
            assert (answer.status_code, answer.json()["error"]) == (expected, {"type": kind, "message": "no"})
            assert answer.headers["retry-after"] == "7"

    ask()


@pytest.mark.parametrize(
    ("body", "streams", "says"),
    [
        ({"error": {"message": "out of memory"}}, False, "out of memory"),
        ([], False, "the worker's answer has no choices"),
        ([], True, "the worker's answer has no choices"),
    ],
)
def test_an_answer_without_choices_is_retried_elsewhere_and_else_an_error(
    body: object, streams: bool, says: str
) -> None:
    @on_a_loop
    async def ask() -> None:
        async with served(FakeOpenAI(body=body), FakeOpenAI()) as it:
            request = {**MESSAGES, "stream": streams}
            for _ in range(3):
                assert "three" in (await it.ask(request, "/v1/messages")).text
            it.servers[1].body = body
            answer = await it.ask(request, "/v1/messages")
            assert (answer.status_code, answer.json()["error"]["message"]) == (502, says)

    ask()


@on_a_loop
async def test_a_request_for_no_tokens_has_none_whatever_the_worker_gives() -> None:
    message = {"content": "I", "tool_calls": [{"id": "c", "function": {"name": "read", "arguments": "{}"}}]}
    async with served(FakeOpenAI(message=message)) as it:
        answer = (await it.ask({**MESSAGES, "max_tokens": 0}, "/v1/messages")).json()
        assert sent(it)["max_tokens"] == 1
        assert (answer["content"], answer["stop_reason"]) == ([], "max_tokens")


@on_a_loop
async def test_an_invalid_request_is_refused_here() -> None:
    async with served(FakeOpenAI()) as it:
        answer = await it.ask({**MESSAGES, "messages": []}, "/v1/messages")
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
        assert it.asked() == [0]
        unknown = await it.ask({**MESSAGES, "model": "other"}, "/v1/messages")
        assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")


@on_a_loop
async def test_responses_continue_a_stored_one() -> None:
    async with served(FakeOpenAI(message={"content": "One."}, cached=3)) as it:
        request = {"model": "m", "instructions": "Be brief.", "input": "Count.", "max_output_tokens": 9}
        first = (await it.ask(request, "/v1/responses")).json()
        assert (first["status"], first["usage"]["input_tokens_details"]["cached_tokens"]) == ("completed", 3)
        assert first["output"][0]["content"][0]["text"] == "One."
        assert (await it.client.get(f"/v1/responses/{first['id']}")).json() == first
        again = {"model": "m", "input": "Go on.", "previous_response_id": first["id"]}
        assert (await it.ask(again, "/v1/responses")).status_code == 200
        said = [(message["role"], message["content"]) for message in sent(it)["messages"]]
        assert said == [("user", "Count."), ("assistant", "One."), ("user", "Go on.")]


@on_a_loop
async def test_a_stream_of_responses_ends_with_the_whole_response() -> None:
    async with served(FakeOpenAI(deltas=DELTAS, reason="tool_calls")) as it:
        answer = await it.ask({"model": "m", "input": "Read b.py", "stream": True}, "/v1/responses")
        found = events(answer)
        assert [event["sequence_number"] for event in found] == list(range(len(found)))
        assert found[-1]["type"] == "response.completed"
        items = found[-1]["response"]["output"]
        assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
        assert (items[2]["call_id"], items[2]["arguments"]) == ("call_7", '{"path": "b.py"}')


def chunk(index: int | None, arguments: str, name: str | None = None) -> dict[str, Any]:
    call: dict[str, Any] = {"function": {"arguments": arguments, **({"name": name} if name else {})}}
    call |= {} if index is None else {"index": index}
    return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}


def test_calls_that_come_mixed_are_passed_on_one_after_another() -> None:
    answer = ChatAnswer(0)
    for each in (chunk(0, '{"a"', "f"), chunk(1, '{"b"', "g"), chunk(0, ": 1}"), chunk(1, ": 2}")):
        answer.read_chunk(each)
    answer.end()
    found = joined(answer.take())
    assert [type(event) for event in found] == [CallBegin, CallArguments, CallEnd] * 2
    assert [(call.name, call.arguments) for call in answer.message.calls] == [("f", '{"a": 1}'), ("g", '{"b": 2}')]
    assert (answer.calls, all(call.is_complete for call in answer.message.calls)) == (2, True)


def test_the_name_of_a_call_may_come_after_its_id() -> None:
    answer = ChatAnswer(0)
    answer.read_chunk({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "call_7"}]}}]})
    answer.read_chunk(chunk(0, '{"a"'))
    assert answer.take() == ()
    answer.read_chunk(chunk(0, "", "f"))
    answer.read_chunk(chunk(0, ": 1}", "f"))
    answer.end()
    assert joined(answer.take()) == [
        CallBegin(0, "f", "call_7"), CallArguments(0, '{"a": 1}'), CallEnd(0, is_complete=True)
    ]  # fmt: skip


def test_a_call_without_a_number_goes_on_until_another_id() -> None:
    def part(call_id: str, arguments: str) -> dict[str, Any]:
        call = {"id": call_id, "function": {"name": "f", "arguments": arguments}}
        return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}

    answer = ChatAnswer(0)
    for call_id, arguments in (("1", '{"a"'), ("1", ": 1}"), ("2", "{}")):
        answer.read_chunk(part(call_id, arguments))
    answer.end()
    assert [(call.name, call.arguments) for call in answer.message.calls] == [("f", '{"a": 1}'), ("f", "{}")]


def test_a_call_without_a_number_goes_on_where_each_chunk_has_an_id_of_its_own() -> None:
    answer = ChatAnswer(0)
    for number, (name, arguments) in enumerate((("f", '{"a"'), (None, ": 1}"), ("g", "{}"))):
        given = chunk(None, arguments, name)
        given["choices"][0]["delta"]["tool_calls"][0]["id"] = str(number)
        answer.read_chunk(given)
    answer.end()
    assert [(call.name, call.arguments) for call in answer.message.calls] == [("f", '{"a": 1}'), ("g", "{}")]


@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_that_the_worker_aborted_is_an_error(streams: bool) -> None:
    @on_a_loop
    async def ask() -> None:
        async with served(FakeOpenAI(reason="abort")) as it:
            answer = await it.ask({**MESSAGES, "stream": streams}, "/v1/messages")
            error = events(answer)[-1]["error"] if streams else answer.json()["error"]
            assert error["message"] == "the worker ended the answer with finish_reason 'abort'"

    ask()


@on_a_loop
async def test_a_whole_answer_becomes_the_stream_that_was_asked_for() -> None:
    async with served(FakeOpenAI(streams=False, message={"content": "Nothing to do."})) as it:
        found = events(await it.ask({**MESSAGES, "stream": True}, "/v1/messages"))
        assert [event["type"] for event in found] == [
            "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
            "message_stop",
        ]  # fmt: skip
        assert found[2]["delta"]["text"] == "Nothing to do."
        assert found[-2]["delta"]["stop_reason"] == "end_turn"


def test_calls_without_numbers_and_text_behind_a_call() -> None:
    answer = ChatAnswer(0)
    answer.read_chunk(chunk(None, "{}", "f"))
    answer.read_chunk(chunk(None, '{"b": ', "g"))
    answer.read_chunk({"choices": [{"index": 0, "delta": {"content": "Done."}, "finish_reason": "length"}]})
    answer.end()
    assert [event.text for event in answer.take() if isinstance(event, ContentText)] == ["Done."]
    assert [(call.name, call.is_complete) for call in answer.message.calls] == [("f", True), ("g", False)]
    assert isinstance(answer.message.calls[0], ParsedCall)
    assert answer.finish_reason is not None
    assert answer.finish_reason.value == "length"

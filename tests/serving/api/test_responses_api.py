"""The Responses API: as the official client uses it, and item by item."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from emberkv.core.sequence import FinishReason
from emberkv.errors import RequestError
from emberkv.serving.api.responses_api import with_stored_items
from emberkv.serving.api.responses_schema import (
    ChatMessages,
    ResponsesRequest,
    ResponseStore,
    StoredResponse,
    signed_reasoning,
    verified_reasoning,
)
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.parsing.formats import OutputFormat
from tests.serving.fakes import ByteTokenizer, FakeEngine, Script
from tests.serving.harness import MODEL, Client, openai_error, serving, sse_blocks, sse_comments
from tests.waiting import DEADLINE

PATH = "/v1/responses"
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
THOUGHT = "<think>\nHm.\n</think>\n\n"
TOOLS: list[Any] = [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}]
ANSWER = f"{THOUGHT}Let me add.\n{CALL}"


@pytest.fixture
def lifecycle(engine: FakeEngine) -> Lifecycle:
    lifecycle = Lifecycle()
    lifecycle.loaded(ServedModel((MODEL,), 0, engine, ByteTokenizer(), output_format=OutputFormat("hermes", "think")))
    return lifecycle


@pytest.fixture
def gpt(lifecycle: Lifecycle) -> Iterator[openai.OpenAI]:
    with (
        serving(lifecycle) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=DEADLINE) as client,
    ):
        yield client


def send(client: Client, **fields: Any) -> httpx.Response:
    response = client.post(PATH, {"model": MODEL, "input": "Hi", "tools": TOOLS, **fields})
    assert response.status_code == 200, response.text
    return response


def prompt_of(engine: FakeEngine) -> str:
    return bytes(engine.submitted[-1].prompt_token_ids).decode()


def test_an_answer_has_a_thought_a_message_and_a_call(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(ANSWER, cached=8)
    answer = send(client).json()
    assert [(item["type"], item["status"]) for item in answer["output"]] == [
        ("reasoning", "completed"), ("message", "completed"), ("function_call", "completed"),
    ]  # fmt: skip
    thought, message, call = answer["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert "encrypted_content" not in thought
    assert message["content"][0]["text"] == "Let me add."
    assert (call["name"], json.loads(call["arguments"])) == ("add", {"x": 1})
    assert answer["status"] == "completed"
    assert answer["usage"]["input_tokens_details"] == {"cached_tokens": 8, "cache_write_tokens": 0}
    assert answer["usage"]["output_tokens"] == len(ANSWER)
    assert 0 < answer["usage"]["output_tokens_details"]["reasoning_tokens"] < len(ANSWER)


def test_the_events_of_a_stream(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(ANSWER, cached=8)
    answer = send(client, stream=True)
    events = [json.loads(block.partition("data: ")[2]) for block in sse_blocks(answer)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert list(dict.fromkeys(kinds)) == [
        "created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done", "output_text.delta", "output_text.done",
        "function_call_arguments.delta", "function_call_arguments.done", "completed",
    ]  # fmt: skip
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done
    for kind, field, item in (("output_text", "text", 1), ("function_call_arguments", "arguments", 2)):
        deltas = "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta")
        (whole,) = (event for event in events if event["type"] == f"response.{kind}.done")
        assert (whole[field], whole["output_index"], whole["item_id"]) == (deltas, item, done[item]["id"])
    assert sse_comments(answer)["x-emberkv-cache"].startswith("hit=8;")


def test_the_official_client_streams_and_goes_on(gpt: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = Script(ANSWER)
    with gpt.responses.stream(model=MODEL, input="Hi", tools=TOOLS) as stream:
        kinds = {event.type for event in stream}
        first = stream.get_final_response()
    assert {"response.created", "response.output_text.delta", "response.completed"} <= kinds
    assert first.output_text == "Let me add."
    call = next(item for item in first.output if item.type == "function_call")
    engine.script = Script("Two.")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
    second = gpt.responses.create(model=MODEL, previous_response_id=first.id, input=[result], tools=TOOLS)
    assert second.output_text == "Two."
    assert "<user>Hi<assistant>Let me add.[add 1]<tool>2<assistant>" in prompt_of(engine)
    assert gpt.responses.retrieve(second.id).output_text == "Two."
    assert [item.type for item in gpt.responses.input_items.list(second.id, order="asc", limit=2)] == [
        "message", "reasoning", "message", "function_call", "function_call_output",
    ]  # fmt: skip
    gpt.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(second.id)


def test_the_official_client_takes_an_answer_apart(gpt: openai.OpenAI, engine: FakeEngine) -> None:
    class Sum(BaseModel):
        total: int

    engine.script = Script('{"total": 2}')
    parsed = gpt.responses.parse(model=MODEL, input="1 + 1?", text_format=Sum)
    assert parsed.output_parsed == Sum(total=2)
    constraint = engine.submitted[-1].params.constraint
    assert constraint is not None
    assert '"total"' in constraint.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_off_is_incomplete(client: Client, engine: FakeEngine, stream: bool) -> None:
    engine.script = Script("Hello there")
    answer = send(client, max_output_tokens=5, stream=stream)
    response = answer.json() if not stream else json.loads(sse_blocks(answer)[-1].partition("data: ")[2])["response"]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "Hello"


def test_a_failure_within_the_answer_is_the_last_event(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("Hello", finish=FinishReason.ERROR, error="it broke")
    last = json.loads(sse_blocks(send(client, stream=True))[-1].partition("data: ")[2])
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "generation_failed", "message": "generation failed: it broke"}


def test_tools_that_cannot_be_offered_are_named(client: Client, engine: FakeEngine) -> None:
    others = [{"type": kind} for kind in ("web_search", "local_shell", "namespace")]
    freeform = {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}}
    picture = {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}
    answer = send(client, tools=[*TOOLS, *others, freeform], input=[picture, {"type": "web_search_call", "id": "w"}])
    named = dict(each.split("=") for each in answer.headers["x-emberkv-left-out"].split(";"))
    kinds = ("input_image", "web_search_call", "tool-web_search", "tool-local_shell", "tool-namespace", "tool-custom")
    assert named == dict.fromkeys(kinds, "1")
    assert prompt_of(engine) == "<tool add><user>[image left out]<assistant>"


def test_items_become_messages() -> None:
    left_out: Counter[str] = Counter()
    messages = ChatMessages(b"", left_out)
    for item in (
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "summary": [], "encrypted_content": signed_reasoning("Hm.", b"")},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "2", "name": "patch", "input": "x"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "c"}]},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "d"},
        {"type": "reasoning", "summary": [], "encrypted_content": "of another server"},
    ):
        messages.add(item, "input[0]")
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "2", "type": "function", "function": {"name": "patch", "arguments": '{"input":"x"}'}},
    ]
    assert messages.messages == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "c"},
        {"role": "tool", "tool_call_id": "2", "content": "d"},
    ]
    assert left_out == {"reasoning": 1}


def test_a_request_as_a_chat() -> None:
    request = ResponsesRequest.model_validate({
        "model": "m", "input": "a", "instructions": "i", "max_output_tokens": 5, "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        "tools": TOOLS, "tool_choice": {"type": "function", "name": "add"}, "parallel_tool_calls": False, "seed": 3,
    })  # fmt: skip
    schema = {"name": "n", "schema": {"type": "object"}, "strict": True}
    function = {"name": "add", "parameters": {"type": "object"}, "strict": False}
    assert json.loads(request.chat_body(request.items(), b"", Counter())) == {
        "model": "m",
        "messages": [{"role": "system", "content": "i"}, {"role": "user", "content": "a"}],
        "max_completion_tokens": 5,
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": schema},
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "parallel_tool_calls": False,
        "seed": 3,
    }


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"background": True}, "background", "background is not supported"),
        ({"truncation": "auto"}, "truncation", "only 'disabled' is supported"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "no such response is stored"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role", "input[0].role is 'king'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "it must be a string"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "must be a string or a list of parts"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "it must be 'function' or 'allowed_tools'"),
        ({"tool_choice": {"type": "allowed_tools", "tools": ["x"]}}, "tool_choice", "must be a list of objects"),
        ({"tool_choice": "required", "tools": [{"type": "web_search"}]}, "tool_choice", "no tools that are functions"),
        ({"n": 2}, "n", "a response has one answer"),
        ({"functions": [{"name": "f"}]}, "functions", "functions is not supported"),
        ({"include": ["message.output_text.logprobs"]}, "include", "is not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
        ({"input": []}, "input", "at least one"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "text.format.schema is missing"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "it must be 'text'"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input[0].content", "must be a string or a list of parts"),
        ({"input": [{"type": "item_reference", "id": "msg_x_0"}]}, "input[0]", "is not stored"),
    ],
)
def test_what_cannot_be_done_is_refused(client: Client, fields: dict[str, Any], param: str, message: str) -> None:
    refused = client.post(PATH, {"model": MODEL, "input": "Hi", "tools": TOOLS, **fields})
    assert refused.status_code == 400
    error = openai_error(refused)
    assert error["param"] == param
    assert message in error["message"]


def test_a_reference_stands_for_the_stored_item_that_it_names(client: Client, engine: FakeEngine) -> None:
    engine.script = Script(ANSWER)
    output = send(client).json()["output"]
    references = [{"type": "item_reference", "id": item["id"]} for item in output]
    result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "2"}
    send(client, input=[{"role": "user", "content": "Hi"}, *references, result])
    assert "<user>Hi<assistant>Let me add.[add 1]<tool>2<assistant>" in prompt_of(engine)
    twice = client.post(PATH, {"model": MODEL, "input": [references[1], references[1]]})
    assert (twice.status_code, openai_error(twice)["param"]) == (400, "input[1]")


def test_a_reference_to_another_tenants_item_is_to_none() -> None:
    store = ResponseStore(clock=lambda: 0.0)
    item = {"type": "message", "id": "msg_ab_0"}
    store.put("x", "resp_ab", StoredResponse({"output": [item]}, [item], 0, 10))
    reference = {"type": "item_reference", "id": "msg_ab_0"}
    assert with_stored_items([reference], "x", store)[0] == [item]
    with pytest.raises(RequestError, match="is not stored"):
        with_stored_items([reference], "y", store)


def test_thoughts_in_several_items_are_all_kept_and_no_text_is_no_word() -> None:
    messages = ChatMessages(b"", Counter())
    for item in (
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "One."}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Two."}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": None}]},
    ):
        messages.add(item, "input[0]")
    assert messages.messages == [{"role": "assistant", "content": "", "reasoning_content": "One.\nTwo."}]


def test_a_response_that_is_not_to_be_stored_is_not(client: Client) -> None:
    kept, gone = send(client).json(), send(client, store=False).json()
    assert client.get(f"{PATH}/{kept['id']}").json() == kept
    assert client.get(f"{PATH}/{gone['id']}").status_code == 404


def test_signed_reasoning_is_accepted_with_its_salt_alone() -> None:
    signed = signed_reasoning("Zwei Lämpchen.", b"a")
    assert verified_reasoning(signed, b"a") == "Zwei Lämpchen."
    assert verified_reasoning(signed, b"b") is None
    assert verified_reasoning("no base64!", b"a") is None
    assert verified_reasoning("é", b"a") is None


def test_the_store_is_bounded_by_count_bytes_and_time_for_each_tenant() -> None:
    now = [0.0]
    store = ResponseStore(clock=lambda: now[0], most=2, most_bytes=100, total_bytes=120, seconds=60.0)

    def put(tenant: str, name: str, size: int = 10) -> None:
        store.put(tenant, name, StoredResponse({}, (), 0, size))

    def names(tenant: str) -> set[str]:
        return {name for name in "abcdef" if store.get(tenant, name)}

    put("x", "a")
    put("x", "b")
    put("y", "a")
    assert store.get("x", "a") is not None
    put("x", "c")
    assert (names("x"), names("y")) == ({"a", "c"}, {"a"})
    put("x", "d", size=95)
    assert names("x") == {"d"}
    put("x", "e", size=101)
    assert names("x") == {"d"}
    put("y", "b", size=25)
    assert (names("x"), names("y")) == ({"d"}, {"b"})
    now[0] = 61.0
    assert names("y") == set()


def test_input_items_come_in_pages(client: Client) -> None:
    given = [{"role": "user", "content": str(number)} for number in range(3)]
    path = f"{PATH}/{send(client, input=given).json()['id']}/input_items"
    newest = client.get(path, params={"limit": 2}).json()
    assert ([item["content"] for item in newest["data"]], newest["has_more"]) == (["2", "1"], True)
    rest = client.get(path, params={"limit": 2, "after": newest["last_id"]}).json()
    assert ([item["content"] for item in rest["data"]], rest["has_more"]) == (["0"], False)
    unknown = client.get(path, params={"after": "item_9"})
    assert (unknown.status_code, openai_error(unknown)["param"]) == (400, "after")
    nothing = client.get(path, params={"limit": 0})
    assert (nothing.status_code, openai_error(nothing)["param"]) == (400, "limit")


def test_input_items_with_unusable_ids_are_numbered_so_that_all_pages_are_reached(client: Client) -> None:
    given = [{"role": "user", "content": str(at), "id": own} for at, own in enumerate(("x", "x", None, 5))]
    path = f"{PATH}/{send(client, input=given).json()['id']}/input_items"
    found: list[str] = []
    for _ in given:
        after = {"after": found[-1]} if found else {}
        page = client.get(path, params={"limit": 1, "order": "asc", **after}).json()
        found.append(page["last_id"])
    assert found == ["x", "item_1", "item_2", "item_3"]
    assert not page["has_more"]

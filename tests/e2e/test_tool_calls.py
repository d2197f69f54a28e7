"""Tool calls of a real server: of the demonstration model, which has learned none and makes them because it is
constrained, and of `tests/data/tool_model`, which has learned them and is free to answer otherwise.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pytest

from tests.e2e.process import Server, serving
from tests.waiting import DEADLINE, eventually

TEMPLATE = """
{{- bos_token -}}
{%- if tools -%}
<|system|>Tools: {{ tools | tojson }}. Call one as <tool_call>\\n{"name": NAME, "arguments": {}}\\n</tool_call><|end|>
{%- endif -%}
{%- for message in messages -%}
{{- '<|assistant|>' if message.role == 'assistant' else '<|system|>' if message.role == 'system' else '<|user|>' -}}
{{- message.content -}}
{%- for call in message.tool_calls or [] -%}
{{- '\\n' if not loop.first -}}
<tool_call>{{ '\\n' }}{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
{{- '\\n' }}</tool_call>
{%- endfor -%}
<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
WHERE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "module": {"enum": ["json", "pathlib", "re"]},
        "line": {"type": "integer", "minimum": 1, "maximum": 99},
        "word": {"type": "string", "maxLength": 12},
    },
    "required": ["module", "line"],
    "additionalProperties": False,
}
QUESTION = {"role": "user", "content": "Where does the library write JSON? " * 12}
TOOL: Any = {"type": "function", "function": {"name": "find", "description": "Finds a line.", "parameters": WHERE}}
TOOL_MODEL = Path(__file__).parents[1] / "data" / "tool_model"
GREEDY: Any = {"model": "tool_model", "max_tokens": 64, "extra_body": {"temperature": 0.0}}
LIMITS: Any = {"model": "demo", "max_tokens": 400, "temperature": 1.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tools")
    (folder / "tools.jinja").write_text(TEMPLATE)
    template = ("--chat-template", str(folder / "tools.jinja"))
    with serving(folder, "--cache-ram", "64MiB", "--served-name", "demo", *template) as server:
        yield server


@pytest.fixture(scope="module")
def gpt(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE) as client:
        yield client


def test_a_required_call_is_valid_and_the_next_turn_hits_all_of_it(server: Server, gpt: openai.OpenAI) -> None:
    messages: list[Any] = [QUESTION]
    first = gpt.chat.completions.create(
        messages=messages, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, seed=4, **LIMITS
    )
    (choice,) = first.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, WHERE)
    call.function.arguments = json.dumps(dict(reversed(arguments.items())))  # as clients in other languages may
    messages += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "line 12"},
    ]
    second = gpt.chat.completions.create(messages=messages, tools=[TOOL], **{**LIMITS, "max_tokens": 1})
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens
    assert server.metric("emberkv_history_answers_total", outcome="rewritten") == 1
    assert server.metric("emberkv_answer_memory_answers") >= 1
    ready, waited = (server.metric("emberkv_constraint_masks_total", state=each) for each in ("ready", "waited_for"))
    assert ready + waited >= first.usage.completion_tokens


def test_anthropics_named_tool_is_called(server: Server) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=DEADLINE) as claude:
        tools: Any = [{"name": "find", "input_schema": WHERE}, {"name": "other", "input_schema": {"type": "object"}}]
        choice: Any = {"type": "tool", "name": "find", "disable_parallel_tool_use": True}
        messages: Any = [QUESTION]
        answer = claude.messages.create(
            messages=messages, tools=tools, tool_choice=choice, model="demo", max_tokens=400
        )
    (block,) = answer.content
    assert (answer.stop_reason, block.type) == ("tool_use", "tool_use")
    assert block.name == "find"
    jsonschema.validate(block.input, WHERE)


def test_an_answer_in_the_form_of_a_schema_is_streamed(gpt: openai.OpenAI) -> None:
    messages: list[Any] = [QUESTION]
    form: Any = {"type": "json_schema", "json_schema": {"name": "where", "strict": True, "schema": WHERE}}

    def comes_in_pieces() -> bool:
        """False where the client read so late that the server sent many tokens at once."""
        stream = gpt.chat.completions.create(messages=messages, response_format=form, seed=2, stream=True, **LIMITS)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        jsonschema.validate(json.loads("".join(pieces)), WHERE)
        return len(pieces) > 3

    eventually(comes_in_pieces)


def test_a_schema_that_cannot_be_compiled_is_refused_at_its_place(server: Server) -> None:
    broken = {"type": "object", "properties": {"when": {"type": "moment"}}}
    tool = {"type": "function", "function": {"name": "find", "parameters": broken}}
    body = {"messages": [QUESTION], "tools": [tool], "tool_choice": "required", **LIMITS}
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=DEADLINE)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "tools[0].function.parameters"
    assert "#/properties/when: Invalid type: moment" in error["message"]


def needs(argument: str) -> dict[str, Any]:
    """The schema of an object with one string."""
    return {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}


WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": needs("city")}}
TIME: Any = {"type": "function", "function": {"name": "get_time", "parameters": needs("place")}}


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the model that has learned to call tools."""
    with serving(tmp_path_factory.mktemp("caller"), str(TOOL_MODEL), "--cache-ram", "16MiB") as server:
        yield server


@pytest.fixture(scope="module")
def chat(caller: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{caller.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE) as client:
        yield client


def masks(server: Server) -> float:
    """How many tokens of answers were constrained."""
    return server.total("emberkv_constraint_masks_total")


def test_a_model_calls_a_tool_of_itself_and_answers_from_its_result(caller: Server, chat: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = chat.chat.completions.create(messages=messages, tools=[TIME, WEATHER], **GREEDY)
    (choice,) = first.choices
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    messages += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "rainy"},
    ]
    second = chat.chat.completions.create(messages=messages, tools=[TIME, WEATHER], **GREEDY)
    (choice,) = second.choices
    assert (choice.finish_reason, choice.message.content) == ("stop", "It is rainy.")
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens
    assert masks(caller) == 0


def test_a_streamed_call_of_anthropics_api_is_answered_from_its_result(caller: Server) -> None:
    tools: Any = [{"name": "find_river", "description": "The river of a town.", "input_schema": needs("town")}]
    messages: list[Any] = [{"role": "user", "content": "Tell me the river in Prague."}]
    with anthropic.Anthropic(base_url=caller.url, api_key="none", max_retries=0, timeout=DEADLINE) as claude:
        with claude.messages.stream(messages=messages, tools=tools, **GREEDY) as stream:
            first = stream.get_final_message()
        (call,) = first.content
        assert call.type == "tool_use"
        assert (first.stop_reason, call.name, call.input) == ("tool_use", "find_river", {"town": "Prague"})
        messages += [
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "Elbe"}]},
        ]
        second = claude.messages.create(messages=messages, tools=tools, **GREEDY)
    (text,) = second.content
    assert text.type == "text"
    assert (second.stop_reason, text.text) == ("end_turn", "It is Elbe.")
    begun = first.usage
    prompt = begun.input_tokens + (begun.cache_creation_input_tokens or 0) + (begun.cache_read_input_tokens or 0)
    assert (second.usage.cache_read_input_tokens or 0) >= prompt + begun.output_tokens
    assert masks(caller) == 0


def test_a_model_without_tools_answers_in_text(chat: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    (choice,) = chat.chat.completions.create(messages=messages, **GREEDY).choices
    assert choice.message.tool_calls is None
    assert (choice.finish_reason, choice.message.content) == ("stop", "I have no tool for that.")

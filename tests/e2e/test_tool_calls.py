"""Tool calls of a real server. Its demonstration model has learned none, and makes them because it is constrained."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pytest

from tests.e2e.process import DEADLINE, Server, serving

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
    stream = gpt.chat.completions.create(messages=messages, response_format=form, seed=2, stream=True, **LIMITS)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 3
    jsonschema.validate(json.loads("".join(pieces)), WHERE)


def test_a_schema_that_cannot_be_compiled_is_refused_at_its_place(server: Server) -> None:
    broken = {"type": "object", "properties": {"when": {"type": "moment"}}}
    tool = {"type": "function", "function": {"name": "find", "parameters": broken}}
    body = {"messages": [QUESTION], "tools": [tool], "tool_choice": "required", **LIMITS}
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=DEADLINE)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "tools[0].function.parameters"
    assert "#/properties/when: Invalid type: moment" in error["message"]

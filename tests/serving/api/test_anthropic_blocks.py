"""Content blocks of the Anthropic API as messages of a chat template."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.errors import RequestError
from emberkv.serving.api.anthropic_schema import BlockReader, template_tools

IMAGE = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}}


def read(*messages: Any) -> list[dict[str, Any]]:
    return BlockReader().messages(messages)


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def result(content: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t1", "content": content, **fields}


def test_an_answer_with_thoughts_and_calls() -> None:
    use = {"type": "tool_use", "id": "t1", "name": "add", "input": {"x": 1}}
    blocks = [{"type": "thinking", "thinking": "So.", "signature": "s"}, text("On"), text("e."), use]
    assert read({"role": "assistant", "content": blocks}) == [
        {
            "role": "assistant",
            "content": "One.",
            "reasoning_content": "So.",
            "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}],
        }
    ]


def test_results_come_before_the_text_beside_them() -> None:
    blocks = [result("3"), text("So?"), result([text("a"), text("b")]), text("Well?")]
    assert read({"role": "user", "content": blocks}) == [
        {"role": "tool", "tool_call_id": "t1", "content": "3"},
        {"role": "tool", "tool_call_id": "t1", "content": "a\nb"},
        {"role": "user", "content": "So?\nWell?"},
    ]
    assert [each["role"] for each in read({"role": "user", "content": [result("3")]})] == ["tool"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("no such file", "Error: no such file"),
        ("<tool_use_error>No such file</tool_use_error>", "<tool_use_error>No such file</tool_use_error>"),
        (None, "Error"),
        ([], "Error"),
    ],
)
def test_a_result_that_is_an_error_says_so(content: Any, expected: str) -> None:
    (message,) = read({"role": "user", "content": [result(content, is_error=True)]})
    assert message["content"] == expected
    (plain,) = read({"role": "user", "content": [result(content, is_error=False)]})
    assert plain["content"] == (content or "")


@pytest.mark.parametrize(
    ("block", "expected", "left_out"),
    [
        (IMAGE, "[image left out]", {"image": 1}),
        ({"type": "document", "source": {"type": "base64", "data": "aGk="}}, "[document left out]", {"document": 1}),
        ({"type": "document", "title": "T", "source": {"type": "text", "data": "words"}}, "T\nwords", {}),
        ({"type": "document", "source": {"type": "content", "content": [text("a"), IMAGE]}},
         "a\n[image left out]", {"image": 1}),
        ({"type": "search_result", "title": "T", "source": "S", "content": [text("a")]}, "T\nS\na", {}),
        ({"type": "tool_reference", "tool_name": "add"}, "[tool add]", {}),
        ({"type": "server_tool_use", "name": "web_search"}, "[server tool use left out]", {"server_tool_use": 1}),
        ({"type": "web_search_tool_result", "content": []}, "[web search tool result left out]",
         {"web_search_tool_result": 1}),
    ],
)  # fmt: skip
def test_what_a_text_model_cannot_read_has_a_text_in_its_place(
    block: dict[str, Any], expected: str, left_out: dict[str, int]
) -> None:
    for message in (
        {"role": "user", "content": [block]},
        {"role": "assistant", "content": [block]},
        {"role": "user", "content": [result([block])]},
    ):
        reader = BlockReader()
        (read_message,) = reader.messages([message])
        assert (read_message["content"], dict(reader.left_out)) == (expected, left_out)


def test_encrypted_thoughts_are_dropped_and_counted() -> None:
    reader = BlockReader()
    blocks = [{"type": "redacted_thinking", "data": "x"}, {"type": "thinking", "thinking": "", "signature": "s"}]
    assert reader.messages([{"role": "assistant", "content": blocks}]) == [{"role": "assistant", "content": ""}]
    assert reader.left_out == {"redacted_thinking": 1}


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (
            {"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "a", "input": {}}]},
            "has type 'tool_use'",
        ),
        ({"role": "assistant", "content": [result("3")]}, "has type 'tool_result'"),
        ({"role": "assistant", "content": [{"type": "tool_use", "name": "a", "input": "x"}]}, "an input (object)"),
        ({"role": "assistant", "content": [{"type": "thinking"}]}, "content.0.thinking must be a string"),
        ({"role": "user", "content": [result([result("3")])]}, "content.0.content.0 has type 'tool_result'"),
        ({"role": "user", "content": None}, "messages.0.content must be a string or a list"),
    ],
)
def test_what_cannot_be_used_is_named(message: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError) as raised:
        read(message)
    assert problem in str(raised.value)


def test_tools_of_anthropics_service_are_left_out() -> None:
    own = {"type": "custom", "name": "add", "description": "adds", "input_schema": {"type": "object"}, "strict": True}
    left_out: Counter[str] = Counter()
    kinds = ["text_editor_20250728", "tool_search_tool_regex_20251119", "Bad Type\n"]
    tools = template_tools([own, *({"type": kind, "name": "x"} for kind in kinds)], left_out)
    assert tools == [
        {
            "type": "function",
            "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}, "strict": True},
        }
    ]
    assert left_out == {"text_editor_20250728": 1, "tool_search_tool_regex_20251119": 1, "other": 1}


blocks = st.lists(
    st.sampled_from([text("a"), IMAGE, result("3"), {"type": "server_tool_use"}, {"type": "redacted_thinking"}])
    | st.fixed_dictionaries({"type": st.text(max_size=8), "text": st.text(max_size=4) | st.none()}),
    max_size=5,
)
histories = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": blocks}), max_size=5
)


@given(histories, histories)
def test_a_history_reads_the_same_as_it_grows(history: list[dict[str, Any]], more: list[dict[str, Any]]) -> None:
    try:
        whole = read(*history, *more)
    except RequestError:
        return
    beginning = read(*history)
    assert whole[: len(beginning)] == beginning

"""Calls in the Hermes and Qwen form, and `<think>` in front of them."""

import pytest

from emberkv.serving.parsing.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    ContentText,
    OutputEvent,
    ParsedCall,
    ParsedMessage,
    ReasoningText,
    joined,
)
from emberkv.serving.parsing.formats import OutputFormat, parse_output

FORMAT = OutputFormat("hermes", "think")
TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}]


def parsed(text: str) -> ParsedMessage:
    return parse_output(FORMAT, text, tools=TOOLS)


def test_thought_content_and_two_calls() -> None:
    text = (
        "<think>\nFirst this.\n\nThen that.\n</think>\n\nLet me look.\n"
        '<tool_call>\n{"name": "read", "arguments": {"path": "a.py", "at": [1, {"x": null}]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "list", "arguments": {}}\n</tool_call>'
    )
    assert parsed(text) == ParsedMessage(
        "First this.\n\nThen that.",
        "Let me look.",
        (ParsedCall("read", '{"path": "a.py", "at": [1, {"x": null}]}'), ParsedCall("list", "{}")),
    )


def test_events_come_as_soon_as_they_are_certain() -> None:
    parser = FORMAT.parser(tools=TOOLS, in_reasoning=True)
    fed: list[tuple[str, list[OutputEvent]]] = [
        ("Hm", [ReasoningText("Hm")]),
        ("\n</think", []),
        (">\n\nYes.", [ContentText("Yes.")]),
        ('\n<tool_call>\n{"name": "rea', []),
        ('d", "arguments": {"path', [CallBegin(0, "read", None), CallArguments(0, '{"path')]),
        ('": "a"}', [CallArguments(0, '": "a"}'), CallEnd(0, is_complete=True)]),
        ("}\n</tool_call>\n", []),
    ]
    assert [(text, parser.feed(text)) for text, _ in fed] == fed
    assert parser.finish() == []


def test_a_string_holds_the_end_tag() -> None:
    text = '<tool_call>{"name": "read", "arguments": {"path": "</tool_call>"}}</tool_call>'
    assert parsed(text).calls == (ParsedCall("read", '{"path": "</tool_call>"}'),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<tool_call>{"name": "read", "arguments": {"p": "cut', ParsedMessage(
            calls=(ParsedCall("read", '{"p": "cut', is_complete=False),))),
        ('<tool_call>{"name": "read", "arguments": {"p": "line\n"}}</tool_call>', ParsedMessage(
            calls=(ParsedCall("read", '{"p": "line\n"}}', is_complete=False),))),
        ('<tool_call>{"arguments": {"p": 1}, "name": "read"}</tool_call>', ParsedMessage(
            calls=(ParsedCall("read", '{"p": 1}'),))),
        ('<tool_call>{"name": "read", "arguments": "{\\"p\\": 1}"}</tool_call>', ParsedMessage(
            calls=(ParsedCall("read", '{"p": 1}'),))),
        ('<tool_call>{"name": "read", "arguments": {"p": 1}}}\n</tool_call>', ParsedMessage(
            calls=(ParsedCall("read", '{"p": 1}'),))),
        ("<tool_call>not JSON</tool_call>", ParsedMessage(content="<tool_call>not JSON</tool_call>")),
        ('<tool_call>{"name": "rea', ParsedMessage(content='<tool_call>{"name": "rea')),
    ],
    ids=["cut", "bad JSON", "arguments first", "arguments as text", "a bracket too many", "no JSON", "cut name"],
)  # fmt: skip
def test_calls_that_are_not_as_they_should_be(text: str, message: ParsedMessage) -> None:
    assert parsed(text) == message


def test_without_tools_markup_is_content() -> None:
    text = 'A\n<tool_call>\n{"name": "read", "arguments": {}}\n</tool_call>'
    assert parse_output(FORMAT, text) == ParsedMessage(content=text)


def test_where_the_prompt_ends_inside_a_thought() -> None:
    assert FORMAT.ends_in_reasoning("<|im_start|>assistant\n<think>\n")
    assert not FORMAT.ends_in_reasoning("say <think><|im_start|>assistant\n")
    assert not FORMAT.ends_in_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert FORMAT.ends_in_reasoning("<|im_start|>assistant\n<think>\nSo", begun="<think>\nSo")
    assert FORMAT.ends_in_reasoning("<|im_start|>assistant\n<think>\nSo", begun="So")
    assert not FORMAT.ends_in_reasoning("<|im_start|>assistant\n<think>\nSo</think>A", begun="So</think>A")


def test_a_thought_that_begins_in_the_prompt() -> None:
    message = parse_output(FORMAT, "\nSo.\n</think>\n\nYes.", in_reasoning=True)
    assert message == ParsedMessage("So.", "Yes.")
    assert parse_output(FORMAT, "<think>So", in_reasoning=True) == ParsedMessage("So", "")


def test_the_parts_of_an_answer_keep_their_order() -> None:
    call = '<tool_call>\n{"name": "read", "arguments": {}}\n</tool_call>'
    message = parsed(f"<think>\nHm.\n</think>\n\nOne.\n{call}\nTwo.\n{call}")
    read = ParsedCall("read", "{}")
    assert message.parts() == (ReasoningText("Hm."), ContentText("One."), read, ContentText("\nTwo."), read)
    assert message == ParsedMessage("Hm.", "One.\nTwo.", (read, read))


def test_pieces_join() -> None:
    assert joined([ContentText("a"), ContentText("b"), CallArguments(0, "c"), CallArguments(1, "d")]) == [
        ContentText("ab"),
        CallArguments(0, "c"),
        CallArguments(1, "d"),
    ]

"""cache_control: which part of a prompt a mark covers, for how long, and what is no mark."""

from collections import Counter
from typing import Any

import pytest

from emberkv.errors import RequestError
from emberkv.serving.api.anthropic_schema import PromptRequest
from emberkv.serving.api.openai_messages import template_tools
from emberkv.serving.api.openai_schema import ChatCompletionRequest
from emberkv.serving.api.rendering import anthropic_mark, chat_mark, covered_tokens
from tests.serving.fakes import ByteTokenizer

SHORT = {"type": "ephemeral"}
LONG = {"type": "ephemeral", "ttl": "1h"}
TOKENIZER = ByteTokenizer()


def text(value: str, mark: object = None) -> dict[str, Any]:
    return {"type": "text", "text": value, **({"cache_control": mark} if mark else {})}


def anthropic_cover(**fields: Any) -> tuple[str, float] | None:
    """The covered part of the prompt, in text."""
    request = PromptRequest.model_validate({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields})
    mark = anthropic_mark(request)
    if mark is None:
        return None
    prompt = request.conversation().prompt_text(TOKENIZER)
    ids = TOKENIZER.encode(prompt, add_special_tokens=False)
    cut = mark.cut.conversation().prompt_text(TOKENIZER)
    return prompt[: covered_tokens(TOKENIZER, prompt, ids, cut)], mark.seconds


def chat_cover(messages: list[Any], **fields: Any) -> tuple[str, float] | None:
    request = ChatCompletionRequest.model_validate({"model": "tiny", "messages": messages, **fields})
    mark = chat_mark(request)
    if mark is None:
        return None

    def render(each: ChatCompletionRequest) -> str:
        return each.conversation().prompt_text(TOKENIZER)

    prompt = render(request)
    ids = TOKENIZER.encode(prompt, add_special_tokens=False)
    return prompt[: covered_tokens(TOKENIZER, prompt, ids, render(mark.cut))], mark.seconds


def test_a_block_of_the_system_prompt() -> None:
    assert anthropic_cover(system=[text("Be kind.", SHORT), text("Be brief.")]) == ("<system>Be kind.", 300.0)
    assert anthropic_cover(system=[text("Be kind."), text("Be brief.", LONG)]) == (
        "<system>Be kind.\nBe brief.<user>",
        3600.0,
    )


def test_a_block_of_a_message_covers_all_before_it() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [text("one", SHORT), text("two")]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "three"},
    ]
    assert anthropic_cover(system="Be kind.", messages=messages) == ("<system>Be kind.<user>one", 300.0)
    messages[2]["content"] = [text("three", SHORT)]
    assert anthropic_cover(messages=messages) == ("<user>one\ntwo<assistant>yes<user>three<assistant>", 300.0)


def test_a_tool() -> None:
    tools = [{"name": "a", "input_schema": {}, "cache_control": LONG}, {"name": "b", "input_schema": {}}]
    assert anthropic_cover(tools=tools) == ("<tool a><", 3600.0)


def test_of_several_marks_the_longest_then_the_last_counts() -> None:
    user = [{"role": "user", "content": [text("Hi", SHORT)]}]
    assert anthropic_cover(system=[text("a", LONG), text("b", LONG)], messages=user) == ("<system>a\nb<user>", 3600.0)
    assert anthropic_cover(system=[text("a", SHORT)], messages=user) == ("<system>a<user>Hi<assistant>", 300.0)


def test_openai_messages_parts_and_tools() -> None:
    system = {"role": "system", "content": "Be kind.", "cache_control": LONG}
    user = {"role": "user", "content": [text("one", SHORT), text("two")]}
    assert chat_cover([system, user]) == ("<system>Be kind.<", 3600.0)
    assert chat_cover([user]) == ("<user>one", 300.0)
    tool = {"type": "function", "function": {"name": "a"}, "cache_control": SHORT}
    assert chat_cover([{"role": "user", "content": "Hi"}], tools=[tool]) == ("<tool a><user>Hi<assistant>", 300.0)
    assert template_tools([tool], Counter()) == [{"type": "function", "function": {"name": "a"}}]


def test_without_a_mark_nothing_is_retained() -> None:
    assert anthropic_cover(system="Be kind.") is None
    assert chat_cover([{"role": "user", "content": "Hi", "cache_control": None}]) is None


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"type": "persistent"}, "system.0.cache_control is {'type': 'persistent'}; it must be an object with type"),
        ("yes", "system.0.cache_control is 'yes'"),
        ({"type": "ephemeral", "ttl": "2h"}, "system.0.cache_control.ttl is '2h'; it must be '5m' or '1h'"),
        ({"type": "ephemeral", "ttl": 300}, "system.0.cache_control.ttl is 300"),
    ],
)
def test_what_is_no_mark(mark: object, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        anthropic_cover(system=[text("a", mark)])
    assert str(raised.value).startswith(message)
    assert raised.value.param in {"system.0.cache_control", "system.0.cache_control.ttl"}


def test_only_the_mark_that_counts_is_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = 0
    copy = PromptRequest.model_copy

    def counted(self: PromptRequest, **arguments: Any) -> PromptRequest:
        nonlocal copies
        copies += 1
        return copy(self, **arguments)

    monkeypatch.setattr(PromptRequest, "model_copy", counted)
    parts = [text(f"{number} ", SHORT) for number in range(200)]
    assert anthropic_cover(messages=[{"role": "user", "content": parts}] * 5, system=parts) is not None
    assert copies == 1

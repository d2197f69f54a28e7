"""Conversations as chat templates take them."""

from emberkv.serving.api.conversation import Conversation, with_result_names
from tests.serving.fakes import ByteTokenizer

ASKED = {"role": "user", "content": "Hi"}


def call(call_id: object, name: str) -> dict[str, object]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": {"x": 1}}}


def test_a_begun_answer_stands_where_the_answer_begins() -> None:
    assert Conversation([ASKED], begun="Well,").prompt_text(ByteTokenizer()) == "<user>Hi<assistant>Well,"


def test_a_result_gets_the_name_of_its_call() -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": [call("a", "read"), call("b", "write"), call(None, "x")]}
    results = [
        {"role": "tool", "content": "", "tool_call_id": "b"},
        {"role": "tool", "content": "", "tool_call_id": "a"},
        {"role": "tool", "content": "", "tool_call_id": "a", "name": "given"},
        {"role": "tool", "content": "", "tool_call_id": "unknown"},
        {"role": "tool", "content": ""},
    ]
    names = [message.get("name") for message in with_result_names([ASKED, calls, *results])]
    assert names == [None, None, "write", "read", "given", None, None]

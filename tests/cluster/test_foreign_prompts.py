"""The prompts of forwarded requests as routing compares them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.cluster.foreign.answers import AnswerEvents, answer_headers, usage_of
from emberkv.cluster.foreign.prompts import PieceTokenizer, PromptReader, canonical_body
from emberkv.cluster.foreign.worker import ReportedUsage
from emberkv.serving.cache.service import text_of
from emberkv.serving.tenancy import DEFAULT_TENANT

READER = PromptReader(block_size=4)
SYSTEM = {"role": "system", "content": "The lamps along the street are lit at six. " * 4}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages), **more}


def common(one: dict[str, Any], other: dict[str, Any]) -> int:
    """How many leading blocks two requests have in common."""
    chains = [READER.read(body, DEFAULT_TENANT).chain.block_hashes for body in (one, other)]
    return next((at for at, pair in enumerate(zip(*chains, strict=False)) if pair[0] != pair[1]), min(map(len, chains)))


@given(st.text())
def test_pieces_of_a_text_make_up_the_text(text: str) -> None:
    tokenizer = PieceTokenizer()
    shown = text_of(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert shown == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").rstrip("\0") or "\0" in text


def test_a_conversation_begins_as_its_earlier_turns() -> None:
    before = chat(SYSTEM, {"role": "user", "content": "One?"})
    after = chat(*before["messages"], {"role": "assistant", "content": "1"}, {"role": "user", "content": "Two?"})
    assert common(before, after) == len(READER.read(before, DEFAULT_TENANT).chain.block_hashes)


def test_the_order_of_keys_is_no_difference_but_tools_models_and_salts_are() -> None:
    one = chat(SYSTEM, {"role": "user", "content": "One?"})
    other = chat({"content": SYSTEM["content"], "role": "system"}, {"role": "user", "content": "One?"})
    assert common(one, other) > len(SYSTEM["content"]) // 16
    assert common(one, one | {"tools": [{"type": "function", "function": {"name": "f"}}]}) == 0
    assert common(one, one | {"model": "n"}) == 0
    assert common(one, one | {"cache_salt": "s"}) == 0


@pytest.mark.parametrize("messages", ["text", [1], None, [{"role": "user", "content": [{"type": "image_url"}]}]])
def test_what_cannot_be_rendered_is_compared_as_it_is(messages: Any) -> None:
    reader = PromptReader(tokenizer=PieceTokenizer(), model="m", block_size=4)
    prompt = reader.read({"model": "m", "messages": messages}, DEFAULT_TENANT)
    assert (prompt.in_tokens, len(prompt.chain) > 0) == (False, True)


def test_token_ids_of_a_completion_are_its_prompt() -> None:
    reader = PromptReader(tokenizer=PieceTokenizer(), model="m", block_size=2)
    for prompt in ([1, 2, 3, 4], [[1, 2, 3, 4], [9]]):
        assert reader.read({"prompt": prompt}, DEFAULT_TENANT).chain.slice(0, 4) == [1, 2, 3, 4]


def test_a_body_without_rules_for_it_stays_the_same_object() -> None:
    body = chat(SYSTEM)
    assert canonical_body(body, None)[0] is body


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        ({}, None),
        ([], None),
        ({"usage": {"prompt_tokens": "9"}}, None),
        ({"usage": {"prompt_tokens": 9}}, ReportedUsage(9, 0, None)),
        (
            {"usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": None}},
            ReportedUsage(9, 2, None),
        ),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 20}}}, ReportedUsage(9, 0, 9)),
        ({"usage": {"prompt_tokens": 9}, "timings": {"cache_n": 5}}, ReportedUsage(9, 0, 5)),
    ],
)
def test_usage_is_read_in_every_form(answer: Any, usage: ReportedUsage | None) -> None:
    assert usage_of(answer) == usage


EVENTS = [
    b": comment\n\n",
    b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}],"usage":null}\r\n\r\n',
    b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\n',
    b"data: [DONE]\n\n",
]


@given(st.lists(st.integers(1, 40), min_size=1), st.booleans())
def test_a_stream_is_the_same_however_it_is_cut(sizes: list[int], keeps_usage: bool) -> None:
    events, stream, passed, at = AnswerEvents(keeps_usage=keeps_usage), b"".join(EVENTS), list[bytes](), 0
    for size in [*sizes, len(stream)]:
        passed += events.feed(stream[at : at + size])
        at += size
    if keeps_usage:
        assert passed == EVENTS
    else:
        assert [passed[0], passed[2], passed[3]] == [EVENTS[0], EVENTS[2], EVENTS[4]]
        assert "usage" not in json.loads(passed[1].removeprefix(b"data: "))
    assert (events.usage, events.is_done, events.is_whole) == (ReportedUsage(3, 1, None), True, True)


def test_a_stream_has_begun_with_its_first_token_and_is_whole_with_its_reason_to_end() -> None:
    events = AnswerEvents(keeps_usage=True)
    list(events.feed(EVENTS[1]))
    assert (events.has_begun, events.is_whole) == (False, False)
    list(events.feed(EVENTS[2][:20]))
    assert not events.is_whole
    list(events.feed(EVENTS[2][20:]))
    assert (events.has_begun, events.is_whole, events.is_done) == (True, True, False)


def test_a_stream_of_several_answers_is_whole_when_all_have_ended() -> None:
    events = AnswerEvents(keeps_usage=True)
    list(events.feed(b'data: {"choices":[{"index":0,"text":"a"},{"index":1,"text":"b"}]}\n\n'))
    list(events.feed(b'data: {"choices":[{"index":0,"text":"","finish_reason":"stop"}]}\n\n'))
    assert not events.is_whole
    list(events.feed(b'data: {"choices":[{"index":1,"text":"","finish_reason":"length"}]}\n\n'))
    assert (events.is_whole, events.finish_reason) == (True, "length")
    list(events.feed(b'data: {"choices":[{"index":1,"text":"","finish_reason":null}],"usage":{}}\n\n'))
    assert events.is_whole, "what comes behind the reason begins no other answer"


def test_an_error_within_a_stream_is_passed_on_whatever_else_is_in_it() -> None:
    events, error = AnswerEvents(keeps_usage=False), b'data: {"error":{"message":"no"},"usage":null}\n\n'
    assert list(events.feed(error)) == [error]
    assert (events.has_failed, events.is_whole) == (True, True)


@pytest.mark.parametrize("choices", ["5", '"a"', "[5]", '{"a":1}'])
def test_choices_of_another_form_pass(choices: str) -> None:
    events, chunk = AnswerEvents(keeps_usage=False), f'data: {{"choices":{choices}}}\n\n'.encode()
    assert list(events.feed(chunk)) == [chunk]
    assert not events.has_begun


def test_headers_are_forwarded_byte_for_byte() -> None:
    sent = {"X-Note": "\u65e5".encode(), "X-Odd": b"\xff"}
    as_read = {name: value.decode("utf-8", "surrogateescape") for name, value in sent.items()}
    headers = answer_headers({**as_read, "Content-Encoding": "gzip"})
    assert {name: value.encode("latin-1") for name, value in headers.items()} == {
        "x-note": sent["X-Note"], "x-odd": sent["X-Odd"]
    }  # fmt: skip


def test_counts_that_are_none_are_not_believed() -> None:
    assert usage_of({"usage": {"prompt_tokens": -5}}) is None
    assert usage_of({"usage": {"prompt_tokens": True}}) is None
    odd = {"prompt_tokens": 5, "completion_tokens": -1, "prompt_tokens_details": {"cached_tokens": True}}
    assert usage_of({"usage": odd}) == ReportedUsage(5, 0, None)

"""What holds for every text that a model may write, well-formed or not."""

import re
import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.serving.parsing.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    ContentText,
    OutputEvent,
    OutputParser,
    ReasoningText,
    joined,
)
from emberkv.serving.parsing.formats import REASONING_FORMATS, TOOL_FORMATS
from tests.serving.parsing.families import FAMILIES, TOOLS, Family

INSERTED = "αβγδεζηθ"
"""Characters that no markup has, each inserted at most once."""

LEFT_OUT = re.compile(r'"tool_call_id": "(\d*)"')

FRAGMENTS = sorted(
    {text for each in TOOL_FORMATS.values() for text in each.special}
    | {text for each in REASONING_FORMATS.values() for text in (each.tags.begin, each.tags.end)}
    | {"```", "function", '"name": "read"', '"arguments": ', *"{}[]()\"'\\,:;=\n ", "call:", "read"}
    | {"<function=read>", "<parameter=path>", '<invoke name="edit">', " to=functions.read"}
)


def parser_of(family: Family, in_reasoning: bool = False) -> OutputParser:
    return family.format.parser(tools=TOOLS, in_reasoning=in_reasoning)


def events_of(parser: OutputParser, pieces: list[str]) -> list[OutputEvent]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined([*events, *parser.finish()])


@st.composite
def cut_texts(draw: st.DrawFn, family: Family) -> list[str]:
    """An answer of the family, as it is, cut off, or with other text put in or left out; in pieces."""
    text = draw(st.sampled_from([family.answer(), ""]))
    text = text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        removed = draw(st.sampled_from([0, 0, 1, 5]))
        text = text[:at] + draw(st.sampled_from(FRAGMENTS)) + text[at + removed :]
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@EACH_FAMILY
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_pieces_give_what_the_whole_gives(family: Family, data: st.DataObject) -> None:
    pieces, in_reasoning = data.draw(cut_texts(family)), data.draw(st.booleans())
    whole = events_of(parser_of(family, in_reasoning), ["".join(pieces)])
    assert events_of(parser_of(family, in_reasoning), pieces) == whole
    assert events_of(parser_of(family, in_reasoning), list("".join(pieces))) == whole
    check_calls(whole)


def check_calls(events: list[OutputEvent]) -> None:
    """Calls come one after the other, numbered from 0, each with its end; no event is empty."""
    begun, is_open = 0, False
    for event in events:
        match event:
            case CallBegin(index, name, _):
                assert (index, is_open) == (begun, False)
                assert name
                begun, is_open = begun + 1, True
            case CallArguments(index, text):
                assert (index, is_open) == (begun - 1, True)
                assert text
            case CallEnd(index, _):
                assert (index, is_open) == (begun - 1, True)
                is_open = False
            case ContentText(text) | ReasoningText(text):
                assert text
                assert not is_open
    assert not is_open


@EACH_FAMILY
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_nothing_is_lost(family: Family, data: st.DataObject) -> None:
    """Each character that is put into an answer anywhere, in markup too, is found in one of the events.

    So what is not passed on is white space, the family's own markup, and what members of a call's JSON object other
    than its name, arguments and id say, where nothing is inserted: Cohere's number of a call.
    """
    text = family.answer()
    for char in data.draw(st.lists(st.sampled_from(INSERTED), unique=True, min_size=1)):
        left_out = {at for found in LEFT_OUT.finditer(text) for at in range(found.start(1), found.end(1) + 1)}
        at = data.draw(st.sampled_from([at for at in range(len(text) + 1) if at not in left_out]))
        text = text[:at] + char + text[at:]
    found = str(events_of(parser_of(family), [text]))
    assert [char for char in INSERTED if char in text and char not in found] == []


def lines_run(family: Family, text: str) -> int:
    """How many lines of the parsers run for a text that comes character by character."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if "parsing" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    parser = parser_of(family)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for char in text:
            parser.feed(char)
        parser.finish()
    finally:
        sys.settrace(before)
    return count


@EACH_FAMILY
def test_work_grows_with_the_length_of_the_text(family: Family) -> None:
    """Behind a call's beginning, where text may be held back, and as content."""
    answer = family.answer()
    begun = answer[: answer.index("path") + 8]
    for start in ("", begun):
        for unit in ("\n", "<", '"', "<tool_call>{"):
            short, long = (lines_run(family, start + unit * (characters // len(unit))) for characters in (60, 240))
            assert long < 5 * short, (start, unit)

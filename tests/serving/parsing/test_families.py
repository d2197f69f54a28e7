"""Each family's answers are parsed, and its template renders what was parsed as the very text again."""

import json

import pytest

from emberkv.errors import ConfigError
from emberkv.serving.parsing.events import ParsedCall, ParsedMessage
from emberkv.serving.parsing.formats import OutputFormat, chosen_format, detect_format, output_format
from tests.serving.parsing.families import FAMILIES, Family

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@EACH_FAMILY
def test_an_answer_is_parsed(family: Family) -> None:
    answer = family.answer()
    assert family.parsed(answer) == family.message(), answer


@EACH_FAMILY
def test_what_was_parsed_is_rendered_as_the_same_text(family: Family) -> None:
    answer = family.answer()
    assert family.turn_text(family.parsed(answer)) == answer


@EACH_FAMILY
def test_the_template_says_which_format_it_is(family: Family) -> None:
    assert detect_format(family.template) == family.format


def test_a_value_holds_the_tag_that_ends_values() -> None:
    """The tag ends a value only where a parameter or the call's end follows."""
    family = FAMILIES["Qwen3-Coder"]
    for value in ("</parameter>", "<parameter=a>\n</parameter>\n", "\n\n</parameter> b\n"):
        message = ParsedMessage(calls=(ParsedCall("edit", json.dumps({"path": value})),))
        text = family.turn_text(message)
        assert family.parsed(text) == message, text


def test_a_template_without_markup_has_no_format() -> None:
    assert detect_format("{{ messages[0].content }}") == OutputFormat(None, None) == detect_format(None)


def test_a_template_of_a_format_that_is_not_parsed_has_none() -> None:
    """MiniMax M3's tags look like Hermes' behind its separators, and hold no JSON."""
    assert detect_format("]<]minimax[>[<tool_call>{{ call }}]<]minimax[>[</tool_call>") == OutputFormat(None, None)


def test_names_override_what_the_template_shows() -> None:
    template = FAMILIES["Qwen3"].template
    assert chosen_format(template) == OutputFormat("hermes", "think")
    assert chosen_format(template, tools="qwen-xml") == OutputFormat("qwen-xml", "think")
    assert chosen_format(template, tools="none", reasoning="think-first") == OutputFormat(None, "think-first")
    assert str(chosen_format(template, reasoning="none")) == "tool calls: hermes, reasoning: none"


def test_names_are_checked() -> None:
    assert output_format("hermes", "none") == OutputFormat("hermes", None)
    with pytest.raises(ConfigError, match="--tool-parser is 'x'; accepted are auto, none, harmony, deepseek-dsml"):
        output_format("x", None)
    with pytest.raises(ConfigError, match="--reasoning-parser is 'y'; accepted are auto, none, harmony, mistral"):
        output_format(None, "y")

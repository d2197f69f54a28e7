"""What each family's template lets the next turn reuse of what a turn has computed."""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from emberkv.errors import RequestError
from emberkv.serving.template_study import TemplateStudy, agent_warnings, study_template
from tests.serving.parsing.families import FAMILIES, Family, render

KEPT = ("", "", "")
REWRITTEN = ("", "", "answer 1")
"""Earlier answers lose their thoughts when the user asks again."""

EXPECTED = {
    ("Qwen3", False): ("answer 1", "answer 2", "answer 3"),  # the empty thought of the last turn goes
    ("Qwen3", True): REWRITTEN,
    ("Qwen3.5", False): REWRITTEN,
    ("Qwen3.5", True): REWRITTEN,
    ("GLM-4.5", True): REWRITTEN,
    ("DeepSeek-R1", True): REWRITTEN,
    ("MiniMax-M2", True): REWRITTEN,
    ("Gemma-4", True): REWRITTEN,
    ("gpt-oss", True): REWRITTEN,
    ("Command-A", True): REWRITTEN,
    ("Nemotron-Nano-2", True): REWRITTEN,
    ("Granite-3.2", True): REWRITTEN,
    ("Mistral-Nemo", False): ("", "", "question 1"),  # the tools move to the last question
    ("Mistral-Nemo", True): ("", "", "question 1"),
}
"""What the two steps of the tool loop, and then the next question, differ in from what was computed; else nothing."""

FIRST = {
    ("Qwen3", False): (821, 1006, 1210),
    ("Qwen3", True): (None, None, 821),
    ("Qwen3.5", False): (None, None, 821),
    ("Qwen3.5", True): (None, None, 821),
    ("GLM-4.5", True): (None, None, 813),
    ("DeepSeek-R1", True): (None, None, 812),
    ("MiniMax-M2", True): (None, None, 821),
    ("Gemma-4", True): (None, None, 812),
    ("gpt-oss", True): (None, None, 828),
    ("Command-A", True): (None, None, 839),
    ("Nemotron-Nano-2", True): (None, None, 821),
    ("Granite-3.2", True): (None, None, 840),
    ("Mistral-Nemo", False): (None, None, 210),
    ("Mistral-Nemo", True): (None, None, 210),
}
"""The first token that differs there; a token is a character here. None: all are kept."""


def study(template: str, with_thoughts: bool) -> TemplateStudy:
    return study_template(
        lambda messages, is_answered: render(template, messages, add_generation_prompt=is_answered),
        lambda text: [ord(char) for char in text],
        with_thoughts=with_thoughts,
    )


@pytest.mark.parametrize("with_thoughts", [False, True], ids=["plain", "thoughts"])
@pytest.mark.parametrize("name", FAMILIES)
def test_where_the_next_turn_differs(name: str, with_thoughts: bool) -> None:
    found = study(FAMILIES[name].template, with_thoughts)
    question = found.question
    assert question is not None
    expected = EXPECTED.get((name, with_thoughts), KEPT)
    assert (*(step.differs_in for step in found.steps), question.differs_in) == expected
    first = tuple(None if each.is_whole else each.kept for each in (*found.steps, question))
    assert first == FIRST.get((name, with_thoughts), (None, None, None))
    assert (question.kept == question.computed) == found.is_stable == (expected == KEPT)
    assert found.shows_calls
    assert found.shows_thoughts == (not with_thoughts or FAMILIES[name].reasoning is not None)


def test_counts_are_where_the_texts_differ() -> None:
    family = FAMILIES["Qwen3"]
    found, without = (study(family.template, with_thoughts=each) for each in (True, False))
    thought, empty = "The file lamps.txt may say it.", "<think>\n\n</think>\n\n"
    assert found.steps[0].computed - without.steps[0].computed == len(thought)
    assert without.question is not None
    assert without.question.kept == without.question.computed - len(empty + "Those of Mill Lane.")


def test_a_template_that_drops_an_answers_thought_loses_the_answer() -> None:
    template = Family(
        "hermes",
        FAMILIES["Qwen3"].call,
        reasoning="think",
        generation="<think>\n",
        thought="",
        content="{{ message.content }}",
    ).template
    found = study(template, with_thoughts=False)
    assert [step.differs_in for step in found.steps] == ["answer 1", "answer 2"]
    assert not found.is_stable


def test_a_template_that_leaves_out_calls() -> None:
    found = study(Family("hermes", "").template, with_thoughts=False)
    assert not found.shows_calls


class TemplateTokenizer:
    """What the study needs of a tokenizer: a family's template, and characters for tokens."""

    chat_problem: str | None = None

    def __init__(self, template: str) -> None:
        self._template = template

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **options: Any
    ) -> str:
        if "refuses" in self._template and any(message["role"] == "tool" for message in messages):
            raise RequestError("no tool results here")
        return render(self._template, messages, add_generation_prompt=add_generation_prompt)

    def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int | None = None) -> "array[int]":
        return array("i", map(ord, text))


@pytest.mark.parametrize(
    ("template", "context", "reasons", "warnings"),
    [
        (FAMILIES["Qwen2.5"].template, 20_000, False, []),
        (FAMILIES["Qwen2.5"].template, 19_999, False, ["the context of 19,999 tokens is too small"]),
        (FAMILIES["Qwen2.5"].template, 40_000, True, ["the chat template leaves out thoughts"]),
        (FAMILIES["MiniMax-M2"].template, 40_000, True, [
            "the chat template writes earlier turns with thoughts anew, and these are computed again at the next "
            "question from answer 1 on; 'emberkv explain --template' says more"]),
        (FAMILIES["Mistral-Nemo"].template, 40_000, False, [
            "the chat template writes earlier turns anew, and these are computed again at the next question from "
            "question 1 on"]),
        ("{#- refuses #}" + FAMILIES["Qwen2.5"].template, 4_000, False, [
            "the chat template takes no tool calls and results: no tool results here"]),
        (Family("hermes", "").template, 4_000, False, []),
    ],
    ids=["none", "small context", "no thoughts", "rewritten thoughts", "moved tools", "refused results", "no tools"],
)  # fmt: skip
def test_what_the_start_warns_of(template: str, context: int, reasons: bool, warnings: list[str]) -> None:
    found = agent_warnings(TemplateTokenizer(template), context, reasons=reasons)
    assert len(found) == len(warnings)
    assert all(message.startswith(warning) for message, warning in zip(found, warnings, strict=True)), found

"""What each family's template lets the next turn reuse of what a turn has computed."""

import pytest

from emberkv.serving.template_study import Study, study_template
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
    ("Mistral-Nemo", False): ("", "", "question 1"),  # the tools move to the last question
    ("Mistral-Nemo", True): ("", "", "question 1"),
}
"""What the two steps of the tool loop, and then the next question, differ in from what was computed; else nothing."""


def study(template: str, with_thoughts: bool) -> Study:
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

"""The texts: as long as asked for, the same for the same seed, and never the same otherwise."""

import pytest

from emberkv.bench.runner import WORDS, BenchWorkload
from emberkv.errors import ConfigError


def test_texts_have_the_length_asked_for() -> None:
    workload = BenchWorkload(system_tokens=300, user_tokens=30, tokens_per_word=1.5)
    assert len(workload.system_prompt().split()) == 200
    assert len(workload.question(0, 0)["content"].split()) == 20


def test_the_same_seed_and_nonce_say_the_same() -> None:
    one, other = BenchWorkload(seed=3, nonce="a"), BenchWorkload(seed=3, nonce="a")
    assert one.system_prompt() == other.system_prompt()
    assert one.question(1, 2) == other.question(1, 2)


@pytest.mark.parametrize("other", [BenchWorkload(seed=4, nonce="a"), BenchWorkload(seed=3, nonce="b")])
def test_another_seed_or_nonce_shares_no_beginning(other: BenchWorkload) -> None:
    one = BenchWorkload(seed=3, nonce="a")
    assert one.system_prompt().split()[:4] != other.system_prompt().split()[:4]


def test_every_question_is_its_own() -> None:
    workload = BenchWorkload(sessions=5, turns=5)
    questions = {workload.question(s, t)["content"] for s in range(5) for t in range(5)}
    assert len(questions) == 25


def test_a_system_prompt_of_no_tokens_is_left_out() -> None:
    assert BenchWorkload(system_tokens=0).opening() == []


def test_words_are_distinct() -> None:
    assert len(set(WORDS)) == len(WORDS)


@pytest.mark.parametrize(
    ("field", "value"), [("sessions", 0), ("turns", 0), ("concurrency", 0), ("answer_tokens", 0), ("system_tokens", -1)]
)
def test_a_bad_value_is_named(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value}; it must be at least {value + 1}"):
        BenchWorkload(**{field: value})

"""Preemption, abort and clearing at every point of a request's life; no other request is affected."""

from collections.abc import Callable
from hashlib import sha256

import pytest

from emberkv.core.sequence import FinishReason, Sequence, SequenceStatus
from tests.core.harness import Harness

NAMES = ("first", "twin", "long", "last")
STEPS = 24


def by_content(sequence: Sequence) -> int:
    """Greedy sampling: the next token follows from all before it."""
    return sha256(sequence.chain.encoded()).digest()[0]


def scenario(exact: bool) -> tuple[Harness, dict[str, Sequence]]:
    """Twins that share, one long prompt and one that has to wait, in a pool too small for all."""
    harness = Harness(num_blocks=14, chunk=8, exact=exact, max_step_tokens=22, max_running=3, next_token=by_content)
    prompts = {"first": range(18), "long": range(100, 121), "twin": range(18), "last": range(12)}
    return harness, {name: harness.add(name, tokens, new=9) for name, tokens in prompts.items()}


def answers(sequences: dict[str, Sequence]) -> dict[str, list[int]]:
    return {
        name: sequence.chain.slice(sequence.prompt_tokens, len(sequence.chain)) for name, sequence in sequences.items()
    }


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[int]]:
    harness, sequences = scenario(exact=False)
    harness.finish()
    return answers(sequences)


def test_the_scenario_visits_every_point_of_a_life() -> None:
    harness, sequences = scenario(exact=False)
    seen = set()
    for _ in range(STEPS):
        seen |= {(each.status, each.num_computed > 0, each.num_preemptions > 0) for each in sequences.values()}
        harness.step()
    assert seen >= {
        (SequenceStatus.WAITING, False, False),
        (SequenceStatus.WAITING, False, True),
        (SequenceStatus.PREFILLING, False, False),
        (SequenceStatus.PREFILLING, True, False),
        (SequenceStatus.DECODING, True, False),
        (SequenceStatus.DECODING, True, True),
        (SequenceStatus.FINISHED, True, False),
    }
    harness.finish()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_abort_at_every_step(name: str, exact: bool, undisturbed: dict[str, list[int]]) -> None:
    for step in range(STEPS):
        harness, sequences = scenario(exact)
        for _ in range(step):
            harness.step()
        gone = sequences[name]
        done = gone.status is SequenceStatus.FINISHED
        harness.scheduler.finish(name, FinishReason.ABORT)
        harness.check()
        assert (gone.lease, gone.status) == (None, SequenceStatus.FINISHED)
        assert gone.finish_reason is (FinishReason.LENGTH if done else FinishReason.ABORT)
        harness.finish()
        expected = undisturbed if done else {**undisturbed, name: answers(sequences)[name]}
        assert answers(sequences) == expected


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_preemption_at_every_step(name: str, exact: bool, undisturbed: dict[str, list[int]]) -> None:
    for step in range(STEPS):
        harness, sequences = scenario(exact)
        for _ in range(step):
            harness.step()
        sequence = sequences[name]
        if sequence.lease is None:
            continue
        cached = sequence.cached_tokens
        harness.scheduler._preempt(sequence)
        harness.check()
        assert sequence.status is SequenceStatus.WAITING
        harness.finish()
        assert sequence.cached_tokens == cached
        assert answers(sequences) == undisturbed


def abort_a_preempted(harness: Harness, sequence: Sequence) -> None:
    harness.scheduler._preempt(sequence)
    harness.scheduler.finish(sequence.request_id, FinishReason.ABORT)


def clear_the_cache(harness: Harness, sequence: Sequence) -> None:
    harness.pool.clear()


def clear_and_preempt(harness: Harness, sequence: Sequence) -> None:
    harness.pool.clear()
    harness.scheduler._preempt(sequence)


@pytest.mark.parametrize("interrupt", [abort_a_preempted, clear_the_cache, clear_and_preempt])
@pytest.mark.parametrize("name", NAMES)
def test_other_interruptions_at_every_step(
    name: str, interrupt: Callable[[Harness, Sequence], None], undisturbed: dict[str, list[int]]
) -> None:
    for step in range(STEPS):
        harness, sequences = scenario(exact=False)
        for _ in range(step):
            harness.step()
        if sequences[name].lease is None:
            continue
        interrupt(harness, sequences[name])
        harness.check()
        harness.finish()
        aborted = sequences[name].finish_reason is FinishReason.ABORT
        expected = {**undisturbed, name: answers(sequences)[name]} if aborted else undisturbed
        assert answers(sequences) == expected


def test_everybody_leaves_at_once() -> None:
    for step in range(STEPS):
        harness, _ = scenario(exact=False)
        for _ in range(step):
            harness.step()
        for name in NAMES:
            harness.scheduler.finish(name, FinishReason.ERROR)
        assert harness.pool.num_free == harness.pool.num_blocks
        assert (harness.scheduler.num_running, harness.scheduler.num_waiting) == (0, 0)
        assert not harness.step()
        harness.check()

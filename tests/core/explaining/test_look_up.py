"""A look-up says what an admission then finds, and leaves no trace."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.core.explaining.explain import admission_outcome, look_up
from emberkv.core.explaining.explanation import CacheOutcome, MissReason
from tests.core.harness import Harness, chain
from tests.core.lower import FakeTiers


def test_what_lies_below_counts_as_hit_if_it_would_be_loaded() -> None:
    harness = Harness(lower=FakeTiers(block_seconds={"disk": 1.0}, token_seconds=1.0))
    prompt = chain(range(30))
    assert harness.lower is not None
    harness.lower.put(prompt.block_hashes[:4])
    assert look_up(harness.cache, harness.lower, prompt) == CacheOutcome({"disk": 16})
    harness.lower.token_seconds = 0.1
    assert look_up(harness.cache, harness.lower, prompt) == CacheOutcome({}, {MissReason.RECOMPUTE_CHEAPER: 16})
    assert look_up(harness.cache, None, prompt) == CacheOutcome()


def test_what_only_a_look_up_over_the_network_can_tell() -> None:
    harness = Harness(lower=FakeTiers(block_seconds={"disk": 1.0}, token_seconds=1.0))
    prompt = chain(range(30))
    assert harness.lower is not None
    harness.lower.put(prompt.block_hashes[:2])
    harness.lower.pending = set(prompt.block_hashes[2:])
    assert look_up(harness.cache, harness.lower, prompt) == CacheOutcome({"disk": 8}, {MissReason.LOOK_UP: 20})
    harness.lower.token_seconds = 0.1
    declined = CacheOutcome({}, {MissReason.RECOMPUTE_CHEAPER: 8, MissReason.LOOK_UP: 20})
    assert look_up(harness.cache, harness.lower, prompt) == declined


def test_a_cache_that_is_off() -> None:
    assert look_up(Harness(enabled=False).cache, None, chain(range(9))) == CacheOutcome(
        set_aside={MissReason.CACHE_OFF: 9}
    )


def test_state_that_is_not_exact() -> None:
    harness = Harness(exact=True)
    harness.add("first", [1, 2], new=6)
    harness.finish()
    grown = [1, 2, *(1000 + length for length in range(2, 8)), 9]
    assert look_up(harness.cache, None, chain(grown)).refused is MissReason.INEXACT


@settings(deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0.1, 1.0]),
)
def test_an_admission_finds_what_the_look_up_said(
    seed: int, alignment: int, exact: bool, batch_invariant: bool, token_seconds: float | None
) -> None:
    rng = Random(seed)
    lower = FakeTiers(block_seconds={"disk": 1.0, "ram": 0.01}, token_seconds=token_seconds)
    # The pool is so large that no load evicts a partial block.
    harness = Harness(200, alignment=alignment, chunk=8, exact=exact, batch_invariant=batch_invariant, lower=lower)
    for number in range(8):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 40))]
        prompt = chain(tokens)
        for block_hash in prompt.block_hashes:
            if rng.random() < 0.3:
                lower.put([block_hash], rng.choice(["disk", "ram"]), exact=rng.random() < 0.7)
        expected = look_up(harness.cache, lower, prompt)
        sequence = harness.add(str(number), tokens)
        while harness.scheduler.num_running + harness.scheduler.num_waiting:
            for load in harness.step().loads:
                harness.arrive(load)
        assert sequence.admission is not None
        served = admission_outcome(sequence.admission, len(tokens))
        assert served.hit == pytest.approx(expected.hit)
        if not expected.hit.keys() - {"pool"}:  # a load changes where the search in the pool then ends
            assert served == expected

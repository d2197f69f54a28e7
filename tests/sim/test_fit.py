"""The fit finds what made the data, and nothing below zero."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.sim.calibrated import bare, fit_overheads, nonnegative_least_squares
from emberkv.sim.roofline import Roofline
from emberkv.sim.timing import ChunkWork, StepWork
from tests.sim.flat import FLAT, TINY, with_overheads

WORKS = [
    StepWork(n, 50 * n, chunks)
    for n in (1, 4, 9)
    for chunks in ((), (ChunkWork(0, 32, True),), (ChunkWork(8, 9, False),))
]


def test_overheads_are_found_again_in_the_times_they_made() -> None:
    made = Roofline(TINY, with_overheads(step=70, sequence=5, chunk=20, token=3))
    kernels = Roofline(TINY, bare(made.hardware))
    found = fit_overheads(
        ("step", "sequence", "chunk", "token"),
        [kernels.overhead_counts(work) for work in WORKS],
        [kernels.terms_of(work).total for work in WORKS],
        [made.terms_of(work).total for work in WORKS],
    )
    assert found == pytest.approx({"step": 70, "sequence": 5, "chunk": 20, "token": 3})


def test_an_overhead_that_only_a_negative_one_would_fit_is_zero() -> None:
    kernels = Roofline(TINY, FLAT)
    seconds = [kernels.terms_of(work).total for work in WORKS]
    counts = [kernels.overhead_counts(work) for work in WORKS]
    assert fit_overheads(("step",), counts, seconds, [0.9 * each for each in seconds]) == {"step": 0}


@given(
    st.lists(st.tuples(*[st.floats(-5, 5)] * 3), min_size=3, max_size=8),
    st.lists(st.floats(-5, 5), min_size=8, max_size=8),
    st.tuples(*[st.floats(0, 5)] * 3),
)
def test_no_other_nonnegative_point_comes_closer(
    rows: list[tuple[float, float, float]], target: list[float], other: tuple[float, float, float]
) -> None:
    factors, wanted = np.array(rows), np.array(target[: len(rows)])
    found = nonnegative_least_squares(factors, wanted)
    assert (found >= 0).all()
    assert np.linalg.norm(factors @ found - wanted) <= np.linalg.norm(factors @ np.array(other) - wanted) + 1e-6

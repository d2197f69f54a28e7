"""Sizes, times and shares as people read them."""

import pytest

from emberkv.sim.formatting import format_rate, format_seconds, format_share, format_size

GIB = 2**30


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (768, "768 B"), (1536, "1.5 KiB"), (32 * GIB, "32 GiB"), (round(55.44 * GIB), "55.4 GiB"),
     (683 * GIB + 5, "683 GiB"), (2**40, "1 TiB")],
)  # fmt: skip
def test_sizes(size: int, words: str) -> None:
    assert format_size(size) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(12.345, "12.3 s"), (0.0456, "45.6 ms"), (2.6e-6, "2.6 us"), (0.0, "0 s"), (99.96, "100 s"), (0.99996, "1 s"),
     (2287.997, "38 min"), (7100, "118 min"), (31_240, "8.7 h")],
)  # fmt: skip
def test_times_are_in_the_unit_that_reads_best(seconds: float, words: str) -> None:
    assert format_seconds(seconds) == words


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.8031, "80.3%"), (1.0, "100.0%"), (2033 / 2034, "over 99.9%"), (1e-6, "under 0.1%"), (0, "0.0%")],
)
def test_what_is_not_all_does_not_read_like_all(share: float, words: str) -> None:
    assert format_share(share) == words


@pytest.mark.parametrize(("rate", "words"), [(1530.4, "1,530"), (3.4, "3.4"), (0.05214, "0.0521")])
def test_rates(rate: float, words: str) -> None:
    assert format_rate(rate) == words

"""What an unlimited cache would find, counted by hand."""

from pathlib import Path

import pytest

from emberkv.workload.description import describe, lengths
from emberkv.workload.trace import read_trace
from tests.workload.build import jsonl, mooncake_line, request, span


def test_a_small_trace_counted_by_hand(tmp_path: Path) -> None:
    """Blocks of 4 tokens. Hits: 0, then 0 1 (8 tokens), 0 1 (8), 0 (4), and 0 1 2 with its partial end (10)."""
    path = jsonl(
        tmp_path / "t.jsonl",
        mooncake_line(0, 10, [0, 1, 2]),
        mooncake_line(1000, 10, [0, 1, 3]),
        mooncake_line(2000, 8, [0, 1]),
        mooncake_line(3000, 6, [0, 4]),
        mooncake_line(4000, 10, [0, 1, 2]),
    )
    found = describe(read_trace(path, block_size=4))
    assert found is not None
    cache = found.cache
    assert (cache.block_size, cache.references, cache.unique, cache.hits) == (4, 13, 5, 8)
    assert (cache.prompt_tokens, cache.hit_tokens) == (44, 30)
    assert cache.block_hit_rate == pytest.approx(8 / 13)
    assert cache.token_hit_rate == pytest.approx(30 / 44)
    assert (found.requests, found.duration, found.rate, found.sessions) == (5, 4.0, 1.0, 0)


def test_a_block_found_after_one_that_was_not_is_no_hit() -> None:
    found = describe([request("1", 8, 1, span("a", 8)), request("2", 8, 1, span("b", 4), span("a", 4))], 4)
    assert found is not None
    assert (found.cache.hits, found.cache.unique) == (0, 4)


def test_known_answers_are_found_by_the_next_turn() -> None:
    said, answered = span("said", 6), span("answered", 6)
    first = request("1", 6, 6, said, answered, session="s")
    second = request("2", 16, 1, said, answered, span("more", 4), session="s")
    found = describe([first, second], 4)
    assert found is not None
    assert (found.cache.hits, found.cache.hit_tokens, found.sessions, found.longest_session) == (3, 12, 1, 2)


def test_lengths_alone_share_nothing() -> None:
    found = describe([request("1", 40, 1), request("2", 40, 1)])
    assert found is not None
    assert (found.cache.hits, found.cache.content_known, found.cache.references) == (0, False, 6)


def test_an_empty_workload_has_no_description() -> None:
    assert describe([]) is None


def test_percentiles_are_by_nearest_rank() -> None:
    found = lengths(list(range(1, 101)))
    assert (found.mean, found.p50, found.p90, found.p99, found.max) == (50.5, 50, 90, 99, 100)
    assert lengths([7]).p99 == 7

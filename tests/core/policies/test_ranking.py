"""The ranking under the policies: lowest first, moves, and outdated entries swept out."""

import pytest

from emberkv.core.policies.eviction import Ranking


def ranked(*ranks: int) -> Ranking[str, tuple[int]]:
    """Keys "a", "b" and so on with these ranks."""
    ranking: Ranking[str, tuple[int]] = Ranking()
    for key, rank in zip("abcdefgh", ranks, strict=False):
        ranking.place(key, (rank,))
    return ranking


def test_the_lowest_comes_first() -> None:
    assert ranked(5, 2, 7).first() == ("b", (2,))


def test_a_moved_key_counts_where_it_is_now() -> None:
    ranking = ranked(5, 2, 7)
    ranking.place("b", (9,))
    assert ranking.first() == ("a", (5,))
    assert ranking.rank("b") == (9,)
    assert len(ranking) == 3


def test_a_removed_key_is_passed_over() -> None:
    ranking = ranked(5, 2, 7)
    ranking.remove("b")
    assert "b" not in ranking
    assert ranking.first() == ("a", (5,))


def test_nothing_ranked_is_a_key_error() -> None:
    ranking = ranked(1)
    ranking.remove("a")
    with pytest.raises(KeyError, match="nothing is ranked"):
        ranking.first()


def test_outdated_entries_are_swept() -> None:
    ranking = ranked(*range(8))
    for rank in range(1000):
        ranking.place("d", (rank,))
    assert len(ranking._heap) <= 2 * 8 + 64
    assert ranking.first() == ("a", (0,))

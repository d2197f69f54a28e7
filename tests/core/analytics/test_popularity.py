"""Popularity: reuse counted by prefix, fading with time, within a bound."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.analytics.popularity import PopularPrefix, PrefixPopularity, full_tokens
from emberkv.core.hashing import PUBLIC_OWNER, TokenChain, encode_tokens, token_array
from emberkv.errors import ConfigError

BLOCK = 2
ROOT = b"r" * 32
HOUR = 3600.0


def chain(tokens: Sequence[int], **arguments: object) -> TokenChain:
    return TokenChain(ROOT, tokens, BLOCK, **arguments)  # type: ignore[arg-type]  # settings by name


def encoded(*tokens: int) -> bytes:
    return encode_tokens(token_array(tokens))


def scores(popularity: PrefixPopularity, now: float = 0.0) -> dict[bytes, float]:
    """By the whole prefix's tokens."""
    best = popularity.best(now)
    return {tokens: prefix.score for tokens, prefix in zip(full_tokens(best), best, strict=True)}


def test_a_shared_beginning_scores_for_all_who_reuse_it() -> None:
    popularity = PrefixPopularity()
    popularity.used(chain([1, 1, 2, 2, 3, 3]), 6, 0.0)
    popularity.used(chain([1, 1, 2, 2, 4, 4]), 6, 0.0)
    popularity.used(chain([1, 1, 9, 9]), 2, 0.0)
    assert scores(popularity) == {
        encoded(1, 1): 3,
        encoded(1, 1, 2, 2): 2,
        encoded(1, 1, 2, 2, 3, 3): 1,
        encoded(1, 1, 2, 2, 4, 4): 1,
    }
    assert popularity.num_tokens == 8  # what is shared is there once


def test_what_was_not_reused_is_not_remembered() -> None:
    popularity = PrefixPopularity()
    popularity.used(chain([1, 1, 2, 2]), 0, 0.0)
    popularity.used(chain([1, 1, 2, 2]), 1, 0.0)  # less than a block
    assert popularity.best(0.0) == []


def test_the_best_come_first_and_extend_those_before_them() -> None:
    popularity = PrefixPopularity()
    for _ in range(3):
        popularity.used(chain([5, 5, 6, 6]), 4, 0.0)
    popularity.used(chain([1, 1, 2, 2]), 2, 0.0)
    popularity.used(chain([1, 1, 2, 2]), 4, 0.0)
    long, short, extended = popularity.best(0.0)
    assert long == PopularPrefix(None, chain([5, 5, 6, 6]).block_hashes[-1], encoded(5, 5, 6, 6), "", 3.0)
    assert (short.parent, short.tokens, short.score) == (None, encoded(1, 1), 2.0)
    assert (extended.parent, extended.tokens, extended.score) == (1, encoded(2, 2), 1.0)
    assert extended.block_hash == chain([1, 1, 2, 2]).block_hashes[-1]


def test_reuse_fades_by_half_in_each_half_life() -> None:
    popularity = PrefixPopularity(half_life=HOUR)
    popularity.used(chain([1, 1]), 2, 0.0)
    popularity.used(chain([1, 1]), 2, 0.0)
    popularity.used(chain([2, 2]), 2, 2 * HOUR)
    assert scores(popularity, 2 * HOUR) == {encoded(2, 2): 1.0, encoded(1, 1): 0.5}
    popularity.used(chain([1, 1]), 2, 2 * HOUR)
    assert scores(popularity, 3 * HOUR) == {encoded(1, 1): 0.75, encoded(2, 2): 0.5}
    assert [prefix.tokens for prefix in popularity.best(3 * HOUR, least_score=0.6)] == [encoded(1, 1)]


def test_a_clock_that_goes_back_takes_nothing_away() -> None:
    popularity = PrefixPopularity(half_life=HOUR)
    popularity.used(chain([1, 1]), 2, HOUR)
    popularity.used(chain([1, 1]), 2, 0.0)
    assert scores(popularity, HOUR) == {encoded(1, 1): 2.0}


def test_salts_and_owners_are_kept_apart() -> None:
    popularity = PrefixPopularity()
    popularity.used(chain([1, 1, 2, 2], owner="a", salt=b"a", public_blocks=1), 4, 0.0)
    popularity.used(chain([1, 1, 2, 2], owner="b", salt=b"b", public_blocks=1), 4, 0.0)
    public, *private = popularity.best(0.0)
    assert (public.owner, public.tokens, public.score) == (PUBLIC_OWNER, encoded(1, 1), 2.0)
    assert {(each.owner, each.tokens, each.score) for each in private} == {
        ("a", encoded(2, 2), 1.0),
        ("b", encoded(2, 2), 1.0),
    }


def test_what_is_worth_least_is_forgotten_first() -> None:
    popularity = PrefixPopularity(max_tokens=20, half_life=HOUR)
    for number in range(2, 12):
        for _ in range(number % 5 + 1):
            popularity.used(chain([number, number]), 2, 0.0)
    popularity.used(chain([1, 1]), 2, HOUR)
    assert popularity.num_tokens == 18
    left = scores(popularity, HOUR)
    assert encoded(1, 1) in left
    assert encoded(4, 4) in left
    assert encoded(5, 5) not in left  # one of the two that were reused but once, and an hour ago
    assert encoded(10, 10) not in left


@pytest.mark.parametrize("arguments", [{"max_tokens": 0}, {"half_life": 0.0}, {"half_life": float("nan")}], ids=str)
def test_refused_bounds(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        PrefixPopularity(**arguments)  # type: ignore[arg-type]  # settings by name


def test_a_prefix_that_extends_none_before_it() -> None:
    for parent in (0, -1, 5):
        with pytest.raises(ValueError, match="prefix 0 extends"):
            full_tokens([PopularPrefix(parent, b"", encoded(1, 1), "", 1.0)])


uses = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=12), st.integers(0, 12), st.integers(0, 5)), max_size=30
)


@given(uses)
def test_scores_are_those_of_a_list_of_all_uses(given_uses: list[tuple[list[int], int, int]]) -> None:
    """Each prefix that some reuse ended with scores every reuse that covers it."""
    popularity = PrefixPopularity(half_life=1.0)
    covered: list[tuple[bytes, float]] = []
    now = 0.0
    for tokens, hit, wait in given_uses:
        now += wait
        popularity.used(chain(tokens), hit, now)
        reused = tokens[: min(hit, len(tokens)) // BLOCK * BLOCK]
        if reused:
            covered.append((encoded(*reused), now))
    found = scores(popularity, now)
    assert {tokens for tokens, _ in covered} <= set(found)
    for tokens, score in found.items():
        expected = sum(0.5 ** (now - at) for whole, at in covered if whole.startswith(tokens))
        assert score == pytest.approx(expected)
    assert popularity.num_tokens == sum(len(prefix.tokens) for prefix in popularity.best(now)) // 4


@given(uses)
def test_another_instance_goes_on_with_the_same_scores(given_uses: list[tuple[list[int], int, int]]) -> None:
    first, second = PrefixPopularity(half_life=1.0), PrefixPopularity(half_life=1.0)
    for tokens, hit, _ in given_uses:
        first.used(chain(tokens), hit, 3.0)
    best = first.best(4.0)
    chains = [chain(array) for array in map(decoded, full_tokens(best))]
    second.restore(best, chains, 4.0)
    assert scores(second, 5.0) == pytest.approx(scores(first, 5.0))


def decoded(tokens: bytes) -> list[int]:
    return [int.from_bytes(tokens[at : at + 4], "little") for at in range(0, len(tokens), 4)]


@given(uses, st.integers(1, 12))
def test_never_above_the_bound(given_uses: list[tuple[list[int], int, int]], bound: int) -> None:
    popularity = PrefixPopularity(max_tokens=bound, half_life=1.0)
    now = 0.0
    for tokens, hit, wait in given_uses:
        now += wait
        popularity.used(chain(tokens), hit, now)
        assert popularity.num_tokens <= bound
        best = popularity.best(now)
        full_tokens(best)
        assert popularity.num_tokens == sum(len(prefix.tokens) for prefix in best) // 4


@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=10), min_size=1, max_size=8),
    removed=st.sets(st.integers(0, 20)),
)
def test_forgetting_is_as_if_no_prompt_had_gone_on_into_what_is_forgotten(
    prompts: list[list[int]], removed: set[int]
) -> None:
    chains = [chain(each) for each in prompts]
    blocks = list(dict.fromkeys(block_hash for each in chains for block_hash in each.block_hashes))
    gone = {blocks[index] for index in removed if index < len(blocks)}
    popularity, expected = PrefixPopularity(), PrefixPopularity()
    for each in chains:
        kept = next(
            (at for at, block_hash in enumerate(each.block_hashes) if block_hash in gone), len(each.block_hashes)
        )
        popularity.used(each, len(each), 0.0)
        expected.used(each, kept * BLOCK, 0.0)
    popularity.forget(gone)
    assert popularity.num_tokens == expected.num_tokens
    assert {key: score for key, score in scores(popularity).items() if key in scores(expected)} == scores(expected)
    popularity.forget(None)
    assert (popularity.best(0.0), popularity.num_tokens) == ([], 0)

"""Explanations as values: the dominant reason, what lies elsewhere, and rounding as the prefix cache rounds."""

import pytest

from emberkv.core.explaining.explanation import CacheOutcome, Explanation, Miss, MissReason, outcome_of

EVICTED = Miss(MissReason.EVICTED, 8, 4)
NEW = Miss(MissReason.NEW, 12, 20)
PARTIAL = Miss(MissReason.PARTIAL, 32, 3)
EXPLANATION = Explanation(35, {"pool": 8}, (EVICTED, NEW, PARTIAL))


def test_the_dominant_reason_has_the_most_tokens() -> None:
    assert EXPLANATION.dominant == NEW
    assert Explanation(8, {"pool": 8}, ()).dominant is None
    assert Explanation(8, {}, (Miss(MissReason.NEW, 0, 4), Miss(MissReason.PARTIAL, 4, 4))).dominant == Miss(
        MissReason.NEW, 0, 4
    )


@pytest.mark.parametrize(
    ("tokens", "misses"),
    [
        (12, (EVICTED, NEW, PARTIAL)),
        (20, (EVICTED, Miss(MissReason.OTHER_MODEL, 12, 8), Miss(MissReason.NEW, 20, 12), PARTIAL)),
        (32, (EVICTED, Miss(MissReason.OTHER_MODEL, 12, 20), PARTIAL)),
        (99, (EVICTED, Miss(MissReason.OTHER_MODEL, 12, 20), PARTIAL)),
    ],
)
def test_what_is_cached_elsewhere_explains_what_would_be_new(tokens: int, misses: tuple[Miss, ...]) -> None:
    assert EXPLANATION.with_elsewhere(MissReason.OTHER_MODEL, tokens).misses == misses


@pytest.mark.parametrize(
    ("runs", "prompt_tokens", "outcome"),
    [
        ([], 40, CacheOutcome()),
        ([("pool", 2)], 40, CacheOutcome({"pool": 8})),
        ([("pool", 2), ("disk", 3)], 40, CacheOutcome({"pool": 8, "disk": 8}, {MissReason.ALIGNMENT: 4})),
        ([("ram", 3), ("disk", 1)], 17, CacheOutcome({"ram": 12, "disk": 4})),
        ([("pool", 4)], 16, CacheOutcome({"pool": 8}, {MissReason.ALIGNMENT: 4})),  # the last token is left to compute
        ([("pool", 1), ("ram", 1), ("pool", 2)], 30, CacheOutcome({"pool": 12, "ram": 4})),
    ],
)
def test_runs_are_rounded_as_hits_are(runs: list[tuple[str, int]], prompt_tokens: int, outcome: CacheOutcome) -> None:
    assert outcome_of(runs, prompt_tokens, block_size=4, alignment=8) == outcome
    assert outcome.tokens <= prompt_tokens

"""Explanations from a ledger and against a real pool: reasons, divergences, and every token accounted for."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.block import MatchEnd
from emberkv.core.block_pool import BlockPool
from emberkv.core.events import POOL, AllBlocksCleared, BlockRemoved
from emberkv.core.explaining.explain import admission_outcome, common_tokens, explain, look_up
from emberkv.core.explaining.explanation import (
    CacheOutcome,
    Divergence,
    Explanation,
    Loss,
    LossKind,
    Miss,
    MissReason,
    outcome_of,
)
from emberkv.core.explaining.ledger import Ledger
from emberkv.core.hashing import TokenChain, decode_tokens
from emberkv.core.loading import Admission
from emberkv.core.prefix_cache import PrefixCache
from tests.core.harness import chain
from tests.core.ledgers import SIZE, CountedChain, asked, ledger_with, miss_spans, stored
from tests.machine import subclasses_core


def test_nothing_is_known() -> None:
    explanation = asked(Ledger(), chain(range(10)))
    assert explanation.hit == {}
    assert miss_spans(explanation) == [(MissReason.NEW, 0, 8), (MissReason.PARTIAL, 8, 2)]
    assert explanation.divergence is None


def test_a_prompt_that_is_cached_but_for_its_last_block() -> None:
    explanation = asked(ledger_with(chain(range(12))), chain(range(12)))
    assert explanation.hit == {POOL: 8}
    assert miss_spans(explanation) == [(MissReason.PARTIAL, 8, 4)]
    explanation = asked(ledger_with(chain(range(12))), chain(range(13)))
    assert (explanation.hit, miss_spans(explanation)) == ({POOL: 12}, [(MissReason.PARTIAL, 12, 1)])


def test_a_prompt_that_goes_on_where_nothing_did() -> None:
    explanation = asked(ledger_with(chain(range(8))), chain(range(18)))
    assert explanation.hit == {POOL: 8}
    assert miss_spans(explanation) == [(MissReason.NEW, 8, 8), (MissReason.PARTIAL, 16, 2)]


def test_the_first_difference_is_told_with_what_is_around_it() -> None:
    cached = chain([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    explanation = asked(ledger_with(cached), chain([1, 2, 3, 4, 5, 6, -7, 8, 9, 10, 11]))
    assert explanation.hit == {POOL: 4}
    assert miss_spans(explanation) == [
        (MissReason.ALIGNMENT, 4, 2),
        (MissReason.DIVERGED, 6, 2),
        (MissReason.PARTIAL, 8, 3),
    ]
    assert explanation.divergence == Divergence(
        position=6, before=(1, 2, 3, 4, 5, 6), expected=(7, 8, 9, 10, 11, 12), found=(-7, 8, 9, 10, 11), cached=True
    )


def test_a_difference_in_the_very_first_token() -> None:
    divergence = asked(ledger_with(chain(range(8))), chain([99, *range(1, 8)])).divergence
    assert divergence == Divergence(0, (), tuple(range(8)), (99, *range(1, 8)), cached=True)


def test_what_is_told_around_a_difference_is_bounded() -> None:
    cached = chain(range(1000))
    divergence = asked(ledger_with(cached), chain([*range(500), -1, *range(501, 1000)])).divergence
    assert divergence is not None
    assert divergence.position == 500
    assert divergence.before == tuple(range(476, 500))
    assert divergence.expected == tuple(range(500, 524))
    assert divergence.found == (-1, *range(501, 524))


def test_the_nearest_of_many_siblings_is_told() -> None:
    siblings = [chain([7, 7, third, fourth]) for third in range(300) for fourth in (1, 2)]
    divergence = asked(ledger_with(*siblings), chain([7, 7, 150, 3, 0])).divergence
    assert divergence is not None
    assert (divergence.position, divergence.found) == (3, (3, 0))
    assert divergence.expected in {(1,), (2,)}


def test_of_equally_near_siblings_a_cached_one_is_told() -> None:
    siblings = [chain([7, 7, 7, last]) for last in (1, 2, 4, 5)]
    ledger = ledger_with(*siblings)
    ledger.left(POOL, [siblings[1].block_hashes[0], siblings[2].block_hashes[0]], now=2.0)
    divergence = asked(ledger, chain([7, 7, 7, 3, 0])).divergence
    assert divergence is not None
    assert divergence.cached
    assert divergence.expected in {(1,), (5,)}
    ledger.cleared(POOL, now=3.0)
    divergence = asked(ledger, chain([7, 7, 7, 3, 0])).divergence
    assert divergence is not None
    assert not divergence.cached


def test_an_eviction_is_told_with_its_time_and_place() -> None:
    cached = chain(range(12))
    ledger = ledger_with(cached)
    ledger.left(POOL, cached.block_hashes[1:], now=5.0)
    explanation = asked(ledger, chain(range(17)))
    assert explanation.hit == {POOL: 4}
    assert explanation.misses == (
        Miss(MissReason.EVICTED, 4, 8, Loss(POOL, 5.0, LossKind.EVICTED)),
        Miss(MissReason.NEW, 12, 4),
        Miss(MissReason.PARTIAL, 16, 1),
    )


def test_a_cleared_cache_is_no_eviction() -> None:
    ledger = ledger_with(chain(range(8)))
    ledger.apply(AllBlocksCleared(), 4.0)
    (miss, _) = asked(ledger, chain(range(9))).misses
    assert miss == Miss(MissReason.CLEARED, 0, 8, Loss(POOL, 4.0, LossKind.CLEARED))


def test_each_way_to_lose_blocks_is_a_reason_of_its_own() -> None:
    cached = chain(range(20))
    ledger = ledger_with(cached)
    ledger.apply(BlockRemoved(tuple(cached.block_hashes[1:2]), evicted=False), 3.0)
    ledger.apply(BlockRemoved(tuple(cached.block_hashes[3:])), 2.0)
    explanation = asked(ledger, chain(range(21)))
    assert explanation.hit == {POOL: 4}
    assert explanation.misses == (
        Miss(
            MissReason.REMOVED, 4, 8, Loss(POOL, 3.0, LossKind.REMOVED)
        ),  # with one still cached, of no use without it
        Miss(MissReason.EVICTED, 12, 8, Loss(POOL, 2.0, LossKind.EVICTED)),
        Miss(MissReason.PARTIAL, 20, 1),
    )


def test_alignment_and_short_prompts() -> None:
    ledger = ledger_with(chain(range(12)))
    explanation = asked(ledger, chain(range(14)), alignment=8)
    assert explanation.hit == {POOL: 8}
    assert miss_spans(explanation) == [(MissReason.ALIGNMENT, 8, 4), (MissReason.PARTIAL, 12, 2)]
    assert miss_spans(asked(ledger, chain(range(8)), alignment=8)) == [
        (MissReason.ALIGNMENT, 0, 4),
        (MissReason.TOO_SHORT, 4, 4),
    ]
    assert miss_spans(asked(ledger, chain([50, 51]), alignment=8)) == [(MissReason.TOO_SHORT, 0, 2)]


def test_where_hits_end_at_any_token_only_the_last_one_is_left() -> None:
    ledger = ledger_with(chain(range(12)))
    unit = {"hit_unit": 1}
    repeat = explain(ledger, chain(range(7)), CacheOutcome({POOL: 6}), **unit)
    assert miss_spans(repeat) == [(MissReason.LAST, 6, 1)]
    short = explain(ledger, chain([50, 51]), CacheOutcome(), **unit)
    assert miss_spans(short) == [(MissReason.DIVERGED, 0, 1), (MissReason.LAST, 1, 1)]
    assert miss_spans(explain(Ledger(), chain([50, 51, 52]), CacheOutcome(), **unit)) == [
        (MissReason.NEW, 0, 2),
        (MissReason.LAST, 2, 1),
    ]
    left = explain(ledger, chain([*range(6), 70, 71, 72, 73]), CacheOutcome({POOL: 6}), **unit)
    assert miss_spans(left) == [(MissReason.DIVERGED, 6, 3), (MissReason.LAST, 9, 1)]
    assert left.divergence is not None
    assert left.divergence.position == 6


def test_where_hits_end_at_any_token_the_beginning_of_a_lost_block_is_lost() -> None:
    cached = chain(range(12))
    ledger = ledger_with(cached)
    ledger.left(POOL, cached.block_hashes[1:], now=5.0)
    explanation = explain(ledger, chain([*range(6), 70, 71]), CacheOutcome({POOL: 4}), hit_unit=1)
    assert explanation.misses == (
        Miss(MissReason.EVICTED, 4, 2, Loss(POOL, 5.0, LossKind.EVICTED)),
        Miss(MissReason.DIVERGED, 6, 1),
        Miss(MissReason.LAST, 7, 1),
    )


def test_of_a_block_in_a_tier_only_the_whole_is_reused() -> None:
    cached = chain(range(12))
    ledger = ledger_with(cached)
    ledger.arrived("disk", cached.block_hashes)
    ledger.left(POOL, cached.block_hashes[1:], now=5.0)
    explanation = explain(ledger, chain([*range(6), 70, 71]), CacheOutcome({POOL: 4}), hit_unit=1)
    assert miss_spans(explanation) == [
        (MissReason.ALIGNMENT, 4, 2),
        (MissReason.DIVERGED, 6, 1),
        (MissReason.LAST, 7, 1),
    ]


def test_a_hit_in_a_partial_block_goes_on_where_nothing_known_does() -> None:
    explanation = explain(
        ledger_with(chain(range(8))), chain([*range(5), 70, 71, 72]), CacheOutcome({POOL: 6}), hit_unit=1
    )
    assert (miss_spans(explanation), explanation.divergence) == (
        [(MissReason.NEW, 6, 1), (MissReason.LAST, 7, 1)],
        None,
    )


def test_what_a_tier_had_and_was_not_loaded() -> None:
    outcome = CacheOutcome({POOL: 4, "disk": 4}, {MissReason.RECOMPUTE_CHEAPER: 8, MissReason.LOAD_FAILED: 4})
    explanation = explain(Ledger(), chain(range(30)), outcome, hit_unit=SIZE)
    assert explanation.hit == {POOL: 4, "disk": 4}
    assert miss_spans(explanation) == [
        (MissReason.RECOMPUTE_CHEAPER, 8, 8),
        (MissReason.LOAD_FAILED, 16, 4),
        (MissReason.NEW, 20, 8),
        (MissReason.PARTIAL, 28, 2),
    ]


def test_a_known_block_that_must_not_be_used() -> None:
    cached = chain(range(8))
    outcome = CacheOutcome(refused=MissReason.INEXACT)
    explanation = explain(ledger_with(cached), chain(range(9)), outcome, hit_unit=SIZE)
    assert miss_spans(explanation) == [(MissReason.INEXACT, 0, 8), (MissReason.PARTIAL, 8, 1)]


def test_another_salt_is_never_spoken_of() -> None:
    ledger = ledger_with(chain(range(8), salt=b"theirs"))
    explanation = asked(ledger, chain(range(9), salt=b"ours"))
    assert miss_spans(explanation) == [(MissReason.NEW, 0, 8), (MissReason.PARTIAL, 8, 1)]
    assert explanation.divergence is None


def test_leaving_a_public_prefix_is_told_to_everyone() -> None:
    public = chain(range(8))
    ours = TokenChain(public.root, [0, 1, 2, 3, 4, 5, -6, 7, 8], SIZE, owner="ann", salt=b"ours", public_blocks=1)
    divergence = asked(ledger_with(public), ours).divergence
    assert divergence is not None
    assert (divergence.position, divergence.expected, divergence.found) == (6, (6, 7), (-6, 7, 8))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20), st.lists(st.integers(0, 3), max_size=20))
def test_encoded_tokens_are_read_back(tokens: list[int], others: list[int]) -> None:
    encoded = TokenChain(b"", tokens, SIZE).encoded()
    assert decode_tokens(encoded) == tuple(tokens)
    common = common_tokens(encoded, TokenChain(b"", others, SIZE).encoded())
    assert tokens[:common] == others[:common]
    assert tokens[common : common + 1] != others[common : common + 1] or common in (len(tokens), len(others))


prompts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=16), min_size=1, max_size=25)


@given(
    prompts,
    st.integers(4, 9),
    st.integers(2, 60),
    st.sampled_from([1, 2]),
    st.sampled_from([2, 4]),
    st.sampled_from([(False, True), (True, True), (True, False)]),
)
def test_the_ledger_agrees_with_the_pool_and_accounts_for_every_token(
    served: Sequence[list[int]], pool_blocks: int, remembered: int, unit: int, size: int, flags: tuple[bool, bool]
) -> None:
    pool = BlockPool(pool_blocks, size)
    cache = PrefixCache(pool, alignment=unit * size, batch_invariant=flags[0], within_blocks=flags[1], branch_tokens=1)
    ledger, seen = Ledger(remembered), 0
    for now, tokens in enumerate(served):
        prompt = chain(tokens, block_size=size)
        found = pool.match(prompt, stop=len(prompt.block_hashes)).blocks
        if len(ledger) < remembered:
            assert ledger.cached_run(prompt) == len(found)
        explanation = explain(ledger, prompt, look_up(cache, None, prompt), hit_unit=cache.hit_unit)
        check_account(explanation, prompt, cache.hit_unit)
        lease = cache.acquire(prompt)
        assert explanation.hit_tokens == lease.hit_tokens
        if lease.missing_blocks(len(prompt)) <= pool.num_free:
            lease.extend(len(prompt))
            if lease.checkpoint is not None:
                lease.commit_prefilled(lease.checkpoint)
            lease.commit_prefilled(len(prompt))
        lease.release()
        for event in pool.events.since(seen) or ():
            ledger.apply(event, float(now))
        seen = pool.events.last_sequence
        assert len(ledger) <= remembered


def check_account(explanation: Explanation, prompt: TokenChain, hit_unit: int) -> None:
    """Hit and misses are the prompt, without gap or overlap; a divergence is one."""
    at = explanation.hit_tokens
    for miss in explanation.misses:
        assert (miss.start, miss.tokens > 0) == (at, True)
        at = miss.stop
    assert at == len(prompt) == explanation.prompt_tokens
    reasons = {miss.reason for miss in explanation.misses}
    if hit_unit == 1:  # no reason speaks of blocks, and all but the last token is explained by what is known
        assert reasons <= {MissReason.NEW, MissReason.DIVERGED, MissReason.EVICTED, MissReason.LAST}
        assert explanation.misses[-1] == Miss(MissReason.LAST, len(prompt) - 1, 1)
    divergence = explanation.divergence
    assert (divergence is not None) == any(miss.reason is MissReason.DIVERGED for miss in explanation.misses)
    if divergence is not None:
        (diverged,) = (miss for miss in explanation.misses if miss.reason is MissReason.DIVERGED)
        assert diverged.start == divergence.position
        assert divergence.found[0] == prompt[divergence.position] != divergence.expected[0]
        assert divergence.before == tuple(prompt.slice(0, divergence.position))[-24:]


def test_what_an_admission_found() -> None:
    admission = Admission(8, {"disk": 4}, MatchEnd.ABSENT, recompute_cheaper_tokens=16, load_failed_tokens=4)
    assert admission_outcome(admission, 100) == CacheOutcome(
        {POOL: 8, "disk": 4}, {MissReason.RECOMPUTE_CHEAPER: 16, MissReason.LOAD_FAILED: 4}
    )
    assert admission_outcome(Admission(0, {}, MatchEnd.INEXACT), 100) == CacheOutcome(refused=MissReason.INEXACT)
    assert admission_outcome(Admission(0, {}, MatchEnd.TOKENS_DIFFER), 9) == CacheOutcome(refused=MissReason.COLLISION)


def test_without_a_cache_nothing_else_is_said() -> None:
    outcome = admission_outcome(Admission(0, {}, MatchEnd.OFF, partial_tokens=1), 9)
    assert miss_spans(explain(ledger_with(chain(range(9))), chain(range(9)), outcome, hit_unit=SIZE)) == [
        (MissReason.CACHE_OFF, 0, 9)
    ]


def test_what_was_generated_since_is_no_part_of_the_prompt() -> None:
    grown = chain([0, 1, 2, 3, 4, 5])
    grown.append(6)
    grown.append(7)
    ledger = ledger_with(chain([0, 1, 2, 9]))
    explanation = explain(ledger, grown, CacheOutcome(), hit_unit=SIZE, prompt_tokens=6)
    assert miss_spans(explanation) == [
        (MissReason.ALIGNMENT, 0, 3),
        (MissReason.DIVERGED, 3, 1),
        (MissReason.PARTIAL, 4, 2),
    ]
    assert explanation.divergence == Divergence(3, (0, 1, 2), (9,), (3, 4, 5), cached=True)


@subclasses_core
def test_of_a_long_prompt_only_the_block_that_differs_is_compared() -> None:
    tokens = list(range(128_000))
    cached = TokenChain(b"root", tokens, 16)
    ledger = Ledger()
    ledger.apply(stored(cached), 1.0)
    ledger.left(POOL, cached.block_hashes[10:], 2.0)
    prompt = CountedChain(b"root", [*tokens[:-100], *[-1] * 100], 16)
    prompt.asked = 0
    outcome = outcome_of([(POOL, ledger.cached_run(prompt))], len(prompt), block_size=16, alignment=32)
    explanation = explain(ledger, prompt, outcome, hit_unit=32)
    assert [reason for reason, _, _ in miss_spans(explanation)] == [
        MissReason.EVICTED,
        MissReason.DIVERGED,
        MissReason.PARTIAL,
    ]
    assert prompt.asked == 1

"""The bound: above every policy, equal to exhaustive search on small traces, and to the published figures."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.sim.curves import Access, Optimal, replay
from tests.sim.curves.build import CAPACITIES, visit_lists, visit_of


def best_of_all_choices(seen: list[Access], capacity: int) -> int:
    """Hits of the best of all ways to keep or drop each block after each use."""
    uses = [(block, at < access.asked) for access in seen for at, block in enumerate(access.blocks)]

    @cache
    def best(at: int, kept: frozenset[bytes]) -> int:
        if at == len(uses):
            return 0
        block, asked = uses[at]
        gain = int(asked and block in kept)
        rest = kept - {block}
        ways = [rest] + ([rest | {block}] if len(rest) < capacity else [rest - {out} | {block} for out in rest])
        return gain + max(best(at + 1, way) for way in ways)

    return best(0, frozenset())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=2), max_size=7), st.integers(1, 3), st.data())
def test_no_choice_of_what_to_keep_hits_more(paths: list[list[int]], capacity: int, data: st.DataObject) -> None:
    seen = [visit_of(path, asked=data.draw(st.integers(0, len(path)))) for path in paths]
    assert Optimal(seen).at(capacity).hits == best_of_all_choices(seen, capacity)


@settings(max_examples=50)
@given(visit_lists(), st.integers(6, 40), st.sampled_from(POLICY_NAMES))
def test_no_policy_exceeds_it(seen: list[Access], capacity: int, policy: str) -> None:
    bound, found = Optimal(seen).at(capacity), replay(seen, capacity, policy)
    assert (bound.references, bound.prompt_tokens) == (found.references, found.prompt_tokens)
    assert found.hits <= bound.hits
    assert found.hit_tokens <= bound.hit_tokens


@pytest.mark.parametrize(("capacity", "hits"), [(1, 1), (2, 2), (3, 3)])
def test_of_a_loop_it_keeps_what_fits(capacity: int, hits: int) -> None:
    assert Optimal([visit_of([root]) for root in (1, 2, 3, 1, 2, 3)]).at(capacity).hits == hits


def test_the_mooncake_figures(mooncake: list[Access]) -> None:
    bound = Optimal(mooncake)
    rates = [round(bound.at(capacity).block_rate, 4) for capacity in CAPACITIES]
    assert rates == [0.1907, 0.2945, 0.3551, 0.3664, 0.3664, 0.3664, 0.3664]

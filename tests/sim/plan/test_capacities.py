"""Hit rates by size: at sizes people buy, exact where they can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.sim import planner
from emberkv.sim.build import Machine, machine_of
from emberkv.sim.curves import Access, replay
from emberkv.sim.planner import Capacities, round_sizes
from tests.sim.curves.build import visit_of
from tests.sim.plan.build import rates


@pytest.fixture
def machine() -> Machine:
    return machine_of(rates(), 16)


def test_round_sizes_are_powers_of_two_and_their_middles() -> None:
    assert round_sizes(60, 400) == [64, 96, 128, 192, 256, 384, 512]


@given(st.integers(1, 2**40), st.integers(1, 2**40))
def test_round_sizes_begin_no_lower_and_end_with_the_first_that_is_enough(smallest: int, largest: int) -> None:
    sizes = round_sizes(smallest, largest)
    assert sizes == sorted(set(sizes))
    assert sizes[0] >= smallest
    assert sizes[-1] >= largest
    assert all(size < largest for size in sizes[:-1])


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_short_workloads_are_exact_for_every_policy(machine: Machine, policy: str) -> None:
    seen = [visit_of([root % 7, 1, root % 3]) for root in range(60)]
    found = Capacities(seen, policy, machine)
    assert found.hit_rate(8) == replay(seen, 8, policy).token_rate
    assert found.error is None


def test_a_pool_smaller_than_a_request_is_replayed_without_it(machine: Machine) -> None:
    seen = [visit_of([1]), visit_of([1, 2, 3]), visit_of([1])]
    assert Capacities(seen, "lru", machine).hit_rate(2) == 4 / 20


def test_sizes_are_of_the_machines_blocks_and_end_where_nothing_changes(machine: Machine) -> None:
    seen = [visit_of([root, 1]) for root in range(8)] * 2
    found = Capacities(seen, "lru", machine)
    assert found.enough == 16 * machine.block_bytes == 16 * 16 * 1024
    last = found.sizes()[-1]
    assert (last.bytes, last.blocks, last.hit_rate, last.best_possible) == (16 * 16384, 16, 0.5, 0.5)


def test_long_workloads_are_sampled_and_say_how_far_off_that_may_be(machine: Machine, mooncake: list[Access]) -> None:
    seen = mooncake[:6000]
    assert sum(access.asked for access in seen) > planner.MAX_REPLAYED
    found = Capacities(seen, "lfu", machine)
    rate = found.hit_rate(10_000)
    assert found.error is not None
    assert 0 < found.error < 0.02
    assert abs(rate - replay(seen, 10_000, "lfu").token_rate) < found.error

"""The routing policies, each by what it is for."""

from collections import Counter
from random import Random

import pytest

from emberkv.cluster.policies import ConsistentHashing, LongestPrefix, ReplicaState, RoutingPolicy
from emberkv.cluster.routing import ROUTER_NAMES, Router, RoutingRequest, make_router, names
from emberkv.core.events import BlockStored
from emberkv.core.hashing import TokenChain
from emberkv.errors import ConfigError

BLOCK = 4


def chain(*tokens: int) -> TokenChain:
    return TokenChain(bytes(32), tokens, BLOCK)


def a_router(name: str, replicas: int, rng: Random | None = None) -> Router:
    return make_router(name, rng or Random(1), names(replicas))


def with_policy(policy: RoutingPolicy, replicas: int) -> Router:
    router = Router(policy, Random(1))
    for name in names(replicas):
        router.join(name)
    return router


def chosen(router: Router, asked: TokenChain, replicas: list[ReplicaState]) -> int:
    decision = router.decide(RoutingRequest(asked, len(asked)), replicas)
    assert decision is not None
    return decision.replica


def states(*loads: float, down: tuple[int, ...] = ()) -> list[ReplicaState]:
    return [ReplicaState(load, up=index not in down) for index, load in enumerate(loads)]


def prompt(start: int, blocks: int) -> TokenChain:
    return chain(*range(start, start + blocks * BLOCK))


def tell(router: Router, replica: int, of: TokenChain) -> None:
    assert router.index is not None
    router.index.apply(replica, BlockStored(tuple(of.block_hashes), b"", (), BLOCK))


@pytest.mark.parametrize("name", ROUTER_NAMES)
def test_nobody_chooses_a_replica_that_is_down(name: str) -> None:
    router = a_router(name, 4, Random(1))
    found = {chosen(router, prompt(number, 3), states(0, 9, 0, 5, down=(0, 2))) for number in range(60)}
    assert found <= {1, 3}


@pytest.mark.parametrize("name", ROUTER_NAMES)
def test_a_prompt_without_a_full_block_goes_somewhere(name: str) -> None:
    assert chosen(a_router(name, 3, Random(1)), chain(1, 2), states(1, 1, 1)) in range(3)


def test_random_is_even_and_seeded() -> None:
    choices = [[chosen(a_router("random", 4, Random(7)), chain(), states(0, 0, 0, 0))] for _ in range(2)]
    assert choices[0] == choices[1]
    router = a_router("random", 4, Random(7))
    counts = Counter(chosen(router, chain(), states(0, 0, 0, 0)) for _ in range(4000))
    assert all(900 < counts[index] < 1100 for index in range(4))


def test_round_robin_goes_round() -> None:
    router = a_router("round-robin", 3)
    assert [chosen(router, chain(), states(0, 0, 0)) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_least_loaded_takes_the_first_of_equals() -> None:
    router = a_router("least-loaded", 3)
    assert chosen(router, chain(), states(5, 2, 2)) == 1


def test_consistent_hashing_looks_at_the_first_two_blocks() -> None:
    router = a_router("consistent-hashing", 8)
    even = states(*[0] * 8)
    same = {chosen(router, chain(*range(8), *range(tail, tail + 8)), even) for tail in range(50)}
    assert len(same) == 1
    others = {chosen(router, chain(*range(4), *range(tail, tail + 8)), even) for tail in range(50)}
    assert len(others) > 3


def test_consistent_hashing_ignores_load_unless_it_is_bounded() -> None:
    plain, bounded = (with_policy(ConsistentHashing(bound=bound), 4) for bound in (None, 1.25))
    home = chosen(plain, prompt(1, 2), states(0, 0, 0, 0))
    loads = [100.0 if index == home else 10.0 for index in range(4)]
    assert chosen(plain, prompt(1, 2), states(*loads)) == home
    elsewhere = chosen(bounded, prompt(1, 2), states(*loads))
    assert elsewhere != home
    assert chosen(bounded, prompt(1, 2), states(12, 12, 12, 12)) == home, "a mean load is within the bound"


def test_longest_prefix_follows_the_blocks_whatever_the_load() -> None:
    router = a_router("longest-prefix", 3)
    tell(router, 1, prompt(0, 2))
    tell(router, 2, prompt(0, 3))
    assert chosen(router, prompt(0, 5), states(0, 0, 1000)) == 2
    assert chosen(router, prompt(9, 5), states(5, 0, 0)) == 0, "nobody has any: the first"


def test_prefix_minus_load_weighs_tokens_against_tokens() -> None:
    router = a_router("prefix-minus-load", 2)
    tell(router, 1, prompt(0, 3))
    assert chosen(router, prompt(0, 5), states(0, 3 * BLOCK - 1)) == 1
    assert chosen(router, prompt(0, 5), states(0, 3 * BLOCK + 1)) == 0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="'nearest' is unknown; use one of random, round-robin"):
        a_router("nearest", 2)
    with pytest.raises(ConfigError, match="bound 1"):
        ConsistentHashing(bound=1.0)
    with pytest.raises(ConfigError, match="load_weight is -1"):
        LongestPrefix(load_weight=-1)


def test_a_slot_is_used_again_and_what_its_replica_had_is_forgotten() -> None:
    router = a_router("longest-prefix", 3)
    tell(router, 1, prompt(0, 3))
    assert chosen(router, prompt(0, 5), states(0, 0, 0)) == 1
    router.leave(1)
    assert chosen(router, prompt(0, 5), states(0, 0, 0, down=(1,))) == 0
    assert [router.join("late"), router.join("later")] == [1, 3]
    assert chosen(router, prompt(0, 5), states(0, 0, 0, 0)) == 0


def test_without_a_replica_that_is_up_there_is_no_decision() -> None:
    assert a_router("random", 2).decide(RoutingRequest(prompt(0, 1), 4), states(0, 0, down=(0, 1))) is None

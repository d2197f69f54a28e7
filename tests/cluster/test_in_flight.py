"""Prompts on their way are found by what another prompt has in common with them."""

from hypothesis import given
from hypothesis import strategies as st

from emberkv.cluster.routing import PromptsInFlight
from emberkv.core.hashing import prompt_hashes

PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=40)


def hashes(tokens: list[int]) -> list[bytes]:
    return prompt_hashes("weights", tokens, block_size=1)


def common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


@given(PROMPTS, st.dictionaries(st.integers(0, 5), PROMPTS, max_size=4))
def test_depths_are_those_of_the_prompts(asked: list[int], sent: dict[int, list[int]]) -> None:
    in_flight = PromptsInFlight()
    for slot, prompt in sent.items():
        in_flight.add(slot, hashes(prompt), until=1.0)
    expected = {slot: depth for slot, prompt in sent.items() if (depth := common(asked, prompt))}
    assert in_flight.depths(hashes(asked), now=0.5) == expected


def test_the_latest_prompt_of_a_replica_counts_and_each_has_its_own_end() -> None:
    in_flight = PromptsInFlight()
    in_flight.add(1, hashes([1, 1, 1]), until=5.0)
    in_flight.add(1, hashes([1, 1, 1, 1]), until=3.0)
    in_flight.add(2, hashes([1, 0]), until=9.0)
    asked = hashes([1, 1, 1, 1, 1])
    assert in_flight.depths(asked, now=2.0) == {1: 4, 2: 1}
    assert in_flight.depths(asked, now=4.0) == {2: 1}, "the earlier prompt is not remembered behind the later one"
    assert in_flight.depths(asked, now=10.0) == {}


def test_a_replica_that_is_lost_computes_nothing() -> None:
    in_flight = PromptsInFlight()
    in_flight.add(1, hashes([1, 1]), until=5.0)
    in_flight.add(2, hashes([1]), until=5.0)
    in_flight.forget(1)
    assert in_flight.depths(hashes([1, 1]), now=0.0) == {2: 1}

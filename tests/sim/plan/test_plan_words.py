"""The recommendation: every number in it is the plan's."""

from dataclasses import replace

import pytest

from emberkv.sim.plan_words import recommendation, seconds_words, size_words
from tests.sim.plan.build import GIB, PLAN, SIZES, plan


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (768, "768 B"), (1536, "1.5 KiB"), (32 * GIB, "32 GiB"), (round(55.44 * GIB), "55.4 GiB"),
     (683 * GIB + 5, "683 GiB"), (2**40, "1 TiB")],
)  # fmt: skip
def test_sizes_read_as_people_say_them(size: int, words: str) -> None:
    assert size_words(size) == words


@pytest.mark.parametrize(("seconds", "words"), [(12.345, "12.3 s"), (0.0456, "45.6 ms"), (2.6e-6, "2.6 us")])
def test_times_are_in_the_unit_that_reads_best(seconds: float, words: str) -> None:
    assert seconds_words(seconds) == words


def test_it_says_what_to_get_and_why() -> None:
    assert recommendation(PLAN) == [
        "Of all prompt tokens, 30.0% can be reused: that is what a cache without limit finds.",
        "4 GiB captures 100% of what is reusable; beyond 3.5 GiB nothing changes.",
        "A policy that knew the future would need 2 GiB for as much; LRU needs the rest because it cannot.",
        "Fetching a prompt token from RAM takes 2 us, 10.0 times as fast as computing it (20 us).",
        "Fetching a prompt token from disk takes 40 us, slower than computing it (20 us).",
        "The workload asks for 2 requests a second, 5 at its busiest. 3 replicas with 1 GiB of KV memory each would "
        "find 25.0% of prompt tokens and could serve 9 a second at most.",
        "2 replicas with 1 GiB of KV memory and 2 GiB of RAM each would do, at no more than 80% of what they could "
        "serve.",
        "Simulated over 900 of 1,000 requests: 2 replicas with 1 GiB of KV memory and 2 GiB of RAM each, routed by "
        "consistent-hashing: 28.0% of prompt tokens found, mean time to first token 400 ms, p99 2.5 s, queueing "
        "included.",
    ]  # fmt: skip


def test_a_sampled_curve_says_so_and_does_not_promise_where_nothing_changes() -> None:
    words = recommendation(plan(eviction="lfu", error=0.0071))
    assert words[1] == "4 GiB captures 100% of what is reusable (from a sample; at most about 0.007 off)."


def test_without_a_size_that_is_enough_it_says_what_the_largest_does() -> None:
    words = recommendation(plan(recommended=None, sizes=SIZES[:2]))
    assert words[1] == "No size captures 90% of that; 2 GiB captures 67%."


def test_where_nothing_is_told_or_shared_it_promises_nothing() -> None:
    untold = recommendation(plan(told=False, unlimited=0.0, recommended=None, set_ups=PLAN.set_ups[-1:]))
    assert untold[0].startswith("The workload does not say what prompts share")
    assert untold[1].endswith("3 replicas with 1 GiB of KV memory each could serve 9 a second at most.")
    assert recommendation(plan(unlimited=0.0, recommended=None))[0].startswith("No two prompts begin alike")


def test_set_ups_that_cannot_serve_the_busiest_time_are_named() -> None:
    (slow,) = (replace(PLAN.set_ups[0], most_requests_per_second=6.0),)
    words = recommendation(plan(set_ups=[slow]))
    assert words[-1] == "None of these set-ups serves its busiest time with 20% to spare."

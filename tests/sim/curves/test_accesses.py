"""A request as a cache sees it."""

from emberkv.sim.curves import access
from tests.workload.build import request, span


def test_a_prompt_of_a_trace_counts_its_partial_block() -> None:
    seen = access(request("a", 10, 5, span("x", 10)), 4)
    assert (len(seen.blocks), seen.asked, seen.references) == (3, 3, 3)
    assert [seen.tokens(hits) for hits in range(4)] == [0, 4, 8, 10]


def test_a_known_answer_stays_in_full_blocks_and_swallows_the_partial_one() -> None:
    seen = access(request("a", 10, 7, span("x", 17)), 4)
    assert (len(seen.blocks), seen.asked, seen.references) == (4, 2, 3)


def test_equal_beginnings_are_equal_blocks_and_unknown_content_is_private() -> None:
    short, long = (access(request(name, size, 0, span("x", size)), 4) for name, size in (("a", 8), ("b", 12)))
    assert long.blocks[:2] == short.blocks
    private = [access(request(name, 8, 0), 4).blocks for name in ("a", "b")]
    assert not set(private[0]) & set(private[1])


def test_a_prompt_of_no_tokens_looks_nothing_up() -> None:
    seen = access(request("a", 0, 3), 4)
    assert (seen.blocks, seen.asked, seen.references) == ([], 0, 0)

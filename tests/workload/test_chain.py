"""The core's own pool, cache and scheduler run over contents as they do over token ids."""

from array import array

import pytest

from emberkv.core.block_pool import BlockPool
from emberkv.core.hashing import BlockHash, Chain, TokenChain
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig
from emberkv.core.sequence import Sequence
from emberkv.workload.content import Content, Span, Tokens, stream_key
from emberkv.workload.request import ContentChain, Request
from tests.workload.build import request, span

ROOT = bytes(32)


class Machine:
    """The serving scheduler over a pool of blocks of 10 tokens, with nothing computed."""

    def __init__(self, num_blocks: int = 2000) -> None:
        self.pool = BlockPool(num_blocks, 10)
        self.scheduler = Scheduler(PrefixCache(self.pool, alignment=10), SchedulerConfig(prefill_chunk=1000))

    def run(self, asked: Request, root: BlockHash = ROOT) -> tuple[int, int]:
        """Cached and prefilled tokens."""
        before = self.scheduler.stats.prefill_tokens
        sequence = Sequence(asked.request_id, asked.chain(root, 10), asked.output_tokens)
        self.scheduler.add(sequence)
        while plan := self.scheduler.schedule():
            ready = [*plan.decodes, *(chunk.sequence for chunk in plan.prefills if chunk.samples)]
            self.scheduler.complete(plan, {each.request_id: 0 for each in ready})
        self.pool.check_integrity([])
        assert sequence.num_generated == asked.output_tokens
        return sequence.cached_tokens, self.scheduler.stats.prefill_tokens - before


@pytest.mark.parametrize(
    ("first", "answer", "second", "cached", "prefilled"),
    [(100, 50, 200, 140, 60), (100, 51, 200, 150, 50), (9_000, 1_001, 12_000, 10_000, 2_000)],
)
def test_a_second_turn_prefills_what_the_first_did_not_leave(
    first: int, answer: int, second: int, cached: int, prefilled: int
) -> None:
    """The last token that is generated has no KV state yet: 100 + 50 tokens leave 149, so 14 full blocks."""
    machine = Machine()
    said, answered = span("first", first), span("answer", answer)
    assert machine.run(request("1", first, answer, said, answered)) == (0, first)
    rest = span("second", second - first - answer)
    assert machine.run(request("2", second, 1, said, answered, rest)) == (cached, prefilled)


def test_what_is_private_is_found_by_nobody() -> None:
    machine = Machine()
    assert machine.run(request("1", 100, 1)) == (0, 100)
    assert machine.run(request("2", 100, 1)) == (0, 100)


def test_equal_contents_under_another_root_are_not_found() -> None:
    machine = Machine()
    prompt = span("shared", 100)
    assert machine.run(request("1", 100, 1, prompt)) == (0, 100)
    assert machine.run(request("2", 100, 1, prompt), root=b"other") == (0, 100)
    assert machine.run(request("3", 100, 1, prompt)) == (90, 10)


def test_blocks_of_known_token_ids_have_the_hashes_of_the_core() -> None:
    tokens = list(range(100, 137))
    chain: Chain = ContentChain(ROOT, Content([Tokens(array("i", tokens))]), 37, 16)
    known: Chain = TokenChain(ROOT, tokens, 16)
    assert list(chain.block_hashes) == list(known.block_hashes)
    assert [chain.block_tokens(at) for at in range(2)] == [known.block_tokens(at) for at in range(2)]
    assert chain.slice(30, 40) == known.slice(30, 40)
    assert chain[-1] == known[-1] == 136


def test_chains_part_where_the_materialised_tokens_part() -> None:
    one = Content([span("a", 40), span("b", 60)])
    other = Content([span("a", 40), span("c", 60)])
    for make in (
        lambda content: ContentChain(ROOT, content, 100, 16).block_hashes,
        lambda content: TokenChain(ROOT, content.token_ids(0, 100), 16).block_hashes,
    ):
        assert [left == right for left, right in zip(make(one), make(other), strict=True)] == [True] * 2 + [False] * 4


@pytest.mark.parametrize(("length", "blocks", "touched"), [(0, 0, 0), (15, 0, 1), (16, 1, 1), (17, 1, 2)])
def test_full_blocks_and_blocks_taken(length: int, blocks: int, touched: int) -> None:
    asked = request("1", length, 3, span("a", length))
    assert len(asked.chain(ROOT, 16).block_hashes) == blocks
    assert len(asked.block_references(ROOT, 16)) == touched


def test_an_answer_continues_the_prompt_and_ends() -> None:
    asked = request("1", 30, 2, span("a", 32))
    chain = asked.chain(ROOT, 16)
    chain.append(0)
    assert len(chain.block_hashes) == 1
    chain.append(0)
    assert chain.block_hashes == ContentChain(ROOT, Content([span("a", 32)]), 32, 16).block_hashes
    with pytest.raises(IndexError, match="ends at 32 tokens"):
        chain.append(0)


def test_a_next_turn_takes_over_hashes_only_where_contents_agree() -> None:
    said, answered = span("a", 40), span("b", 24)
    before = request("1", 40, 24, said, answered).chain(ROOT, 16)
    for _ in range(24):
        before.append(0)
    follow_up = request("2", 100, 1, said, answered, span("c", 36))
    fresh = follow_up.chain(ROOT, 16)
    assert follow_up.chain(ROOT, 16, before).block_hashes == fresh.block_hashes
    assert before.block_hashes == fresh.block_hashes[:4]
    edited = request("3", 100, 1, Span(stream_key("z"), 0, 100))
    assert edited.chain(ROOT, 16, before).block_hashes == edited.chain(ROOT, 16).block_hashes
    assert follow_up.chain(b"salted", 16, before).block_hashes == follow_up.chain(b"salted", 16).block_hashes
    assert follow_up.chain(ROOT, 8, before).block_hashes == follow_up.chain(ROOT, 8).block_hashes

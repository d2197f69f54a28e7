"""Blocks go from one engine's pool to another's: a hit there has the same bits, and what is not sound is refused."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from emberkv.core.block_pool import BlockPool
from emberkv.core.checkpoints import CheckpointKind
from emberkv.core.hashing import TokenChain, partial_hash, root_hash
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig
from emberkv.engine.block_transfer import MAX_BYTES, BlockTransfer, ImportedBlocks
from emberkv.engine.commands import (
    CacheControl,
    ExportBlocks,
    ExportCheckpoint,
    ImportBlocks,
    ReadRows,
    Remove,
    Statistics,
)
from emberkv.engine.loop import EngineLoop
from emberkv.engine.request import GenerationRequest, ModelLimits, SamplingParams, TokenOutput
from emberkv.errors import ConfigError, RequestError
from emberkv.tiers.codec import decode_record, encode_record
from tests.engine.loop_harness import Inbox
from tests.engine.tiny_executor import WORDS, TinyExecutor
from tests.waiting import DEADLINE

BLOCK = 4
NAMESPACE = b"tiny"
ROOT = root_hash("tiny", BLOCK)
PROMPT = [*range(3, 33)]  # 7 full blocks and 2 tokens


class Tiny:
    """A running loop over a `TinyExecutor`, whose tokens depend on every byte of KV state."""

    def __init__(
        self,
        num_blocks: int = 40,
        *,
        exact: bool = False,
        max_bytes: int = MAX_BYTES,
        batch_invariant: bool = True,
        within_blocks: bool = True,
    ) -> None:
        self.executor = TinyExecutor(num_blocks=num_blocks, block_size=BLOCK)
        self.pool = BlockPool(num_blocks, BLOCK)
        cache = PrefixCache(
            self.pool,
            alignment=BLOCK,
            batch_invariant=batch_invariant,
            within_blocks=within_blocks,
            exact=exact,
            branch_tokens=2,
        )
        self.scheduler = Scheduler(cache, SchedulerConfig(8, 16))
        transfer = BlockTransfer(cache, self.executor.pool, NAMESPACE, max_bytes=max_bytes)
        self.control = CacheControl(self.scheduler, transfer=transfer)
        limits = ModelLimits(100, 50, frozenset())
        self.loop = EngineLoop(self.executor, self.scheduler, limits, root=ROOT, control=self.control)

    def ask(self, prompt: list[int], new: int = 8) -> tuple[int, list[int]]:
        """Cached tokens, and the answer."""
        inbox = Inbox()
        params = SamplingParams(max_tokens=new, temperature=0.0)
        self.loop.submit(GenerationRequest("a", prompt, params), inbox)
        last: TokenOutput = inbox.wait()
        assert last.usage is not None
        return last.usage.cached_tokens, inbox.tokens

    def export(self, chain: TokenChain) -> list[bytes]:
        records = self.loop.execute(ExportBlocks(chain.block_hashes)).result(DEADLINE)
        return [record for record in records if record is not None]

    def export_checkpoint(self, chain: TokenChain, position: int) -> bytes | None:
        return self.loop.execute(ExportCheckpoint(chain, position)).result(DEADLINE)

    def take(self, chain: TokenChain, records: list[bytes]) -> ImportedBlocks:
        return self.loop.execute(ImportBlocks(chain, records)).result(DEADLINE)


Start = Callable[..., Tiny]


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[Tiny] = []

    def begin(num_blocks: int = 40, **how: Any) -> Tiny:
        tiny = Tiny(num_blocks, **how)
        tiny.loop.start()
        made.append(tiny)
        return tiny

    yield begin
    for tiny in made:
        tiny.loop.stop()
        tiny.pool.check_integrity(holders=[])


def prompt_chain(tokens: list[int] = PROMPT) -> TokenChain:
    return TokenChain(ROOT, tokens, BLOCK)


def exported(start: Start) -> tuple[list[bytes], list[int]]:
    first = start()
    _, answer = first.ask(PROMPT)
    records = first.export(prompt_chain())
    assert len(records) == 7
    return records, answer


def test_a_hit_on_imported_blocks_is_bit_exact(start: Start) -> None:
    records, answer = exported(start)
    second = start()
    chain = prompt_chain()
    assert second.take(chain, records) == ImportedBlocks(7, 7, 0)
    assert second.ask(PROMPT) == (28, answer)
    assert second.take(chain, records) == ImportedBlocks(7, 0, 7)
    assert second.export(chain) == records
    stats = second.loop.execute(Statistics()).result(DEADLINE).counters
    assert (stats.imported_blocks, stats.exported_blocks, dict(stats.refused_imports)) == (7, 7, {})


def test_an_import_goes_on_behind_what_is_cached_and_needs_no_record_before(start: Start) -> None:
    records, answer = exported(start)
    second = start()
    second.ask(PROMPT[:14], new=1)
    assert second.take(prompt_chain(), records[3:]) == ImportedBlocks(4, 4, 3)
    assert second.ask(PROMPT) == (28, answer)


def test_what_the_pool_lacks_is_left_out(start: Start) -> None:
    first = start()
    first.ask(PROMPT)
    chain = prompt_chain([*PROMPT[:8], 40, 41, 42, 43])
    answers = first.loop.execute(ExportBlocks(chain.block_hashes)).result(DEADLINE)
    assert [record is not None for record in answers] == [True, True, False]


def rows(tiny: Tiny, chain: TokenChain) -> tuple[int, bytes]:
    """How many tokens are cached, and the values of these, page by page."""
    pages, end = [], 0
    while True:
        page = tiny.loop.execute(ReadRows(chain, 0, end)).result(DEADLINE)
        pages.append(page.values.data)
        end += page.values.shape[0]
        if not page.values.shape[0]:
            return end, b"".join(pages)


def test_rows_are_read_up_to_the_last_token_that_was_computed(start: Start) -> None:
    whole, by_block = start(), start(max_bytes=1)
    answers = [each.ask(PROMPT)[1] for each in (whole, by_block)]
    assert answers[0] == answers[1]
    chain = prompt_chain([*PROMPT, *answers[0]])
    cached, values = rows(whole, chain)
    assert cached == len(PROMPT) + 7, "the last token has only been chosen"
    assert len(values) == cached * WORDS * 8
    assert rows(by_block, chain) == (cached, values)
    begun = prompt_chain([*PROMPT[:13], 49, 49])
    assert rows(whole, begun) == (13, values[: 13 * WORDS * 8])
    assert rows(whole, prompt_chain([49, 49, 49])) == (0, b"")


def test_a_page_has_as_many_blocks_as_a_layer_s_bytes_allow(start: Start) -> None:
    """And is of the blocks from its first token on, whether or not the pool still has those before."""
    layer_bytes = TinyExecutor(num_blocks=1, block_size=BLOCK).pool.layer_bytes
    tiny = start(max_bytes=3 * layer_bytes)
    tiny.ask(PROMPT)
    chain = prompt_chain()
    pages = [tiny.loop.execute(ReadRows(chain, 0, first)).result(DEADLINE) for first in (0, 3 * BLOCK, 6 * BLOCK)]
    assert [page.values.shape[0] for page in pages] == [3 * BLOCK, 3 * BLOCK, BLOCK + 2]
    tiny.loop.execute(Remove([chain.block_hashes[0]])).result(DEADLINE)
    assert tiny.loop.execute(ReadRows(chain, 0, 3 * BLOCK)).result(DEADLINE) == pages[1]
    assert tiny.loop.execute(ReadRows(chain, 0)).result(DEADLINE).values.shape[0] == 0


def test_rows_of_a_layer_that_the_model_has_not_are_refused(start: Start) -> None:
    tiny = start()
    tiny.ask(PROMPT)
    with pytest.raises(RequestError, match="layer is 1"):
        tiny.loop.execute(ReadRows(prompt_chain(), 1)).result(DEADLINE)


def damaged(records: list[bytes]) -> bytes:
    return records[2][:-20] + bytes([records[2][-20] ^ 1]) + records[2][-19:]


def of_another_model(records: list[bytes]) -> bytes:
    return encode_record(decode_record(records[2], namespace=NAMESPACE), namespace=b"other")


def with_other_tokens(records: list[bytes]) -> bytes:
    record = decode_record(records[2], namespace=NAMESPACE)
    return encode_record(replace(record, tokens=b"\1\0\0\0" * BLOCK), namespace=NAMESPACE)


def with_another_parent(records: list[bytes]) -> bytes:
    record = decode_record(records[2], namespace=NAMESPACE)
    return encode_record(replace(record, parent=ROOT), namespace=NAMESPACE)


def of_another_size(records: list[bytes]) -> bytes:
    record = decode_record(records[2], namespace=NAMESPACE)
    return encode_record(replace(record, payload=bytes(8)), namespace=NAMESPACE)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda records: b"", "truncated"),
        (damaged, "checksum"),
        (of_another_model, "namespace"),
        (with_other_tokens, "tokens"),
        (with_another_parent, "tokens"),
        (of_another_size, "size"),
        (lambda records: records[3], "position"),
    ],
)
def test_a_record_that_is_not_sound_is_refused_and_counted(
    start: Start, spoil: Callable[[list[bytes]], bytes], fault: str
) -> None:
    records, answer = exported(start)
    second = start()
    spoilt = [*records[:2], spoil(records), *records[3:]]
    assert second.take(prompt_chain(), spoilt) == ImportedBlocks(3, 2, 0, {fault: 1})
    stats = second.loop.execute(Statistics()).result(DEADLINE).counters
    assert (stats.imported_blocks, dict(stats.refused_imports)) == (2, {fault: 1})
    assert second.ask(PROMPT) == (8, answer)


def test_only_exact_blocks_are_imported_where_only_exact_ones_are_reused(start: Start) -> None:
    records, _ = exported(start)
    inexact = encode_record(replace(decode_record(records[0], namespace=NAMESPACE), exact=False), namespace=NAMESPACE)
    assert start(exact=True).take(prompt_chain(), [inexact]).refused == {"exactness": 1}
    assert start().take(prompt_chain(), [inexact]).imported == 1


def test_a_pool_takes_what_it_has_room_for(start: Start) -> None:
    records, _ = exported(start)
    assert start(num_blocks=5).take(prompt_chain(), records).imported == 5


def test_a_command_copies_a_bounded_number_of_bytes(start: Start) -> None:
    records, answer = exported(start)
    third = start(max_bytes=3 * 4 * BLOCK * 8)
    taken: list[ImportedBlocks] = []
    while records:
        taken.append(third.take(prompt_chain(), records))
        records = records[taken[-1].taken :]
    assert [each.imported for each in taken] == [3, 3, 1]
    assert len(third.export(prompt_chain())) == 3
    assert third.ask(PROMPT) == (28, answer)


SHORT = PROMPT[:7]  # a block and 3 tokens, which are a checkpoint when the answer has one token
NEXT = [*SHORT, 40, 41, 42, 43]


@pytest.mark.parametrize("within_blocks", [False, True])
def test_a_hit_goes_on_from_an_imported_checkpoint(start: Start, within_blocks: bool) -> None:
    first, second, cold = (start(within_blocks=within_blocks) for _ in range(3))
    first.ask(SHORT, new=1)
    chain = prompt_chain(SHORT)
    checkpoint = first.export_checkpoint(chain, 1)
    assert checkpoint is not None
    assert second.take(chain, [*first.export(chain), checkpoint]) == ImportedBlocks(2, 1, 0, {}, 1)
    assert second.take(chain, [checkpoint]) == ImportedBlocks(1, 0, 1)
    assert second.export_checkpoint(chain, 1) == checkpoint
    assert second.ask(NEXT) == (7, cold.ask(NEXT)[1])
    counted = [each.loop.execute(Statistics()).result(DEADLINE).counters for each in (first, second)]
    assert [(each.exported_checkpoints, each.imported_checkpoints) for each in counted] == [(1, 0), (1, 1)]
    assert [each.imported_blocks for each in counted] == [0, 1]


def test_the_longest_checkpoint_is_exported_whose_tokens_are_the_chain_s(start: Start) -> None:
    first = start(within_blocks=False)
    first.ask(SHORT[:6], new=1)
    first.ask([*SHORT[:6], 49], new=1)
    lengths = []
    for tokens in (SHORT[:5], SHORT[:6], SHORT, [*SHORT[:6], 49], [*SHORT[:6], 49, 48, 47]):
        record = first.export_checkpoint(prompt_chain(tokens), 1)
        lengths.append(0 if record is None else len(decode_record(record, namespace=NAMESPACE).tokens) // 4)
    assert lengths == [0, 2, 2, 3, 3]
    assert first.export_checkpoint(prompt_chain(SHORT), 0) is None
    with pytest.raises(RequestError, match="position is 2; the chain has 1 full blocks"):
        first.export_checkpoint(prompt_chain(SHORT), 2)


@pytest.mark.parametrize("is_used", [False, True])
def test_a_speculative_checkpoint_is_exported_as_one_to_be_kept_once_it_was_used(start: Start, is_used: bool) -> None:
    """That before the prompt's last token."""
    first, second = start(within_blocks=False), start(within_blocks=False)
    first.ask(SHORT)
    if is_used:
        assert first.ask(SHORT)[0] == 6
    assert first.pool.stats.speculative_used == is_used
    chain = prompt_chain(SHORT)
    checkpoint = first.export_checkpoint(chain, 1)
    assert checkpoint is not None
    record = decode_record(checkpoint, namespace=NAMESPACE)
    assert (len(record.tokens) // 4, record.keep_when_extended) == (2, is_used)
    assert second.take(chain, [*first.export(chain), checkpoint]).checkpoints == 1
    block = second.pool.lookup(record.block_hash)
    assert block is not None
    assert block.keep_when_extended == is_used


def test_a_public_prefix_s_checkpoint_is_exported_as_the_tenant_s_own(start: Start) -> None:
    first, second = start(within_blocks=False), start(within_blocks=False)

    def chain(tokens: list[int], public_blocks: int) -> TokenChain:
        return TokenChain(ROOT, tokens, BLOCK, owner="ann", salt=b"ann", public_blocks=public_blocks)

    whole = chain(PROMPT[:12], 3)
    blocks = first.pool.allocate(2)
    for position, block in enumerate(blocks):
        first.executor.pool.write_block(block.block_id, bytes([position]) * first.executor.pool.block_bytes)
    first.pool.commit(blocks[0], whole, 0, exact=True)
    assert first.pool.commit_partial(blocks[1], whole, 1, 3, CheckpointKind.BRANCH)
    first.pool.free(blocks)
    ours = chain(SHORT, 1)
    checkpoint = first.export_checkpoint(ours, 1)
    assert checkpoint is not None
    assert second.take(ours, [*first.export(ours), checkpoint]) == ImportedBlocks(2, 1, 0, {}, 1)
    tokens = ours.encoded_slice(4, 7)
    kept = second.pool.lookup(partial_hash(ours.parent(1), tokens))
    assert kept is not None
    assert (kept.owner, kept.keep_when_extended) == ("ann", True)
    assert second.pool.lookup(partial_hash(whole.parent(1), tokens)) is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"position": 2}, "position"),
        ({"tokens": b"\1\0\0\0" * 3}, "tokens"),
        ({"tokens": b""}, "tokens"),
        ({"parent": ROOT}, "tokens"),
        ({"partial": False}, "position"),
        ({"payload": bytes(8)}, "size"),
        ({"exact": False}, "exactness"),
    ],
    ids=str,
)
def test_a_checkpoint_that_is_not_the_chain_s_is_refused(start: Start, change: dict[str, Any], fault: str) -> None:
    first, second = start(within_blocks=False), start(within_blocks=False)
    first.ask(SHORT, new=1)
    chain = prompt_chain(SHORT)
    checkpoint = first.export_checkpoint(chain, 1)
    assert checkpoint is not None
    spoilt = encode_record(replace(decode_record(checkpoint, namespace=NAMESPACE), **change), namespace=NAMESPACE)
    assert second.take(chain, [*first.export(chain), spoilt]) == ImportedBlocks(2, 1, 0, {fault: 1})


def test_a_checkpoint_is_refused_where_hits_end_at_whole_blocks(start: Start) -> None:
    first, second = start(within_blocks=False), start(batch_invariant=False)
    first.ask(SHORT, new=1)
    chain = prompt_chain(SHORT)
    checkpoint = first.export_checkpoint(chain, 1)
    assert checkpoint is not None
    assert second.take(chain, [*first.export(chain), checkpoint]).refused == {"kind": 1}


def test_an_engine_without_a_transfer_refuses(start: Start) -> None:
    control = CacheControl(start().scheduler)
    with pytest.raises(ConfigError, match="neither exports nor imports"):
        control.execute(ExportBlocks([]))

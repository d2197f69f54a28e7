"""Prefill and decode over a paged pool, against attention written out in double precision."""

import random
from collections.abc import Iterator
from itertools import pairwise, takewhile

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import LayerCall, shared_prefixes
from emberkv.engine.torch.attention.torch_attention import DecodeStep, PrefillStep, bucket_by_length
from emberkv.engine.torch.model.geometry import LayerGeometry, ModelGeometry, Window
from emberkv.errors import ConfigError

CPU = torch.device("cpu")
DIM = 8
BLOCK = 4
TILE = 8
LAYERS = 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def empty_pool(heads: int, kv_heads: int, dtype: torch.dtype = torch.float32, num_blocks: int = 64) -> KVPool:
    """A pool in which whatever is read before it is written gives NaN."""
    layers = (LayerGeometry(None, None, 1.0),) * LAYERS
    pool = KVPool(ModelGeometry(heads, kv_heads, DIM, 10, 1000, layers), dtype, num_blocks, BLOCK, CPU)
    pool.storage.fill_(float("nan"))
    return pool


def expected(call: LayerCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``[tokens, heads, dim]``, of all queries at once. Scores of keys that a query does not see are minus infinity."""
    kv_heads = k.shape[1]
    queries = q.double().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # a KV head's queries beside one another
    keys, values = (each.double().transpose(0, 1).unsqueeze(1) for each in (k, v))
    scores = queries @ keys.transpose(2, 3) * call.scale  # [kv_heads, heads of each, tokens, tokens]
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    positions = torch.arange(len(q))
    if call.slopes is not None:
        scores = scores + call.slopes.view(kv_heads, -1, 1, 1) * (positions - positions[:, None])
    first = torch.zeros_like(positions)
    if call.window is not None:
        size, chunked = call.window
        first = positions - positions % size if chunked else positions - size + 1
    seen = (positions <= positions[:, None]) & (positions >= first[:, None])
    scores = scores.masked_fill(~seen, -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks.double().view(kv_heads, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], 3)
    weights = torch.softmax(scores, 3)[..., : len(q)]
    return (weights @ values).flatten(0, 1).transpose(0, 1)


class Sequence:
    """Random queries, keys and values ``[tokens, heads, dim]``, and where their keys and values lie."""

    def __init__(
        self, length: int, heads: int, kv_heads: int, block_ids: list[int], dtype: torch.dtype, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v = (
            torch.randn(length, n, DIM, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads)
        )
        self.block_ids = block_ids

    def __len__(self) -> int:
        return self.q.shape[0]

    def expected(self, call: LayerCall) -> Tensor:
        return expected(call, self.q, self.k, self.v)

    def prefill(self, pool: KVPool, call: LayerCall, cuts: list[int]) -> Tensor:
        parts = []
        for start, stop in pairwise([0, *cuts]):
            step = PrefillStep(pool, self.block_ids, start, stop - start, tile=TILE)
            parts.append(step.attend(call, self.q[start:stop], self.k[start:stop], self.v[start:stop]))
        return torch.cat(parts)


def scattered(rng: random.Random, pool: KVPool, tokens: int) -> list[int]:
    return rng.sample(range(pool.num_blocks), -(-tokens // BLOCK))


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype is dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    "window", [None, *map(Window, (1, 5, TILE, 11, 100)), Window(5, chunked=True), Window(11, chunked=True)]
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_prefill(dtype: torch.dtype, heads: int, kv_heads: int, window: Window | None, softcap: float | None) -> None:
    rng = random.Random(0)
    call = LayerCall(1, 0.4, window, softcap)
    for length, cuts in [(1, [1]), (7, [7]), (16, [16]), (29, [29]), (29, [8, 29]), (37, [16, 32, 37]), (33, [24, 33])]:
        pool = empty_pool(heads, kv_heads, dtype)
        sequence = Sequence(length, heads, kv_heads, scattered(rng, pool, length), dtype, seed=length)
        close(sequence.prefill(pool, call, cuts), sequence.expected(call), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, Window(5), Window(11), Window(5, chunked=True)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_prefill_gives_the_same_bits_however_it_is_cut(
    dtype: torch.dtype, window: Window | None, softcap: float | None
) -> None:
    call = LayerCall(0, 0.4, window, softcap)
    results = []
    for cuts in [53], [8, 53], [16, 24, 53], [8, 16, 24, 32, 40, 48, 53], [40, 48, 53]:
        pool = empty_pool(4, 2, dtype)
        sequence = Sequence(53, 4, 2, scattered(random.Random(len(cuts)), pool, 53), dtype, seed=1)
        results.append(sequence.prefill(pool, call, cuts))
    assert all(torch.equal(results[0], other) for other in results[1:])


def decode(
    sequences: list[Sequence], pool: KVPool, call: LayerCall, *, min_shared: int = 256
) -> tuple[DecodeStep, Tensor, Tensor]:
    """Prefill all but the last token of each sequence, and decode the last ones together: (step, ours, theirs)."""
    for sequence in sequences:
        if len(sequence) > 1:
            sequence.prefill(pool, call, [len(sequence) - 1])
    step = DecodeStep(
        pool, [each.block_ids for each in sequences], [len(each) for each in sequences], min_shared=min_shared
    )
    last = [torch.stack([getattr(each, name)[-1] for each in sequences]) for name in ("q", "k", "v")]
    ours = step.attend(call, *last)
    return step, ours, torch.stack([each.expected(call)[-1] for each in sequences])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, *map(Window, (1, 5, 11, 100)), Window(5, chunked=True)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("lengths", [[1], [4, 5], [3, 8, 9, 41, 40, 1]], ids=str)
def test_decode(
    dtype: torch.dtype, heads: int, kv_heads: int, window: Window | None, softcap: float | None, lengths: list[int]
) -> None:
    pool = empty_pool(heads, kv_heads, dtype)
    block_ids = iter(scattered(random.Random(0), pool, pool.num_blocks * BLOCK))
    sequences = [
        Sequence(n, heads, kv_heads, [next(block_ids) for _ in range(-(-n // BLOCK))], dtype, seed)
        for seed, n in enumerate(lengths)
    ]
    _, ours, theirs = decode(sequences, pool, LayerCall(1, 0.4, window, softcap))
    close(ours, theirs, dtype)


def family(pool: KVPool, stems: list[int], tails: list[list[int]], dtype: torch.dtype) -> list[Sequence]:
    """For each stem of so many tokens, sequences that hold its blocks and then their own."""
    block_ids = iter(scattered(random.Random(0), pool, pool.num_blocks * BLOCK))
    sequences = []
    for number, (stem, lengths) in enumerate(zip(stems, tails, strict=True)):
        common = [next(block_ids) for _ in range(stem // BLOCK)]
        trunk = Sequence(stem, 4, 2, common, dtype, seed=100 + number)
        for tail in lengths:
            table = common + [next(block_ids) for _ in range(-(-tail // BLOCK))]
            member = Sequence(stem + tail, 4, 2, table, dtype, seed=len(sequences))
            member.k[:stem], member.v[:stem] = trunk.k, trunk.v
            sequences.append(member)
    return sequences


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, Window(7), Window(1000), Window(1000, chunked=True)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_decode_over_shared_prefixes(dtype: torch.dtype, window: Window | None, softcap: float | None) -> None:
    pool = empty_pool(4, 2, dtype)
    sequences = family(pool, [24, 16, 12], [[1, 4, 13], [2, 30], [5]], dtype)
    step, ours, theirs = decode(sequences, pool, LayerCall(0, 0.4, window, softcap), min_shared=16)
    close(ours, theirs, dtype)
    shared = [group for groups, _ in step._layouts.values() for group in groups]
    members = [group.members.tolist() for group in shared]
    assert members == ([[0, 1, 2], [3, 4]] if window != Window(7) and softcap is None else [])


SINKS = torch.tensor([-40.0, -1.0, 2.5, 30.0])
"""From one that weighs nothing to one that takes almost all of its head's weight."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, Window(7)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sinks_take_part_in_the_softmax(dtype: torch.dtype, window: Window | None, softcap: float | None) -> None:
    """In prefill, in a decode of one sequence, and in decodes over prefixes that are shared or not."""
    call = LayerCall(0, 0.4, window, softcap, SINKS)
    pool = empty_pool(4, 2, dtype)
    members = family(pool, [24, 16], [[1, 4, 13], [2, 30]], dtype)
    whole = members[-1]
    close(whole.prefill(pool, call, [16, len(whole)]), whole.expected(call), dtype)
    for sequences in ([whole], members):
        _, ours, theirs = decode(sequences, pool, call, min_shared=16)
        close(ours, theirs, dtype)


SLOPES = torch.tensor([0.5, 0.25, 2.0**-6, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, Window(7)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_alibi_lowers_scores_by_distance(dtype: torch.dtype, window: Window | None, softcap: float | None) -> None:
    """In prefill, in a decode of one sequence, and in decodes of sequences of several lengths."""
    call = LayerCall(0, 0.4, window, softcap, slopes=SLOPES)
    pool = empty_pool(4, 2, dtype)
    members = family(pool, [24, 16], [[1, 4, 13], [2, 30]], dtype)
    whole = members[-1]
    close(whole.prefill(pool, call, [16, len(whole)]), whole.expected(call), dtype)
    for sequences in ([whole], members):
        _, ours, theirs = decode(sequences, pool, call, min_shared=16)
        close(ours, theirs, dtype)


def test_decode_reads_a_shared_prefix_for_all_members_at_once() -> None:
    """The members' own tables are not read there: the first one's stands for all."""
    pool = empty_pool(4, 2)
    sequences = family(pool, [24], [[3, 5]], torch.float32)
    step, ours, _ = decode(sequences, pool, LayerCall(0, 0.4, None, None), min_shared=16)
    (groups, buckets) = next(iter(step._layouts.values()))
    assert groups[0].blocks.shape == (24 // BLOCK,)
    assert sum(bucket.blocks.numel() for bucket in buckets) < 24 // BLOCK
    assert torch.isfinite(ours).all()


def test_what_somebody_left_in_a_block_does_not_reach_its_next_holder() -> None:
    """At a tail that prefill writes, and at a block that decode begins."""
    call = LayerCall(0, 0.4, None, None)
    for length in (2 * BLOCK + 2, 2 * BLOCK + 1):
        pool = empty_pool(4, 2)
        pool.storage.fill_(float("inf"))
        sequence = Sequence(length, 4, 2, [5, 3, 9], torch.float32, seed=1)
        _, ours, theirs = decode([sequence], pool, call)
        close(ours, theirs, torch.float32)


def test_layers_do_not_share_rows() -> None:
    pool = empty_pool(4, 2)
    sequences = [Sequence(9, 4, 2, [7, 0, 3], torch.float32, seed) for seed in range(LAYERS)]
    step = PrefillStep(pool, [7, 0, 3], 0, 9, tile=TILE)
    for layer, sequence in enumerate(sequences):
        ours = step.attend(LayerCall(layer, 0.4, None, None), sequence.q, sequence.k, sequence.v)
        close(ours, sequence.expected(LayerCall(layer, 0.4, None, None)), torch.float32)
    for layer, sequence in enumerate(sequences):
        keys, values = pool.gather(layer, pool.index_of([7, 0, 3]))
        assert torch.equal(keys[:9], sequence.k)
        assert torch.equal(values[:9], sequence.v)


def test_a_pool_holds_as_many_blocks_as_fit() -> None:
    geometry = empty_pool(4, 2).geometry
    block_bytes = 2 * LAYERS * 2 * DIM * 4 * BLOCK
    assert KVPool.of_bytes(geometry, torch.float32, 10 * block_bytes + 1, BLOCK, CPU).num_blocks == 10
    assert KVPool.of_bytes(geometry, torch.bfloat16, 10 * block_bytes, BLOCK, CPU).num_bytes == 10 * block_bytes
    with pytest.raises(ConfigError, match=f"{block_bytes - 1} bytes holds no block; one block of 4 tokens takes"):
        KVPool.of_bytes(geometry, torch.float32, block_bytes - 1, BLOCK, CPU)


TABLES = st.lists(
    st.tuples(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=8), st.integers(1, 4)), min_size=1, max_size=8
)


@given(TABLES, st.integers(1, 16))
@example([([0, 0], 1), ([0, 0, 0], 1), ([0] * 5, 1), ([0] * 5, 1)], 1)  # the second saves most beside the first
@settings(max_examples=300, deadline=None)
def test_shared_prefixes(cases: list[tuple[list[int], int]], min_tokens: int) -> None:
    # A block id stands for a whole chain up to it, as it does in a pool: equal ids follow equal ids.
    tables = [[hash(tuple(table[: i + 1])) for i in range(len(table))] for table, _ in cases]
    lengths = [(len(table) - 1) * BLOCK + last for table, last in cases]
    groups = shared_prefixes(tables, lengths, BLOCK, min_tokens)
    grouped = [member for members, _ in groups for member in members]
    assert len(grouped) == len(set(grouped))
    for members, blocks in groups:
        assert len(members) > 1
        assert blocks * BLOCK >= min_tokens
        assert len({tuple(tables[member][:blocks]) for member in members}) == 1
        # As long as it can be: one block more would be the new token's, or not common.
        longer = blocks + 1
        assert (
            any((lengths[member] - 1) // BLOCK < longer for member in members)
            or len({tuple(tables[member][:longer]) for member in members}) > 1
        )
    if len(tables) <= 6:
        full = [table[: (length - 1) // BLOCK] for table, length in zip(tables, lengths, strict=True)]
        saved = sum((len(members) - 1) * blocks for members, blocks in groups)
        assert saved == max(
            sum(_saved([full[member] for member in group], min_tokens) for group in partition)
            for partition in _partitions(list(range(len(full))))
        )


def _saved(tables: list[list[int]], min_tokens: int) -> int:
    """Block reads that these sequences save as one group."""
    columns = zip(*tables, strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return (len(tables) - 1) * common if common * BLOCK >= min_tokens else 0


def _partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in _partitions(items[1:]):
        yield [[items[0]], *rest]
        for index, group in enumerate(rest):
            yield [*rest[:index], [items[0], *group], *rest[index + 1 :]]


def test_a_step_without_sequences_has_no_groups() -> None:
    assert shared_prefixes([], [], 16, 256) == []


def test_a_sequence_that_shares_little_does_not_keep_others_from_sharing_much() -> None:
    alike = [[*range(125), 1000 + number] for number in range(8)]
    odd = [0, *range(5000, 5125)]
    assert shared_prefixes([*alike, odd], [126 * 16] * 9, 16, 256) == [(list(range(8)), 125)]
    assert shared_prefixes([*alike, odd], [126 * 16] * 9, 16, 16) == [(list(range(8)), 125)]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.floats(0, 0.9))
@settings(max_examples=300, deadline=None)
def test_bucket_by_length(blocks: list[int], max_waste: float) -> None:
    buckets = bucket_by_length(blocks, max_waste=max_waste)
    assert sorted(member for bucket in buckets for member in bucket) == list(range(len(blocks)))
    for bucket in buckets:
        assert bucket == sorted(bucket)
        padded = max(blocks[member] for member in bucket) * len(bucket)
        assert padded - sum(blocks[member] for member in bucket) <= max_waste * padded

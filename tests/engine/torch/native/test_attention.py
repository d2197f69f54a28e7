"""The compiled attention, against attention written out in double precision, and against itself cut otherwise."""

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import LayerCall, Run
from emberkv.engine.torch.model.geometry import LayerGeometry, ModelGeometry, Window
from emberkv.engine.torch.native.attention import NativeStep
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.errors import UnsupportedModelError
from tests.engine.torch.attention.test_paged_attention import SLOPES, TOLERANCE
from tests.engine.torch.attention.test_paged_attention import expected as written_out

BLOCK = 16
CALL = LayerCall(1, 0.2, None, None)
Rows = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    return kind


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pool_of(
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    num_blocks: int = 160,
    block_size: int = BLOCK,
    stored_dtype: torch.dtype | None = None,
) -> KVPool:
    """A pool in which whatever is read before it is written gives NaN."""
    geometry = ModelGeometry(heads, kv_heads, dim, 10, 4096, (LayerGeometry(None, None, 1.0),) * 2)
    pool = KVPool(geometry, stored_dtype or dtype, num_blocks, block_size, torch.device("cpu"), dtype)
    pool.storage.fill_(127 if stored_dtype is torch.int8 else float("nan"))
    return pool


class Text:
    """Random queries, keys and values ``[tokens, heads, dim]`` of one sequence, in blocks at random places."""

    def __init__(self, pool: KVPool, length: int, block_ids: list[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        geometry = pool.geometry
        heads = geometry.num_heads, geometry.num_kv_heads, geometry.num_kv_heads
        made = [torch.randn(n, length, geometry.head_dim, generator=generator).to(pool.activations) for n in heads]
        self.q, self.k, self.v = (each.transpose(0, 1) for each in made)  # as models hand them over
        self.block_ids = block_ids

    def __len__(self) -> int:
        return self.q.shape[0]

    def rows(self, start: int, stop: int) -> Rows:
        return self.q[start:stop], self.k[start:stop], self.v[start:stop]


def places(pool: KVPool, seed: int = 0) -> Iterator[int]:
    return iter(random.Random(seed).sample(range(pool.num_blocks), pool.num_blocks))


def text(pool: KVPool, length: int, seed: int = 0) -> Text:
    block_ids = places(pool, seed)
    return Text(pool, length, [next(block_ids) for _ in range(-(-length // pool.block_size))], seed)


def step_of(pool: KVPool, kernels: Kernels, pieces: list[tuple[Text, int, int]], wanted: list[int]) -> NativeStep:
    return NativeStep(pool, kernels, [Run(each.block_ids, start, stop - start) for each, start, stop in pieces], wanted)


def compute(
    pool: KVPool,
    kernels: Kernels,
    call: LayerCall,
    pieces: list[tuple[Text, int, int]],
    wanted: list[int] | None = None,
) -> Tensor:
    """One pass over pieces of texts. wanted: rows, or all."""
    rows = sum(stop - start for _, start, stop in pieces)
    step = step_of(pool, kernels, pieces, list(range(rows)) if wanted is None else wanted)
    q, k, v = (torch.cat(some) for some in zip(*(each.rows(start, stop) for each, start, stop in pieces), strict=True))
    return step.attend(call, q, k, v)


def cut(pool: KVPool, kernels: Kernels, call: LayerCall, whole: Text, cuts: list[int]) -> Tensor:
    parts = [compute(pool, kernels, call, [(whole, start, stop)]) for start, stop in pairwise([0, *cuts, len(whole)])]
    return torch.cat(parts)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=TOLERANCE[ours.dtype])


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 8), (4, 2, 20), (6, 1, 64), (7, 1, 80), (2, 1, 136)])
@pytest.mark.parametrize("window", [None, *map(Window, (1, 5, 100, 300)), Window(100, chunked=True)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_it_is_attention(
    kernels: Kernels,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    window: Window | None,
    softcap: float | None,
) -> None:
    call = LayerCall(1, dim**-0.5, window, softcap)
    pool = pool_of(heads, kv_heads, dim, dtype)
    whole = text(pool, kernels.span + 70)
    close(cut(pool, kernels, call, whole, [1, 40, 300]), written_out(call, whole.q, whole.k, whole.v))


@pytest.mark.parametrize("window", [None, Window(100), Window(100, chunked=True)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sinks_take_part_in_the_softmax(
    kernels: Kernels, dtype: torch.dtype, window: Window | None, softcap: float | None
) -> None:
    """From one that weighs nothing to one that takes almost all of its head's weight."""
    call = LayerCall(1, 0.25, window, softcap, torch.tensor([-40.0, -1.0, 2.5, 30.0]))
    pool = pool_of(4, 2, 16, dtype)
    whole = text(pool, kernels.span + 70)
    at_once = cut(pool, kernels, call, whole, [])
    close(at_once, written_out(call, whole.q, whole.k, whole.v))
    assert torch.equal(cut(pool, kernels, call, whole, [1, 300, kernels.span + 69]), at_once)


@pytest.mark.parametrize("window", [None, Window(100)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_alibi_lowers_scores_by_distance(
    kernels: Kernels, dtype: torch.dtype, window: Window | None, softcap: float | None
) -> None:
    call = LayerCall(1, 0.25, window, softcap, slopes=SLOPES)
    pool = pool_of(4, 2, 16, dtype)
    whole = text(pool, kernels.span + 70)
    at_once = cut(pool, kernels, call, whole, [])
    close(at_once, written_out(call, whole.q, whole.k, whole.v))
    assert torch.equal(cut(pool, kernels, call, whole, [1, 300, kernels.span + 69]), at_once)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("stored_dtype", [None, torch.int8])
@pytest.mark.parametrize("window", [None, Window(100), Window(100, chunked=True)])
def test_a_value_that_is_not_finite_changes_no_row_that_does_not_see_it(
    kernels: Kernels, dtype: torch.dtype, window: Window | None, stored_dtype: torch.dtype | None, bad: float
) -> None:
    """Rows before it, and those whose window begins behind it: a pair of tokens shares a unit of values in bf16."""
    call = LayerCall(1, 0.25, window, None)
    for at, dim in ((0, 16), (300, 20), (301, 16), (kernels.span + 8, 16)):
        sound, poisoned = (pool_of(4, 2, dim, dtype, stored_dtype=stored_dtype) for _ in range(2))
        expected = cut(sound, kernels, call, text(sound, kernels.span + 70), [])
        whole = text(poisoned, kernels.span + 70)
        whole.v[at, 1, 3] = bad
        got = cut(poisoned, kernels, call, whole, [])
        seeing = [row for row in range(at, len(whole)) if window is None or window.first(row) <= at]
        assert not got[seeing, 2:, 3].isfinite().any()
        others = torch.tensor([row for row in range(len(whole)) if row not in seeing], dtype=torch.long)
        assert torch.equal(got[others], expected[others])
        assert torch.equal(got[:, :2], expected[:, :2])  # the other KV head's


def stored(pool: KVPool, block_id: int) -> tuple[Tensor, Tensor]:
    """A block's keys and values, ``[block_size, kv_heads, dim]``, as in layout.hpp."""
    heads, dim, size = pool.geometry.num_kv_heads, pool.geometry.head_dim, pool.block_size
    pair = 4 // pool.storage.element_size()
    keys, values = pool.keys_and_values[CALL.layer][block_id]
    return (
        keys.reshape(heads, dim // pair, size, pair).permute(2, 0, 1, 3).reshape(size, heads, dim),
        values.reshape(heads, size // pair, dim, pair).permute(1, 3, 0, 2).reshape(size, heads, dim),
    )


def test_what_it_stores_are_the_keys_and_the_values(kernels: Kernels, dtype: torch.dtype) -> None:
    pool = pool_of(4, 2, 20, dtype)
    whole = text(pool, 37)
    cut(pool, kernels, CALL, whole, [20])
    blocks = [stored(pool, block_id) for block_id in whole.block_ids]
    assert torch.equal(torch.cat([keys for keys, _ in blocks])[:37], whole.k)
    assert torch.equal(torch.cat([values for _, values in blocks])[:37], whole.v)
    assert pool.storage.isnan().sum() == pool.storage.numel() - 37 * 2 * 2 * 20


@pytest.mark.parametrize("block_size", [2, 6, 8, 24, 32, 48, 1024])
def test_blocks_of_any_size_give_the_same_bits(kernels: Kernels, dtype: torch.dtype, block_size: int) -> None:
    usual, other = pool_of(4, 2, 64, dtype), pool_of(4, 2, 64, dtype, 400, block_size)
    length = kernels.span + 77
    expected = cut(usual, kernels, CALL, text(usual, length), [])
    assert torch.equal(cut(other, kernels, CALL, text(other, length), [1, 40, 300]), expected)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_row_has_the_same_bits_however_a_text_is_cut(kernels: Kernels, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    call = LayerCall(
        1,
        0.2,
        data.draw(st.sampled_from([None, Window(7), Window(290), Window(290, chunked=True)])),
        data.draw(st.sampled_from([None, 3.0])),
    )
    length = data.draw(st.integers(2, 2 * kernels.span + 50))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6)))
    at_once, in_pieces = pool_of(4, 2, 16, kind), pool_of(4, 2, 16, kind)
    expected = cut(at_once, kernels, call, text(at_once, length), [])
    got = cut(in_pieces, kernels, call, Text(in_pieces, length, text(in_pieces, length, seed=9).block_ids), cuts)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("common", [0, 1, 2])
def test_sequences_with_common_blocks_get_the_bits_that_each_gets_alone(
    kernels: Kernels, dtype: torch.dtype, common: int
) -> None:
    """In one pass with a piece of a prompt."""
    pool = pool_of(4, 2, 16, dtype)
    block_ids = places(pool)
    stem = [next(block_ids) for _ in range(common * kernels.span // BLOCK)]
    trunk = Text(pool, common * kernels.span, stem, seed=1)
    members = []
    for seed, tail in enumerate((1, 30, 300)):
        member = Text(
            pool, len(trunk) + tail, stem + [next(block_ids) for _ in range(-(-tail // BLOCK))], seed=2 + seed
        )
        for ours, theirs in zip((member.k, member.v), (trunk.k, trunk.v), strict=True):
            ours[: len(trunk)] = theirs
        members.append(member)
        if len(member) > 1:
            compute(pool, kernels, CALL, [(member, 0, len(member) - 1)])
    prompt = Text(pool, 50, [next(block_ids) for _ in range(4)], seed=9)
    last = [(member, len(member) - 1, len(member)) for member in members]

    alone = [compute(pool, kernels, CALL, [piece]) for piece in (*last, (prompt, 0, 50))]
    together = compute(pool, kernels, CALL, [*last, (prompt, 0, 50)])

    assert torch.equal(together, torch.cat(alone))
    for member, row in zip(members, together, strict=False):
        close(row, written_out(CALL, member.q, member.k, member.v)[-1])


@pytest.mark.parametrize("count", [2, 3, 16])
def test_more_threads_than_tasks_share_the_spans_and_change_no_bit(
    kernels: Kernels, dtype: torch.dtype, threads: None, count: int
) -> None:
    pool = pool_of(4, 1, 16, dtype)
    whole = text(pool, 3 * kernels.span + 5)
    compute(pool, kernels, CALL, [(whole, 0, len(whole) - 3)])
    pieces = [(whole, len(whole) - 3, len(whole))]
    torch.set_num_threads(1)
    expected = compute(pool, kernels, CALL, pieces)
    torch.set_num_threads(count)
    assert torch.equal(compute(pool, kernels, CALL, pieces), expected)


def test_rows_on_both_sides_of_a_span_share_its_threads(kernels: Kernels, dtype: torch.dtype, threads: None) -> None:
    pool = pool_of(4, 1, 16, dtype)
    whole = text(pool, kernels.span + 6)
    compute(pool, kernels, CALL, [(whole, 0, kernels.span - 3)])
    pieces = [(whole, kernels.span - 3, len(whole))]
    torch.set_num_threads(1)
    expected = compute(pool, kernels, CALL, pieces)
    for count in (2, 4, 8):
        torch.set_num_threads(count)
        assert torch.equal(compute(pool, kernels, CALL, pieces), expected)


@pytest.mark.parametrize("length", [129, 513])
def test_one_query_row_at_a_time_gets_the_bits_of_many(kernels: Kernels, dtype: torch.dtype, length: int) -> None:
    """With a KV head for each head, a decode step multiplies single rows."""
    at_once, singly = pool_of(2, 2, 24, dtype), pool_of(2, 2, 24, dtype)
    expected = cut(at_once, kernels, CALL, text(at_once, length), [])
    got = cut(singly, kernels, CALL, text(singly, length), list(range(length - 10, length)))
    assert torch.equal(got, expected)


def test_rows_beyond_the_runs_are_padding(kernels: Kernels, dtype: torch.dtype) -> None:
    pool = pool_of(4, 2, 16, dtype)
    whole = text(pool, 20)
    step = step_of(pool, kernels, [(whole, 0, 18)], list(range(18)))
    out = step.attend(CALL, whole.q, whole.k, whole.v)
    assert torch.equal(out[18:], torch.zeros_like(out[18:]))
    close(out[:18], written_out(CALL, whole.q, whole.k, whole.v)[:18])


def test_padding_is_left_out_with_the_rows_that_are_not_wanted(kernels: Kernels, dtype: torch.dtype) -> None:
    pool = pool_of(4, 2, 16, dtype)
    whole = text(pool, 20)
    step = step_of(pool, kernels, [(whole, 0, 18)], [17])
    out = step.attend(CALL, whole.q, whole.k, whole.v)
    assert out.any(dim=-1).any(dim=-1).nonzero().flatten().tolist() == [17]
    assert step.active_rows is not None
    assert (step.active_rows.index.tolist(), step.active_rows.of) == ([17], 20)


def test_queries_of_another_type_than_the_pool_are_refused(kernels: Kernels, dtype: torch.dtype) -> None:
    pool = pool_of(4, 2, 16, dtype)
    whole = text(pool, 5)
    step = step_of(pool, kernels, [(whole, 0, 5)], [4])
    with pytest.raises(UnsupportedModelError, match=r"given torch\.float64, "):
        step.attend(CALL, whole.q.double(), whole.k, whole.v)


@pytest.mark.parametrize("window", [None, Window(100), Window(100, chunked=True)])
@pytest.mark.parametrize("wanted", [[], [699], [0, 5, 650, 700, 701, 720]])
@pytest.mark.parametrize("count", [1, 16])
def test_the_last_layer_attends_for_the_wanted_rows_only(
    kernels: Kernels, dtype: torch.dtype, threads: None, window: Window | None, wanted: list[int], count: int
) -> None:
    torch.set_num_threads(count)
    last = LayerCall(1, 0.2, window, None)
    pools = [pool_of(4, 2, 16, dtype) for _ in range(2)]
    given = [None, wanted]
    all_rows, some = (
        compute(pool, kernels, last, [(text(pool, 700), 0, 700), (text(pool, 30, seed=1), 0, 30)], rows)
        for pool, rows in zip(pools, given, strict=True)
    )
    left = torch.zeros_like(all_rows)
    left[wanted] = all_rows[wanted]
    assert torch.equal(some, left)
    assert torch.equal(*(torch.nan_to_num(pool.storage) for pool in pools))  # the keys and values of all


def test_layers_before_the_last_attend_for_all_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    pool = pool_of(4, 2, 16, dtype)
    pieces = [(text(pool, 40), 0, 40)]
    first = LayerCall(0, 0.2, None, None)
    assert torch.equal(compute(pool, kernels, first, pieces, [39]), compute(pool, kernels, first, pieces))


def test_after_the_last_layer_the_wanted_rows_are_left(kernels: Kernels, dtype: torch.dtype) -> None:
    pool = pool_of(4, 2, 16, dtype)
    whole = text(pool, 10)
    step = step_of(pool, kernels, [(whole, 0, 10)], [3, 9])
    step.attend(LayerCall(0, 0.2, None, None), whole.q, whole.k, whole.v)
    assert step.active_rows is None
    step.attend(LayerCall(1, 0.2, None, None), whole.q, whole.k, whole.v)
    assert step.active_rows is not None
    assert (step.active_rows.index.tolist(), step.active_rows.of) == ([3, 9], 10)


def test_sequences_whose_wanted_rows_share_a_prefix_get_the_same_bits_as_alone(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    pool = pool_of(4, 2, 16, dtype)
    shared = text(pool, 1100)
    compute(pool, kernels, CALL, [(shared, 0, 1100)])
    again = [(shared, 1090, 1100), (shared, 1095, 1100)]
    together = compute(pool, kernels, CALL, again, [9, 14])
    assert torch.equal(together[9], together[14])
    assert torch.equal(together[9], compute(pool, kernels, CALL, [(shared, 1099, 1100)])[0])

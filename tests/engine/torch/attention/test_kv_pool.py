"""Blocks of the pool as bytes: what is read can be put back anywhere, to the last bit."""

import pytest
import torch

from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import LayerCall, Run
from emberkv.engine.torch.model.geometry import HeadShape, LayerGeometry, ModelGeometry
from emberkv.engine.torch.model.state_layers import StateGeometry
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.errors import ConfigError, RequestError, UnknownLayerError
from emberkv.tensors import TensorBytes, deserialize_tensor, to_json
from tests.engine.conftest import ModelFactory
from tests.engine.torch.attention.test_int8_kv import CALL, Text, pool_of, step_of
from tests.engine.torch.attention.test_paged_attention import expected


def filled(paged: ModelFactory, dtype: torch.dtype) -> KVPool:
    pool = KVPool(paged("llama").geometry, dtype, 5, 4, torch.device("cpu"))
    torch.manual_seed(0)
    pool.storage.copy_(torch.randn(pool.storage.shape))
    return pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_can_be_put_back(paged: ModelFactory, dtype: torch.dtype) -> None:
    pool = filled(paged, dtype)
    before = pool.storage.clone()
    contents = pool.read_blocks([3, 1])
    assert pool.read_blocks([]) == []
    assert {len(content) for content in contents} == {pool.block_bytes} == {pool.num_bytes // 5}
    assert [bytes(content) for content in contents] == [pool.read(3), pool.read(1)]
    pool.storage[3] = float("nan")
    assert bytes(contents[0]) != pool.read(3), "a copy, not a view"
    pool.write_block(0, contents[0])
    pool.write_block(3, bytes(contents[1]))
    assert torch.equal(pool.storage[[0, 1, 2, 3, 4]], before[[3, 1, 2, 1, 4]])


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 6, 15])
def test_of_a_block_s_beginning_nothing_behind_it_is_read_but_the_state(
    dtype: torch.dtype, count: int, *, is_native: bool
) -> None:
    usual, other = LayerGeometry(None, None, 1.0), LayerGeometry(None, None, 1.0, head_shape=HeadShape(4, 1, 20))
    state = StateGeometry(2, columns=3, channels=10)
    geometry = ModelGeometry(4, 2, 16, 10, 4096, (usual, other), states=(state,))
    pool = KVPool(geometry, dtype, 2, 16, torch.device("cpu"))
    pool.packed = is_native
    pool.blocks.copy_(torch.randn(pool.blocks.shape).abs() + 1)
    before = pool.blocks.clone()
    pool.write_block(1, pool.read_beginning(0, count))
    assert torch.equal(pool.blocks[0], before[0])
    assert torch.equal(pool.convolved[2][1], pool.convolved[2][0])
    for layer in range(2):
        for whole, beginning in zip(pool.read_layer([0], layer), pool.read_layer([1], layer), strict=True):
            ours, given = of_numbers(beginning), of_numbers(whole)
            assert given.all()
            assert torch.equal(ours[:count], given[:count])
            assert not ours[count:].any()


def of_numbers(given: TensorBytes) -> torch.Tensor:
    return deserialize_tensor(to_json(given), library="torch")


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_read_as_it_was_given(kernels: Kernels, dtype: torch.dtype, *, is_native: bool) -> None:
    geometry = ModelGeometry(4, 2, 16, 10, 4096, (LayerGeometry(None, None, 1.0),) * 2)
    pool = KVPool(geometry, dtype, 64, 16, torch.device("cpu"))
    pool.packed = is_native
    text = Text(pool, 41)
    text.compute(pool, kernels if is_native else None, CALL, [1, 20])
    keys, values = map(of_numbers, pool.read_layer(text.block_ids, CALL.layer))
    assert keys.shape == values.shape == (48, 2, 16)
    assert torch.equal(keys[:41], text.k)
    assert torch.equal(values[:41], text.v)
    with pytest.raises(UnknownLayerError, match="layer is 2; the model has layers 0 to 1"):
        pool.read_layer(text.block_ids, 2)


def test_layers_are_read_by_their_numbers_in_the_model() -> None:
    layers = (LayerGeometry(None, None, 1.0),) * 2
    geometry = ModelGeometry(4, 2, 16, 10, 4096, layers, attending=(1, 3), model_layers=5)
    pool = KVPool(geometry, torch.float32, 4, 4, torch.device("cpu"))
    pool.storage.copy_(torch.randn(pool.storage.shape))
    keys, values = map(of_numbers, pool.read_layer([2], 3))
    assert torch.equal(keys, pool.keys_and_values[1][2, 0])
    assert torch.equal(values, pool.keys_and_values[1][2, 1])
    assert [each.shape for each in pool.read_layer([], 1)] == [(0, 2, 16)] * 2
    for layer in (2, 4):
        with pytest.raises(RequestError, match=rf"layer {layer} has no attention, .* are 1, 3"):
            pool.read_layer([2], layer)
    with pytest.raises(UnknownLayerError, match="layer is 5; the model has layers 0 to 4"):
        pool.read_layer([], 5)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_layers_of_other_heads_have_rows_of_their_own_size(
    kernels: Kernels, dtype: torch.dtype, *, is_native: bool
) -> None:
    """The first and the last layer have the model's heads, and the one between has fewer and larger ones."""
    usual, other = LayerGeometry(None, None, 1.0), LayerGeometry(None, None, 1.0, head_shape=HeadShape(4, 1, 20))
    geometry = ModelGeometry(4, 2, 16, 10, 4096, (usual, other, usual))
    pool = KVPool(geometry, dtype, 64, 16, torch.device("cpu"), torch.float32 if dtype is torch.int8 else dtype)
    pool.packed = is_native
    scales = 2 if dtype is torch.int8 else 0
    row = [2 * (16 * dtype.itemsize + scales), 20 * dtype.itemsize + scales, 2 * (16 * dtype.itemsize + scales)]
    assert pool.block_bytes == 16 * 2 * sum(row)
    assert pool.layer_bytes == 16 * 2 * 32 * pool.activations.itemsize
    texts = [Text(pool, 41, layer=layer) for layer in range(3)]
    calls = [LayerCall(layer, 0.25, None, None) for layer in range(3)]
    parts: list[list[torch.Tensor]] = [[], [], []]
    for some in (slice(0, 32), slice(32, 41)):
        run = Run(texts[0].block_ids, some.start, some.stop - some.start)
        step = step_of(pool, kernels if is_native else None, [run])
        for call, text, out in zip(calls, texts, parts, strict=True):
            out.append(step.attend(call, text.q[some], text.k[some], text.v[some]))
    tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-5
    for layer, text in enumerate(texts):
        stored = text.rounded() if dtype is torch.int8 else (text.k, text.v)
        wanted = expected(calls[layer], text.q, *stored)
        torch.testing.assert_close(torch.cat(parts[layer]).double(), wanted, rtol=tolerance, atol=tolerance)
        read = [of_numbers(each)[:41] for each in pool.read_layer(text.block_ids, layer)]
        assert all(torch.equal(ours.to(given), given) for ours, given in zip(read, stored, strict=True))
    assert [each.shape for each in pool.read_layer([], 1)] == [(0, 1, 20)] * 2


@pytest.mark.parametrize("is_native", [True, False])
def test_a_layer_in_8_bits_is_read_as_it_was_rounded(kernels: Kernels, *, is_native: bool) -> None:
    pool = pool_of(torch.float32)
    pool.packed = is_native
    text = Text(pool, 20)
    text.compute(pool, kernels if is_native else None, CALL, [])
    read = map(of_numbers, pool.read_layer(text.block_ids, CALL.layer))
    assert all(torch.equal(ours[:20].double(), wanted) for ours, wanted in zip(read, text.rounded(), strict=True))


def test_no_memory_for_the_copy_is_a_memory_error(paged: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = filled(paged, torch.float32)
    monkeypatch.setattr(KVPool, "block_bytes", 2**60)
    with pytest.raises(MemoryError):
        pool.read_blocks([0])


def test_another_number_of_bytes_is_refused(paged: ModelFactory) -> None:
    pool = filled(paged, torch.float32)
    with pytest.raises(ConfigError, match=f"7 bytes for a block; one of this pool has {pool.block_bytes}"):
        pool.write_block(0, bytes(7))

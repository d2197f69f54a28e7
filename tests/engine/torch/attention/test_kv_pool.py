"""Blocks of the pool as bytes: what is read can be put back anywhere, to the last bit."""

import pytest
import torch

from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.errors import ConfigError
from tests.engine.conftest import ModelFactory


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


def test_no_memory_for_the_copy_is_a_memory_error(paged: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = filled(paged, torch.float32)
    monkeypatch.setattr(KVPool, "block_bytes", 2**60)
    with pytest.raises(MemoryError):
        pool.read_blocks([0])


def test_another_number_of_bytes_is_refused(paged: ModelFactory) -> None:
    pool = filled(paged, torch.float32)
    with pytest.raises(ConfigError, match=f"7 bytes for a block; one of this pool has {pool.block_bytes}"):
        pool.write_block(0, bytes(7))

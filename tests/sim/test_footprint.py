"""What fits: weights, activations and the runtime taken off, in whole blocks."""

import pytest

from emberkv.errors import ConfigError
from emberkv.sim.build import activation_bytes, kv_block_bytes, kv_blocks, weight_bytes
from emberkv.sim.hardware import GIB, load_profile
from emberkv.sim.model_spec import load_spec
from tests.sim.flat import FLAT, TINY

LLAMA = load_spec("llama-3.1-8b")


def test_blocks_by_hand() -> None:
    activations = 64 * (3 * 8 + 3 * 16) * 2 + 4 * 32 * 12
    assert activation_bytes(TINY, 64, 4) == activations
    assert kv_block_bytes(TINY, 16) == 16 * 2 * 16
    left = int(GIB * 0.5) - weight_bytes(TINY) - activations
    assert kv_blocks(TINY, FLAT, utilisation=0.5, step_tokens=64, sequences=4) == left // (16 * 2 * 16)


def test_devices_share_weights_and_heads_and_copy_heads_that_are_too_few() -> None:
    assert weight_bytes(LLAMA, 2) == LLAMA.weight_bytes // 2
    assert kv_block_bytes(LLAMA, 16, 8) == kv_block_bytes(LLAMA, 16) // 8
    assert kv_block_bytes(LLAMA, 16, 16) == kv_block_bytes(LLAMA, 16, 8)


def test_a_mixture_computes_only_the_experts_of_a_token() -> None:
    mixture = load_spec("mixtral-8x7b")
    assert activation_bytes(mixture, 1, 0) == (3 * 4096 + 3 * 2 * 14336) * 2


def test_as_many_blocks_as_a_server_found_on_the_same_card() -> None:
    """vLLM 0.19 with these settings had 2,588."""
    assert kv_blocks(LLAMA, load_profile("rtx4090")) == pytest.approx(2588, rel=0.05)


def test_a_model_that_does_not_fit_is_refused_with_the_sizes() -> None:
    with pytest.raises(ConfigError, match=r"llama-3.1-70b does not fit H100 SXM: of 72\.0 GiB, 131\.4 GiB of weights"):
        kv_blocks(load_spec("llama-3.1-70b"), load_profile("h100"))
    assert kv_blocks(load_spec("llama-3.1-70b"), load_profile("h100"), tensor_parallel=4) > 0

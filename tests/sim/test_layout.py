"""Devices that share a model: experts whole or in parts, attention divided by heads or by sequences, links."""

from dataclasses import replace

import pytest

from emberkv.errors import ConfigError
from emberkv.sim.build import kv_blocks, machine_of, weight_bytes
from emberkv.sim.config import SimulationConfig
from emberkv.sim.hardware import load_profile
from emberkv.sim.roofline import Layout, Roofline
from emberkv.sim.timing import ChunkWork, StepWork
from tests.sim.flat import FLAT, TINY

MIXTURE = replace(TINY, moe_layers=2, experts=8, experts_per_token=2, expert_intermediate=4)
DATA_PARALLEL = Layout(data_parallel_attention=True)
EXPERTS = Layout(expert_parallel=True)


def roofline(layout: Layout, model=MIXTURE, devices: int = 2) -> Roofline:
    return Roofline(model, FLAT, tensor_parallel=devices, layout=layout)


def test_data_parallel_attention_reads_whole_heads_of_its_own_sequences() -> None:
    """Two sequences of 100 tokens: a device reads one of them with all heads, as much as both with half of them."""
    work = StepWork(2, 200)
    shared, own = (roofline(each).terms_of(work).decode_attention for each in (Layout(), DATA_PARALLEL))
    assert own == shared
    alone = roofline(DATA_PARALLEL).terms_of(StepWork(1, 100)).decode_attention
    assert alone == 2 * roofline(Layout()).terms_of(StepWork(1, 100)).decode_attention


def test_one_prompt_is_computed_by_one_device_if_attention_is_data_parallel() -> None:
    work = StepWork(0, 0, (ChunkWork(0, 64, True),))
    shared, own = (roofline(each).terms_of(work).prefill_attention for each in (Layout(), DATA_PARALLEL))
    assert own == pytest.approx(2 * shared)
    two = StepWork(0, 0, (ChunkWork(0, 64, True), ChunkWork(0, 64, True)))
    assert roofline(DATA_PARALLEL).terms_of(two).prefill_attention == pytest.approx(own)


def test_data_parallel_attention_exchanges_once_a_layer_instead_of_twice() -> None:
    work = StepWork(4, 400)
    twice, once = (roofline(each).terms_of(work).all_reduce for each in (Layout(), DATA_PARALLEL))
    assert twice == 2 * once > 0
    counts = [roofline(each).overhead_counts(work)["all_reduce"] for each in (Layout(), DATA_PARALLEL)]
    assert counts == [4, 2]


def test_whole_experts_wait_for_the_device_that_is_chosen_most() -> None:
    """One row chooses 2 of 8 experts: in parts, each device reads half of both; whole, one may have to read both."""
    work = StepWork(1, 1)
    parts, whole = (roofline(each).terms_of(work).gemm for each in (Layout(), EXPERTS))
    assert parts < whole


def test_whole_experts_are_evenly_loaded_when_rows_are_many() -> None:
    work = StepWork(0, 0, (ChunkWork(0, 100_000, False),))
    parts, whole = (roofline(each).terms_of(work).gemm for each in (Layout(), EXPERTS))
    assert parts < whole < 1.02 * parts


def test_each_device_keeps_all_of_the_attentions_weights_and_its_own_blocks() -> None:
    attention = MIXTURE.layers * MIXTURE.attention_parameters * 2
    whole, half = weight_bytes(MIXTURE), weight_bytes(MIXTURE, 2)
    assert weight_bytes(MIXTURE, 2, whole_attention=True) == attention + -(-(whole - attention) // 2)
    few = replace(MIXTURE, kv_heads=1)
    shared = kv_blocks(few, FLAT, tensor_parallel=2)
    own = kv_blocks(few, FLAT, tensor_parallel=2, data_parallel_attention=True)
    assert half < whole
    assert own == pytest.approx(2 * shared, rel=0.01)  # heads too few to divide are copied; sequences are not


def test_links_are_slower_without_direct_access() -> None:
    card = load_profile("rtx4090")
    assert (card.link(), card.link(True), card.link(False)) == (12.5, 25.0, 12.5)
    work = StepWork(0, 0, (ChunkWork(0, 2048, True),))
    slow, fast = (
        Roofline(TINY, card, tensor_parallel=2, layout=Layout(peer_access=each)).terms_of(work).all_reduce
        for each in (False, True)
    )
    assert slow > fast


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert_parallel": True, "tensor_parallel": 2}, "llama-3.1-8b has 0 experts"),
        ({"expert_parallel": True, "model": "mixtral-8x7b", "tensor_parallel": 1}, "at least 2"),
        ({"expert_parallel": True, "model": "mixtral-8x7b", "tensor_parallel": 16}, "has 8 experts to divide"),
        ({"data_parallel_attention": True}, "at least 2 devices"),
        ({"peer_access": False, "tensor_parallel": 2}, "H100 SXM has no link to others without direct access"),
    ],
)
def test_what_cannot_be_shared_so_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        machine_of(SimulationConfig(**changes), 16)


def test_a_set_up_of_whole_experts_and_own_sequences_fits_more_tokens() -> None:
    """Qwen3-30B-A3B has 4 KV heads: divided among 8 devices they are copied twice."""
    shape = {"model": "qwen3-30b-a3b", "tensor_parallel": 8}
    shared = machine_of(SimulationConfig(**shape), 16)
    own = machine_of(SimulationConfig(**shape, expert_parallel=True, data_parallel_attention=True), 16)
    assert own.num_blocks > 1.9 * shared.num_blocks
    assert own.block_bytes * 2 == shared.block_bytes

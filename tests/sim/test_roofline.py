"""Step times: by hand on a device without flaws, monotone in everything, and the sum of their parts."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.scheduler import PrefillChunk, StepPlan
from emberkv.core.sequence import Sequence
from emberkv.errors import ConfigError
from emberkv.sim.hardware import load_profile, profile_names
from emberkv.sim.model_spec import load_spec
from emberkv.sim.roofline import Roofline
from emberkv.sim.timing import ChunkWork, StepWork
from emberkv.workload.content import Content
from emberkv.workload.request import Request
from tests.sim.flat import FLAT, TINY, with_overheads

NS = 1e-9
WINDOWED = replace(TINY, window=8, window_layers=1)
MIXTURE = replace(TINY, moe_layers=1, experts=8, experts_per_token=2, expert_intermediate=4, shared_intermediate=6)


def sequence(name: str, length: int) -> Sequence:
    request = Request(
        request_id=name, arrival_time=0, prompt_tokens=length, output_tokens=8, max_output_tokens=8, content=Content()
    )
    return Sequence(name, request.chain(bytes(32), 16), 8)


def linear(rows: float, inputs: int, outputs: int) -> float:
    return max(2 * inputs * outputs + 2 * rows * (inputs + outputs), 2 * rows * inputs * outputs) * NS


def layer_gemm(rows: int) -> float:
    return linear(rows, 8, 16) + linear(rows, 8, 8) + linear(rows, 8, 32) + linear(rows, 16, 8)


def test_a_decode_step_by_hand() -> None:
    terms = Roofline(TINY, FLAT).terms_of(StepWork(3, 100))
    assert terms.gemm == pytest.approx(2 * layer_gemm(3))
    assert terms.logits == pytest.approx(linear(3, 8, 32))
    assert terms.decode_attention == pytest.approx(2 * 100 * 16 * NS)  # 2 heads of 2, keys and values, 2 bytes
    assert terms.elementwise == pytest.approx(2 * 3 * (8 * 8 + 2 * 16 + 3 * 16) * 2 * NS)
    assert terms.prefill_attention == terms.all_reduce == terms.step_overhead == 0


def test_prefill_attention_counts_the_pairs_of_a_chunk_and_all_before_it() -> None:
    roofline = Roofline(TINY, FLAT)
    pairs = sum(position + 1 for position in range(10, 30))
    assert roofline.terms_of(StepWork(0, 0, (ChunkWork(10, 30, True),))).prefill_attention == pytest.approx(
        2 * 4 * 8 * pairs * NS
    )
    whole = roofline.terms_of(StepWork(0, 0, (ChunkWork(0, 30, True),))).prefill_attention
    first = roofline.terms_of(StepWork(0, 0, (ChunkWork(0, 10, False),))).prefill_attention
    assert whole == pytest.approx(first + 2 * 4 * 8 * pairs * NS)


def test_the_last_token_of_a_long_prompt_reads_all_keys_and_values() -> None:
    terms = Roofline(replace(TINY, heads=2), FLAT).terms_of(StepWork(0, 0, (ChunkWork(999, 1000, True),)))
    assert terms.prefill_attention == pytest.approx(2 * 1000 * 16 * NS)


def test_only_the_last_chunk_of_a_prompt_needs_logits() -> None:
    roofline = Roofline(TINY, FLAT)
    assert roofline.terms_of(StepWork(0, 0, (ChunkWork(0, 16, False),))).logits == 0
    assert roofline.terms_of(StepWork(0, 0, (ChunkWork(0, 16, True),))).logits == pytest.approx(linear(1, 8, 32))


@pytest.mark.parametrize("samples", [False, True])
def test_a_last_layer_that_computes_what_is_wanted_costs_keys_and_values_for_the_rest(samples: bool) -> None:
    sparing = FLAT.model_copy(update={"last_layer": "wanted"})
    terms = Roofline(TINY, sparing).terms_of(StepWork(3, 100, (ChunkWork(10, 30, samples),)))
    rows, last = 3 + 20, 3 + samples
    after = linear(last, 8, 8) + linear(last, 8, 32) + linear(last, 16, 8)
    assert terms.gemm == pytest.approx(layer_gemm(rows) + linear(rows, 8, 16) + after)
    pairs = sum(position + 1 for position in range(10, 30))
    assert terms.prefill_attention == pytest.approx(4 * 8 * (pairs + 30 * samples) * NS)
    assert terms.decode_attention == pytest.approx(2 * 100 * 16 * NS)
    nothing = Roofline(TINY, sparing).terms_of(StepWork(0, 0, (ChunkWork(0, 20, False),)))
    assert nothing.gemm == pytest.approx(layer_gemm(20) + linear(20, 8, 16))


def test_the_experts_of_a_last_layer_compute_all_rows() -> None:
    work = StepWork(0, 0, (ChunkWork(0, 20, True),))
    spared = (
        Roofline(MIXTURE, FLAT).terms_of(work).gemm
        - Roofline(MIXTURE, FLAT.model_copy(update={"last_layer": "wanted"})).terms_of(work).gemm
    )
    assert spared == pytest.approx(linear(20, 8, 8) - linear(1, 8, 8))


def test_a_last_layer_with_a_window_computes_what_is_wanted_of_the_window() -> None:
    sparing = FLAT.model_copy(update={"last_layer": "wanted"})
    windowed = replace(WINDOWED, window_layers=2)
    terms = Roofline(windowed, sparing).terms_of(StepWork(0, 0, (ChunkWork(0, 20, True),)))
    pairs = sum(min(position + 1, 8) for position in range(20))
    assert terms.prefill_attention == pytest.approx(4 * 8 * (pairs + 8) * NS)


def test_a_window_bounds_what_its_layers_read_and_compute() -> None:
    roofline = Roofline(WINDOWED, FLAT)
    assert roofline.terms_of(StepWork(2, 100)).decode_attention == pytest.approx((100 + 2 * 8) * 16 * NS)
    pairs = sum(position + 1 for position in range(20))
    windowed = sum(min(position + 1, 8) for position in range(20))
    prefill = roofline.terms_of(StepWork(0, 0, (ChunkWork(0, 20, True),))).prefill_attention
    assert prefill == pytest.approx(4 * 8 * (pairs + windowed) * NS)


def test_a_mixture_reads_the_experts_that_are_expected_to_be_chosen() -> None:
    touched = 8 * (1 - (6 / 8) ** 5)
    each = 5 * 2 / touched
    experts = touched * (linear(each, 8, 8) + linear(each, 4, 8))
    shared = linear(5, 8, 12) + linear(5, 6, 8)
    attention = linear(5, 8, 16) + linear(5, 8, 8)
    dense = linear(5, 8, 32) + linear(5, 16, 8)
    gemm = Roofline(MIXTURE, FLAT).terms_of(StepWork(5, 5)).gemm
    assert gemm == pytest.approx(2 * attention + dense + experts + shared)


def test_one_token_touches_just_its_own_experts_and_many_touch_all() -> None:
    wide = replace(MIXTURE, expert_intermediate=4096, shared_intermediate=0)
    roofline = Roofline(wide, FLAT.model_copy(update={"peak_tflops": {"bf16": 1e6}}))
    expert = 3 * 8 * 4096 * 2 * NS
    one, many = (roofline.terms_of(StepWork(rows, rows)).gemm for rows in (1, 64))
    assert one == pytest.approx(2 * expert, rel=0.2)
    assert 8 * expert < many < 8 * expert + 64 * one


def test_every_overhead_is_paid_as_often_as_it_says() -> None:
    work = StepWork(3, 60, (ChunkWork(0, 16, False), ChunkWork(0, 8, True)))
    plain = Roofline(TINY, FLAT, tensor_parallel=2).terms_of(work).total
    counts = Roofline(TINY, FLAT, tensor_parallel=2).overhead_counts(work)
    assert counts == {"step": 1, "launch": 1, "layer": 2, "sequence": 3, "chunk": 2, "token": 24, "all_reduce": 4}
    for name, count in counts.items():
        with_it = Roofline(TINY, with_overheads(**{name: 1000}), tensor_parallel=2).terms_of(work).total
        assert with_it - plain == pytest.approx(count * 1e-3), name


def test_passes_of_their_own_read_the_weights_again() -> None:
    work = StepWork(3, 60, (ChunkWork(0, 16, False), ChunkWork(0, 8, True)))
    each = FLAT.model_copy(update={"passes": "each"})
    roofline = Roofline(TINY, each)
    assert roofline.terms_of(work).gemm == pytest.approx(2 * (layer_gemm(3) + layer_gemm(16) + layer_gemm(8)))
    assert Roofline(TINY, FLAT).terms_of(work).gemm == pytest.approx(2 * layer_gemm(27))
    assert roofline.overhead_counts(work)["launch"] == 3


def test_two_devices_share_the_work_and_exchange_activations() -> None:
    one, two = (Roofline(TINY, FLAT, tensor_parallel=devices).terms_of(StepWork(4, 400)) for devices in (1, 2))
    assert two.decode_attention == pytest.approx(one.decode_attention / 2)
    assert two.all_reduce == pytest.approx(2 * 2 * 4 * 8 * 2 / 0.5 * NS)  # 2 a layer; a ring of 2 sends all once
    assert one.gemm / 2 <= two.gemm < one.gemm


def test_more_devices_than_kv_heads_hold_copies() -> None:
    two, four = (Roofline(TINY, FLAT, tensor_parallel=devices).terms_of(StepWork(4, 400)) for devices in (2, 4))
    assert four.decode_attention == two.decode_attention


def test_fewer_bits_are_read_sooner_and_computed_no_faster_without_units_for_them() -> None:
    model = load_spec("llama-3.1-8b")
    for device, gain in (("a100", False), ("h100", True)):
        few, many = [], []
        for weights in ("bf16", "fp8"):
            roofline = Roofline(model.with_dtypes(weights=weights), load_profile(device))
            few.append(roofline.terms_of(StepWork(1, 100)).gemm)
            many.append(roofline.terms_of(StepWork(0, 0, (ChunkWork(0, 8192, True),))).gemm)
        assert few[1] == pytest.approx(few[0] / 2, rel=0.01)
        assert (many[1] < 0.6 * many[0]) is gain
    int4 = Roofline(model.with_dtypes(weights="int4"), load_profile("h100"))
    assert int4.terms_of(StepWork(0, 0, (ChunkWork(0, 8192, True),))).gemm == pytest.approx(
        Roofline(model, load_profile("h100")).terms_of(StepWork(0, 0, (ChunkWork(0, 8192, True),))).gemm
    )


def test_the_h100_dips_near_256_rows() -> None:
    roofline = Roofline(load_spec("llama-3.1-8b"), load_profile("h100"))

    def share(rows: int) -> float:
        bound = max(4096 * 28672 * 2 / 3.35e12, 2 * rows * 4096 * 28672 / 989.4e12)
        return bound / roofline._linear(rows, 4096, 28672)

    assert share(64) == pytest.approx(0.83, abs=0.03)
    assert share(256) == pytest.approx(0.72, abs=0.03)
    assert share(1024) == pytest.approx(0.80, abs=0.03)


def plan_of(decodes: list[int], prompts: list[list[tuple[int, int]]]) -> StepPlan:
    plan = StepPlan()
    plan.decodes += [sequence(f"d{at}", length) for at, length in enumerate(decodes)]
    for at, parts in enumerate(prompts):
        prompt = sequence(f"p{at}", parts[-1][1])
        plan.prefills += [PrefillChunk(prompt, start, stop) for start, stop in parts]
    return plan


def test_a_plan_in_numbers() -> None:
    plan = plan_of([30, 12], [[(0, 16), (16, 24)], [(8, 20)]])
    assert Roofline(TINY, FLAT).work_of(plan) == StepWork(2, 42, (ChunkWork(0, 24, True), ChunkWork(8, 20, True)))
    each = Roofline(TINY, FLAT.model_copy(update={"passes": "each"}))
    assert each.work_of(plan).chunks == (ChunkWork(0, 16, False), ChunkWork(16, 24, True), ChunkWork(8, 20, True))


@pytest.mark.parametrize("name", profile_names())
def test_a_step_takes_the_sum_of_its_terms(name: str) -> None:
    roofline = Roofline(load_spec("qwen3-30b-a3b"), load_profile(name))
    plan = plan_of([300, 120], [[(0, 64)]])
    parts = roofline.explain(plan)
    assert sum(parts.values()) == pytest.approx(roofline.step_seconds(plan))
    assert min(parts.values()) >= 0
    only = plan_of([300, 120], [])
    assert roofline.decode_seconds(2, 420) == roofline.step_seconds(only)


ROOFLINES = [
    Roofline(model, load_profile(hardware))
    for model in (
        load_spec("llama-3.1-8b"),
        load_spec("qwen3-30b-a3b"),
        load_spec("llama-3.1-8b").with_dtypes(weights="fp8"),
        replace(load_spec("llama-3.1-8b"), window=1024, window_layers=16),
    )
    for hardware in profile_names()
]


@given(
    roofline=st.sampled_from(ROOFLINES),
    sequences=st.integers(1, 300),
    mean=st.integers(1, 20_000),
    start=st.integers(0, 30_000),
    length=st.integers(1, 8_192),
    more=st.integers(1, 500),
)
def test_more_work_never_takes_less_time(
    roofline: Roofline, sequences: int, mean: int, start: int, length: int, more: int
) -> None:
    def seconds(sequences: int, context: int, start: int, stop: int) -> float:
        return roofline.terms_of(StepWork(sequences, context, (ChunkWork(start, stop, True),))).total * (1 + 1e-12)

    context, stop = sequences * mean, start + length
    base = roofline.terms_of(StepWork(sequences, context, (ChunkWork(start, stop, True),))).total
    assert seconds(sequences, context + more, start, stop) >= base
    assert seconds(sequences + more, context + more, start, stop) >= base
    assert seconds(sequences, context, start, stop + more) >= base
    assert seconds(sequences, context, max(0, start - more), stop) >= base
    assert seconds(sequences, context, start + more, stop + more) >= base


def test_heads_and_links_must_allow_sharing() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel is 3; tiny has 4 heads"):
        Roofline(TINY, FLAT, tensor_parallel=3)
    with pytest.raises(ConfigError, match="alone has no link"):
        Roofline(TINY, FLAT.model_copy(update={"name": "alone", "link_gb_per_s": None}), tensor_parallel=2)

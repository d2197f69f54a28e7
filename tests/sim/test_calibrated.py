"""A calibrated profile takes the times that it was made of."""

from pathlib import Path

import pytest

from emberkv.errors import ConfigError
from emberkv.sim.build import about, machine_of
from emberkv.sim.calibrated import Measurements, calibrated_profile, check_fit, deviation, with_request_times
from emberkv.sim.config import SimulationConfig
from emberkv.sim.hardware import HardwareProfile, MeasuredWith, Overheads, TierRates, dump_profile, parse_profile
from emberkv.sim.model_spec import ModelSpec, load_spec
from emberkv.sim.roofline import Roofline
from emberkv.sim.timing import ChunkWork, StepWork
from tests.sim.flat import FLAT

DEMO = load_spec("emberkv-demo")
SHAPES = [StepWork(n, n * each) for n in (1, 4, 16) for each in (64, 512, 2048)]
SHAPES += [
    StepWork(0, 0, (ChunkWork(start, start + length, True),)) for start in (0, 1024) for length in (32, 128, 256)
]


def machine(**changes: object) -> HardwareProfile:
    """A made-up machine of about the size of a small CPU."""
    given = {
        "memory_gb_per_s": 20.0,
        "peak_tflops": {"bf16": 0.5},
        "gemm_bandwidth": 0.8,
        "decode_attention": [[1.0, 0.5]],
        "prefill_attention": [[1.0, 0.3]],
        "overheads_us": Overheads(step=2000, sequence=80, chunk=300, token=25),
    }
    return FLAT.model_copy(update=given | changes)


def measured_on(hardware: HardwareProfile, works: list[StepWork], model: ModelSpec = DEMO) -> Measurements:
    roofline = Roofline(model, hardware)
    linears = [
        (rows, roofline.terms_of(StepWork(rows, 0)).gemm + roofline.terms_of(StepWork(rows, 0)).logits)
        for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    ]
    steps = [(work, roofline.terms_of(work).total) for work in works]
    tiers = {"disk": TierRates(latency_us=20, read_gb_per_s=1.5, write_gb_per_s=0.5)}
    with_types = MeasuredWith(weights=model.weights_dtype, kv=model.kv_dtype, kernels="native")
    return Measurements(linears, steps, hardware.passes, 2**34, tiers, hardware.last_layer, with_types)


@pytest.mark.parametrize("passes", ["one", "each"])
@pytest.mark.parametrize("last_layer", ["all", "wanted"])
def test_a_machine_is_recognised_by_its_times(passes: str, last_layer: str) -> None:
    hardware = machine(passes=passes, last_layer=last_layer)
    measured = measured_on(hardware, SHAPES)
    found = calibrated_profile("found", "", DEMO, measured)
    assert deviation(found, DEMO, measured) < 0.02
    unseen = measured_on(
        hardware, [StepWork(8, 8 * 300), StepWork(2, 3000), StepWork(0, 0, (ChunkWork(512, 576, True),))]
    )
    assert deviation(found, DEMO, unseen) < 0.05
    assert found.overheads_us.step == pytest.approx(2000, rel=0.05)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_machine_is_recognised_by_the_times_of_quantised_weights_and_kv(weights: str) -> None:
    model, hardware = DEMO.with_dtypes(weights=weights, kv="int8", on_load=True), machine()
    measured = measured_on(hardware, SHAPES, model)
    found = calibrated_profile("found", "", model, measured)
    assert deviation(found, model, measured) < 0.02
    assert found.gemm_bandwidth * found.memory_gb_per_s == pytest.approx(0.8 * 20, rel=0.02)


@pytest.mark.parametrize(
    ("types", "said"),
    [
        ({"weights": "int8", "kv": "int8"}, None),
        ({"weights": "int8"}, "found was measured with int8 weights, int8 KV and native kernels; the model has other"),
        ({}, "found was measured with int8 weights, int8 KV and native kernels; the model has other"),
    ],
)
def test_a_simulation_says_where_the_machine_was_measured_with_other_types(
    tmp_path: Path, types: dict[str, str], said: str | None
) -> None:
    model = DEMO.with_dtypes(weights="int8", kv="int8")
    file = tmp_path / "mine.yaml"
    file.write_text(dump_profile(calibrated_profile("found", "", model, measured_on(machine(), SHAPES, model))))
    config = SimulationConfig(
        model="emberkv-demo", hardware=str(file), weights=types.get("weights"), kv=types.get("kv")
    )
    sentence = about(config, machine_of(config, 16)).measured_sentence
    assert sentence is None if said is None else str(sentence).startswith(said)


def test_weights_on_hardware_that_was_calibrated_have_the_bytes_of_emberkv_s_own_rounding(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(dump_profile(calibrated_profile("found", "", DEMO, measured_on(machine(), SHAPES))))
    here, other = (
        machine_of(SimulationConfig(model="emberkv-demo", hardware=hardware, weights="int4"), 16).model
        for hardware in (str(file), "h100")
    )
    assert here == DEMO.with_dtypes(weights="int4", on_load=True)
    assert other == DEMO.with_dtypes(weights="int4")


def test_the_profile_is_a_file_like_all_others() -> None:
    found = calibrated_profile("found", "here", DEMO, measured_on(machine(), SHAPES))
    assert parse_profile(dump_profile(found)) == found
    assert (found.name, found.description, found.memory_gib, found.tiers["disk"].read_gb_per_s) == (
        "found", "here", 16, 1.5,
    )  # fmt: skip


def test_times_that_fall_with_more_rows_are_noise() -> None:
    measured = measured_on(machine(), SHAPES)
    (one, seconds), *rest = measured.linears
    noisy = Measurements([(one, 1.5 * seconds), *rest], measured.steps, "one", 2**34)
    found = calibrated_profile("found", "", DEMO, noisy)
    roofline = Roofline(DEMO, found)
    gemms = [roofline.terms_of(StepWork(rows, 0)).gemm for rows in range(1, 300)]
    assert gemms == sorted(gemms)


def test_a_request_s_own_time_is_told_from_that_of_its_tokens() -> None:
    profile = calibrated_profile("found", "", DEMO, measured_on(machine(), SHAPES))
    times = [(tokens, 0.005 + 2e-6 * tokens) for tokens in (50, 400, 1500)]
    found = with_request_times(profile, times)
    assert (found.request_us, found.request_token_us) == (pytest.approx(5000), pytest.approx(2))
    assert with_request_times(profile, [(50, -0.001), (90, -0.002)]).request_us == 0


def test_a_profile_that_is_near_is_accepted() -> None:
    check_fit(0.15, tolerance=0.15, load=99.0, cores=2)


@pytest.mark.parametrize(
    ("load", "why"), [(7.0, r"busy \(load 7.0 on 2 cores\)"), (1.0, "do not follow the profile's form")]
)
def test_a_profile_that_is_far_off_is_refused_with_the_likely_reason(load: float, why: str) -> None:
    with pytest.raises(ConfigError, match=f"nothing is written: .* 54% .*--tolerance 0.15 allows; .*{why}"):
        check_fit(0.54, tolerance=0.15, load=load, cores=2)

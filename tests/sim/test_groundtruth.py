"""The models against what was measured elsewhere."""

import statistics

import pytest
from benchmarks import groundtruth, h100_points

from emberkv.sim.hardware import load_profile

RUN = groundtruth.RUN


def test_the_recorded_run_is_predicted() -> None:
    real, model = groundtruth.measured(RUN), groundtruth.simulated(RUN)
    errors = {metric: model.mean(metric) / real.mean(metric) - 1 for metric in groundtruth.METRICS}
    assert errors == pytest.approx({"TTFT": 0.079, "TPOT": 0.044, "end to end": 0.070}, abs=0.02)


def test_without_its_kv_limit_the_run_would_hardly_queue() -> None:
    real, model = groundtruth.measured(RUN), groundtruth.simulated(RUN, groundtruth.ENOUGH_BLOCKS)
    assert model.mean("TTFT") < 0.2 * real.mean("TTFT")


def test_short_answers_of_the_h100_points_are_predicted() -> None:
    points = [each for each in h100_points.read_points(h100_points.POINTS) if each.answer == 128 and each.clients <= 32]
    hardware = load_profile("h100")
    samples = h100_points.sample_points(points, hardware)
    stored = {name: getattr(hardware.overheads_us, name) for name in h100_points.FITTED}
    errors = [abs(each.tpot_error(stored)) for each in samples]
    assert len(errors) == 101
    assert statistics.median(errors) < h100_points.TPOT_TARGET

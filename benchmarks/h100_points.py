"""The step-time model against 534 measured points of vLLM, SGLang and TensorRT-LLM on H100.

    python -m benchmarks.h100_points [--out PREFIX]

Three overheads are fitted (a layer, a decoding sequence, an all-reduce), to the times per output token; everything
else comes from the profile. Each (engine, model) group is predicted with what the others alone give, and with what all
give, which is what the profile has. Prints both, by group; times to first token by concurrency. Nothing is timed here,
so the machine does not matter. Exits with 1 when a target is missed, or when the profile differs from the fit.
"""

import csv
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from benchmarks import measured_elsewhere
from benchmarks.closed_loop import BLOCK_SIZE, Loop, Walk, walk
from benchmarks.figures import Figure, Row

from emberkv.sim.build import kv_blocks
from emberkv.sim.calibrated import bare, fit_overheads
from emberkv.sim.hardware import MICROSECOND, HardwareProfile, Overheads, load_profile
from emberkv.sim.model_spec import load_spec
from emberkv.sim.roofline import Roofline

POINTS = measured_elsewhere.DATA / "h100_ttft_tpot.csv.xz"
MODELS = {"Qwen/Qwen3-32B": "qwen3-32b", "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b"}
ROUNDS = {"sglang": 1, "vllm": 5, "trtllm": 5}
"""How often each client asks, all beginning at once. The file does not say; by SGLang's times to first token, which
rise in proportion to the clients, its points are of a single round. TTFT depends on it most, TPOT hardly.
"""

FITTED = ("layer", "sequence", "all_reduce")
TPOT_TARGET = 0.12
PROFILE_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Point:
    """A row of the file. ttft, tpot: seconds, as measured."""

    engine: str
    model: str
    weights: str
    devices: int
    clients: int
    prompt: int
    answer: int
    ttft: float
    tpot: float

    @property
    def group(self) -> str:
        return f"{self.engine} {self.model} {self.weights}"


@dataclass(frozen=True, slots=True)
class Sample:
    """A point with what the model says: the kernels' seconds of its TTFT and TPOT, and how often each overhead is in
    them.
    """

    point: Point
    ttft_kernels: float
    ttft_counts: Mapping[str, float]
    tpot_kernels: float
    tpot_counts: Mapping[str, float]

    def tpot_error(self, overheads: Mapping[str, float]) -> float:
        return _total(self.tpot_kernels, self.tpot_counts, overheads) / self.point.tpot - 1

    def ttft_error(self, overheads: Mapping[str, float]) -> float:
        return _total(self.ttft_kernels, self.ttft_counts, overheads) / self.point.ttft - 1


def _total(kernels: float, counts: Mapping[str, float], overheads: Mapping[str, float]) -> float:
    return kernels + sum(counts[name] * each * MICROSECOND for name, each in overheads.items())


def read_points(path: Path) -> list[Point]:
    return [
        Point(
            engine=row["backend"],
            model=MODELS[row["model_path"]],
            weights=row["gemm_quant_mode"] or "bf16",
            devices=int(row["tp_size"]),
            clients=int(row["batch_size"]),
            prompt=int(row["isl"]),
            answer=int(row["osl"]),
            ttft=float(row["silicon_ttft_ms"]) / 1e3,
            tpot=float(row["silicon_tpot_ms"]) / 1e3,
        )
        for row in csv.DictReader(StringIO(measured_elsewhere.text_of(path)))
    ]


def sample_points(points: Iterable[Point], hardware: HardwareProfile) -> list[Sample]:
    """Price every point's steps; loops that several points share are walked once."""
    kernels = bare(hardware)
    walks: dict[Loop, Walk] = {}
    samples = []
    for point in points:
        model = load_spec(point.model).with_dtypes(weights=point.weights)
        roofline = Roofline(model, kernels, tensor_parallel=point.devices)
        fit = kv_blocks(model, hardware, block_size=BLOCK_SIZE, tensor_parallel=point.devices, step_tokens=8192)
        enough = point.clients * (-(-(point.prompt + point.answer) // BLOCK_SIZE) + 1)
        loop = Loop(point.clients, point.prompt, point.answer, min(fit, enough), ROUNDS[point.engine])
        found = walks.get(loop)
        if found is None:
            found = walks[loop] = walk(loop, roofline)
        first, each = _priced(found, found.first_token, roofline), _priced(found, found.each_token, roofline)
        samples.append(Sample(point, *first, *each))
    return samples


def _priced(found: Walk, shares: Mapping[int, float], roofline: Roofline) -> tuple[float, Mapping[str, float]]:
    seconds, counts = 0.0, dict.fromkeys(Overheads.model_fields, 0.0)
    for step, share in shares.items():
        work = found.steps[step]
        seconds += share * roofline.terms_of(work).total
        for name, count in roofline.overhead_counts(work).items():
            counts[name] += share * count
    return seconds, counts


def fitted(samples: Sequence[Sample]) -> dict[str, float]:
    """Microseconds of each fitted overhead."""
    return fit_overheads(
        FITTED,
        [each.tpot_counts for each in samples],
        [each.tpot_kernels for each in samples],
        [each.point.tpot for each in samples],
    )


def cross_validated(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Errors of TPOT by group, each group's with overheads fitted on all the others."""
    groups = sorted({each.point.group for each in samples})
    errors = {}
    for group in groups:
        overheads = fitted([each for each in samples if each.point.group != group])
        errors[group] = [each.tpot_error(overheads) for each in samples if each.point.group == group]
    return errors


def median_size(errors: Iterable[float]) -> float:
    return statistics.median(abs(error) for error in errors)


def rows_of(samples: Sequence[Sample], hardware: HardwareProfile) -> list[Row]:
    held_out = cross_validated(samples)
    overheads = fitted(samples)
    everyone = [error for errors in held_out.values() for error in errors]
    rows: list[Row] = [Figure("TPOT error, all held-out points, median size", "", [median_size(everyone)], TPOT_TARGET)]
    for group, errors in held_out.items():
        bias = statistics.median(errors)
        name = f"TPOT error, {group} held out ({len(errors)} points, median {bias:+.3f}), median size"
        rows.append(Figure(name, "", [median_size(errors)]))
    rows.append(
        Figure(
            "TPOT error, all points with the fit to all", "", [median_size(s.tpot_error(overheads) for s in samples)]
        )
    )
    for engine, clients in sorted({(each.point.engine, each.point.clients) for each in samples}):
        some = [s for s in samples if (s.point.engine, s.point.clients) == (engine, clients)]
        if len(some) >= 10:
            bias = statistics.median(each.ttft_error(overheads) for each in some)
            name = f"TTFT error, {engine}, {clients} clients ({len(some)} points, median {bias:+.2f}), median size"
            rows.append(Figure(name, "", [median_size(each.ttft_error(overheads) for each in some)]))
    for name in FITTED:
        stored = getattr(hardware.overheads_us, name)
        off = abs(stored / overheads[name] - 1)
        title = f"{name}: fitted {overheads[name]:.2f} us, in the profile {stored:g} us; off by"
        rows.append(Figure(title, "", [off], PROFILE_TOLERANCE))
    return rows


def measure(path: Path) -> list[Row]:
    hardware = load_profile("h100")
    return rows_of(sample_points(read_points(path), hardware), hardware)


def main() -> int:
    return measured_elsewhere.run("benchmarks.h100_points", __doc__, POINTS, measure)


if __name__ == "__main__":
    sys.exit(main())

"""Hardware profiles fitted to measured times, in the same form as all others."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from emberkv.errors import ConfigError
from emberkv.sim.hardware import GB, GIB, MICROSECOND, TERA, HardwareProfile, MeasuredWith, Overheads, TierRates
from emberkv.sim.model_spec import ModelSpec
from emberkv.sim.roofline import Roofline
from emberkv.sim.timing import StepWork

Floats = NDArray[np.float64]

OVERHEADS = ("step", "sequence", "chunk", "token")
"""The overheads that the times of one model distinguish; those of layers are part of the step's."""

TINY_SHARE = 1e-6


@dataclass(frozen=True, slots=True)
class Measurements:
    """One machine's times for one model.

    linears: (rows, seconds) of all linear layers together, rows rising from 1. steps: with the seconds of each.
    passes, last_layer: see `HardwareProfile`. tiers: rates of the lower tiers. with_types: the number types and
    kernels that it was measured with.

    >>> from emberkv.sim.model_spec import load_spec
    >>> linears, steps = [(1, 0.010), (64, 0.012)], [(StepWork(1, 100), 0.012), (StepWork(8, 800), 0.013)]
    >>> measured = Measurements(linears, steps, passes="one", memory_bytes=2**34)
    >>> profile = calibrated_profile("mine", "An example.", load_spec("qwen2.5-0.5b"), measured)
    >>> profile.memory_gib, profile.passes
    (16.0, 'one')
    """

    linears: Sequence[tuple[int, float]]
    steps: Sequence[tuple[StepWork, float]]
    passes: Literal["one", "each"]
    memory_bytes: int
    tiers: Mapping[str, TierRates] = field(default_factory=dict)
    last_layer: Literal["all", "wanted"] = "all"
    with_types: MeasuredWith | None = None


def calibrated_profile(name: str, description: str, model: ModelSpec, measured: Measurements) -> HardwareProfile:
    """The profile under which ``model`` takes the times measured.

    Matrix products follow the times of the linear layers. What remains of the steps is shared out by non-negative least
    squares of the relative errors among overheads, the bytes that decode attention reads, and the operations of prefill
    attention. The peaks are the best rates seen, as nothing else is known of the machine.
    """
    output = model.vocab * model.hidden
    linear = model.linear_parameters + output
    weights = (model.linear_parameters * model.linear_bits + output * model.output_bits) / 8
    seconds = list(accumulate((each for _, each in measured.linears), max))
    rates = [2 * rows * linear / each for (rows, _), each in zip(measured.linears, seconds, strict=True)]
    found = _share_out(model, measured, _draft(name, model, max(rates), weights / seconds[0], measured, rates))
    peak = max(*rates, found.flops)
    bandwidth = max(weights / seconds[0], found.bandwidth)
    profile = _draft(name, model, peak, bandwidth, measured, rates)
    changes = {
        "description": description,
        "gemm_bandwidth": weights / seconds[0] / bandwidth,
        "decode_attention": [[1.0, _share(found.bandwidth, bandwidth)]],
        "prefill_attention": [[1.0, _share(found.flops, peak)]],
        "overheads_us": Overheads(**found.overheads),
    }
    return HardwareProfile.model_validate(profile.model_copy(update=changes).model_dump(exclude_unset=True))


def with_request_times(profile: HardwareProfile, times: Sequence[tuple[int, float]]) -> HardwareProfile:
    """times: (prompt tokens, seconds beside the steps) of requests; shared out to each request and each token."""
    factors = np.array([[1.0, float(tokens)] for tokens, _ in times])
    once, each_token = nonnegative_least_squares(factors, np.array([seconds for _, seconds in times]))
    update = {"request_us": float(once) / MICROSECOND, "request_token_us": float(each_token) / MICROSECOND}
    return profile.model_copy(update=update)


def deviation(profile: HardwareProfile, model: ModelSpec, measured: Measurements) -> float:
    """The median size of the relative error, over all steps measured."""
    roofline = Roofline(model, profile)
    return statistics.median(abs(roofline.terms_of(work).total / seconds - 1) for work, seconds in measured.steps)


def check_fit(off: float, *, tolerance: float, load: float, cores: int) -> None:
    """off: what `deviation` says. load: processes that wanted to run on the ``cores`` meanwhile.

    Raises ConfigError where the profile is further off than ``tolerance``, which says why that may be.
    """
    if off <= tolerance:
        return
    why = (
        f"the machine was busy (load {load:.1f} on {cores} cores): measure again when nothing else runs"
        if load > 1.5 * cores
        else "measure again, and if it stays, this model's times here do not follow the profile's form"
    )
    raise ConfigError(
        f"nothing is written: the profile misses the times measured by {off:.0%} (median), more than --tolerance "
        f"{tolerance:g} allows; {why}"
    )


@dataclass(frozen=True, slots=True)
class _Shares:
    """overheads: microseconds. bandwidth, flops: of decode and prefill attention; 0 where they did not show."""

    overheads: dict[str, float]
    bandwidth: float
    flops: float


def _share(rate: float, peak: float) -> float:
    """Attention too quick to show costs next to nothing either way; it then goes at the peak."""
    return max(TINY_SHARE, rate / peak) if rate else 1.0


def _share_out(model: ModelSpec, measured: Measurements, draft: HardwareProfile) -> _Shares:
    roofline = Roofline(model, draft)
    rows, rest, whole = [], [], []
    for work, seconds in measured.steps:
        terms = roofline.terms_of(work)
        counts = roofline.overhead_counts(work)
        # At the draft's peaks, attention's seconds times the peak are its bytes and operations.
        read = terms.decode_attention * draft.bytes_per_second
        computed = terms.prefill_attention * draft.flops(model.base_dtype)
        rows.append([*(counts[each] for each in OVERHEADS), read, computed])
        rest.append(max(0.0, seconds - terms.gemm - terms.logits - terms.elementwise))
        whole.append(seconds)
    relative = np.array(rows) / np.array(whole)[:, None]
    scale = np.linalg.norm(relative, axis=0)
    scale[scale == 0] = 1.0
    found = nonnegative_least_squares(relative / scale, np.array(rest) / np.array(whole)) / scale
    overheads = {each: float(value) / MICROSECOND for each, value in zip(OVERHEADS, found, strict=False)}
    per_byte, per_operation = float(found[-2]), float(found[-1])
    return _Shares(overheads, 1 / per_byte if per_byte else 0.0, 1 / per_operation if per_operation else 0.0)


def _draft(
    name: str, model: ModelSpec, peak: float, bandwidth: float, measured: Measurements, rates: Sequence[float]
) -> HardwareProfile:
    """Without overheads, and attention at the peaks."""
    here = f"measured on this machine with {model.name}"
    given = {
        "memory_gib": "as the system reports",
        "memory_gb_per_s": f"{here}: the best of what matrix products and attention read",
        "peak_tflops": f"{here}: the best rate of a matrix product or of attention",
        "gemm_bandwidth": f"{here}: linear layers with 1 row",
        "gemm_compute": f"{here}: linear layers",
        "prefill_attention": f"{here}: first tokens, by length and by what is cached",
        "decode_attention": f"{here}: answers over HTTP, by streams and context",
        "overheads_us": f"{here}: what is left of answers and first tokens, fitted",
        "passes": "as the engine computes on this machine",
        "last_layer": "likewise",
        "request_us": f"{here}: first tokens over HTTP, less their steps",
        "request_token_us": f"{here}: the same, by the length of the prompt",
        "tiers": "measured on this machine: blocks stored, and loaded, verified and copied",
    }
    return HardwareProfile(
        name=name,
        memory_gib=measured.memory_bytes / GIB,
        memory_gb_per_s=bandwidth / GB,
        peak_tflops={model.base_dtype: peak / TERA},
        gemm_bandwidth=1.0,
        gemm_compute=[[float(rows), rate / peak] for (rows, _), rate in zip(measured.linears, rates, strict=True)],
        prefill_attention=[[1.0, 1.0]],
        decode_attention=[[1.0, 1.0]],
        overheads_us=Overheads(),
        passes=measured.passes,
        last_layer=measured.last_layer,
        request_us=0.0,
        request_token_us=0.0,
        tiers=dict(measured.tiers),
        measured_with=measured.with_types,
        sources=given,
    )


def bare(hardware: HardwareProfile) -> HardwareProfile:
    """The profile without its overheads: kernels alone."""
    return hardware.model_copy(update={"overheads_us": Overheads()})


def fit_overheads(
    names: Sequence[str], counts: Sequence[Mapping[str, float]], kernels: Sequence[float], measured: Sequence[float]
) -> dict[str, float]:
    """Microseconds of the overheads ``names`` that, as often as ``counts`` says and beside the kernels' seconds, come
    closest to the seconds ``measured``: least squares of the relative errors, none of them negative.
    """
    target = np.asarray(measured, dtype=np.float64)
    factors = np.array([[each[name] for name in names] for each in counts], dtype=np.float64) / target[:, None]
    found = nonnegative_least_squares(factors, 1 - np.asarray(kernels, dtype=np.float64) / target)
    return {name: float(value) / MICROSECOND for name, value in zip(names, found, strict=True)}


def nonnegative_least_squares(factors: Floats, target: Floats) -> Floats:
    """The x >= 0 that brings ``factors @ x`` closest to ``target``. Tries every choice of the columns that are not
    zero, so it is for few of them.
    """
    columns = factors.shape[1]
    best, least = np.zeros(columns), float(target @ target)
    for size in range(1, columns + 1):
        for chosen in combinations(range(columns), size):
            part = factors[:, chosen]
            found = np.linalg.lstsq(part, target)[0]
            off = target - part @ found
            if (found >= 0).all() and float(off @ off) < least:
                least = float(off @ off)
                best = np.zeros(columns)
                best[list(chosen)] = found
    return best

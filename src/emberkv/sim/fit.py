"""The tuning bench: overheads fitted to measured times, once the kernels' own share is known."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from emberkv.sim.hardware import MICROSECOND, HardwareProfile, Overheads

Floats = NDArray[np.float64]


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

"""Distributions of lengths in tokens, think times in seconds and numbers of turns."""

import math
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from emberkv.errors import WorkloadError
from emberkv.validation import Strict
from emberkv.workload.bounds import MOST_TOKENS, Amount, SomeAmount
from emberkv.workload.trace import read_trace

P90 = 1.2815515655446004
"""The standard normal distribution's 0.9-quantile."""

_LARGEST_EXPONENT = 700.0
"""Beyond it, exp overflows."""


class Fixed(Strict):
    kind: Literal["fixed"]
    value: Amount

    def sample(self, rng: Random) -> float:
        return self.value


class Uniform(Strict):
    """Between ``min`` and ``max``."""

    kind: Literal["uniform"]
    min: Amount
    max: Amount

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self

    def sample(self, rng: Random) -> float:
        return rng.uniform(self.min, self.max)


class _Clipped(Strict):
    """``min`` and ``max``: what is drawn beyond them is put on them."""

    min: Amount = 0.0
    max: Amount | None = None

    def _clip(self, value: float) -> float:
        return max(self.min, value if self.max is None else min(value, self.max))


class LogNormal(_Clipped):
    """By its median and its 90th percentile."""

    kind: Literal["lognormal"]
    median: SomeAmount
    p90: SomeAmount

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.p90 < self.median:
            raise ValueError(f"p90 {self.p90:g} is below the median {self.median:g}")
        return self

    def sample(self, rng: Random) -> float:
        spread = (math.log(self.p90) - math.log(self.median)) / P90
        return self._clip(math.exp(min(_LARGEST_EXPONENT, rng.normalvariate(math.log(self.median), spread))))


class Exponential(_Clipped):
    kind: Literal["exponential"]
    mean: SomeAmount

    def sample(self, rng: Random) -> float:
        return self._clip(rng.expovariate(1 / self.mean))


class Geometric(Strict):
    """Whole numbers from 1 on: a conversation goes on with the same chance after each turn."""

    kind: Literal["geometric"]
    mean: Annotated[float, Field(ge=1, le=1e12)]

    def sample(self, rng: Random) -> float:
        if self.mean == 1:
            return 1
        return 1 + math.floor(math.log(1 - rng.random()) / math.log1p(-1 / self.mean))


class Empirical(Strict):
    """Any of ``values``, or of a field of a trace's requests; a relative path starts at the description's folder."""

    kind: Literal["empirical"]
    values: list[Amount] | None = None
    trace: str | None = None
    field: Literal["prompt_tokens", "output_tokens"] | None = None
    _drawn_from: list[float] = PrivateAttr(default_factory=list)

    def model_post_init(self, context: Any) -> None:
        if (self.values is None) == (self.trace is None) or (self.trace is None) != (self.field is None):
            raise ValueError("give either values, or trace and field (prompt_tokens or output_tokens)")
        found = self.values
        if self.trace is not None and self.field is not None:
            requests = read_trace(folder_of(context) / self.trace)
            found = [getattr(request, self.field) for request in requests]
        if not found:
            raise ValueError("there are no values to draw from; at least one is needed")
        self._drawn_from = found

    def sample(self, rng: Random) -> float:
        return rng.choice(self._drawn_from)


def folder_of(context: Any) -> Path:
    """Where relative paths of a description start: validation's context ``{"folder": Path}``, else here."""
    return Path(context["folder"]) if context else Path()


def _number_as_fixed(data: Any) -> Any:
    return {"kind": "fixed", "value": data} if isinstance(data, int | float) else data


Distribution = Annotated[
    Annotated[Fixed | Uniform | LogNormal | Exponential | Geometric | Empirical, Field(discriminator="kind")],
    BeforeValidator(_number_as_fixed),
]
"""A mapping with ``kind`` and that kind's parameters; a plain number is fixed."""


def whole(value: float, least: int = 1, most: int = MOST_TOKENS) -> int:
    """A drawn value as a number of tokens or turns. Raises WorkloadError for one beyond ``most``."""
    if not value <= most:
        raise WorkloadError(f"the description draws a length of {value:.6g}; at most {most:,} are accepted")
    return max(least, round(value))

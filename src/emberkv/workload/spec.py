"""The schema of a generated workload in a YAML file: distributions, arrivals and clients; unknown keys are refused."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from emberkv.errors import WorkloadError
from emberkv.validation import Strict, describe
from emberkv.workload import bounds
from emberkv.workload.bounds import MOST_TOKENS, Amount, Rate, SomeAmount
from emberkv.workload.trace import read_trace
from emberkv.yaml_files import read_yaml

P90 = 1.2815515655446004
"""The standard normal distribution's 0.9-quantile."""

_LARGEST_EXPONENT = 700.0
"""Beyond it, exp overflows."""


class Fixed(Strict):
    """Always ``value``.

    >>> Fixed(kind="fixed", value=200).sample(Random(0))
    200.0
    """

    kind: Literal["fixed"]
    value: Amount

    def sample(self, rng: Random) -> float:
        return self.value


class Uniform(Strict):
    """Between ``min`` and ``max``.

    >>> 10 <= Uniform(kind="uniform", min=10, max=20).sample(Random(0)) <= 20
    True
    """

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
    """``min`` and ``max``: values drawn beyond them are replaced by them."""

    min: Amount = 0.0
    max: Amount | None = None

    def _clip(self, value: float) -> float:
        return max(self.min, value if self.max is None else min(value, self.max))


class LogNormal(_Clipped):
    """Log-normal, given by its median and its 90th percentile.

    >>> lengths = LogNormal(kind="lognormal", median=100, p90=400)
    >>> 450 < sum(lengths.sample(Random(seed)) > 100 for seed in range(1000)) < 550
    True
    """

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
    """Exponential, given by its mean.

    >>> Exponential(kind="exponential", mean=10, max=5).sample(Random(1)) <= 5
    True
    """

    kind: Literal["exponential"]
    mean: SomeAmount

    def sample(self, rng: Random) -> float:
        return self._clip(rng.expovariate(1 / self.mean))


class Geometric(Strict):
    """Whole numbers from 1 on: a conversation continues with the same probability after each turn.

    >>> Geometric(kind="geometric", mean=1).sample(Random(0))
    1
    """

    kind: Literal["geometric"]
    mean: Annotated[float, Field(ge=1, le=1e12)]

    def sample(self, rng: Random) -> float:
        if self.mean == 1:
            return 1
        return 1 + math.floor(math.log(1 - rng.random()) / math.log1p(-1 / self.mean))


class Empirical(Strict):
    """Any of ``values``, or of a field of a trace's requests; a relative path starts at the description's folder.

    >>> Empirical(kind="empirical", values=[3, 5]).sample(Random(0)) in (3, 5)
    True
    """

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


def _apart(gap: Callable[[], float]) -> Iterator[float]:
    """Times without end, each a drawn gap after the one before, the first one after 0."""
    now = 0.0
    while True:
        now += gap()
        yield now


class Poisson(Strict):
    """``rate`` conversations a second, independent of each other.

    >>> times = Poisson(kind="poisson", rate=100.0).times(Random(0))
    >>> 80 < sum(next(times) < 1.0 for _ in range(200)) < 120
    True
    """

    kind: Literal["poisson"]
    rate: Rate

    def times(self, rng: Random) -> Iterator[float]:
        return _apart(lambda: rng.expovariate(self.rate))


class Gamma(Strict):
    """``rate`` a second with gamma-distributed gaps.

    burstiness: the gaps' coefficient of variation; at 1 it is Poisson, above 1 arrivals come in bursts.

    >>> times = Gamma(kind="gamma", rate=100.0, burstiness=1.0).times(Random(0))
    >>> 80 < sum(next(times) < 1.0 for _ in range(200)) < 120
    True
    """

    kind: Literal["gamma"]
    rate: Rate
    burstiness: Annotated[float, Field(ge=0.01, le=100)]

    def times(self, rng: Random) -> Iterator[float]:
        shape = self.burstiness**-2
        return _apart(lambda: rng.gammavariate(shape, 1 / (self.rate * shape)))


class Constant(Strict):
    """One every ``1 / rate`` seconds, the first at 0.

    >>> times = Constant(kind="constant", rate=2.0).times(Random(0))
    >>> [next(times) for _ in range(3)]
    [0.0, 0.5, 1.0]
    """

    kind: Literal["constant"]
    rate: Rate

    def times(self, rng: Random) -> Iterator[float]:
        count = 0
        while True:
            yield count / self.rate
            count += 1


class TraceTimed(Strict):
    """When the requests of a trace arrive; ends with it. A relative path starts at the description's folder."""

    kind: Literal["trace"]
    trace: str
    _path: Path = PrivateAttr(default=Path())

    def model_post_init(self, context: Any) -> None:
        self._path = folder_of(context) / self.trace

    def times(self, rng: Random) -> Iterator[float]:
        return (request.arrival_time for request in read_trace(self._path))


Arrivals = Annotated[Poisson | Gamma | Constant | TraceTimed, Field(discriminator="kind")]


Name = Annotated[str, Field(min_length=1)]

PRESETS: dict[str, dict[str, Any]] = {
    # Growth a step (the call written and the tool's result read) and think times as measured on coding agents: median
    # 653 tokens, 10 s, p90 161 s. How the growth divides between the two, and the turns, are assumptions.
    "agent": {
        "first_message": {"kind": "lognormal", "median": 6000, "p90": 20000},
        "message": {"kind": "lognormal", "median": 440, "p90": 3000},
        "output": {"kind": "lognormal", "median": 120, "p90": 400},
        "turns": {"kind": "geometric", "mean": 30},
        "think_time": {"kind": "lognormal", "median": 10, "p90": 161},
        "max_context": 128_000,
    },
}
"""The keys that a profile with ``base`` starts from; its own keys take precedence."""


class SystemPrompts(Strict):
    """``count`` different system prompts of drawn lengths; the k-th most popular is chosen in proportion to k^-skew.

    >>> SystemPrompts(count=50, skew=1.1, tokens=800).tokens.value
    800.0
    """

    count: Annotated[int, Field(ge=1, le=bounds.MOST_PROMPTS)]
    skew: Annotated[float, Field(ge=0, le=1000)]
    tokens: Distribution


class Profile(Strict):
    """A kind of client. Its conversations grow: each prompt is everything before and a new message.

    weight: its share of the conversations, among the weights of all. system_prompts: which set it draws from; None is
    no system prompt. message, output: tokens a turn; first_message: where the first differs. max_output_tokens: the
    limit that is asked for, and put on drawn outputs; None asks for just what is generated. turns: in a conversation.
    think_time: seconds from a turn's completion to the next. max_context: a conversation ends before the turn whose
    prompt and limit together would exceed it. base: the name of a preset that gives the keys left out.

    >>> agent = Profile(name="coding", weight=1.0, base="agent")
    >>> agent.max_context, agent.turns.kind
    (128000, 'geometric')
    """

    name: Name
    weight: Annotated[float, Field(ge=1e-9, le=1e9)]
    base: str | None = None
    system_prompts: str | None = None
    first_message: Distribution | None = None
    message: Distribution
    output: Distribution
    max_output_tokens: bounds.SomeTokens | None = None
    turns: Distribution
    think_time: Distribution
    max_context: bounds.SomeTokens | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_base(cls, data: Any) -> Any:
        base = data.get("base") if isinstance(data, dict) else None
        if base is None:
            return data
        if not isinstance(base, str) or base not in PRESETS:
            raise ValueError(f"base is {base!r}; accepted: {', '.join(PRESETS)}")
        return {**PRESETS[base], **data}


class GeneratedWorkload(Strict):
    """Conversations that begin as ``arrivals`` says: for ``duration`` seconds, or ``sessions`` of them, or whichever of
    the two is reached first. The seed decides all that is drawn: two descriptions that differ in, say, their rate or a
    think time only, and share the seed, have the same conversations.

    >>> agents = {"name": "agents", "weight": 1, "base": "agent"}
    >>> poisson = {"kind": "poisson", "rate": 2.0}
    >>> data = {"seed": 1, "arrivals": poisson, "sessions": 10, "clients": [agents]}
    >>> workload = parse_workload(data, folder=Path())
    >>> workload.sessions, workload.clients[0].name
    (10, 'agents')
    """

    seed: int
    arrivals: Arrivals
    duration: bounds.SomeSeconds | None = None
    sessions: Annotated[int, Field(ge=1, le=bounds.MOST_CONVERSATIONS)] | None = None
    system_prompts: dict[Name, SystemPrompts] = Field(default_factory=dict)
    clients: Annotated[list[Profile], Field(min_length=1)]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.duration is None and self.sessions is None and self.arrivals.kind != "trace":
            raise ValueError("give duration (seconds), sessions, or both; else it would never end")
        if self.sessions is None and self.duration is not None and self.arrivals.kind != "trace":
            expected = self.duration * self.arrivals.rate
            if expected > bounds.MOST_CONVERSATIONS:
                raise ValueError(
                    f"a duration of {self.duration:g} s at {self.arrivals.rate:g} a second is {expected:g} "
                    f"conversations; at most {bounds.MOST_CONVERSATIONS:,} are accepted"
                )
        names = [profile.name for profile in self.clients]
        if len(set(names)) < len(names):
            raise ValueError(f"clients are named {', '.join(names)}; each needs a name of its own")
        for profile in self.clients:
            if profile.system_prompts is not None and profile.system_prompts not in self.system_prompts:
                raise ValueError(
                    f"client {profile.name} draws from system_prompts {profile.system_prompts!r}; "
                    f"described are: {', '.join(self.system_prompts) or 'none'}"
                )
        return self


def parse_workload(data: object, *, folder: Path, source: str = "workload") -> GeneratedWorkload:
    """A description from plain data. Relative paths in it start at ``folder``.

    Raises WorkloadError, beginning with ``source``, that names each wrong key and what is accepted.
    """
    try:
        return GeneratedWorkload.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        raise WorkloadError(f"{source}: {describe(error)}") from error


def load_workload(path: Path) -> GeneratedWorkload:
    """The description under the key ``workload`` of a YAML file; its other keys are the simulation's.

    Raises WorkloadError naming the file and what is wrong.
    """
    data = read_yaml(path, WorkloadError)
    if not isinstance(data, dict) or "workload" not in data:
        raise WorkloadError(f"{path}: there is no key 'workload'; expected one with a mapping under it")
    return parse_workload(data["workload"], folder=path.parent, source=f"{path}: workload")

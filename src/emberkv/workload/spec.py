"""The schema of a generated workload in a YAML file, validated with unknown keys refused."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from emberkv.errors import WorkloadError
from emberkv.validation import Strict, describe
from emberkv.workload import bounds
from emberkv.workload.arrivals import Arrivals
from emberkv.workload.distributions import Distribution
from emberkv.yaml_files import read_yaml

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
"""What a profile with ``base`` starts from; its own keys go before."""


class SystemPrompts(Strict):
    """``count`` different system prompts of drawn lengths; the k-th most popular is chosen in proportion to k^-skew."""

    count: Annotated[int, Field(ge=1, le=bounds.MOST_PROMPTS)]
    skew: Annotated[float, Field(ge=0, le=1000)]
    tokens: Distribution


class Profile(Strict):
    """A kind of client. Its conversations grow: each prompt is everything before and a new message.

    weight: its share of the conversations, among the weights of all. system_prompts: which set it draws from; None is
    no system prompt. message, output: tokens a turn; first_message: where the first differs. max_output_tokens: the
    limit that is asked for, and put on drawn outputs; None asks for just what is generated. turns: in a conversation.
    think_time: seconds from a turn's completion to the next. max_context: a conversation ends before the turn whose
    prompt and limit together would exceed it.
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

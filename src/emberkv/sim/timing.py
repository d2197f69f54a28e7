"""Steps in virtual time: what a step computes, how long it takes, and runs of steps that only decode.

Virtual time is counted in whole nanoseconds, so that a run of steps takes exactly as long as its steps one by one.
"""

from dataclasses import dataclass, field, fields
from typing import Final, NamedTuple, Protocol

from emberkv.core.scheduler import StepPlan
from emberkv.errors import ConfigError
from emberkv.workload.bounds import MOST_SECONDS

NANOSECONDS: Final = 1_000_000_000
CONTEXT_BUCKET: Final = 256
"""Tokens of context within which steps that only decode are taken to last alike."""


def nanoseconds(seconds: float) -> int:
    """Raises ConfigError for more than virtual time has."""
    if not seconds <= MOST_SECONDS:
        raise ConfigError(f"a time of {seconds:g} s comes out; the simulation has room for {MOST_SECONDS:g} s")
    return round(seconds * NANOSECONDS)


class ChunkWork(NamedTuple):
    """Tokens ``[start, stop)`` of one sequence, computed in one step. samples: whether its next token is sampled, too.

    >>> chunk = ChunkWork(start=512, stop=640, samples=True)
    >>> chunk.stop - chunk.start
    128
    """

    start: int
    stop: int
    samples: bool


class StepWork(NamedTuple):
    """What a step computes: ``sequences`` decode one token each over ``context`` tokens in all, beside prefill chunks.

    >>> work = StepWork(sequences=8, context=8 * 1024, chunks=(ChunkWork(0, 256, samples=False),))
    >>> work.context // work.sequences
    1024
    """

    sequences: int
    context: int
    chunks: tuple[ChunkWork, ...] = ()


@dataclass(slots=True, init=False)
class StepTerms:
    """Seconds of a step by what they are spent on; the step takes their sum.

    >>> terms = StepTerms(step_overhead=0.001)
    >>> terms.gemm = 0.004
    >>> terms.total, terms.as_dict()["logits"]
    (0.005, 0.0)
    """

    gemm: float
    elementwise: float
    decode_attention: float
    prefill_attention: float
    logits: float
    all_reduce: float
    layer_overhead: float
    sequence_overhead: float
    token_overhead: float
    step_overhead: float

    def __init__(self, step_overhead: float) -> None:
        self.gemm = 0.0
        self.elementwise = 0.0
        self.decode_attention = 0.0
        self.prefill_attention = 0.0
        self.logits = 0.0
        self.all_reduce = 0.0
        self.layer_overhead = 0.0
        self.sequence_overhead = 0.0
        self.token_overhead = 0.0
        self.step_overhead = step_overhead

    @property
    def total(self) -> float:
        kernels = self.gemm + self.elementwise + self.decode_attention + self.prefill_attention + self.logits
        overheads = self.layer_overhead + self.sequence_overhead + self.token_overhead + self.step_overhead
        return kernels + self.all_reduce + overheads

    def as_dict(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class StepTimer(Protocol):
    """Step durations on some hardware."""

    def step_seconds(self, plan: StepPlan) -> float:
        """Seconds of a step that is not empty: all its decodes together and each of its prefill chunks."""

    def decode_seconds(self, sequences: int, context: int) -> float:
        """Seconds of a step that only decodes, one token for each of ``sequences``, which attend to ``context`` tokens
        in all (the sum of their lengths). Equal to `step_seconds` of such a plan.
        """


@dataclass(frozen=True, slots=True)
class ConstantRates:
    """A machine that computes nothing in parallel: seconds for each step, each prefill token and each decoded token.

    >>> rates = ConstantRates(per_step=0.25, per_prefill_token=0.5, per_decode_token=2.0)
    >>> rates.decode_seconds(sequences=3, context=100)
    6.25
    """

    per_step: float = 0.0
    per_prefill_token: float = 1e-4
    per_decode_token: float = 1e-3

    def step_seconds(self, plan: StepPlan) -> float:
        prefilled = sum(chunk.stop - chunk.start for chunk in plan.prefills)
        return self.per_step + self.per_prefill_token * prefilled + self.per_decode_token * len(plan.decodes)

    def decode_seconds(self, sequences: int, context: int) -> float:
        return self.per_step + self.per_decode_token * sequences


@dataclass(slots=True)
class StepClock:
    """A timer's step durations in nanoseconds, at least 1 each. Those of steps that only decode are remembered.

    >>> clock = StepClock(ConstantRates(per_step=0.25, per_decode_token=0.5))
    >>> clock.decode(sequences=2, context=300), clock.run(sequences=2, context=300, steps=4).duration
    (1250000000, 5000000000)
    """

    timer: StepTimer
    _decodes: dict[tuple[int, int], int] = field(default_factory=dict)

    def step(self, plan: StepPlan) -> int:
        if not plan.prefills:
            return self.decode(len(plan.decodes), sum(len(each.chain) for each in plan.decodes))
        return max(1, nanoseconds(self.timer.step_seconds(plan)))

    def decode(self, sequences: int, context: int) -> int:
        """Nanoseconds of a step that only decodes, at the middle of the bucket in which ``context`` is."""
        bucket = context // CONTEXT_BUCKET
        known = self._decodes.get((sequences, bucket))
        if known is None:
            seconds = self.timer.decode_seconds(sequences, bucket * CONTEXT_BUCKET + CONTEXT_BUCKET // 2)
            known = self._decodes[sequences, bucket] = max(1, nanoseconds(seconds))
        return known

    def run(self, sequences: int, context: int, steps: int) -> "SteadyRun":
        """``steps`` steps in a row, each adding a token to the context of every sequence."""
        return SteadyRun(self, sequences, context, steps)


@dataclass(slots=True, init=False)
class SteadyRun:
    """Steps that only decode, one after the other, with nothing happening in between.

    context: tokens attended to by the first of them.

    >>> run = StepClock(ConstantRates(per_decode_token=1.0)).run(sequences=1, context=10, steps=4)
    >>> run.duration // NANOSECONDS
    4
    >>> run.cut(elapsed=2 * NANOSECONDS + 1)  # the third step is under way
    (3, 3000000000)
    """

    clock: StepClock
    sequences: int
    context: int
    steps: int

    def __init__(self, clock: StepClock, sequences: int, context: int, steps: int) -> None:
        self.clock = clock
        self.sequences = sequences
        self.context = context
        self.steps = steps

    @property
    def duration(self) -> int:
        return self._walk(None)[1]

    def cut(self, elapsed: int) -> tuple[int, int]:
        """How many steps there are up to the end of the one that is under way after ``elapsed`` nanoseconds, and how
        long they take; a step that ends just then counts as ended.
        """
        return self._walk(elapsed)

    def _walk(self, elapsed: int | None) -> tuple[int, int]:
        """Bucket by bucket, until ``elapsed`` is reached or the steps end."""
        done, duration, context = 0, 0, self.context
        while done < self.steps:
            each = self.clock.decode(self.sequences, context)
            within = -(-(CONTEXT_BUCKET - context % CONTEXT_BUCKET) // self.sequences)
            count = min(within, self.steps - done)
            if elapsed is not None and duration + count * each >= elapsed:
                count = max(0, -(-(elapsed - duration) // each))
                return done + count, duration + count * each
            done += count
            duration += count * each
            context += count * self.sequences
        return done, duration


@dataclass(slots=True, init=False)
class Step:
    """A step under way from ``began`` for ``duration`` nanoseconds, or ``count`` equal ones in a row, which are
    ``run``. done: those of them that are accounted for.

    >>> step = Step(StepPlan(), began=5, duration=20)
    >>> step.ends, step.count
    (25, 1)
    """

    plan: StepPlan
    began: int
    duration: int
    count: int
    run: SteadyRun | None
    done: int

    def __init__(self, plan: StepPlan, began: int, duration: int, count: int = 1, run: SteadyRun | None = None) -> None:
        self.plan = plan
        self.began = began
        self.duration = duration
        self.count = count
        self.run = run
        self.done = 0

    @property
    def ends(self) -> int:
        return self.began + self.duration

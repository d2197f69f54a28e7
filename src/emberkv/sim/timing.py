"""The stopwatch: how long a step takes, in virtual time.

Virtual time is counted in whole nanoseconds, so that a run of steps takes exactly as long as its steps one by one.
"""

from dataclasses import dataclass, field
from typing import Protocol

from emberkv.core.scheduler import StepPlan
from emberkv.errors import ConfigError
from emberkv.workload.bounds import MOST_SECONDS

NANOSECONDS = 1_000_000_000
CONTEXT_BUCKET = 256
"""Tokens of context within which steps that only decode are taken to last alike."""


def nanoseconds(seconds: float) -> int:
    """Raises ConfigError for more than virtual time has."""
    if not seconds <= MOST_SECONDS:
        raise ConfigError(f"a time of {seconds:g} s comes out; the simulation has room for {MOST_SECONDS:g} s")
    return round(seconds * NANOSECONDS)


class StepTimer(Protocol):
    """What a step costs on some hardware."""

    def step_seconds(self, plan: StepPlan) -> float:
        """Seconds of a step that is not empty: all its decodes together and each of its prefill chunks."""

    def decode_seconds(self, sequences: int, context: int) -> float:
        """Seconds of a step that only decodes, one token for each of ``sequences``, which attend to ``context`` tokens
        in all (the sum of their lengths). Equal to `step_seconds` of such a plan.
        """


@dataclass(frozen=True, slots=True)
class ConstantRates:
    """A machine that does nothing in parallel: so many seconds a step, a prefill token and a decoded token."""

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
    """A timer's answers in nanoseconds, at least 1 for each step; those of steps that only decode are remembered."""

    timer: StepTimer
    _decodes: dict[tuple[int, int], int] = field(default_factory=dict)

    def step(self, plan: StepPlan) -> int:
        if not plan.prefills:
            return self.decode(len(plan.decodes), sum(len(each.chain) for each in plan.decodes))
        return max(1, nanoseconds(self.timer.step_seconds(plan)))

    def decode(self, sequences: int, context: int) -> int:
        """Of a step that only decodes, at the middle of the bucket in which ``context`` is."""
        bucket = context // CONTEXT_BUCKET
        known = self._decodes.get((sequences, bucket))
        if known is None:
            seconds = self.timer.decode_seconds(sequences, bucket * CONTEXT_BUCKET + CONTEXT_BUCKET // 2)
            known = self._decodes[sequences, bucket] = max(1, nanoseconds(seconds))
        return known

    def run(self, sequences: int, context: int, steps: int) -> "SteadyRun":
        """``steps`` steps in a row, each adding a token to the context of every sequence."""
        return SteadyRun(self, sequences, context, steps)


@dataclass(frozen=True, slots=True)
class SteadyRun:
    """Steps that only decode, one after the other, with nothing happening in between.

    context: tokens attended to by the first of them.
    """

    clock: StepClock
    sequences: int
    context: int
    steps: int

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

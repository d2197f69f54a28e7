"""Routing decisions as lines of JSON, and the same decisions made again from them, by the same policy or another one.

A line has all that the policy decided from and what it chose. It has no text, no token and no block hash. Sessions are
not named either: the line says only which replica had the session's last request.

    router.record = DecisionLog(file, "expected-ttft").record
    replay(read_decisions(path)).same     # all of them
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from msgspec import Meta, Struct

from emberkv.cluster.policies import Decision, Order, ReplicaState, RoutingPolicy, RoutingReason, RoutingView
from emberkv.cluster.routing import Recorder, make_policy
from emberkv.errors import ConfigError, WorkloadError, reason_of

VERSION = 1

Count = Annotated[int, Meta(ge=0)]
Amount = Annotated[float, Meta(ge=0)]


class RecordedReplica(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A slot. cached: blocks by tier. The others are fields of `ReplicaState` and `RoutingView`."""

    up: bool
    load: Amount = 0.0
    queued_tokens: Amount = 0.0
    prefill_rate: Amount | None = None
    step_seconds: Amount = 0.0
    load_rates: dict[str, Amount] = {}
    cached: dict[str, Count] = {}
    recent: Amount = 0.0


class RecordedDecision(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A line. at: seconds, of the router's clock. order, home: see `RoutingView`."""

    version: int
    policy: str
    at: float
    prompt_tokens: Count
    block_size: Annotated[int, Meta(ge=1)]
    replicas: list[RecordedReplica]
    order: list[Count]
    replica: Count
    reason: RoutingReason
    home: int | None = None

    @property
    def view(self) -> RoutingView:
        """What the policy decided from."""
        states = [
            ReplicaState(each.load, each.up, each.queued_tokens, each.prefill_rate, each.step_seconds, each.load_rates)
            for each in self.replicas
        ]
        cached = [each.cached for each in self.replicas]
        recent = [each.recent for each in self.replicas]
        return RoutingView(self.prompt_tokens, self.block_size, states, cached, self.order, recent, self.home)


class DecisionLog:
    """Writes decisions to a file that is open for writing bytes. Raises OSError as the file does."""

    def __init__(self, file: BinaryIO, policy: str) -> None:
        self._file = file
        self._policy = policy
        self._encoder = msgspec.json.Encoder()

    def record(self, at: float, view: RoutingView, decision: Decision) -> None:
        """Append a line. at: seconds, of any clock."""
        replicas = [
            RecordedReplica(
                state.up,
                state.load,
                state.queued_tokens,
                state.prefill_rate,
                state.step_seconds,
                dict(state.load_rates),
                dict(view.cached[slot]) if view.cached else {},
                view.recent[slot] if view.recent else 0.0,
            )
            for slot, state in enumerate(view.replicas)
        ]
        line = RecordedDecision(
            VERSION,
            self._policy,
            at,
            view.prompt_tokens,
            view.block_size,
            replicas,
            list(view.order),
            decision.replica,
            decision.reason,
            view.home,
        )
        self._file.write(self._encoder.encode(line) + b"\n")


def recorder_until_full(log: DecisionLog, failed: Callable[[OSError], None]) -> Recorder:
    """Records with ``log`` until its file cannot be written, and then calls ``failed`` once with the error."""
    recording: Recorder | None = log.record

    def record(at: float, view: RoutingView, decision: Decision) -> None:
        nonlocal recording
        try:
            if recording is not None:
                recording(at, view, decision)
        except OSError as error:
            recording = None
            failed(error)

    return record


def read_decisions(path: Path) -> Iterator[RecordedDecision]:
    """The lines of a recording. Raises WorkloadError, which names the line, for one that cannot be read."""
    decoder = msgspec.json.Decoder(RecordedDecision)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield _checked(decoder.decode(line))
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise WorkloadError(f"{path}, line {number}: no routing decision: {reason_of(error)}") from error
    except OSError as error:
        raise WorkloadError(f"cannot read {path}: {error.strerror}") from error


def _checked(line: RecordedDecision) -> RecordedDecision:
    """Raises msgspec's ValidationError where the fields do not fit together."""
    if line.version != VERSION:
        raise msgspec.ValidationError(f"version {line.version}; this emberkv reads version {VERSION}")
    slots = len(line.replicas)
    named = [*line.order, line.replica, *([] if line.home is None else [line.home])]
    if not all(0 <= slot < slots for slot in named) or not line.replicas[line.replica].up:
        raise msgspec.ValidationError(f"slots {named} of {slots} replicas; one was chosen that is not up or not there")
    return line


@cache
def _policy(name: str, recorded: str) -> RoutingPolicy:
    policy, before = make_policy(name), make_policy(recorded)
    if (policy.reads_index and not before.reads_index) or policy.order not in (Order.NONE, before.order):
        raise ConfigError(
            f"--routing {name} needs more than {recorded} recorded; record with --routing {name}, or replay without it"
        )
    return policy


@dataclass(frozen=True, slots=True)
class Replayed:
    """A recording, decided again. same: decisions that are as recorded. first_other: the number of the first line that
    is not, from 1. expected, recorded: mean seconds to first token that the policy expects of what it chooses, and of
    what was chosen then; None where the policy expects none.
    """

    decisions: int
    same: int
    first_other: int | None
    expected: float | None
    recorded: float | None
    reasons: dict[str, int]


def replay(lines: Iterable[RecordedDecision], name: str | None = None) -> Replayed:
    """Decide each line again by itself, with what was known when it was recorded.

    name: of the policy; None: the recorded one. Raises ConfigError for a policy that needs what was not recorded.
    """
    decisions = same = 0
    first_other: int | None = None
    reasons: dict[str, int] = {}
    expected: list[tuple[float, float]] = []
    for number, line in enumerate(lines, 1):
        policy = _policy(name or line.policy, line.policy)
        decision = policy.choose(line.view)
        decisions += 1
        reasons[decision.reason.value] = reasons.get(decision.reason.value, 0) + 1
        if decision.replica == line.replica:
            same += 1
        else:
            first_other = first_other or number
        by_slot = {each.slot: each.ttft for each in decision.estimates}
        if by_slot:
            expected.append((by_slot[decision.replica], by_slot[line.replica]))
    means = [sum(column) / len(expected) for column in zip(*expected, strict=True)] or [None, None]
    return Replayed(decisions, same, first_other, means[0], means[1], reasons)

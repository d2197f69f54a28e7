"""The builder: small set-ups on a machine whose times are simple numbers, and their outcomes by request."""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

from emberkv.sim.build import build, machine_of
from emberkv.sim.config import SimulationConfig, with_changes
from emberkv.sim.outcome import RequestOutcome
from emberkv.sim.simulator import SimulationEnd, Simulator
from emberkv.workload.content import Content, Span
from emberkv.workload.request import Request
from emberkv.workload.source import Source, TraceSource
from tests.workload.build import span

RATES = {"per_step": 0.0, "per_prefill_token": 0.001, "per_decode_token": 0.01}
"""A step takes 1 ms a prompt token and 10 ms a decoded one."""

SMALL = {"rates": {**RATES, "kv_bytes_per_token": 1}, "kv_blocks": 1000, "block_size": 10}


def config(**changes: Any) -> SimulationConfig:
    """One replica of 1,000 blocks of 10 tokens; the changes go before."""
    return with_changes(SimulationConfig(), {**SMALL, **changes})


@dataclass
class Ran:
    """A simulation that is over. outcomes: by request id."""

    simulator: Simulator
    ending: SimulationEnd
    outcomes: dict[str, RequestOutcome]

    def cached(self, name: str) -> tuple[int, int]:
        outcome = self.outcomes[name]
        return outcome.cached_tokens, outcome.prefilled_tokens

    def check_idle(self) -> None:
        """No block is held, and the conservation law holds."""
        for replica in self.simulator.replicas:
            assert (replica.scheduler.num_running, replica.scheduler.num_waiting) == (0, 0)
            assert replica.pool.num_free == replica.pool.num_blocks
            replica.pool.check_integrity([])
            assert replica.state.load == 0


def run(source: Source | Iterable[Request], settings: SimulationConfig | None = None, **changes: Any) -> Ran:
    """Every request has exactly one outcome."""
    settings = with_changes(settings or config(), changes)
    outcomes: dict[str, RequestOutcome] = {}

    def emit(outcome: RequestOutcome) -> None:
        assert outcome.request.request_id not in outcomes
        outcomes[outcome.request.request_id] = outcome

    if not hasattr(source, "next_arrival"):
        source = TraceSource(source)
    machine = machine_of(settings, settings.block_size or 10)
    simulator = build(settings, machine, source, emit, lambda done, now: None)
    return Ran(simulator, simulator.run(), outcomes)


def turn(
    session: str, number: int, prompt: int, output: int, *, at: float = 0.0, ends_early: bool = True, **more: Any
) -> Request:
    """The session's stream of tokens, up to the prompt's and answer's end; each turn goes on from the one before.

    ends_early: with an end-of-sequence token, so that the whole answer is computed and cached.
    """
    return Request(
        request_id=f"{session}.{number}", arrival_time=at, prompt_tokens=prompt, output_tokens=output,
        max_output_tokens=output + ends_early, content=Content([span(session, prompt + output)]), session_id=session,
        turn=number, **more,
    )  # fmt: skip


def single(name: str, prompt: int, output: int, *pieces: Span, at: float = 0.0, **more: Any) -> Request:
    """A request of no session; what the pieces leave of it is its own."""
    return Request(
        request_id=name, arrival_time=at, prompt_tokens=prompt, output_tokens=output, max_output_tokens=output,
        content=Content(pieces), **more,
    )  # fmt: skip


def mixed_requests(seed: int, count: int, *, longest: int = 120, rate: float = 2.0) -> list[Request]:
    """Requests of few, branching beginnings and answers, some in sessions, some that end early, by arrival, of two
    clients in turn.
    """
    rng = Random(seed)
    now, requests = 0.0, []
    for number in range(count):
        now += rng.expovariate(rate) * rng.choice([0, 1, 1])
        prompt, output = rng.randint(0, longest), rng.randint(0, 40)
        known_tokens = rng.randint(0, prompt + output)
        cut = rng.randint(0, known_tokens)
        pieces = [Span(span(f"head{rng.randint(0, 3)}", 1).key, 0, cut), Span(span("tail", 1).key, cut, known_tokens)]
        request = Request(
            request_id=f"r{number}", arrival_time=now, prompt_tokens=prompt, output_tokens=output,
            max_output_tokens=output + rng.choice([0, 0, 5]), content=Content(pieces),
            session_id=rng.choice(["", "s0", "s1"]), client_id=f"c{number % 2}",
        )  # fmt: skip
        requests.append(request)
    return requests

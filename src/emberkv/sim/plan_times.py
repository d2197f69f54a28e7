"""Times and rates from formulas, for the set-ups that a plan does not simulate.

First token: what a request costs outside the scheduler, computing the part of its prompt that is not cached, alone on
the machine, and loading the part that a lower tier has; no queueing. Most requests a second: the inverse of a
request's share of the machine, which is computing that part and, for each token of the answer, its share of a decode
step of as many sequences as the pool holds. Every prompt is taken to be cached to the same share.
"""

from collections import Counter
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import pairwise
from math import fsum

from emberkv.core.scheduler import PrefillChunk, StepPlan
from emberkv.core.sequence import Sequence
from emberkv.sim.build import Machine
from emberkv.sim.cache_only import ReferenceChain
from emberkv.sim.config import SimulationConfig
from emberkv.sim.curves import ROOT
from emberkv.sim.hardware import GB, MICROSECOND, TierRates
from emberkv.workload.request import Request

SAMPLED = 200
"""Requests, evenly spaced, whose times are averaged."""


@dataclass(frozen=True, slots=True)
class Demand:
    """The load of a workload: how many requests, how often, and how long they are.

    rate, busiest: requests a second, on average and in the busiest stretch of time; None when all arrive at once.
    sample: prompt and answer lengths.

    >>> from emberkv.workload.content import Content
    >>> lengths = {"prompt_tokens": 40, "output_tokens": 4, "max_output_tokens": 4, "content": Content()}
    >>> demand = demand_of([Request(request_id=str(at), arrival_time=at / 2, **lengths) for at in range(9)])
    >>> demand.requests, demand.rate, demand.prompt_tokens
    (9, 2.0, 40.0)
    """

    requests: int
    rate: float | None
    busiest: float | None
    prompt_tokens: float
    output_tokens: float
    sample: list[tuple[int, int]]


def demand_of(requests: Ordered[Request]) -> Demand:
    """The demand of at least one request, in the order of arrival."""
    count = len(requests)
    duration = requests[-1].arrival_time - requests[0].arrival_time
    every = max(1, count // SAMPLED)
    return Demand(
        requests=count,
        rate=(count - 1) / duration if duration > 0 else None,
        busiest=_busiest(requests, duration) if duration > 0 else None,
        prompt_tokens=sum(request.prompt_tokens for request in requests) / count,
        output_tokens=sum(request.output_tokens for request in requests) / count,
        sample=[(request.prompt_tokens, request.output_tokens) for request in requests[::every]],
    )


def _busiest(requests: Ordered[Request], duration: float) -> float:
    """The rate in the busiest of at most 20 equal stretches of time, which have 50 requests or more on average."""
    stretches = max(1, min(20, len(requests) // 50))
    begin = requests[0].arrival_time
    counts = Counter(min(stretches - 1, int((each.arrival_time - begin) * stretches / duration)) for each in requests)
    return max(counts.values()) * stretches / duration


@dataclass(frozen=True, slots=True)
class Times:
    """What one replica does. first_token: seconds, the mean, without queueing. requests_per_second: the most it serves.

    >>> times = Times(first_token=0.25, requests_per_second=8.0)
    >>> 4 * times.requests_per_second  # of four replicas
    32.0
    """

    first_token: float
    requests_per_second: float


class Formulas:
    """The times of one replica of a machine.

    >>> from emberkv.sim.build import machine_of
    >>> config = SimulationConfig(model="llama-3.1-8b", hardware="h100")
    >>> demand = Demand(1, None, None, prompt_tokens=2000.0, output_tokens=100.0, sample=[(2000, 100)])
    >>> formulas = Formulas(machine_of(config, block_size=16), config, demand)
    >>> formulas.times(in_pool=0.9).first_token < formulas.times(in_pool=0.0).first_token
    True
    """

    def __init__(self, machine: Machine, config: SimulationConfig, demand: Demand) -> None:
        self._machine = machine
        self._step_tokens = config.max_step_tokens
        self._demand = demand
        context = max(1, round(demand.prompt_tokens + demand.output_tokens / 2))
        held = machine.num_blocks * machine.block_size // context
        self._decoding = max(1, min(config.max_running, held))
        self._context = context * self._decoding

    @property
    def decode_token(self) -> float:
        """Seconds of the machine that a token of an answer takes, among as many sequences as the pool holds."""
        return self._machine.timer.decode_seconds(self._decoding, self._context) / self._decoding

    def prefill(self, start: int, stop: int) -> float:
        """Seconds to compute tokens ``[start, stop)`` of a prompt, in steps of the configured budget."""
        if start >= stop:
            return 0.0
        chain = ReferenceChain(ROOT, [b""] * (stop - 1), 1)
        sequence = Sequence("planned", chain, 1)
        cuts = [*range(start, stop, self._step_tokens), stop]
        return fsum(self._step_seconds(PrefillChunk(sequence, first, last)) for first, last in pairwise(cuts))

    def _step_seconds(self, chunk: PrefillChunk) -> float:
        """Of a step that computes nothing else."""
        plan = StepPlan()
        plan.prefills.append(chunk)
        return self._machine.timer.step_seconds(plan)

    @property
    def prefill_token(self) -> float:
        """Seconds to compute a prompt token, on average over the sample's prompts without a cache."""
        tokens = sum(prompt for prompt, _ in self._demand.sample)
        return fsum(self.prefill(0, prompt) for prompt, _ in self._demand.sample) / max(1, tokens)

    def load(self, rates: TierRates, tokens: float) -> float:
        """Seconds to load the state of ``tokens`` from a tier."""
        if not tokens:
            return 0.0
        bytes_per_token = self._machine.block_bytes / self._machine.block_size
        return rates.latency_us * MICROSECOND + tokens * bytes_per_token / (rates.read_gb_per_s * GB)

    def times(self, in_pool: float, in_tier: float = 0.0, rates: TierRates | None = None) -> Times:
        """Times where shares of every prompt are in the pool and in a tier, which is read if that takes less than
        computing.
        """
        waits, works = [], []
        for prompt, output in self._demand.sample:
            pool = round(in_pool * prompt)
            cached = min(max(0, prompt - 1), pool + round(in_tier * prompt))
            whole, rest = self.prefill(pool, prompt), self.prefill(cached, prompt)
            loading = self.load(rates, cached - pool) if rates else 0.0
            loads = rates is not None and rest + loading < whole
            waits.append(rest + loading if loads else whole)
            works.append((rest if loads else whole) + output * self.decode_token)
        count = len(self._demand.sample)
        entering = (
            self._machine.request_seconds
            + self._machine.request_token_seconds * fsum(prompt for prompt, _ in self._demand.sample) / count
        )
        return Times(entering + fsum(waits) / count, count / max(fsum(works), 1e-12))

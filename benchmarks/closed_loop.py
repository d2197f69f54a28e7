"""Clients that each ask again as soon as they are answered, through the serving scheduler: which steps there are.

Without think times nothing depends on how long a step takes, so that one walk serves every model of its duration.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from emberkv.core.block_pool import BlockPool
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig
from emberkv.core.sequence import Sequence
from emberkv.sim.roofline import Roofline
from emberkv.sim.timing import StepWork
from emberkv.workload.content import Content
from emberkv.workload.request import Request

BLOCK_SIZE = 64
ROOT = bytes(32)


@dataclass(frozen=True, slots=True)
class Loop:
    """``clients`` with prompts and answers of equal lengths, in tokens.

    rounds: how often each asks; all begin at once.
    """

    clients: int
    prompt: int
    answer: int
    kv_blocks: int
    rounds: int
    step_tokens: int = 8192


@dataclass(slots=True)
class Walk:
    """steps: all that were taken. first_token, each_token: the mean share of each step in the time to a request's
    first token, and to each further one, by the step's index.
    """

    steps: list[StepWork] = field(default_factory=list)
    first_token: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    each_token: dict[int, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(slots=True)
class _Visit:
    """The steps at which a request came, got its first token, and was done; each is how many steps had ended."""

    came: int
    first: int = -1
    done: int = -1


def walk(loop: Loop, roofline: Roofline) -> Walk:
    """Play ``loop``. roofline: any, to tell steps in numbers."""
    pool = BlockPool(loop.kv_blocks, BLOCK_SIZE)
    config = SchedulerConfig(prefill_chunk=1024, max_step_tokens=loop.step_tokens, max_running=256)
    scheduler = Scheduler(PrefixCache(pool, alignment=BLOCK_SIZE, enabled=False), config)
    visits: list[_Visit] = []
    found = Walk()

    def ask() -> None:
        request = Request(
            request_id=str(len(visits)), arrival_time=0, prompt_tokens=loop.prompt, output_tokens=loop.answer,
            max_output_tokens=loop.answer, content=Content(),
        )  # fmt: skip
        visits.append(_Visit(came=len(found.steps)))
        scheduler.add(Sequence(request.request_id, request.chain(ROOT, BLOCK_SIZE), loop.answer))

    for _ in range(loop.clients):
        ask()
    requests = loop.clients * loop.rounds
    while scheduler.has_work:
        plan = scheduler.schedule()
        found.steps.append(roofline.work_of(plan))
        now = len(found.steps)
        for chunk in plan.prefills:
            visit = visits[int(chunk.sequence.request_id)]
            if chunk.samples and visit.first < 0:
                visit.first = now
        for sequence in scheduler.complete(plan, defaultdict(int)):
            visits[int(sequence.request_id)].done = now
            if len(visits) < requests:
                ask()
    each = 1 / requests
    for visit in visits:
        for step in range(visit.came, visit.first):
            found.first_token[step] += each
        for step in range(visit.first, visit.done):
            found.each_token[step] += each / (loop.answer - 1)
    return found

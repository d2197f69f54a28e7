"""The builder: a plan of small numbers, and workloads and set-ups that make one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from emberkv.sim.build import SimulatedSystem
from emberkv.sim.config import Rates, SimulationConfig, Targets, Workload
from emberkv.sim.plan import Plan, SetUpPoint, SimulationFigures, SizePoint
from emberkv.sim.plan_times import Demand
from emberkv.sim.summary import OfferedLoad
from tests.workload.build import workload

GIB = 2**30

SIZES = [SizePoint(GIB << power, 16 << power, (power + 1) / 10, min(0.3, (power + 1) / 5)) for power in range(3)]

ABOUT = SimulatedSystem(
    version="0", model="tiny", weights="bf16", hardware="card", devices=2, replicas=1, routing="random", kv_bytes=GIB,
    kv_blocks=16, block_size=16, defaults=(),
)  # fmt: skip

CHOSEN = SetUpPoint(
    2,
    "ram",
    2 * GIB,
    0.3,
    0.25,
    7.0,
    SimulationFigures(900, 0, 0.28, 0.4, 2.5, 0.02, 1.9, OfferedLoad(2.0, 1.9, 3, False, 2)),
)

PLAN = Plan(
    about=ABOUT,
    slo=Targets(),
    price_per_hour=None,
    get=CHOSEN,
    demand=Demand(1000, 2.0, 5.0, 600.0, 50.0, [(600, 50)]),
    simulated_requests=900,
    stop_at=None,
    content_known=True,
    eviction="lru",
    routing="consistent-hashing",
    error=None,
    block_size=16,
    block_bytes=GIB // 16,
    pool_bytes=GIB,
    unlimited=0.3,
    wanted=0.9,
    enough=3 * GIB + GIB // 2,
    recommended_size=SIZES[2],
    prefill_token=20e-6,
    load_token={"ram": 2e-6, "disk": 40e-6},
    sizes=SIZES,
    set_ups=[
        SetUpPoint(2, None, 0, 0.2, 0.5, 6.0),
        CHOSEN,
        SetUpPoint(3, None, 0, 0.25, 0.45, 9.0),
    ],
)


def plan(**changes: Any) -> Plan:
    return replace(PLAN, **changes)


def chats(sessions: int = 60) -> Workload:
    """Conversations that begin twice a second, of three turns, 120 tokens asked and 30 answered each."""
    return Workload(workload(sessions=sessions, client={"message": 120, "output": 30}), None, Path())


def rates(**changes: Any) -> SimulationConfig:
    """A machine without lower tiers: a millisecond for each token, 64 blocks of 16 tokens, of a KiB a token."""
    config = {
        "rates": Rates(per_prefill_token=1e-3, per_decode_token=1e-3, kv_bytes_per_token=1024), "kv_blocks": 64,
        "block_size": 16, **changes,
    }  # fmt: skip
    return SimulationConfig(**config)

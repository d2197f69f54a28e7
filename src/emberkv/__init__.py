"""emberkv keeps the attention state of every prompt warm, and proves that what it reuses is right."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emberkv.tiers.byte_cache import InMemoryKVCacheManager

if TYPE_CHECKING:
    from emberkv.engine.request import Constraint, SamplingParams
    from emberkv.engine.warmup import get_standard_system_prompt, warmup_kv_cache
    from emberkv.llm import LLM
    from emberkv.sim.planner import plan
    from emberkv.sim.run import simulate

__all__ = [
    "LLM",
    "Constraint",
    "InMemoryKVCacheManager",
    "SamplingParams",
    "__version__",
    "get_standard_system_prompt",
    "plan",
    "simulate",
    "warmup_kv_cache",
]

__version__ = "0.1.0"

_ON_DEMAND = {
    "Constraint": "emberkv.engine.request",
    "LLM": "emberkv.llm",
    "SamplingParams": "emberkv.engine.request",
    "get_standard_system_prompt": "emberkv.engine.warmup",
    "plan": "emberkv.sim.planner",
    "simulate": "emberkv.sim.run",
    "warmup_kv_cache": "emberkv.engine.warmup",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ON_DEMAND[name]), name)

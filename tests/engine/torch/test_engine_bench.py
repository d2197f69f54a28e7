"""A tiny model on the measuring bench: everything is measured, and nothing is left running."""

import threading

import pytest
import torch

from emberkv.engine.assembly import EngineConfig
from emberkv.engine.torch.assembly import ModelOptions
from emberkv.engine.torch.calibration import LINEAR_ROWS, EngineBench, prefill_grid
from emberkv.tiers.memory import MemoryTier
from tests.conftest import CheckpointFactory
from tests.machine import MACHINE_CACHE
from tests.models import CONTEXT


@pytest.mark.parametrize(("chunk", "budget"), [(64, 128), (32, 32)])
def test_a_model_is_measured_as_a_server_would_run_it(checkpoint: CheckpointFactory, chunk: int, budget: int) -> None:
    options = ModelOptions(model=str(checkpoint("llama")), device="cpu", machine_cache=MACHINE_CACHE)
    config = EngineConfig(2**26, options.block_size, chunk, max_step_tokens=budget)
    progress_lines: list[str] = []
    others = threading.enumerate()
    bench = EngineBench(options, config, progress_lines.append)
    assert [each.rows for each in bench.linears] == list(LINEAR_ROWS)
    assert (bench.device, bench.memory > 0) == (torch.device("cpu"), True)
    prefills = bench.prefills(1, progress_lines.append)
    assert list(prefills) == list(prefill_grid(CONTEXT, bench.alignment, budget))
    assert min(prefills.values()) > 0
    assert progress_lines[-2:] == ["matrix products", "first tokens, round 1 of 1"]
    tier = MemoryTier(2**26)
    assert min(bench.tier(tier)) > 0
    assert tier.stats().entries == 0
    started = [thread.name for thread in threading.enumerate() if thread not in others]
    assert not [name for name in started if "emberkv" in name]

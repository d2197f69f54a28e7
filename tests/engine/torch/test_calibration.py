"""What is measured is what was asked for; how fast this machine is does not matter here."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from emberkv.core.sequence import FinishReason
from emberkv.engine.torch.calibration import (
    LINEAR_ROWS,
    PrefillBench,
    device_memory,
    prefill_grid,
    time_linears,
    time_tier,
)
from emberkv.errors import EmberError
from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.memory import MemoryTier
from tests.engine.loop_harness import VOCAB, FakeExecutor, Harness, running


class Ticks:
    """A clock that goes on by a second each time that it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Counting(nn.Linear):
    def __init__(self, seen: Counter[int]) -> None:
        super().__init__(3, 5, dtype=torch.bfloat16)
        self.seen = seen

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen[inputs.shape[0]] += 1
        return super().forward(inputs)


def test_every_linear_layer_is_run_with_every_number_of_rows() -> None:
    seen = Counter[int]()
    model = nn.Sequential(Counting(seen), nn.Tanh(), Counting(seen))
    found = time_linears(model, clock=Ticks(), repeats=3)
    assert [each.rows for each in found] == list(LINEAR_ROWS)
    assert seen == dict.fromkeys(LINEAR_ROWS, 2 * (3 + 1))
    assert {each.seconds for each in found} == {1.0}


def test_prefills_find_what_they_should_cached_and_compute_the_rest() -> None:
    executor = FakeExecutor()
    with running(Harness(executor)) as harness:
        bench = PrefillBench(harness.loop, VOCAB)
        assert bench.prefill(16, 24, repeats=3) > 0
        assert harness.scheduler.stats.hit_tokens == (1 + 3) * 16
    assert sorted(executor.prefilled.values()) == [8, 8, 8, 8, 17]


def test_an_answer_that_fails_is_no_measurement() -> None:
    broken = FakeExecutor(scores=lambda sequence: float("nan"))
    with running(Harness(broken)) as harness, pytest.raises(EmberError, match=str(FinishReason.ERROR)):
        PrefillBench(harness.loop, VOCAB).prefill(0, 8)


def test_prefills_to_measure_fit_a_step_and_the_context() -> None:
    assert list(prefill_grid(700, 32, 128)) == [(0, 32), (0, 64), (0, 128), (512, 544), (512, 576), (512, 640)]
    assert list(prefill_grid(700, 128, 128)) == [(0, 128)] * 3 + [(512, 640)] * 3


def test_a_tier_is_measured_and_left_empty(tmp_path: Path) -> None:
    disk = DiskTier.open(tmp_path / "blocks", 2**20, namespace=b"n")
    for tier in (MemoryTier(2**20), disk):
        found = time_tier(tier, 1000, 16, blocks=8, clock=Ticks())
        assert found == (1.0, 8000.0, 8000.0)
        assert tier.stats().entries == 0
        tier.close()


def test_a_tier_that_is_too_small_is_told() -> None:
    with pytest.raises(EmberError, match="ram tier lost a block"):
        time_tier(MemoryTier(3000), 1000, 16, blocks=8)


def test_memory_is_the_machine_s() -> None:
    assert device_memory(torch.device("cpu")) > 2**28

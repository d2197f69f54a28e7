"""The kernels' threads change no bit, sleep between calls, end with the thread that called, and outlive a fork."""

import multiprocessing
import random
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.native.layers import NativeGatedPair, NativeLinear
from tests.waiting import DEADLINE

SIZE, INNER, ROWS = 192, 320, 40
NAME = "emberkv-kernels"


class Network:
    """A gated pair and a layer behind it, each computed by so many threads of the kernels."""

    def __init__(self, kernels: Kernels) -> None:
        generator = torch.Generator().manual_seed(0)
        first, second, third = (torch.randn(INNER, SIZE, generator=generator) for _ in range(3))
        self.pair = NativeGatedPair(kernels, first, second, 1)
        self.back = NativeLinear(kernels, third.t().contiguous(), None)
        self.inputs = torch.randn(ROWS, SIZE, generator=generator)

    def __call__(self, rows: slice, threads: int) -> Tensor:
        self.pair.call.threads = self.back.call.threads = threads
        out: Tensor = self.back(self.pair(self.inputs[rows]))
        return out


def team_threads() -> dict[str, str]:
    """State of each thread of this process's teams, by its id."""
    states = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            if (task / "comm").read_text().strip() == NAME:
                states[task.name] = (task / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since
    return states


def asleep(known: AbstractSet[str]) -> int:
    """Threads of the teams that are not known yet, if all of them sleep; else 0. They have their name once they run."""
    states = [state for task, state in team_threads().items() if task not in known]
    return len(states) if set(states) == {"S"} else 0


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def differing(network: Network, expected: Tensor, calls: int, seed: int, counts: list[int]) -> int:
    """Of so many calls, those whose bits are not the expected ones."""
    rng = random.Random(seed)
    wrong = 0
    for _ in range(calls):
        first = rng.randrange(ROWS)
        rows = slice(first, rng.randrange(first, ROWS) + 1)
        wrong += not torch.equal(network(rows, rng.choice(counts)), expected[rows])
    return wrong


def test_many_calls_by_more_threads_than_cores_have_the_bits_of_one(kernels: Kernels) -> None:
    expected = Network(kernels)(slice(None), 1)
    with ThreadPoolExecutor(3) as leaders:
        runs = [
            leaders.submit(differing, Network(kernels), expected, 400, seed, counts)
            for seed, counts in enumerate([[7], [7], [1, 3, 7]])
        ]
        assert [run.result() for run in runs] == [0, 0, 0]


def test_threads_sleep_between_calls_and_end_with_the_caller(kernels: Kernels) -> None:
    network = Network(kernels)
    before = team_threads()
    with ThreadPoolExecutor(1) as leader:
        for _ in range(2):
            leader.submit(network, slice(None), 4).result()
            assert eventually(lambda: asleep(before.keys()) == 3)
    assert eventually(lambda: team_threads().keys() <= before.keys())


def check_in_child(network: Network, expected: Tensor) -> None:
    assert not team_threads()
    assert differing(network, expected, 50, 0, [3]) == 0
    assert eventually(lambda: asleep(frozenset()) == 2)


def test_a_forked_process_has_threads_of_its_own(kernels: Kernels) -> None:
    network = Network(kernels)
    expected = network(slice(None), 3)
    child = multiprocessing.get_context("fork").Process(target=check_in_child, args=(network, expected))
    child.start()
    child.join(DEADLINE)
    assert child.exitcode == 0
    assert torch.equal(network(slice(None), 3), expected)

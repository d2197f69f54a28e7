"""The byte cache in host memory: reads, writes, a mix, metadata, and ten threads at once.

    python -m benchmarks.ram_cache [--quick] [--policy lru] [--rounds 5] [--out PREFIX]

A value is stored and returned by reference, never copied, so the figures are the cache's own work. Rates include the
loop around the calls; latencies include reading the timer. Exits with 1 when a target is missed.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TypeVar

from benchmarks import report
from benchmarks.figures import Figure, Row

from emberkv import InMemoryKVCacheManager
from emberkv.core.eviction import POLICY_NAMES
from emberkv.tiers.byte_cache import MB

T = TypeVar("T")
Work = tuple[Callable[[str], object], Iterator[str]]
"""A call, and the keys to make it with."""

THREADS = 10
BURST = 1000
PERCENTILES = (50, 95, 99)
GETS_PER_SECOND = {1: 1_000_000, THREADS: 500_000}
GET_P99_US = 50.0


@dataclass(frozen=True, slots=True)
class Effort:
    """seconds: of each rate. calls: timed one by one on each thread, for latencies."""

    seconds: float
    calls: int


@dataclass(frozen=True, slots=True)
class Load:
    """A number of values, of so many MB (2**20 bytes) each, that just fill the cache."""

    value_mb: int
    count: int


LOADS = (Load(value_mb=1, count=64), Load(value_mb=50, count=8))


class Stage:
    """A full cache, and the work to give it. Each work is for one thread."""

    def __init__(self, load: Load, policy: str) -> None:
        values = [bytes([index]) * (load.value_mb * MB) for index in range(load.count)]
        self._values = {f"prefix:{index}": values[index % load.count] for index in range(2 * load.count)}
        names = list(self._values)
        self._resident, absent = names[: load.count], names[load.count :]
        self._turns = cycle(absent + self._resident)
        self.cache = InMemoryKVCacheManager(load.count * load.value_mb + 0.5, policy)
        for name in self._resident:
            self.cache.set(name, self._values[name])

    def get(self) -> Work:
        return self.cache.get, cycle(self._resident)

    def metadata(self) -> Work:
        return self.cache.get_metadata, cycle(self._resident)

    def mix(self) -> Work:
        """Four gets, then a set that replaces; co-prime to the number of keys, so that each is set in its turn."""
        cache, values, is_set = self.cache, self._values, cycle((False, False, False, False, True))
        return lambda key: cache.set(key, values[key]) if next(is_set) else cache.get(key), cycle(self._resident)

    def evicting_set(self) -> Work:
        """Sets of what is not there, so that each has to evict one."""
        cache, values = self.cache, self._values
        return lambda key: cache.set(key, values[key]), self._turns


def calls_per_second(works: Sequence[Work], seconds: float) -> float:
    """In total, each work on a thread of its own, from the first call to the last."""

    def spin(work: Work) -> tuple[int, float, float]:
        call, keys = work
        count, begin = 0, time.perf_counter()
        end = begin
        while not count or end - begin < seconds:
            for key in islice(keys, BURST):
                call(key)
            count += BURST
            end = time.perf_counter()
        return count, begin, end

    runs = together(spin, works)
    return sum(count for count, _, _ in runs) / (max(end for *_, end in runs) - min(begin for _, begin, _ in runs))


def percentiles_us(works: Sequence[Work], calls: int) -> dict[int, float]:
    """Microseconds of a call at each of PERCENTILES, over ``calls`` by each work on a thread of its own."""

    def time_each(work: Work) -> list[int]:
        call, keys = work
        clock, taken = time.perf_counter_ns, []
        for key in islice(keys, calls):
            begin = clock()
            call(key)
            taken.append(clock() - begin)
        return taken

    cuts = statistics.quantiles([each for taken in together(time_each, works) for each in taken], n=100)
    return {percent: cuts[percent - 1] / 1e3 for percent in PERCENTILES}


def together(task: Callable[[Work], T], works: Sequence[Work]) -> list[T]:
    """What ``task`` returns for each work, all started at once."""
    barrier = threading.Barrier(len(works))

    def start(work: Work) -> T:
        barrier.wait()
        return task(work)

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(start, works))


def one_round(load: Load, policy: str, effort: Effort) -> dict[tuple[str, int], tuple[float, dict[int, float]]]:
    """Calls a second and percentiles, by operation and number of threads."""
    stage = Stage(load, policy)
    found: dict[tuple[str, int], tuple[float, dict[int, float]]] = {}

    def measure(name: str, make: Callable[[], Work], threads: int = 1) -> None:
        rate = calls_per_second([make() for _ in range(threads)], effort.seconds)
        found[name, threads] = rate, percentiles_us([make() for _ in range(threads)], effort.calls)

    measure("get", stage.get)
    measure("metadata", stage.metadata)
    measure("80% get, 20% set", stage.mix)
    measure("get", stage.get, THREADS)
    measure("80% get, 20% set", stage.mix, THREADS)
    stats = stage.cache.get_stats()
    assert (stats["cache_misses"], stats["evictions"], stats["total_entries"]) == (0, 0, load.count)
    measure("set, evicting", stage.evicting_set)
    stats = stage.cache.get_stats()
    assert stats["evictions"] > effort.calls
    assert stats["total_entries"] == load.count
    return found


def measure_load(load: Load, policy: str, rounds: int, effort: Effort) -> list[Row]:
    taken = [one_round(load, policy, effort) for _ in range(rounds)]
    rows: list[Row] = []
    for name, threads in taken[0]:
        results = [each[name, threads] for each in taken]
        title = f"{load.value_mb} MB values: {name}, {threads} thread{'s' if threads > 1 else ''}"
        is_get = name == "get"
        target = GETS_PER_SECOND[threads] if is_get else None
        rows.append(Figure(title, "calls/s", [rate for rate, _ in results], target, at_least=True))
        for percent in PERCENTILES:
            values = [percentiles[percent] for _, percentiles in results]
            bound = GET_P99_US if is_get and percent == 99 else None
            rows.append(Figure(f"{title}, p{percent}", "µs", values, bound))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=POLICY_NAMES, default="lru")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--out", "--json", type=Path, help="writes PREFIX.json and PREFIX.md")
    given = parser.parse_args()
    rounds, effort = (1, Effort(0.05, 5_000)) if given.quick else (given.rounds, Effort(0.5, 100_000))
    about = report.about("benchmarks.ram_cache", __doc__, policy=given.policy, rounds=rounds, threads=THREADS)
    rows = [row for load in LOADS for row in measure_load(load, given.policy, rounds, effort)]
    return report.publish(rows, about, given.out)


if __name__ == "__main__":
    sys.exit(main())

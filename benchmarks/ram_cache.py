"""The byte cache in host memory: reads, writes, a mix, metadata, ten threads at once, and the disk tier beside it.

    python -m benchmarks.ram_cache [--quick] [--policy lru] [--rounds 5] [--folder FOLDER] [--out PREFIX]

A value is stored and returned by reference, never copied, so the figures are the cache's own work. Rates include the
loop around the calls; latencies include reading the timer. The disk tier reads 1 MB blocks from the page cache, and
cold: dropped from it before each read. Through the stack, a block is also verified. Exits with 1 when a target is
missed.
"""

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

from benchmarks import arguments, report
from benchmarks.disk_reads import Shelf, shelf
from benchmarks.figures import Comparison, Figure, Row

from emberkv import InMemoryKVCacheManager
from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.tiers.byte_cache import MB

T = TypeVar("T")
Work = tuple[Callable[[str], object], Iterator[str]]
"""A call, and the keys to make it with."""

THREADS = 10
BURST = 1000
PERCENTILES = (50, 95, 99)
GETS_PER_SECOND = {1: 1_000_000, THREADS: 500_000}
GET_P99_US = 50.0
DISK_OVER_RAM = 50.0
"""How many times as long as a get of the RAM cache a read by the disk tier must take, for the former to be worth it."""


@dataclass(frozen=True, slots=True)
class Effort:
    """seconds: of each rate. calls: timed one by one on each thread, for latencies; disk_calls: likewise, of reads."""

    seconds: float
    calls: int
    disk_calls: int = 500


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


def percentiles_of(taken: Sequence[float]) -> dict[int, float]:
    cuts = statistics.quantiles(taken, n=100)
    return {percent: cuts[percent - 1] for percent in PERCENTILES}


def measure_disk(folder: Path | None, policy: str, rounds: int, effort: Effort) -> list[Row]:
    """Reads of 1 MB from disk against gets of 1 MB, taken in turn."""
    ways: dict[str, Callable[[Shelf, int], list[float]]] = {
        "read by the disk tier, page cache": lambda shelf, calls: shelf.loads(calls, cold=False),
        "read by the disk tier, cold": lambda shelf, calls: shelf.loads(calls, cold=True),
        "verified through the stack, RAM tier": lambda shelf, calls: shelf.fetches("ram", calls),
        "verified through the stack, disk tier, page cache": lambda shelf, calls: shelf.fetches("disk", calls),
        "verified through the stack, disk tier, cold": lambda shelf, calls: shelf.fetches("disk", calls, cold=True),
    }
    taken: dict[str, list[dict[int, float]]] = {way: [] for way in ways}
    gets = []
    with shelf(folder) as prepared:
        for _ in range(rounds):
            stage = Stage(LOADS[0], policy)
            gets.append(percentiles_us([stage.get()], effort.calls))
            for way, read in ways.items():
                taken[way].append(percentiles_of(read(prepared, effort.disk_calls)))
    rows: list[Row] = []
    for way, found in taken.items():
        for percent in PERCENTILES:
            name = f"1 MB values: {way}, p{percent}"
            target = DISK_OVER_RAM if way.startswith("read") and percent == 50 else None
            sides = [each[percent] for each in found], [each[percent] for each in gets]
            rows.append(Comparison(name, "µs", "block", sides[0], "get", sides[1], target, at_least=True))
    return rows


def main() -> int:
    parser = arguments.parser(__doc__, rounds=5)
    parser.add_argument("--policy", choices=POLICY_NAMES, default="lru")
    parser.add_argument(
        "--folder", type=Path, help="where the disk tier's folder is made; default: for temporary files"
    )
    parser.add_argument("--quick", action="store_true", help="one short round")
    given = parser.parse_args()
    rounds, effort = (1, Effort(0.05, 5_000, 100)) if given.quick else (given.rounds, Effort(0.5, 100_000))
    about = report.about("benchmarks.ram_cache", __doc__, policy=given.policy, rounds=rounds, threads=THREADS)
    rows = [row for load in LOADS for row in measure_load(load, given.policy, rounds, effort)]
    rows += measure_disk(given.folder, given.policy, rounds, effort)
    return report.publish(rows, about, given.out)


if __name__ == "__main__":
    sys.exit(main())

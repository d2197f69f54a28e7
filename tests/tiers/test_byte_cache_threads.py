"""The byte cache under many threads: nothing torn, nothing over the limit, and statistics exact to the last read."""

import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import pytest

from emberkv import InMemoryKVCacheManager
from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.tiers.byte_cache import MB
from tests.waiting import DEADLINE

T = TypeVar("T")

THREADS = 20


@pytest.fixture(autouse=True)
def _eager_switching() -> Iterator[None]:
    """Threads take turns as often as the interpreter lets them, so that races have many chances to show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(tasks: list[Callable[[], T]]) -> list[T]:
    """What the tasks return, all started at once, each on a thread of its own."""
    barrier = threading.Barrier(len(tasks))

    def start(task: Callable[[], T]) -> T:
        barrier.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(start, tasks))


def on_threads(task: Callable[[int], T]) -> list[T]:
    return together([partial(task, number) for number in range(THREADS)])


def sizes(cache: InMemoryKVCacheManager, keys: Iterable[str]) -> list[int]:
    """Bytes of those entries that are there."""
    found = [cache.get_metadata(key) for key in keys]
    return [each["entry_size_bytes"] for each in found if each]


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_read_write_and_eviction_is_counted_once(policy: str) -> None:
    """Keys are unique, so that each set ends as an eviction, a delete or an entry that is still there."""
    cache = InMemoryKVCacheManager(2000 / MB, policy)

    def work(number: int) -> Counter[str]:
        rng = random.Random(number)
        tally: Counter[str] = Counter()
        for turn in range(200):
            cache.set(f"{number}:{turn}", bytes(rng.randrange(40)))
            for _ in range(5):
                found = cache.get(f"{rng.randrange(THREADS)}:{rng.randrange(turn + 1)}")
                tally["misses" if found is None else "hits"] += 1
            if rng.random() < 0.3:
                tally["deletes"] += cache.delete(f"{number}:{rng.randrange(turn + 1)}")
        return tally

    tally = sum(on_threads(work), Counter())
    stats = cache.get_stats()
    left = sizes(cache, (f"{number}:{turn}" for number in range(THREADS) for turn in range(200)))
    assert (stats["cache_hits"], stats["cache_misses"]) == (tally["hits"], tally["misses"])
    assert min(tally["hits"], tally["misses"], tally["deletes"], stats["evictions"]) > 0
    assert stats["total_entries"] == len(left)
    assert stats["evictions"] + tally["deletes"] + len(left) == THREADS * 200
    assert round(stats["memory_used_mb"] * MB) == sum(left) <= 2000


def test_each_entry_counts_all_its_accesses() -> None:
    cache = InMemoryKVCacheManager(1)
    for key in "abcd":
        cache.set(key, b"value")

    def work(number: int) -> Counter[str]:
        keys = random.Random(number).choices("abcd", k=10_003)
        assert all(cache.get(key) == b"value" for key in keys)
        return Counter(keys)

    tally = sum(on_threads(work), Counter())
    counted = {key: metadata["access_count"] for key in "abcd" if (metadata := cache.get_metadata(key))}
    assert counted == tally
    assert cache.get_stats()["cache_hits"] == THREADS * 10_003


def test_an_entry_that_is_overwritten_is_there_all_the_time_and_whole() -> None:
    cache = InMemoryKVCacheManager(300 / MB)
    cache.set("key", b"")

    def write(number: int) -> None:
        for turn in range(1000):
            cache.set("key", bytes([number]) * (turn % 100))

    def read(number: int) -> None:
        for _ in range(5000):
            value = cache.get("key")
            assert value is not None
            assert len(set(value)) <= 1

    on_threads(lambda number: (write if number % 2 else read)(number))
    stats = cache.get_stats()
    assert (stats["cache_hits"], stats["cache_misses"], stats["total_entries"]) == (THREADS // 2 * 5000, 0, 1)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_the_limit_holds_and_the_books_balance_whatever_happens_at_once(policy: str) -> None:
    cache = InMemoryKVCacheManager(500 / MB, policy)
    keys = [f"key:{index}" for index in range(30)]

    def work(number: int) -> None:
        rng = random.Random(number)
        for turn in range(300):
            key = rng.choice(keys)
            if turn % 100 == 99:
                cache.clear()
            elif rng.random() < 0.1:
                cache.delete(key)
            elif rng.random() < 0.5:
                cache.set(key, bytes(rng.randrange(120)))
            else:
                cache.get(key)
            stats = cache.get_stats()
            assert 0 <= stats["memory_used_mb"] * MB <= 500
            assert stats["memory_used_mb"] == stats["key_memory_mb"] + stats["value_memory_mb"]

    on_threads(work)
    stats, left = cache.get_stats(), sizes(cache, keys)
    assert stats["total_entries"] == len(left)
    assert round(stats["memory_used_mb"] * MB) == sum(left)
    cache.clear()
    assert cache.get_stats() == InMemoryKVCacheManager(1).get_stats()


def test_reads_do_not_wait_for_a_set_and_are_counted_and_recent_all_the_same() -> None:
    evicting, may_go_on = threading.Event(), threading.Event()

    def clock() -> float:
        if threading.current_thread().name == "setting":
            evicting.set()
            assert may_go_on.wait(DEADLINE)
        return 0.0

    cache = InMemoryKVCacheManager(4 / MB, clock=clock)
    for key in "abcd":
        cache.set(key, b"")
    setting = threading.Thread(target=cache.set, args=("e", b""), name="setting")
    setting.start()
    assert evicting.wait(DEADLINE)
    assert [cache.get("b") for _ in range(1000)] == [b""] * 1000
    assert cache.get("?") is None
    may_go_on.set()
    setting.join(DEADLINE)
    cache.set("f", b"")
    assert [key for key in "abcdef" if cache.get_metadata(key)] == ["b", "d", "e", "f"]
    assert (cache.get_stats()["cache_hits"], cache.get_stats()["cache_misses"]) == (1000, 1)

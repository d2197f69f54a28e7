"""The benchmarks of the RAM cache and of the disk tier do the work that they report, on a small scale."""

import itertools
from pathlib import Path

import pytest
from benchmarks import disk_open, disk_reads
from benchmarks.ram_cache import THREADS, Effort, Load, Stage, measure_disk, measure_load, percentiles_us

from emberkv.core.policies.eviction import POLICY_NAMES


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_each_evicting_set_evicts_one(policy: str) -> None:
    stage = Stage(Load(value_mb=1, count=2), policy)
    call, keys = stage.evicting_set()
    for key in itertools.islice(keys, 2):
        call(key)
    assert stage.cache.get_stats()["evictions"] == 2


def test_the_mix_reads_four_times_for_each_set_of_what_is_there() -> None:
    stage = Stage(Load(value_mb=1, count=2), "lru")
    call, keys = stage.mix()
    for key in itertools.islice(keys, 50):
        call(key)
    stats = stage.cache.get_stats()
    assert (stats["cache_hits"], stats["cache_misses"], stats["evictions"]) == (40, 0, 0)


def test_every_thread_makes_its_calls() -> None:
    stage = Stage(Load(value_mb=1, count=2), "lru")
    found = percentiles_us([stage.get() for _ in range(THREADS)], calls=100)
    assert stage.cache.get_stats()["cache_hits"] == THREADS * 100
    assert 0 < found[50] <= found[95] <= found[99]


def test_every_case_gets_its_rows() -> None:
    rows = measure_load(Load(value_mb=1, count=2), "lru", 2, Effort(seconds=0.0, calls=20))
    assert len(rows) == 6 * 4
    assert sum(row.met is not None for row in rows) == 4


def test_the_shelf_reads_what_it_stored_and_leaves_nothing(tmp_path: Path) -> None:
    with disk_reads.shelf(tmp_path) as shelf:
        assert len(shelf.loads(70, cold=True)) == 70
        assert len(shelf.fetches("ram", 3)) == len(shelf.fetches("disk", 3)) == 3
        assert shelf.disk.stats().entries == disk_reads.VALUES
        assert not shelf.disk.stats().errors
    assert list(tmp_path.iterdir()) == []


def test_the_disk_tier_is_measured_against_the_same_run_s_gets(tmp_path: Path) -> None:
    rows = measure_disk(tmp_path, "lru", 1, Effort(seconds=0.0, calls=20, disk_calls=4))
    assert len(rows) == 5 * 3
    assert sum(row.met is not None for row in rows) == 2


def test_every_opening_finds_all_blocks(tmp_path: Path) -> None:
    figure = disk_open.measure(tmp_path, blocks=50, rounds=2)
    assert len(figure.values) == 2
    assert figure.met is None
    assert list(tmp_path.iterdir()) == []

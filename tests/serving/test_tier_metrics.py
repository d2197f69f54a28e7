"""The tiers' figures as Prometheus reads them, to the value."""

from dataclasses import replace

from prometheus_client import CollectorRegistry

from emberkv.engine.request import EngineStats
from emberkv.serving.metrics import TierCollector
from emberkv.tiers.breaker import Circuit
from emberkv.tiers.stats import BOUNDS, Latencies, StackStats, TierStats

LATENCIES = Latencies((1, 0, 2) + (0,) * (len(BOUNDS) - 3) + (4,), seconds=99.5)
DISK = TierStats(
    entries=11,
    bytes=9000,
    max_bytes=10_000,
    evictions=6,
    skipped={"disk full": 3, "no room": 1},
    errors={"vanished": 2},
    hits=20,
    misses=8,
    loads=19,
    stores=17,
    corrupt={"bytes changed": 1},
    load_latency=LATENCIES,
    store_latency=Latencies(),
    lookup_latency=Latencies((3,) + (0,) * len(BOUNDS), seconds=0.25),
)
STATS = EngineStats(
    block_size=16,
    prefix_query_tokens=1000,
    prefix_hit_tokens=700,
    tier_hit_tokens={"disk": 192, "ram": 64},
    loads=1,
    load_choices={"shared": 5, "load": 7},
    loaded_blocks=16,
    unloaded_blocks=3,
    exported_blocks=21,
    imported_blocks=13,
    refused_imports={"wrong namespace": 2},
    transfer_errors={"timeout": 3},
    tiers={"ram": TierStats(hits=4, misses=28), "disk": DISK},
    stack=StackStats(offered=30, already_stored=9, queue_full=2, queue_bytes=512, failures={"OSError": 1}),
)


def registry(stats: EngineStats | None) -> CollectorRegistry:
    made = CollectorRegistry()
    made.register(TierCollector(lambda: stats))
    return made


def check(expected: dict[tuple[str, str], float], *labels: str) -> None:
    """Each key is a name and its labels' values, separated by commas."""
    read = registry(STATS)
    found = {
        (name, values): read.get_sample_value(f"emberkv_{name}", dict(zip(labels, values.split(","), strict=True)))
        for name, values in expected
    }
    assert found == expected


def test_a_tier_is_asked_for_what_no_faster_one_has_and_the_pool_is_the_first() -> None:
    expected = {
        "hit_tokens": (444, 64, 320),
        "miss_tokens": (556, 448, 128),
        "reused_tokens": (444, 64, 192),
    }
    places = "pool", "ram", "disk"
    samples = {name: zip(places, values, strict=True) for name, values in expected.items()}
    check({(f"tier_{name}_total", tier): value for name, found in samples.items() for tier, value in found}, "tier")


def test_what_a_tier_holds_and_moves() -> None:
    expected: dict[tuple[str, str], float] = {
        ("tier_blocks", "disk"): 11,
        ("tier_bytes", "disk"): 9000,
        ("tier_max_bytes", "disk"): 10_000,
        ("tier_loads_total", "disk"): 19,
        ("tier_stores_total", "disk"): 17,
        ("tier_evictions_total", "disk"): 6,
        ("tier_evictions_total", "ram"): 0,
    }
    check(expected, "tier")


def test_what_went_wrong_is_told_by_kind() -> None:
    check({("tier_skipped_total", "disk,disk_full"): 3, ("tier_skipped_total", "disk,no_room"): 1}, "tier", "reason")
    check({("tier_corrupt_total", "disk,bytes_changed"): 1}, "tier", "fault")
    check({("tier_errors_total", "disk,vanished"): 2}, "tier", "kind")
    check({("transfer_errors_total", "timeout"): 3}, "kind")


def test_blocks_between_engines_are_counted() -> None:
    check({("transferred_blocks_total", "exported"): 21, ("transferred_blocks_total", "imported"): 13}, "direction")
    check({("refused_imports_total", "wrong_namespace"): 2}, "fault")


def test_latencies_are_cumulative_histograms() -> None:
    read = registry(STATS)
    counts = [
        read.get_sample_value("emberkv_tier_load_seconds_bucket", {"tier": "disk", "le": bound})
        for bound in ("0.0001", "0.00025", "0.0005", "10.0", "+Inf")
    ]
    assert counts == [1, 1, 3, 3, 7]
    assert read.get_sample_value("emberkv_tier_load_seconds_sum", {"tier": "disk"}) == 99.5
    assert read.get_sample_value("emberkv_tier_load_seconds_count", {"tier": "disk"}) == 7
    assert read.get_sample_value("emberkv_tier_store_seconds_count", {"tier": "disk"}) == 0
    assert read.get_sample_value("emberkv_tier_lookup_seconds_count", {"tier": "disk"}) == 3
    assert read.get_sample_value("emberkv_tier_lookup_seconds_sum", {"tier": "disk"}) == 0.25


def test_loads_avoided_are_those_that_were_shared() -> None:
    assert registry(STATS).get_sample_value("emberkv_loads_avoided_total") == 5
    assert registry(STATS).get_sample_value("emberkv_loads_running") == 1
    expected: dict[tuple[str, str], float] = {
        ("load_choices_total", "load"): 7,
        ("load_choices_total", "shared"): 5,
        ("load_choices_total", "recompute_cheaper"): 0,
        ("load_choices_total", "absent"): 0,
        ("load_choices_total", "alignment"): 0,
    }
    check(expected, "choice")
    check({("load_blocks_total", "arrived"): 16, ("load_blocks_total", "lost"): 3}, "outcome")


def test_the_way_down_is_told_whole() -> None:
    assert registry(STATS).get_sample_value("emberkv_tier_queue_bytes") == 512
    expected: dict[tuple[str, str], float] = {
        ("tier_offers_total", "stored_already"): 9,
        ("tier_offers_total", "queue_full"): 2,
        ("tier_offers_total", "queued"): 19,
    }
    check(expected, "outcome")
    check({("tier_failures_total", "OSError"): 1}, "error")


def test_without_tiers_there_is_the_pool_alone_and_before_an_engine_nothing() -> None:
    plain = registry(EngineStats(block_size=16, prefix_query_tokens=10, prefix_hit_tokens=4))
    assert plain.get_sample_value("emberkv_tier_hit_tokens_total", {"tier": "pool"}) == 4
    assert plain.get_sample_value("emberkv_tier_queue_bytes") is None
    assert list(registry(None).collect()) == []


def test_the_circuit_of_a_remote_tier_has_one_state_and_other_tiers_have_none() -> None:
    read = registry(replace(STATS, tiers={"ram": TierStats(), "remote": TierStats(circuit=Circuit.OPEN)}))
    states = {
        state: read.get_sample_value("emberkv_tier_circuit", {"tier": "remote", "state": state})
        for state in ("closed", "open", "half_open")
    }
    assert states == {"closed": 0, "open": 1, "half_open": 0}
    assert read.get_sample_value("emberkv_tier_circuit", {"tier": "ram", "state": "closed"}) is None

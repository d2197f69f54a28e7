"""Tiers have one id where they find the same blocks, and different ones where they do not."""

from itertools import combinations
from pathlib import Path

import pytest

from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.manager import TierManager
from emberkv.tiers.memory import MemoryTier
from emberkv.tiers.shm.tier import ShmTier
from emberkv.tiers.store_id import folder_id, master_id
from tests.tiers.build import NAMESPACE, OTHER


def test_a_master_is_known_by_host_and_port() -> None:
    assert master_id("mooncake://cache:50051", NAMESPACE) == master_id("mooncake://CACHE.:50051", NAMESPACE)
    different = ["mooncake://cache:50051", "mooncake://other:50051", "mooncake://cache:50052"]
    for one, other in combinations(different, 2):
        assert master_id(one, NAMESPACE) != master_id(other, NAMESPACE)
    assert master_id(different[0], NAMESPACE) != master_id(different[0], OTHER)


def test_a_master_on_loopback_is_one_of_this_machine_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loopback = ("127.0.0.1", "localhost", "[::1]", "localhost.", "ip6-localhost", "x.localhost", "0.0.0.0", "[::]")
    names = (*loopback, "host.docker.internal", "host.containers.internal", "cache", "cache.example")
    before = [master_id(f"mooncake://{name}:50051", NAMESPACE) for name in names]
    assert len(set(before)) == 5, "all names of loopback are one server"
    assert len(set(before[: len(loopback)])) == 1
    (boot := tmp_path / "boot_id").write_text("another machine")
    monkeypatch.setattr("emberkv.tiers.store_id._BOOT_ID", boot)
    after = [master_id(f"mooncake://{name}:50051", NAMESPACE) for name in names]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False] * (len(names) - 2) + [True] * 2


def test_a_folder_is_known_by_whatever_path_it_is_reached(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "one")
    assert folder_id(tmp_path / "link", NAMESPACE) == folder_id(tmp_path / "one", NAMESPACE)
    assert folder_id(tmp_path / "one", NAMESPACE) not in (
        None,
        folder_id(tmp_path / "other", NAMESPACE),
        folder_id(tmp_path / "one", OTHER),
        folder_id(tmp_path / "one", NAMESPACE, "within"),
    )
    assert folder_id(tmp_path / "none", NAMESPACE) is None


def test_the_manager_names_the_tiers_that_others_find_too(tmp_path: Path) -> None:
    def shared(namespace: bytes) -> dict[str, bytes]:
        tiers = [
            MemoryTier(2**20),
            ShmTier.open(2**20, namespace=namespace, folder=tmp_path),
            DiskTier.open(tmp_path, 2**20, namespace=namespace),
        ]
        manager = TierManager(tiers, namespace=namespace, queue_bytes=2**20, start=False)
        found = manager.shared()
        manager.close(0.0)
        assert all(store.is_listed for store in found.values())
        return {name: store.store_id for name, store in found.items()}

    first, second, other = shared(NAMESPACE), shared(NAMESPACE), shared(OTHER)
    assert list(first) == ["shm", "disk"]
    assert first == second
    assert len({*first.values(), *other.values()}) == 4

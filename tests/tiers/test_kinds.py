"""Tiers as data: what describes one, and that all code that names tiers takes the names from there."""

from pathlib import Path

import pytest

from emberkv import tiers
from emberkv.config import ServeConfig
from emberkv.core.policies.eviction import LRU
from emberkv.errors import ConfigError
from emberkv.serving.engine_setup import tier_specs
from emberkv.serving.tenancy import Shares
from emberkv.tiers.kinds import SHARED_OUT, TIER_KINDS, TierConfig, TierSpec, configured_tiers, open_tiers
from emberkv.tiers.manager import OffloadedBlock
from emberkv.tiers.remote.server import ServerAddress
from tests.tiers.build import NAMESPACE, records
from tests.waiting import DEADLINE


def test_the_settings_of_a_server_name_its_tiers_fastest_first(tmp_path: Path) -> None:
    both = configured_tiers(ram_bytes=2**20, folder=tmp_path, disk_bytes=2**30)
    assert both == (TierSpec("ram", 2**20), TierSpec("disk", 2**30, tmp_path))
    assert [str(tier) for tier in both] == ["1.0MiB of memory", f"1.0GiB in {tmp_path}"]
    assert [tier.option for tier in both] == ["--ram-tier", "--cache-disk"]
    assert configured_tiers(ram_bytes=0, folder=None, disk_bytes=2**30) == ()
    server = ServerAddress("redis://cache:6379", "a password")
    (remote,) = configured_tiers(ram_bytes=0, folder=None, disk_bytes=1, server=server, server_bytes=2**30)
    (shm,) = configured_tiers(ram_bytes=0, folder=None, disk_bytes=1, shm_bytes=2**20)
    assert (str(shm), shm.option) == ("1.0MiB of memory", "--shm-tier")
    assert (str(remote), remote.option) == ("1.0GiB in redis://cache:6379", "--remote-tier-bytes")
    assert "a password" not in repr(remote)


@pytest.mark.parametrize("kind", TIER_KINDS)
def test_every_kind_opens_a_tier_of_its_name_and_capacity(kind: str, tmp_path: Path) -> None:
    server = ServerAddress(f"unix://{tmp_path}/nowhere")
    tier = TierSpec(kind, 2**20, tmp_path, server).open(NAMESPACE, LRU)
    assert (tier.name, tier.stats().max_bytes) == (kind, 2**20)
    tier.close()


def test_the_remote_tier_s_password_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("geheim\n")
    given = {"remote_tier": "redis://cache", "remote_tier_bytes": "2MiB", "remote_tier_ttl": 60, "shm_tier": "1MiB"}
    config = ServeConfig.model_validate({**given, "remote_tier_password_file": tmp_path / "password"})
    server = ServerAddress("redis://cache", "geheim")
    assert tier_specs(config) == (
        TierSpec("shm", 2**20),
        TierSpec("remote", 2**21, server=server, ttl_seconds=60.0),
    )
    (tmp_path / "password").write_text("")
    with pytest.raises(ConfigError, match=r"--remote-tier-password-file .* holds no key"):
        tier_specs(config)


def test_blocks_that_are_larger_than_a_queue_are_stored(tmp_path: Path) -> None:
    size = 2**20
    blocks = records(4, payload_bytes=size)
    opened = open_tiers(
        TierConfig((TierSpec("ram", 2**23), TierSpec("disk", 2**23, tmp_path))), "lru", NAMESPACE,
        block_bytes=size, queue_bytes=size // 2,
    )  # fmt: skip
    assert opened is not None
    opened.offload([OffloadedBlock(each, "") for each in blocks])
    assert opened.close(DEADLINE)
    assert opened.stack_stats().queue_full == 0
    assert {name: tier.stores for name, tier in opened.stats().items()} == {"ram": 4, "disk": 4}


def test_an_unknown_kind_and_a_disk_without_a_folder_are_refused() -> None:
    with pytest.raises(ConfigError, match="a tier of kind 'tape' is unknown; use one of ram, shm, disk, remote"):
        TierSpec("tape", 1)
    with pytest.raises(ConfigError, match="has no folder"):
        TierSpec("disk", 1).open(NAMESPACE, LRU)
    with pytest.raises(ConfigError, match="has no server"):
        TierSpec("remote", 1).open(NAMESPACE, LRU)


def test_a_tenant_may_have_a_share_of_every_kind_of_tier() -> None:
    assert set(Shares.model_fields) == set(SHARED_OUT)


def test_the_package_exports_what_it_lists() -> None:
    assert sorted(tiers.__all__) == sorted(tiers._ON_DEMAND)
    for name in tiers.__all__:
        assert hasattr(tiers, name)
    with pytest.raises(AttributeError, match="has no attribute 'Tape'"):
        tiers.Tape  # noqa: B018 - the access is what is tested

"""What tests of the remote tier share: blocks, tiers on one server, and its return after a failure."""

import re
from collections.abc import Callable, Mapping
from threading import Event

import pytest

from emberkv.core.policies.fair_shares import Share
from emberkv.tiers.breaker import Circuit
from emberkv.tiers.manager import TierManager
from emberkv.tiers.remote import server as remote_server
from emberkv.tiers.remote.server import LONGEST_PAUSE, PREFIX
from emberkv.tiers.remote.tier import ENTRY_BYTES, RemoteTier
from emberkv.tiers.stats import TierStats
from tests.tiers.build import NAMESPACE, block_hashes, entries, records
from tests.tiers.harness import Clock
from tests.tiers.redis_process import RedisProcess
from tests.waiting import DEADLINE, eventually

BLOCKS = records(6)
ENTRIES = entries(BLOCKS)
IDS = block_hashes(BLOCKS)
LARGE = 10_000_000
SIZE = len(ENTRIES[0].data) + ENTRY_BYTES


def opened(
    server: RedisProcess,
    *,
    max_bytes: int = LARGE,
    ttl_seconds: float = 1000.0,
    shares: Mapping[str, Share] | None = None,
    prefix: bytes = PREFIX,
    clock: Callable[[], float] | None = None,
) -> RemoteTier:
    return RemoteTier(
        server.address, max_bytes, namespace=NAMESPACE, ttl_seconds=ttl_seconds, shares=shares, prefix=prefix,
        clock=clock or Clock(),
    ).connect()  # fmt: skip


def limit(monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
    """Tiers that are opened from now on have these limits in place of those of ``blocks.lua``."""
    script = remote_server.script()
    for name, value in limits.items():
        script, replaced = re.subn(rf"(?m)^local {name} = \d+$".encode(), f"local {name} = {value}".encode(), script)
        assert replaced == 1, name
    monkeypatch.setattr(remote_server, "script", lambda: script)


def comes_back(tier: RemoteTier, clock: Clock) -> None:
    """Probe until the server answers, with time that passes as fast as it is asked for."""

    def answers() -> bool:
        if tier.stats().circuit is not Circuit.CLOSED:
            clock.now += LONGEST_PAUSE
            tier.refresh()
        return tier.stats().circuit is Circuit.CLOSED

    eventually(answers)


def refreshed(tier: RemoteTier) -> TierStats:
    tier.refresh()
    return tier.stats()


def loaded(manager: TierManager) -> list[object]:
    asked, read = Event(), Event()
    found: list[object] = []
    manager.ask(IDS[:1], asked.set)
    assert asked.wait(DEADLINE)
    manager.onboard(IDS[:1], manager.find(IDS[:1]), lambda records: (found.extend(records), read.set()))
    assert read.wait(DEADLINE)
    return found

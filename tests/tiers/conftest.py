"""Fixtures of the tests that run against every tier."""

from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

import pytest

from emberkv.core.policies.eviction import LRU
from emberkv.core.policies.fair_shares import Share
from emberkv.tiers.base import PolicyFactory, Tier
from tests.tiers.contract import TIERS, MakeTier, Place, remote
from tests.tiers.redis_process import RedisProcess


@pytest.fixture(params=TIERS, ids=lambda tier: tier.__name__)
def make_tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeTier]:
    server = request.getfixturevalue("redis_server") if request.param is remote else None
    folders = (tmp_path / str(number) for number in count())
    made: list[Tier] = []

    def get(blocks: float = 10, policy: PolicyFactory = LRU, shares: Mapping[str, Share] | None = None) -> Tier:
        if request.param is remote and policy is not LRU:
            pytest.skip("the remote tier has one order: the least recently used block goes first")
        made.append(request.param(Place(next(folders), server), blocks, policy, shares or {}))
        return made[-1]

    yield get
    for tier in made:
        tier.close()


@pytest.fixture
def server(redis_server: RedisProcess) -> Iterator[RedisProcess]:
    """For a test that may do it harm; afterwards it runs, empty."""
    redis_server.client().flushall()
    yield redis_server
    redis_server.thaw()
    if not redis_server.answers():
        redis_server.start()
    redis_server.client().config_set("maxmemory", 0)
    redis_server.client().flushall()

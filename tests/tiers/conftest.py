"""Fixtures of the tests that run against every tier."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from emberkv.core.policies.eviction import LRU
from emberkv.tiers.base import PolicyFactory, Tier
from tests.tiers.contract import TIERS, MakeTier


@pytest.fixture(params=TIERS, ids=lambda tier: tier.__name__)
def make_tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeTier]:
    folders = (tmp_path / str(number) for number in count())
    made: list[Tier] = []

    def get(blocks: float = 10, policy: PolicyFactory = LRU) -> Tier:
        made.append(request.param(next(folders), blocks, policy))
        return made[-1]

    yield get
    for tier in made:
        tier.close()

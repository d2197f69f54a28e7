"""The published Mooncake trace, which several files of tests replay."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from emberkv.sim.curves import Access, LRUCurve


@pytest.fixture(scope="session")
def mooncake() -> "list[Access]":
    """What each request of its conversations uses. Tests must not change it."""
    from benchmarks.measured_elsewhere import MOONCAKE

    from emberkv.sim.curves import accesses
    from emberkv.workload.source import open_requests

    return list(accesses(open_requests(MOONCAKE), 512))


@pytest.fixture(scope="session")
def mooncake_curve(mooncake: "list[Access]") -> "LRUCurve":
    """Its hits by capacity, with the oldest blocks evicted first."""
    from emberkv.sim.curves import LRUCurve

    return LRUCurve(mooncake)

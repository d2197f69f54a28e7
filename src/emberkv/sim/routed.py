"""The post room between a router and its replicas: block events go one way, requests the other."""

from collections.abc import Sequence

from emberkv.cluster.routing import ReplicaState, Router
from emberkv.core.block_pool import BlockPool
from emberkv.core.hashing import Chain


class Routed:
    """Asks a router, and keeps its mirror of the pools as recent as they are. One replica alone needs no mirror."""

    def __init__(self, router: Router, states: Sequence[ReplicaState]) -> None:
        self._router = router
        self._states = states
        self._mirror = router.mirror if len(states) > 1 else None
        self._read = [0] * len(states)

    def choose(self, chain: Chain) -> int | None:
        """Where a request goes; None while no replica is up."""
        if not any(state.up for state in self._states):
            return None
        return self._router.choose(chain, self._states)

    def publish(self, replica: int, pool: BlockPool) -> None:
        """Hand on what has changed in a replica's pool since the last time."""
        log, mirror = pool.events, self._mirror
        if mirror is None or log.last_sequence == self._read[replica]:
            return
        news = log.since(self._read[replica])
        if news is None:
            mirror.replace(replica, pool.snapshot())
        else:
            for each in news:
                mirror.apply(replica, each.event)
        self._read[replica] = log.last_sequence

    def lost(self, replica: int) -> None:
        """A replica's pool is gone; the next one begins empty."""
        if self._mirror is not None:
            self._mirror.forget(replica)
        self._read[replica] = 0

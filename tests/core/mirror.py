"""A reader of the event log, as a router is one: starts from a snapshot, then follows the events."""

from emberkv.core.block_pool import BlockPool
from emberkv.core.events import BlockRemoved, BlockStored


class Mirror:
    """What a pool has cached, as far as its events tell. Removing what is not there fails: a lost event."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        snapshot = pool.snapshot()
        self.sequence = snapshot.sequence
        self.parents = dict(snapshot.parents)

    def follow(self) -> None:
        events = self.pool.events.since(self.sequence)
        assert events is not None, "fell behind"
        for numbered in events:
            assert numbered.sequence == self.sequence + 1
            self.sequence = numbered.sequence
            match numbered.event:
                case BlockStored(identities=identities, parent=parent):
                    for identity in identities:
                        assert identity not in self.parents, "stored twice"
                        self.parents[identity] = parent
                        parent = identity
                case BlockRemoved(identities=identities):
                    for identity in identities:
                        del self.parents[identity]
                case _:
                    self.parents.clear()

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
        self.sequence += len(events)
        assert self.sequence == self.pool.events.last_sequence
        for event in events:
            match event:
                case BlockStored(block_hashes=block_hashes, parent=parent):
                    for block_hash in block_hashes:
                        assert block_hash not in self.parents, "stored twice"
                        self.parents[block_hash] = parent
                        parent = block_hash
                case BlockRemoved(block_hashes=block_hashes):
                    for block_hash in block_hashes:
                        del self.parents[block_hash]
                case _:
                    self.parents.clear()

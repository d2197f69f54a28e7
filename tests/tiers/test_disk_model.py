"""The disk tier against a model of it, through random stores, loads, removals, damage, failures and restarts."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from emberkv.tiers.base import RemovalResult, TierEntry
from emberkv.tiers.codec import BlockRecord
from emberkv.tiers.disk.files import owner_folder
from emberkv.tiers.manager import TierManager
from tests.tiers.build import NAMESPACE, OTHER, block_hashes, entries, fetched, inexact, records
from tests.tiers.disks import FailingFiles, files_of, opened, others_of
from tests.waiting import DEADLINE

BLOCKS = records(7)
IDS = block_hashes(BLOCKS)
OWNERS = ("", "one", "two")
QUOTA = 4 * len(entries(BLOCKS[:1])[0].data) + 10

blocks = st.integers(0, len(BLOCKS) - 1)
Key = tuple[bytes, int]
"""A model and a number of `BLOCKS`."""


def record_of(block: int, exact: bool) -> BlockRecord:
    return BLOCKS[block] if exact else inexact(BLOCKS[block])


class DiskMachine(RuleBasedStateMachine):
    """``kept``: what must be there, least recently used first. ``damaged``: of these, what must not be served."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.kept: dict[Key, TierEntry] = {}
        self.damaged: set[Key] = set()
        self.evictions = 0
        self.open(NAMESPACE)

    def open(self, namespace: bytes) -> None:
        self.namespace = namespace
        self.files = FailingFiles(self.folder)
        self.tier = opened(self.folder, QUOTA, namespace=namespace, files=self.files)
        self.stack = TierManager([self.tier], namespace=namespace, queue_bytes=100_000)
        self.evictions = 0
        assert self.tier.read_only is None

    def used(self, key: Key) -> None:
        self.kept[key] = self.kept.pop(key)

    def dropped(self, key: Key) -> None:
        self.kept.pop(key, None)
        self.damaged.discard(key)

    @rule(block=blocks, exact=st.booleans(), owner=st.sampled_from(OWNERS), full=st.integers(0, 5))
    def store(self, block: int, exact: bool, owner: str, full: int) -> None:
        key = (self.namespace, block)
        (entry,) = entries([record_of(block, exact)], owner=owner, namespace=self.namespace)
        there = self.kept.get(key)
        self.files.fails, self.files.error = "" if full else "write", errno.ENOSPC
        outcome = self.tier.store([entry])
        self.files.fails = ""
        if there and (there.exact or not exact):
            assert (outcome.count, outcome.evicted) == (1, [])
            return
        gone = []
        while sum(len(each.data) for each in self.kept.values()) + len(entry.data) > QUOTA:
            gone.append(next(iter(self.kept)))
            self.dropped(gone[-1])
        self.evictions += len(gone)
        ours = [IDS[number] for namespace, number in gone if namespace == self.namespace]
        assert outcome.evicted == [each for each in ours if each != IDS[block] or not full]
        assert outcome.count == (full > 0)
        if full:
            self.dropped(key)
            self.kept[key] = entry

    @rule(block=blocks)
    def load(self, block: int) -> None:
        key = (self.namespace, block)
        (record,) = fetched(self.stack, BLOCKS[block : block + 1])
        entry = self.kept.get(key)
        if entry is None or key in self.damaged:
            assert record is None
            self.dropped(key)
        else:
            assert record == record_of(block, entry.exact)
            self.used(key)

    @rule(block=blocks)
    def touch(self, block: int) -> None:
        self.tier.touch(IDS[block : block + 1])
        if (self.namespace, block) in self.kept:
            self.used((self.namespace, block))

    @rule(block=blocks)
    def remove(self, block: int) -> None:
        assert self.tier.remove(IDS[block : block + 1]) == RemovalResult((self.namespace, block) in self.kept)
        self.dropped((self.namespace, block))

    @rule()
    def clear(self) -> None:
        gone = [key for key in self.kept if key[0] == self.namespace]
        assert self.tier.clear() == RemovalResult(len(gone))
        for key in gone:
            self.dropped(key)

    @rule(block=blocks, at=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.booleans())
    def corrupt(self, block: int, at: int, bit: int, cut: bool) -> None:
        """Of a truncated file the books keep the old size, so the size stays here."""
        entry = self.kept.get((self.namespace, block))
        if not entry or (self.namespace, block) in self.damaged:
            return
        path = self.path(self.namespace, entry)
        damaged = bytearray(entry.data)
        damaged[at % len(damaged)] ^= 1 << bit
        if cut:
            damaged[at % len(damaged) :] = bytes(len(damaged) - at % len(damaged))
        if bytes(damaged) != entry.data:
            modified = path.stat().st_mtime_ns
            path.write_bytes(damaged)
            self.damaged.add((self.namespace, block))
            os.utime(path, ns=(modified, modified))

    @rule(namespace=st.sampled_from((NAMESPACE, OTHER)), stray=st.booleans())
    def reopen(self, namespace: bytes, stray: bool) -> None:
        self.stack.close(DEADLINE)
        if stray:
            (self.folder / "blocks" / "tmp" / "stray").write_bytes(b"half a block")
        self.open(namespace)

    @invariant()
    def the_folder_holds_what_it_should(self) -> None:
        assert files_of(self.folder) == sorted(self.path(key[0], entry) for key, entry in self.kept.items())
        assert others_of(self.folder) == []

    @invariant()
    def the_books_balance(self) -> None:
        stats = self.tier.stats()
        sizes = [len(entry.data) for entry in self.kept.values()]
        assert (stats.entries, stats.bytes, stats.evictions) == (len(sizes), sum(sizes), self.evictions)
        assert stats.bytes <= QUOTA
        assert sum(stats.bytes_by_owner.values()) == stats.bytes
        found = [block for block in range(len(BLOCKS)) if self.tier.lookup(IDS[block : block + 1])]
        assert found == sorted(block for namespace, block in self.kept if namespace == self.namespace)

    def path(self, namespace: bytes, entry: TierEntry) -> Path:
        ending = ".kv" if entry.exact else ".near.kv"
        name = f"{entry.block_hash.hex()}{ending}"
        return self.folder / "blocks" / namespace.hex() / owner_folder(entry.owner) / name

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close(DEADLINE)
            shutil.rmtree(self.folder)


TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

"""The disk tier's index: which files there are, how large they are, and which of them go when space is short.

Pure bookkeeping in memory, without a lock: the tier holds one around each call, and does the file work outside of it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from emberkv.core.policies.eviction import EntryCost, EvictionPolicy
from emberkv.tiers.base import PolicyFactory
from emberkv.tiers.disk.files import BlockFile


class DiskIndex:
    """Files by key, within ``max_bytes``. What is being written is reserved, so that the limit holds meanwhile too."""

    def __init__(self, max_bytes: int, policy: PolicyFactory) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.bytes_by_owner: Counter[str] = Counter()
        self._files: dict[bytes, BlockFile] = {}
        self._unreadable: set[bytes] = set()
        self._last_stamp = 0
        self._reserved = 0
        self._policy: EvictionPolicy[bytes] = policy()

    def __len__(self) -> int:
        return len(self._files)

    def fill(self, files: Iterable[BlockFile]) -> list[BlockFile]:
        """Enter what an earlier process left, least recently used first. Returns what must go.

        Of two files of one block the exact one stays, of alike ones the more recent.
        """
        kept: dict[bytes, BlockFile] = {}
        gone = []
        for file in files:
            other = kept.setdefault(file.key, file)
            if other is not file:
                worse, kept[file.key] = sorted((other, file), key=lambda each: (each.exact, each.mtime_ns))
                gone.append(worse)
        for key, file in sorted(kept.items(), key=lambda item: (item[1].mtime_ns, item[0])):
            self._enter(key, file)
            self._last_stamp = file.mtime_ns
        return gone + self._excess()

    def note(self, file: BlockFile) -> list[BlockFile]:
        """Enter a file that another process has written. Returns what must go for it."""
        self.discard(file.key)
        self._enter(file.key, file)
        self._last_stamp = max(self._last_stamp, file.mtime_ns)
        return self._excess()

    def find(self, key: bytes) -> BlockFile | None:
        """A file that can be loaded."""
        return None if key in self._unreadable else self._files.get(key)

    def get(self, key: bytes) -> BlockFile | None:
        """A file that is there, readable or not."""
        return self._files.get(key)

    def files(self) -> list[BlockFile]:
        return list(self._files.values())

    def add(self, file: BlockFile) -> list[BlockFile]:
        """Enter a file, in place of one with its key if there is one. Returns those that a quota forbids to keep."""
        self.discard(file.key)
        self._enter(file.key, file)
        return self._surplus()

    def discard(self, key: bytes) -> list[BlockFile]:
        """Strike a file off; the list of it, empty where there was none."""
        if key not in self._files:
            return []
        self._policy.discard(key)
        return [self._strike(key)]

    def set_aside(self, file: BlockFile) -> None:
        """It cannot be read, or not be removed: still there and counted, but not found until it is stored again."""
        if self._files.get(file.key) is file:
            self._unreadable.add(file.key)

    def used(self, keys: Sequence[bytes], now_ns: int) -> list[tuple[BlockFile, int]]:
        """The files found, now the most recent, and the time to write on each; the first one's is the latest."""
        found = [file for key in keys if (file := self.find(key))]
        self._policy.access([file.key for file in reversed(found)])
        last = self.stamp(now_ns, len(found))
        return list(zip(found, range(last, last - len(found), -1), strict=True))

    def stamp(self, now_ns: int, count: int = 1) -> int:
        """The last of ``count`` times, all later than any before: the order of use survives a clock set back."""
        self._last_stamp = max(self._last_stamp + count, now_ns)
        return self._last_stamp

    def reserve(self, size: int, owner: str) -> tuple[bool, list[BlockFile]]:
        """Make room for ``size`` bytes and keep it. Returns whether there is room, and what had to go for it.

        There is none where all that could go is guaranteed to others, or is being written.
        """
        gone: list[BlockFile] = []
        while self.bytes + self._reserved + size > self.max_bytes:
            if not self._policy.available_to(owner):
                return False, gone
            gone.append(self._strike(self._policy.evict_for(owner)))
        self._reserved += size
        return True, gone

    def unreserve(self, size: int) -> None:
        self._reserved -= size

    def _enter(self, key: bytes, file: BlockFile) -> None:
        self._files[key] = file
        self._count(file, +1)
        self._policy.admit(key, EntryCost(size=max(file.size, 1), owner=file.owner))
        self._policy.release((key,))

    def _excess(self) -> list[BlockFile]:
        gone = self._surplus()
        while self.bytes > self.max_bytes:
            gone.append(self._strike(self._policy.evict()))
        return gone

    def _surplus(self) -> list[BlockFile]:
        return [self._strike(key) for key in self._policy.evict_surplus()]

    def _strike(self, key: bytes) -> BlockFile:
        self._unreadable.discard(key)
        file = self._files.pop(key)
        self._count(file, -1)
        return file

    def _count(self, file: BlockFile, sign: int) -> None:
        self.bytes += sign * file.size
        self.bytes_by_owner[file.owner] += sign * file.size

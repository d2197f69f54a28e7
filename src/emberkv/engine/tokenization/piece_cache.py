"""Encodings of text pieces that came by before, in one budget of memory for all tenants."""

import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Mapping


class PieceCache:
    """Maps an owner's piece of text to its token ids, in at most ``max_bytes`` of memory. Thread-safe.

    An owner never gets what another one put. The least recently used pieces go first, whosever they are.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[tuple[str, str], array[int]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def bytes_used(self) -> int:
        """Bytes of all texts and ids, never above the limit."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, owner: str, piece: str) -> "array[int] | None":
        """The ids of ``piece``, to be read only; None when it is not here."""
        key = (owner, piece)
        with self._lock:
            ids = self._entries.get(key)
            if ids is not None:
                self._entries.move_to_end(key)
            return ids

    def put(self, owner: str, pieces: "Mapping[str, array[int]]") -> None:
        """Remember the ids of pieces, forgetting older ones for them; one larger than the cache is not remembered."""
        with self._lock:
            for piece, ids in pieces.items():
                size = _size(piece, ids)
                if size > self.max_bytes or (owner, piece) in self._entries:
                    continue
                self._entries[owner, piece] = ids
                self._bytes += size
                while self._bytes > self.max_bytes:
                    (_, oldest), forgotten = self._entries.popitem(last=False)
                    self._bytes -= _size(oldest, forgotten)


def _size(piece: str, ids: "array[int]") -> int:
    return sys.getsizeof(piece) + sys.getsizeof(ids)

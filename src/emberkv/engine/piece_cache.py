"""Encodings of text pieces that came by before, least recently used forgotten first."""

import sys
import threading
from array import array
from collections import OrderedDict


class PieceCache:
    """Maps a piece of text to its token ids, in at most ``max_bytes`` of memory. Safe to use from many threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def bytes_used(self) -> int:
        """Bytes of all texts and ids held, never above the limit."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, piece: str) -> "array[int] | None":
        """The ids of ``piece``, to be read only; None when it is not here."""
        with self._lock:
            ids = self._entries.get(piece)
            if ids is not None:
                self._entries.move_to_end(piece)
            return ids

    def put(self, piece: str, ids: "array[int]") -> None:
        """Remember ``ids``, forgetting older pieces for it; a piece larger than the cache is not remembered."""
        size = _size(piece, ids)
        if size > self.max_bytes:
            return
        with self._lock:
            if piece in self._entries:
                return
            self._entries[piece] = ids
            self._bytes += size
            while self._bytes > self.max_bytes:
                self._bytes -= _size(*self._entries.popitem(last=False))


def _size(piece: str, ids: "array[int]") -> int:
    return sys.getsizeof(piece) + sys.getsizeof(ids)

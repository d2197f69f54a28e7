"""KV tensors that clients with engines of their own keep on a server, by sequence and layer. They are no blocks: the
prefix cache does not know them, and the server does not compute with them.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from emberkv.errors import RequestError
from emberkv.tensors import TensorBytes

Sequence = tuple[str, str]
"""A tenant's name and the id that it gave its sequence."""


class StoreTooSmallError(RequestError):
    """A sequence alone has more bytes or layers than the store may hold."""


@dataclass(slots=True)
class _Rows:
    """A tensor that grows along its first dimension. data: of all rows; appending to it takes time in proportion to
    what is appended, over many appends.
    """

    dtype: str
    row_shape: tuple[int, ...]
    rows: int
    data: bytearray

    @staticmethod
    def of(tensor: TensorBytes) -> "_Rows":
        return _Rows(tensor.dtype, tensor.shape[1:], tensor.shape[0], bytearray(tensor.data))

    def append(self, tensor: TensorBytes) -> None:
        self.data += tensor.data
        self.rows += tensor.shape[0]

    def copy(self) -> TensorBytes:
        return TensorBytes(self.dtype, (self.rows, *self.row_shape), bytes(self.data))


@dataclass(slots=True)
class _Layer:
    """copy_of: see `StoredLayer`."""

    k: _Rows
    v: _Rows
    copy_of: str = ""

    @property
    def bytes(self) -> int:
        return len(self.k.data) + len(self.v.data)

    def append(self, k: TensorBytes, v: TensorBytes) -> None:
        size, rows = len(self.k.data), self.k.rows
        self.k.append(k)
        try:
            self.v.append(v)
        except MemoryError:  # K and V stay of one length
            del self.k.data[size:]
            self.k.rows = rows
            raise


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A copy of a layer's tensors, each ``[seq_len, ...]``, usually ``[seq_len, heads, head_dim]``.

    copy_of: the id of the request that has generated the sequence, for rows of the prefix cache; "" for a client's own.
    """

    k: TensorBytes
    v: TensorBytes
    copy_of: str = ""

    @property
    def bytes(self) -> int:
        return len(self.k.data) + len(self.v.data)

    @property
    def seq_len(self) -> int:
        return self.k.shape[0]


@dataclass(frozen=True, slots=True)
class KVTensorStats:
    """entries: layers of all sequences. bytes: of the tensors, exactly. The evicted ones count up from the start."""

    entries: int = 0
    sequences: int = 0
    bytes: int = 0
    evicted_sequences: int = 0
    max_entries: int = 0
    max_bytes: int = 0


@dataclass(slots=True)
class _Stored:
    layers: dict[int, _Layer] = field(default_factory=dict)
    bytes: int = 0


class KVTensorStore:
    """K and V tensors by sequence and layer, within limits of bytes and of entries, an entry being a layer.

    Beyond a limit, whole sequences are evicted, the least recently used first, and none loses single layers. Putting,
    appending, getting and asking for a length are uses. All methods may be called from any thread.

    >>> import numpy as np
    >>> row = TensorBytes("float32", (1, 2), np.zeros(2, np.float32).tobytes())
    >>> store = KVTensorStore(max_bytes=2**20, max_entries=8)
    >>> store.put(("", "a sequence"), 0, row, row), store.append(("", "a sequence"), 0, row, row)
    (1, 2)
    """

    def __init__(self, *, max_bytes: int, max_entries: int) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._lock = threading.Lock()
        self._sequences: OrderedDict[Sequence, _Stored] = OrderedDict()
        self._bytes = 0
        self._entries = 0
        self._evicted = 0

    def put(self, sequence: Sequence, layer: int, k: TensorBytes, v: TensorBytes) -> int:
        """Replace a layer's tensors; how many rows they have. Raises RequestError for tensors that do not go together,
        StoreTooSmallError where the sequence alone would exceed a limit; then nothing has changed.
        """
        _check_pair(k, v)
        with self._lock:
            stored = self._sequences.get(sequence, _Stored())
            replaced = stored.layers.get(layer)
            grown_by = len(k.data) + len(v.data) - (replaced.bytes if replaced is not None else 0)
            self._check_holds(stored, grown_by, new_layers=int(replaced is None))
            stored.layers[layer] = _Layer(_Rows.of(k), _Rows.of(v))
            self._entries += replaced is None
            self._used(sequence, stored, grown_by)
        return k.shape[0]

    def append(
        self, sequence: Sequence, layer: int, k: TensorBytes, v: TensorBytes, *, behind: StoredLayer | None = None
    ) -> int:
        """Add rows to a layer's tensors, or begin them; how many rows there are then. Raises as `put` does, and
        RequestError for rows of another shape or dtype than those before them; then nothing has changed.

        behind: what the rows follow where nothing is stored for the layer; it is stored with them.
        """
        _check_pair(k, v)
        with self._lock:
            stored = self._sequences.get(sequence, _Stored())
            found = stored.layers.get(layer)
            grown_by = len(k.data) + len(v.data)
            if found is not None:
                _check_fits("k", k, found.k.dtype, found.k.row_shape)
                _check_fits("v", v, found.v.dtype, found.v.row_shape)
            elif behind is not None:
                _check_fits("k", k, behind.k.dtype, behind.k.shape[1:])
                _check_fits("v", v, behind.v.dtype, behind.v.shape[1:])
                grown_by += behind.bytes
            self._check_holds(stored, grown_by, new_layers=int(found is None))
            if found is not None:
                found.append(k, v)
            elif behind is not None:
                found = _Layer(_Rows.of(behind.k), _Rows.of(behind.v), behind.copy_of)
                found.append(k, v)
            else:
                found = _Layer(_Rows.of(k), _Rows.of(v))
            self._entries += layer not in stored.layers
            stored.layers[layer] = found
            self._used(sequence, stored, grown_by)
            return found.k.rows

    def get(self, sequence: Sequence, layer: int) -> StoredLayer | None:
        with self._lock:
            found = self._found(sequence, layer)
            return None if found is None else StoredLayer(found.k.copy(), found.v.copy())

    def length(self, sequence: Sequence, layer: int) -> int:
        """Rows of a layer's tensors; 0 where there are none."""
        with self._lock:
            found = self._found(sequence, layer)
            return 0 if found is None else found.k.rows

    def delete(self, sequence: Sequence) -> bool:
        """Forget all layers of a sequence; whether there were any."""
        with self._lock:
            return self._forget(sequence)

    def forget_copies(self, sequence: Sequence, but_of: str = "") -> None:
        """Forget the layers of a sequence that began as a copy (`StoredLayer.copy_of`) of another request's rows than
        of ``but_of``.
        """
        with self._lock:
            stored = self._sequences.get(sequence)
            if stored is None:
                return
            for layer in [layer for layer, each in stored.layers.items() if each.copy_of not in ("", but_of)]:
                size = stored.layers.pop(layer).bytes
                stored.bytes -= size
                self._bytes -= size
                self._entries -= 1
            if not stored.layers:
                del self._sequences[sequence]

    def stats(self) -> KVTensorStats:
        with self._lock:
            return KVTensorStats(
                self._entries, len(self._sequences), self._bytes, self._evicted, self._max_entries, self._max_bytes
            )

    def _found(self, sequence: Sequence, layer: int) -> _Layer | None:
        stored = self._sequences.get(sequence)
        if stored is None:
            return None
        self._sequences.move_to_end(sequence)
        return stored.layers.get(layer)

    def _check_holds(self, stored: _Stored, grown_by: int, *, new_layers: int) -> None:
        if (needed := stored.bytes + grown_by) > self._max_bytes:
            raise StoreTooSmallError(
                f"the sequence would have {needed} bytes; --kv-max-bytes is {self._max_bytes}, which holds for a "
                "sequence alone, too"
            )
        if (layers := len(stored.layers) + new_layers) > self._max_entries:
            raise StoreTooSmallError(
                f"the sequence would have {layers} layers; --kv-max-entries is {self._max_entries}, which holds for a "
                "sequence alone, too"
            )

    def _used(self, sequence: Sequence, stored: _Stored, grown_by: int) -> None:
        self._sequences[sequence] = stored
        self._sequences.move_to_end(sequence)
        stored.bytes += grown_by
        self._bytes += grown_by
        while self._bytes > self._max_bytes or self._entries > self._max_entries:
            self._forget(next(iter(self._sequences)))
            self._evicted += 1

    def _forget(self, sequence: Sequence) -> bool:
        stored = self._sequences.pop(sequence, None)
        if stored is None:
            return False
        self._bytes -= stored.bytes
        self._entries -= len(stored.layers)
        return True


def _check_fits(name: str, tensor: TensorBytes, dtype: str, row_shape: tuple[int, ...]) -> None:
    """Raises RequestError for rows of another shape or dtype than those before them."""
    if (tensor.dtype, tensor.shape[1:]) != (dtype, row_shape):
        raise RequestError(
            f"{name} has rows of shape {list(tensor.shape[1:])} in {tensor.dtype}; those stored have shape "
            f"{list(row_shape)} in {dtype}",
            param=name,
        )


def _check_pair(k: TensorBytes, v: TensorBytes) -> None:
    for name, tensor in (("k", k), ("v", v)):
        if not tensor.shape:
            raise RequestError(f"{name} is a single number; its first dimension must be the rows", param=name)
    if k.shape[0] != v.shape[0]:
        raise RequestError(f"k has {k.shape[0]} rows and v has {v.shape[0]}; both must have as many", param="v")

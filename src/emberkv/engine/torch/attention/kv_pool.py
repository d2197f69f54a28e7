"""The bytes of the pool: one tensor, allocated once, in which every block is one contiguous run."""

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from emberkv.engine.torch.attention.int8_kv import Int8Rows, check_int8_kv
from emberkv.engine.torch.model.geometry import ModelGeometry
from emberkv.errors import ConfigError, RequestError, UnknownLayerError
from emberkv.tensors import TensorBytes


class Scratch:
    """One growing buffer, so that large temporaries are not mapped anew in each step.

    What `take` returned before is overwritten by the next `take`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        needed = prod(shape) * dtype.itemsize
        if self._buffer.numel() < needed:
            self._buffer = torch.empty(needed, dtype=torch.uint8, device=self._device)
        return self._buffer[:needed].view(dtype).view(shape)


class KVPool:
    """KV state of type ``dtype``. storage: ``[blocks, KV layers, 2, block_size, kv_heads, head_dim]``.

    KV layers are those with keys and values of their own; ``kv_layers`` says which of them each of the model's layers
    with attention attends over.

    blocks: all of each block, ``[blocks, values]``: its keys and values, and behind them, in whole rows, the state that
    layers have after the last token that was computed into it. matrices and convolved: views of that, by the layer's
    number in the model: fp32 ``[blocks, heads, depth, width]``, and ``[blocks, columns, channels]`` in ``dtype``.

    Where the kernels compute, they hold each block's K and V of a layer, the last three axes, in an order of their own
    (native/layout.hpp), and what is said of these axes here does not apply. In int8 these axes are one of bytes
    (`Int8Rows`), with the kernels and without.

    activations: the type of the keys and values that are written and gathered; None: ``dtype``, as anything but int8
    needs it.

    A *row* is one block's K (or V) of one layer. ``rows(block_ids)`` gives each slot's first row; the K of a KV
    layer is ``2 * layer`` rows further, its V one more.

    scores: memory for attention scores, lent to one layer at a time. packed: whether the kernels compute.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        dtype: torch.dtype,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        activations: torch.dtype | None = None,
    ) -> None:
        """Raises ConfigError for int8 with heads or blocks of odd size."""
        self.geometry = geometry
        self.dtype = dtype
        self.activations = dtype if activations is None else activations
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.kv_layers = geometry.kv_layers()
        row: tuple[int, ...] = (block_size, geometry.num_kv_heads, geometry.head_dim)
        if dtype is torch.int8:
            check_int8_kv(geometry, block_size)
            row = (block_size * geometry.num_kv_heads * geometry.bytes_per_head(dtype),)
        self._block_rows = geometry.rows_per_block(dtype, block_size)
        self.blocks = torch.empty((num_blocks, self._block_rows * prod(row)), dtype=dtype, device=device)
        self._row_view = self.blocks.view(num_blocks * self._block_rows, -1)
        kv_values = geometry.num_kv_layers * 2 * prod(row)
        self.storage = self.blocks[:, :kv_values].view(num_blocks, geometry.num_kv_layers, 2, *row)
        self.matrices: dict[int, Tensor] = {}
        self.convolved: dict[int, Tensor] = {}
        self._find_states(self.blocks[:, kv_values:])
        self._token_view = self._row_view.view(self._row_view.shape[0] * block_size, -1)
        self._int8 = Int8Rows(self._row_view, geometry, block_size) if dtype is torch.int8 else None
        self._layer_offsets = torch.arange(geometry.num_kv_layers * 2, device=device).view(-1, 2, 1)
        self._gathered = Scratch(device)
        self._by_head = Scratch(device)
        self.scores = Scratch(device)
        self.packed = False

    def _find_states(self, behind: Tensor) -> None:
        """Of what lies ``behind`` keys and values. What is not used is zero, as equal blocks are equal bit by bit."""
        first = 0
        for each in self.geometry.states:
            if each.heads:
                count = each.matrix_bytes // behind.element_size()
                part = behind[:, first : first + count].view(torch.float32)
                self.matrices[each.layer] = part.view(self.num_blocks, each.heads, each.depth, each.width)
                first += count
        for each in self.geometry.states:
            part = behind[:, first : first + each.convolved]
            self.convolved[each.layer] = part.view(self.num_blocks, each.columns, each.channels)
            first += each.convolved
        behind[:, first:] = 0

    @classmethod
    def of_bytes(
        cls,
        geometry: ModelGeometry,
        dtype: torch.dtype,
        num_bytes: int,
        block_size: int,
        device: torch.device,
        activations: torch.dtype | None = None,
    ) -> "KVPool":
        """The pool with as many blocks as fit into ``num_bytes``.

        Raises ConfigError if none does, or the device has not so much memory.
        """
        block_bytes = geometry.block_bytes(dtype, block_size)
        if num_bytes < block_bytes:
            raise ConfigError(
                f"a KV pool of {num_bytes} bytes holds no block; one block of {block_size} tokens takes {block_bytes}"
            )
        try:
            return cls(geometry, dtype, num_bytes // block_bytes, block_size, device, activations)
        except RuntimeError as error:  # torch's allocators say so
            raise ConfigError(
                f"there is no memory for a KV pool of {num_bytes / 2**30:,.1f} GiB on {device}"
            ) from error

    @property
    def num_bytes(self) -> int:
        return self.blocks.numel() * self.blocks.element_size()

    @property
    def block_bytes(self) -> int:
        return self.num_bytes // self.num_blocks

    @property
    def layer_bytes(self) -> int:
        """Of the keys and values that `read_layer` gives of one block."""
        geometry = self.geometry
        return 2 * self.block_size * geometry.num_kv_heads * geometry.head_dim * self.activations.itemsize

    def read_blocks(self, block_ids: Sequence[int]) -> list[memoryview]:
        """The bytes of whole blocks, copied once, in one piece that lives as long as any of the views.

        Raises MemoryError when there is no memory for the copy.
        """
        if not block_ids:  # torch cannot view an empty array as another type
            return []
        rows = np.empty((len(block_ids), self.block_bytes), dtype=np.uint8)  # numpy says so when there is no memory
        copied = torch.from_numpy(rows).view(self.dtype)
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        if self.device.type == "cpu":
            torch.index_select(self.blocks, 0, index, out=copied)
        else:
            copied.copy_(_or_memory_error(lambda: self.blocks.index_select(0, index)))
        return [row.data for row in rows]

    def read(self, block_id: int) -> bytes:
        """The bytes of one block."""
        return bytes(self.read_blocks([block_id])[0])

    def read_layer(self, block_ids: Sequence[int], layer: int) -> tuple[TensorBytes, TensorBytes]:
        """The keys and the values of the model's layer of that number, as they are attended over, each
        ``[len(block_ids) * block_size, kv_heads, head_dim]``.

        Raises UnknownLayerError for a layer that there is not, RequestError for one without attention, MemoryError when
        there is no memory for the copy.
        """
        kv_layer = self._kv_layer(layer)
        if not block_ids:
            shape = 0, self.geometry.num_kv_heads, self.geometry.head_dim
            none = TensorBytes(str(self.activations).removeprefix("torch."), shape, b"")
            return none, none
        index = self.gather_index(self.rows(list(block_ids)))[kv_layer]
        keys, values = self.gather(index)
        if self.packed and self._int8 is None:
            keys, values = self._unpacked(keys, values)
        return _tensor_bytes(keys), _tensor_bytes(values)

    def _kv_layer(self, layer: int) -> int:
        """Raises as `read_layer` does."""
        attending = self.geometry.attention_layers
        if layer in attending:
            return self.kv_layers[attending.index(layer)]
        layers = self.geometry.model_layers or self.geometry.num_layers
        if not 0 <= layer < layers:
            raise UnknownLayerError(f"layer is {layer}; the model has layers 0 to {layers - 1}", param="layer")
        listed = ", ".join(str(each) for each in attending)
        raise RequestError(
            f"layer {layer} has no attention, so it has no keys and values; those with attention are {listed}",
            param="layer",
        )

    def _unpacked(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What `gather` gives of blocks in the order of native/layout.hpp, in the usual order."""
        heads, dim, size = self.geometry.num_kv_heads, self.geometry.head_dim, self.block_size
        pair = 1 if self.dtype is torch.float32 else 2
        by_unit = keys.reshape(-1, heads, dim // pair, size, pair).permute(0, 3, 1, 2, 4)
        by_token = values.reshape(-1, heads, size // pair, dim, pair).permute(0, 2, 4, 1, 3)
        return by_unit.reshape(keys.shape), by_token.reshape(values.shape)

    def write_block(self, block_id: int, content: bytes | memoryview) -> None:
        """Put back what `read_blocks` gave.

        Raises ConfigError for any other number of bytes, MemoryError when there is no memory for the copy.
        """
        source = np.frombuffer(content, dtype=np.uint8)
        if source.size != self.block_bytes:
            raise ConfigError(f"{source.size} bytes for a block; one of this pool has {self.block_bytes}")
        target = self.blocks[block_id].view(torch.uint8)
        if self.device.type == "cpu":
            target.numpy()[:] = source
        else:
            own = torch.from_numpy(source.copy())
            _or_memory_error(lambda: target.copy_(own))

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks, each from its source to its target; no block may be in both."""
        if sources:
            taken = self.blocks.index_select(0, torch.tensor(sources, dtype=torch.int64, device=self.device))
            self.blocks.index_copy_(0, torch.tensor(targets, dtype=torch.int64, device=self.device), taken)

    def rows(self, block_ids: list[int]) -> Tensor:
        """Each block's first row, int64 ``[len(block_ids)]``."""
        return torch.tensor(block_ids, dtype=torch.int64, device=self.device) * self._block_rows

    def clear(self, block_ids: list[int]) -> None:
        """Zero whole blocks in which a first token is about to be written.

        Decode gathers whole blocks, and what lies beyond a sequence's end weighs nothing; but zero times a NaN that
        another sequence left there is a NaN.
        """
        if block_ids:
            self.blocks.index_fill_(0, torch.tensor(block_ids, device=self.device), 0)

    def gather_index(self, rows: Tensor) -> Tensor:
        """The rows to copy for each KV layer, int64 ``[KV layers, 2 * rows]``: all K, then all V."""
        return (self._layer_offsets + rows.reshape(-1)).view(self.geometry.num_kv_layers, -1)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """K and V, ``[rows * block_size, kv_heads, head_dim]`` each; valid until the next gather.

        index: one layer's entry of `gather_index`.
        """
        out = self._gathered.take((index.numel(), self._row_view.shape[1]), self.dtype)
        torch.index_select(self._row_view, 0, index, out=out)
        if self._int8 is not None:
            of_keys, of_values = (Int8Rows(each, self.geometry, self.block_size) for each in out.chunk(2))
            return of_keys.keys().values(self.activations), of_values.values().values(self.activations)
        keys, values = out.view(2, -1, self.geometry.num_kv_heads, self.geometry.head_dim).unbind(0)
        return keys, values

    def gather_heads(self, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """K and V, ``[kv_heads, count, head_dim]`` each: what `gather` gives, cut or filled with zeros."""
        gathered = self.gather(index)
        shape = (2, self.geometry.num_kv_heads, count, self.geometry.head_dim)
        out = self._by_head.take(shape, self.activations)
        for target, source in zip(out, gathered, strict=True):
            present = min(count, source.shape[0])
            target[:, :present] = source[:present].transpose(0, 1)
            target[:, present:] = 0
        return out[0], out[1]

    def write_index(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """int64 ``[KV layers, 2, tokens]``: where tokens go that are at ``offsets`` within the blocks of ``rows``."""
        return (self._layer_offsets + rows) * self.block_size + offsets

    def write(self, index: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store ``[tokens, kv_heads, head_dim]`` of one layer at that layer's entry of `write_index`."""
        if self._int8 is not None:
            self._int8.write_keys(index[0] // self.block_size, index[0] % self.block_size, keys)
            self._int8.write_values(index[1] // self.block_size, index[1] % self.block_size, values)
            return
        self._token_view.index_copy_(0, index[0], keys.reshape(keys.shape[0], -1))
        self._token_view.index_copy_(0, index[1], values.reshape(values.shape[0], -1))


def tokens_of_pool(geometry: ModelGeometry, dtype: torch.dtype, num_bytes: int, block_size: int) -> int:
    """The capacity in tokens of a pool made by `KVPool.of_bytes`."""
    return num_bytes // geometry.block_bytes(dtype, block_size) * block_size


def _tensor_bytes(tensor: Tensor) -> TensorBytes:
    content = _or_memory_error(lambda: tensor.contiguous().cpu()).view(torch.uint8).numpy().tobytes()
    return TensorBytes(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), content)


def _or_memory_error(copy: Callable[[], Tensor]) -> Tensor:
    try:
        return copy()
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error

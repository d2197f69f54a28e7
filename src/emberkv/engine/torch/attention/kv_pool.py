"""The bytes of the pool: one tensor, allocated once, in which every block is one contiguous run."""

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from emberkv.engine.torch.attention.int8_kv import Int8Rows, check_int8_kv
from emberkv.engine.torch.model.geometry import HeadShape, ModelGeometry, key_bytes
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
    """KV state of type ``dtype``. A block holds, layer by layer, its tokens' keys and then their values.

    KV layers are those with keys and values of their own; ``kv_layers`` says which of them each of the model's layers
    with attention attends over, and ``shapes`` the heads of each. Layers may differ in their heads.

    blocks: all of each block, ``[blocks, elements]``: its keys and values, and behind them, padded with zeros, the
    state that layers have after the last token that was computed into it. The following are views of that. storage:
    all keys and values. keys_and_values: those of each KV layer, ``[blocks, 2, block_size, kv_heads, head_dim]``.
    matrices and convolved: the states, by the layer's number in the model: fp32 ``[blocks, heads, depth, width]``, and
    ``[blocks, columns, channels]`` in ``dtype``.

    Where the kernels compute, they hold each block's K and V of a layer, the last three axes, in an order of their own
    (native/layout.hpp), and what is said of these axes here does not apply. In int8 these axes are one of bytes
    (`Int8Rows`), with the kernels and without.

    activations: the type of the keys and values that are written and gathered; None: ``dtype``, as anything but int8
    needs it.

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
        self.shapes = geometry.kv_shapes()
        if dtype is torch.int8:
            check_int8_kv(geometry, block_size)
        values = geometry.block_bytes(dtype, block_size) // dtype.itemsize
        self.blocks = torch.empty((num_blocks, values), dtype=dtype, device=device)
        kv_values = block_size * geometry.bytes_per_token(dtype) // dtype.itemsize
        self.storage = self.blocks[:, :kv_values]
        widths = [2 * block_size * key_bytes(shape, dtype) // dtype.itemsize for shape in self.shapes]
        self._rows = [part.view(num_blocks, 2, -1) for part in torch.split(self.storage, widths, dim=1)]
        self.keys_and_values = self._rows
        self._int8: list[tuple[Int8Rows, Int8Rows]] | None = None
        if dtype is torch.int8:
            self._int8 = [self._int8_rows(part, shape) for part, shape in zip(self._rows, self.shapes, strict=True)]
        else:
            self.keys_and_values = [
                part.view(num_blocks, 2, block_size, shape.kv_heads, shape.dim)
                for part, shape in zip(self._rows, self.shapes, strict=True)
            ]
        self.matrices: dict[int, Tensor] = {}
        self.convolved: dict[int, Tensor] = {}
        self._find_states(self.blocks[:, kv_values:])
        self._gathered = Scratch(device)
        self._by_head = Scratch(device)
        self.scores = Scratch(device)
        self.packed = False

    def _int8_rows(self, part: Tensor, shape: HeadShape) -> tuple[Int8Rows, Int8Rows]:
        """Of keys and of values: ``[blocks, 2, bytes]`` of a layer."""
        keys, values = (Int8Rows(each, shape, self.block_size) for each in part.unbind(1))
        return keys, values

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
        """Of the keys and values that `read_layer` gives of one block, of the layer where they are the most."""
        widest = max(shape.kv_heads * shape.dim for shape in self.shapes)
        return 2 * self.block_size * widest * self.activations.itemsize

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

    def read_beginning(self, block_id: int, num_tokens: int) -> memoryview:
        """The bytes of a block of which only the first tokens are computed, copied once, with zeros for the others'
        keys and values. Not for int8, which no model takes that has a state and so needs this.

        Raises MemoryError when there is no memory for the copy.
        """
        assert self._int8 is None
        (content,) = self.read_blocks([block_id])
        parts = torch.frombuffer(content, dtype=self.dtype)[: self.storage.shape[1]]
        widths = [2 * self.block_size * shape.kv_heads * shape.dim for shape in self.shapes]
        for part, shape in zip(torch.split(parts, widths), self.shapes, strict=True):
            keys, values = part.view(2, -1).unbind(0)
            if self.packed:
                pair = self._pair
                keys.view(shape.kv_heads, shape.dim // pair, self.block_size, pair)[:, :, num_tokens:] = 0
                by_pair = values.view(shape.kv_heads, self.block_size // pair, shape.dim, pair)
                by_pair[:, num_tokens // pair, :, num_tokens % pair :] = 0
                by_pair[:, num_tokens // pair + 1 :] = 0
            else:
                part.view(2, self.block_size, -1)[:, num_tokens:] = 0
        return content

    def read_layer(self, block_ids: Sequence[int], layer: int) -> tuple[TensorBytes, TensorBytes]:
        """The keys and the values of the model's layer of that number, as they are attended over, each
        ``[len(block_ids) * block_size, kv_heads, head_dim]``.

        Raises UnknownLayerError for a layer that there is not, RequestError for one without attention, MemoryError when
        there is no memory for the copy.
        """
        kv_layer = self._kv_layer(layer)
        if not block_ids:
            shape = self.shapes[kv_layer]
            name = str(self.activations).removeprefix("torch.")
            none = TensorBytes(name, (0, shape.kv_heads, shape.dim), b"")
            return none, none
        keys, values = self.gather(kv_layer, self.index_of(block_ids))
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

    @property
    def _pair(self) -> int:
        """Of `layout.hpp`."""
        return 1 if self.dtype is torch.float32 else 2

    def _unpacked(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What `gather` gives of blocks in the order of native/layout.hpp, in the usual order."""
        (heads, dim), size, pair = keys.shape[1:], self.block_size, self._pair
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

    def index_of(self, block_ids: Sequence[int]) -> Tensor:
        """int64 ``[len(block_ids)]`` on the pool's device."""
        return torch.tensor(block_ids, dtype=torch.int64, device=self.device)

    def clear(self, block_ids: list[int]) -> None:
        """Zero whole blocks in which a first token is about to be written.

        Decode gathers whole blocks, and what lies beyond a sequence's end weighs nothing; but zero times a NaN that
        another sequence left there is a NaN.
        """
        if block_ids:
            self.blocks.index_fill_(0, torch.tensor(block_ids, device=self.device), 0)

    def gather(self, kv_layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a KV layer, ``[blocks * block_size, kv_heads, head_dim]`` each; valid until the next gather.

        blocks: of `index_of`.
        """
        rows, shape = self._rows[kv_layer], self.shapes[kv_layer]
        out = self._gathered.take((2, blocks.numel(), rows.shape[2]), self.dtype)
        for target, source in zip(out, rows.unbind(1), strict=True):
            torch.index_select(source, 0, blocks, out=target)
        if self._int8 is not None:
            of_keys, of_values = (Int8Rows(each, shape, self.block_size) for each in out)
            return of_keys.keys().values(self.activations), of_values.values().values(self.activations)
        keys, values = out.view(2, -1, shape.kv_heads, shape.dim).unbind(0)
        return keys, values

    def gather_heads(self, kv_layer: int, blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """K and V, ``[kv_heads, count, head_dim]`` each: what `gather` gives, cut or filled with zeros."""
        gathered, shape = self.gather(kv_layer, blocks), self.shapes[kv_layer]
        out = self._by_head.take((2, shape.kv_heads, count, shape.dim), self.activations)
        for target, source in zip(out, gathered, strict=True):
            present = min(count, source.shape[0])
            target[:, :present] = source[:present].transpose(0, 1)
            target[:, present:] = 0
        return out[0], out[1]

    def write(self, kv_layer: int, blocks: Tensor, offsets: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store ``[tokens, kv_heads, head_dim]`` of a KV layer.

        blocks, offsets: int64 ``[tokens]``, each token's block and its place within that.
        """
        if self._int8 is not None:
            of_keys, of_values = self._int8[kv_layer]
            of_keys.write_keys(blocks, offsets, keys)
            of_values.write_values(blocks, offsets, values)
            return
        for stored, given in zip(self.keys_and_values[kv_layer].unbind(1), (keys, values), strict=True):
            stored.index_put_((blocks, offsets), given)


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

"""The shape of a model's attention: what its layers keep for each token, and the bytes that it takes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from emberkv.defaults import DEFAULT_BLOCK_SIZE
from emberkv.engine.torch.model.state_layers import StateGeometry

MOST_BLOCK_TOKENS = 1024


class Window(NamedTuple):
    """Which keys a query sees of those up to its own.

    The ``size`` latest ones; or, where it is chunked, those of its own chunk of ``size`` tokens, which are cut at
    absolute positions (Llama 4).
    """

    size: int
    chunked: bool = False

    def first(self, position: int) -> int:
        """The first position that the query at ``position`` sees."""
        return position // self.size * self.size if self.chunked else max(0, position - self.size + 1)


def first_seen(position: int, window: Window | None) -> int:
    """As `Window.first`; 0 where there is no window."""
    return 0 if window is None else window.first(position)


KV_SCALE_BYTES = 2
"""Of the scale that the int8 keys, or values, of one token and KV head have: bf16."""


class HeadShape(NamedTuple):
    """Of a layer's attention. heads: of its queries. kv_heads: of its keys, and of its values.

    dim: the head size, in elements. Where those of K and V differ, the larger one, to which the other is padded with
    zeros.
    """

    heads: int
    kv_heads: int
    dim: int


def key_bytes(shape: HeadShape, kv_dtype: torch.dtype) -> int:
    """Bytes of one token's keys, or values, in a layer: its heads' elements, and in int8 a scale for each head."""
    return shape.kv_heads * (shape.dim * kv_dtype.itemsize + (KV_SCALE_BYTES if kv_dtype is torch.int8 else 0))


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """One attention layer.

    window: the keys that a query sees; None sees all before it.
    softcap: attention scores are ``softcap * tanh(score / softcap)``; None leaves them alone.
    scaling: factor of the query-key product.
    sinks: whether each head has a further score, which has a weight in the softmax and no value.
    alibi: whether scores lose something for each token between query and key, of each head so much.
    shares: the earlier layer whose keys and values this one attends over in place of own ones; None: it has its own.
    head_shape: its heads, where they are others than the model's; None: they are the model's.
    """

    window: Window | None
    softcap: float | None
    scaling: float
    sinks: bool = False
    alibi: bool = False
    shares: int | None = None
    head_shape: HeadShape | None = None


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """All layers that keep state.

    num_heads, num_kv_heads, head_dim: of all layers that have no `LayerGeometry.head_shape` of their own.

    layers: those with attention. attending: their numbers among all of the model's layers; empty where all attend.
    states: of layers that keep a state of fixed size; a block holds it as it is after the block's last token.
    model_layers: how many layers the model has, with those that neither attend nor keep a state; 0: all attend.
    ends_with_attention: whether no such layer comes after the last attention.
    vocab_size: rows of the embedding, the bound of every token id that the model can take.
    context_length: the most tokens that the model was made for and whose state stays valid; see `rotation_limit`.
    stated_context: what the model's config gives as its context; 0 where it is not known.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    layers: tuple[LayerGeometry, ...]
    stated_context: int = 0
    states: tuple[StateGeometry, ...] = ()
    ends_with_attention: bool = True
    attending: tuple[int, ...] = ()
    model_layers: int = 0

    @property
    def num_layers(self) -> int:
        """Layers with attention."""
        return len(self.layers)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Numbers, among all of the model's layers, of those with attention."""
        return self.attending or tuple(range(len(self.layers)))

    @property
    def num_kv_layers(self) -> int:
        """Layers with keys and values of their own."""
        return sum(layer.shares is None for layer in self.layers)

    def kv_layers(self) -> list[int]:
        """Of each layer, which of those with keys and values of their own has the ones that it attends over."""
        found: list[int] = []
        for layer in self.layers:
            found.append(len(set(found)) if layer.shares is None else found[layer.shares])
        return found

    def head_shapes(self) -> list[HeadShape]:
        """Of each layer with attention."""
        usual = HeadShape(self.num_heads, self.num_kv_heads, self.head_dim)
        return [layer.head_shape or usual for layer in self.layers]

    def kv_shapes(self) -> list[HeadShape]:
        """Of each layer with keys and values of its own."""
        return [shape for shape, layer in zip(self.head_shapes(), self.layers, strict=True) if layer.shares is None]

    @property
    def heads_differ(self) -> bool:
        """Whether layers differ in head count or head size."""
        return len(set(self.head_shapes())) > 1

    def odd_head_dim(self) -> int | None:
        """The size of a head that is odd; None where there is none."""
        return next((shape.dim for shape in self.head_shapes() if shape.dim % 2), None)

    def bytes_per_token(self, kv_dtype: torch.dtype) -> int:
        """Bytes of keys and values that one token takes over all layers."""
        return sum(2 * key_bytes(shape, kv_dtype) for shape in self.kv_shapes())

    def state_bytes(self, kv_dtype: torch.dtype) -> int:
        """Bytes of what all layers with a state keep after a token; 0 where none does."""
        return sum(each.matrix_bytes + each.convolved * kv_dtype.itemsize for each in self.states)

    def block_bytes(self, kv_dtype: torch.dtype, block_size: int) -> int:
        """Bytes of a block: keys and values of its tokens, and the state after the last one, which is rounded up to a
        multiple of what the first layer's keys take.
        """
        row = block_size * key_bytes(self.kv_shapes()[0], kv_dtype)
        return block_size * self.bytes_per_token(kv_dtype) + -(-self.state_bytes(kv_dtype) // row) * row

    def default_block_size(self, kv_dtype: torch.dtype) -> int:
        """Tokens of a block unless ``--block-size`` says it.

        The smallest power of two, from 16 to 1024, with which keys and values take as much of a block as the state.
        """
        size = DEFAULT_BLOCK_SIZE
        while size < MOST_BLOCK_TOKENS and size * self.bytes_per_token(kv_dtype) < self.state_bytes(kv_dtype):
            size *= 2
        return size

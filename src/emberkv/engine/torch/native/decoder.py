"""A decoder of Llama's shape, computed in one call of the kernels a pass instead of module by module.

It serves the families that are built of RMS norms, rotary positions, plain attention and a gated pair, with the norms
before each half of a layer (Llama, Mistral, Qwen, Phi-3) or on both sides of it (Gemma). Its operations round where
PyTorch rounds in the model's own code, so it gives the same bits as the modules do: `self_check.decoder_agrees` tries
that before it is used, and a model for which it does not hold is computed module by module.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emberkv.engine.torch.attention.kv_pool import KVPool, Scratch
from emberkv.engine.torch.native.attention import NativeStep
from emberkv.engine.torch.native.kernels import (
    AttentionCall,
    DecoderCall,
    DecoderLayer,
    Kernels,
    NormCall,
    type_number,
)
from emberkv.engine.torch.native.layers import NativeGatedPair, NativeLinear, NativeRMSNorm

_FIRST_POSITIONS = 1024
_REGION = 32  # elements to which each region of the scratch memory is rounded up in decoder.cpp
_REGIONS = 5


@dataclass(frozen=True, slots=True)
class _Layer:
    """products: of queries, keys and values, or one that gives all three. Norms that a layer has not are None."""

    products: tuple[NativeLinear, ...]
    out: NativeLinear
    pair: NativeGatedPair
    down: NativeLinear
    input_norm: NativeRMSNorm
    feedforward_norm: NativeRMSNorm
    query_norm: NativeRMSNorm | None
    key_norm: NativeRMSNorm | None
    after_attention: NativeRMSNorm | None
    after_feedforward: NativeRMSNorm | None

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Inputs and outputs of each product, then of each norm; 0 for one that is missing."""
        products: tuple[NativeLinear | NativeGatedPair, ...] = (*self.products, self.out, self.pair, self.down)
        wide = self.input_norm, self.feedforward_norm, self.after_attention, self.after_feedforward
        return (
            *((each.in_features, each.out_features) for each in products),
            tuple(_size(norm) for norm in wide),
            tuple(_size(norm) for norm in (self.query_norm, self.key_norm)),
        )


class _Rotation:
    """cos and sin ``[positions, dim]``, as the model's own module gives them. They grow with the longest sequence."""

    def __init__(self, module: nn.Module, layer_type: tuple[str, ...], dtype: torch.dtype, limit: int) -> None:
        self._module, self._layer_type, self._limit = module, layer_type, limit
        self._like = torch.empty(1, 1, dtype=dtype)
        self.drop()

    def drop(self) -> None:
        """Keep the first position only."""
        self.cos, self.sin = self._computed(0, 1)

    @property
    def dim(self) -> int:
        return self.cos.shape[1]

    def cover(self, positions: int) -> bool:
        """Whether the tables had to grow, and so have moved."""
        known = self.cos.shape[0]
        if positions <= known:
            return False
        wanted = min(self._limit, max(_FIRST_POSITIONS, 1 << (positions - 1).bit_length()))
        cos, sin = self._computed(known, max(positions, wanted))
        self.cos, self.sin = torch.cat([self.cos, cos]), torch.cat([self.sin, sin])
        return True

    def _computed(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, stop).unsqueeze(0)
        cos, sin = self._module(self._like, positions, *self._layer_type)
        return cos[0].contiguous(), sin[0].contiguous()


class NativeDecoder:
    """All layers of a model, over one pool. Not thread-safe; one pass at a time."""

    def __init__(
        self,
        kernels: Kernels,
        pool: KVPool,
        embedding: nn.Module,
        layers: list[_Layer],
        rotations: list[_Rotation],
        norm: NativeRMSNorm,
        output: NativeLinear,
        softcap: float | None,
    ) -> None:
        """rotations: of each layer; some may share one. softcap: of logits, as ``softcap * tanh(logit / softcap)``."""
        self._kernels, self._pool = kernels, pool
        self._embedding, self._layers, self._rotations = embedding, layers, rotations
        self._norm, self._output, self._softcap = norm, output, softcap
        self._unique = list({id(each): each for each in rotations}.values())
        self._windows = [layer.window for layer in pool.geometry.layers]
        self._scratch = Scratch(pool.device)
        self._native = (DecoderLayer * len(layers))(*(self._native_layer(i) for i in range(len(layers))))
        self._call = self._prepared()

    def forward(self, step: NativeStep, tokens: list[int]) -> Tensor:
        """The step's pass over its ``tokens``; logits ``[wanted, vocab]`` of the rows that the step wants.

        Writes the tokens' K and V into the pool.
        """
        call = self._call
        self._place(int(step.positions.max()) + 1)
        hidden: Tensor = self._embedding(torch.tensor([tokens]))[0].contiguous()
        plans, plan_of = step.plans(self._windows)
        given = (AttentionCall * len(plans))(*plans)
        for layer, plan in zip(self._native, plan_of, strict=True):
            layer.plan = plan
        kept = np.array(step.wanted, dtype=np.int32)
        logits = torch.empty((len(kept), self._output.out_features), dtype=hidden.dtype)
        call.type = type_number(hidden, self._pool.activations)
        call.plans, call.rows, call.num_kept = given, len(tokens), len(kept)
        call.hidden, call.logits, call.kept = hidden.data_ptr(), logits.data_ptr(), kept.ctypes.data
        call.scratch = self._scratch.take((self._scratch_elements(len(tokens)),), hidden.dtype).data_ptr()
        call.threads = torch.get_num_threads()
        self._kernels.decoder(call)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def drop_positions(self) -> None:
        """Free the memory of the rotations of a long sequence."""
        for rotation in self._unique:
            rotation.drop()
        self._point_to_rotations()

    @contextmanager
    def larger_norms(self, factor: float) -> Iterator[None]:
        """Within this context every norm gives so many times what it gives, here and in the model's modules."""
        norms = [norm for layer in self._layers for norm in _norms(layer)] + [self._norm]
        scales = {id(norm.scale): norm.scale for norm in norms}
        before = {key: scale.clone() for key, scale in scales.items()}
        try:
            for scale in scales.values():
                scale.mul_(factor)
            yield
        finally:
            for key, scale in scales.items():
                scale.copy_(before[key])

    def _prepared(self) -> DecoderCall:
        geometry, first = self._pool.geometry, self._layers[0]
        return DecoderCall(
            layers=self._native,
            norm=self._norm.call,
            output=self._output.call,
            num_layers=len(self._layers),
            hidden_size=first.down.out_features,
            intermediate_size=first.pair.out_features,
            heads=geometry.num_heads,
            kv_heads=geometry.num_kv_heads,
            dim=geometry.head_dim,
        )

    def _native_layer(self, index: int) -> DecoderLayer:
        parts, geometry = self._layers[index], self._pool.geometry.layers[index]
        query, key, value = parts.products if len(parts.products) == 3 else parts.products * 3
        layer = DecoderLayer(
            input_norm=parts.input_norm.call,
            feedforward_norm=parts.feedforward_norm.call,
            query=query.call,
            key=key.call,
            value=value.call,
            out=parts.out.call,
            gate_up=parts.pair.call,
            down=parts.down.call,
            pool=self._pool.keys_and_values[self._pool.kv_layers[index]].data_ptr(),
            scale=geometry.scaling,
            softcap=geometry.softcap or 0.0,
            rotary_dim=self._rotations[index].dim,
            fused=len(parts.products) == 1,
        )
        for name in ("query_norm", "key_norm", "after_attention", "after_feedforward"):
            norm: NativeRMSNorm | None = getattr(parts, name)
            setattr(layer, name, NormCall() if norm is None else norm.call)
        return layer

    def _place(self, positions: int) -> None:
        """See that each layer's tables have so many positions."""
        moved = [rotation.cover(positions) for rotation in self._unique]
        if any(moved) or not self._native[0].cos:
            self._point_to_rotations()

    def _point_to_rotations(self) -> None:
        for layer, rotation in zip(self._native, self._rotations, strict=True):
            layer.cos, layer.sin = rotation.cos.data_ptr(), rotation.sin.data_ptr()

    def _scratch_elements(self, rows: int) -> int:
        """As decoder.cpp lays it out."""
        call = self._call
        widths: int = 2 * call.hidden_size + 2 * (call.heads + call.kv_heads) * call.dim + call.intermediate_size
        return rows * widths + _REGIONS * _REGION


def find_decoder(model: Any, pool: KVPool, kernels: Kernels) -> NativeDecoder | None:
    """A decoder that may compute ``model``, whose layers the kernels have replaced; None where it has other parts.

    Whether it really computes the model is to be tried.
    """
    base = model.base_model
    output, norm = model.get_output_embeddings(), getattr(base, "norm", None)
    rotary, embedding = getattr(base, "rotary_emb", None), model.get_input_embeddings()
    layers = [_layer(module) for module in getattr(base, "layers", ())]
    found = [layer for layer in layers if layer is not None]
    if len(found) != pool.geometry.num_layers or len(found) != len(layers) or pool.geometry.heads_differ:
        return None
    if type(output) is not NativeLinear or type(norm) is not NativeRMSNorm or rotary is None:
        return None
    types = _layer_types(rotary, model.config, len(layers))
    limit = pool.geometry.context_length
    tables = {each: _Rotation(rotary, each, pool.activations, limit) for each in set(types)}
    rotations = [tables[each] for each in types]
    width = embedding(torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    if width != norm.scale.numel() or not _fits(found, rotations, pool, norm, output):
        return None
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return NativeDecoder(kernels, pool, embedding, found, rotations, norm, output, softcap)


def _layer_types(rotary: nn.Module, config: Any, count: int) -> list[tuple[str, ...]]:
    """What the rotary module is given for each layer, beside the positions: its type, where it asks for that."""
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        return [(str(layer_type),) for layer_type in config.layer_types]
    return [()] * count


def _layer(module: Any) -> _Layer | None:
    """The parts of a decoder's layer; None if it has any other."""
    attention: Any = getattr(module, "self_attn", None)
    feedforward: Any = getattr(module, "mlp", None)
    if attention is None or type(feedforward) is not nn.Sequential:
        return None
    pair, down = feedforward if len(feedforward) == 2 else (None, None)
    # Ministral 3 scales its queries by their position, from one on that a trial may not reach.
    if "position_ids" in inspect.signature(attention.forward).parameters:
        return None
    if not isinstance(pair, NativeGatedPair) or not isinstance(down, NativeLinear):
        return None
    fused = hasattr(attention, "qkv_proj")
    products = ["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"]
    inner = {**dict.fromkeys([*products, "o_proj"], NativeLinear), "q_norm": NativeRMSNorm, "k_norm": NativeRMSNorm}
    after = hasattr(module, "pre_feedforward_layernorm")
    norms = {
        "input_norm": "input_layernorm",
        "feedforward_norm": "pre_feedforward_layernorm" if after else "post_attention_layernorm",
        "after_attention": "post_attention_layernorm" if after else None,
        "after_feedforward": "post_feedforward_layernorm" if after else None,
    }
    outer = {name: NativeRMSNorm for name in norms.values() if name is not None}
    optional = {"q_norm", "k_norm"}
    if not _has_only(attention, inner, optional) or not _has_only(
        module, {**outer, "self_attn": type(attention), "mlp": nn.Sequential}, set()
    ):
        return None
    found: dict[str, Any] = {name: None if given is None else getattr(module, given) for name, given in norms.items()}
    return _Layer(
        products=tuple(getattr(attention, name) for name in products),
        out=attention.o_proj,
        pair=pair,
        down=down,
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        **found,
    )


def _has_only(module: nn.Module, kinds: dict[str, type[nn.Module]], optional: set[str]) -> bool:
    """Whether a module's parts are these, of these classes, but for dropout, which is for training."""
    children = {name: child for name, child in module.named_children() if not isinstance(child, nn.Dropout)}
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    known = all(name in kinds and type(child) is kinds[name] for name, child in children.items())
    return not own and known and kinds.keys() - children.keys() <= optional


def _fits(
    layers: list[_Layer], rotations: list[_Rotation], pool: KVPool, norm: NativeRMSNorm, output: NativeLinear
) -> bool:
    """Whether sizes and types are what decoder.cpp takes them to be; it would reach beyond its memory otherwise."""
    geometry = pool.geometry
    hidden, intermediate = norm.scale.numel(), layers[0].pair.out_features
    queries, keys = geometry.num_heads * geometry.head_dim, geometry.num_kv_heads * geometry.head_dim
    apart, together = ((hidden, queries), (hidden, keys), (hidden, keys)), ((hidden, queries + 2 * keys),)
    behind = ((queries, hidden), (hidden, intermediate), (intermediate, hidden))
    products = {(*apart, *behind), (*together, *behind)}
    linears: list[NativeLinear | NativeGatedPair] = [output]
    for layer in layers:
        linears += (*layer.products, layer.out, layer.pair, layer.down)
    return (
        output.in_features == hidden
        and all(each.call.bits or each.packed.dtype is pool.activations for each in linears)
        and all(rotation.cos.dtype is pool.activations for rotation in rotations)
        and all(0 < rotation.dim <= geometry.head_dim and rotation.dim % 2 == 0 for rotation in rotations)
        and all(layer.sizes()[:-2] in products for layer in layers)
        and all(layer.sizes()[-2] in {(hidden,) * 2 + (0,) * 2, (hidden,) * 4} for layer in layers)
        and all(layer.sizes()[-1] in {(0, 0), (geometry.head_dim,) * 2} for layer in layers)
    )


def _norms(layer: _Layer) -> Iterator[NativeRMSNorm]:
    yield from (layer.input_norm, layer.feedforward_norm)
    yield from filter(None, (layer.query_norm, layer.key_norm, layer.after_attention, layer.after_feedforward))


def _size(norm: NativeRMSNorm | None) -> int:
    return 0 if norm is None else norm.scale.numel()

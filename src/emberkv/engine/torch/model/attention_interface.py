"""Models whose layers compute attention by themselves, made to call transformers' attention interface as others do.

Of each class of attention layers listed here, what computes attention is replaced in every layer; the projections
before and behind it stay the model's own. ALiBi, which some of these models have for positions, is handed on as one
slope a head.
"""

import re
from collections.abc import Callable
from functools import partial
from math import ceil, floor, log2
from sys import modules
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def calls_interface(config: PretrainedConfig) -> bool:
    """Whether the layers of such a model call the attention interface by themselves, as far as is known."""
    return config.model_type not in _LAYERS


def own_implementation(config: PretrainedConfig) -> str:
    """The implementation with which a model computes as it should where `calls_interface` is false.

    In Falcon's "eager" code, the biases of ALiBi are in the mask as well, and so count twice.
    """
    return "sdpa" if config.model_type == "falcon" else "eager"


def use_interface(model: Any, name: str) -> None:
    """Have all attention layers of a model of transformers call the attention function that is registered as ``name``.

    A model that does not call the interface by itself must have been made with its `own_implementation`, and cannot go
    back to that.
    """
    config = model.config
    if calls_interface(config):
        model.set_attn_implementation(name)
        _number_layers(model)
        return
    config._attn_implementation = name  # so that the model makes no masks, which the attention function does not need
    class_name, prepare = _LAYERS[config.model_type]
    layers = [module for module in model.modules() if type(module).__name__ == class_name]
    for index, layer in enumerate(layers):
        layer.config, layer.layer_idx = config, index
        with torch.device(model.device):
            prepare(layer)
    if config.model_type == "mpt":
        vars(model.base_model)["forward"] = partial(_mpt_model, model.base_model)


def _number_layers(model: Any) -> None:
    """Give attention that does not know its layer (Zamba2) the number by which keys and values are found."""
    for name, module in model.named_modules():
        place = re.search(r"\blayers\.(\d+)\.", name)
        if place and getattr(module, "layer_idx", None) == -1:
            module.layer_idx = int(place[1])


def _attend(layer: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
    """query ``[1, heads, tokens, dim]``, key and value ``[1, kv_heads, tokens, dim]``, to ``[1, tokens, heads * dim]``.

    key and query are converted to the type of value, as some models rotate them in fp32.
    """
    function: Any = ALL_ATTENTION_FUNCTIONS[layer.config._attn_implementation]
    out: Tensor
    given = {"scaling": scale, "sliding_window": window, "alibi_slopes": getattr(layer, "slopes", None)}
    out, _ = function(layer, query.to(value.dtype), key.to(value.dtype), value, None, **given)
    return out.flatten(2)


def _with_own_attention(scale: Callable[[Any], float]) -> Callable[[Any], None]:
    """For layers with a method ``_attn``, from queries, keys and values to outputs by head."""

    def attend(layer: Any, query: Tensor, key: Tensor, value: Tensor, _mask: object = None) -> tuple[Tensor, None]:
        out = _attend(layer, query, key, value, scale(layer), _window(layer))
        return out.view(*out.shape[:2], query.shape[1], -1).transpose(1, 2), None

    def prepare(layer: Any) -> None:
        vars(layer)["_attn"] = partial(attend, layer)

    return prepare


def _window(layer: Any) -> int | None:
    """GPT-Neo's windows."""
    return int(layer.config.window_size) if getattr(layer, "attention_type", "global") == "local" else None


def _with_forward(
    forward: Callable[..., tuple[Tensor, None]], slopes: Callable[[Any], Tensor | None] = lambda _: None
) -> Callable[[Any], None]:
    """For layers all of whose forward pass is replaced. slopes: of a layer's heads, where it has ALiBi."""

    def prepare(layer: Any) -> None:
        vars(layer)["forward"] = partial(forward, layer)
        vars(layer)["slopes"] = slopes(layer)

    return prepare


def _falcon(layer: Any, hidden_states: Tensor, *_: object, **others: Any) -> tuple[Tensor, None]:
    query, key, value = _split(layer.query_key_value(hidden_states), layer.num_kv_heads, layer.head_dim)
    if layer.slopes is None:
        own_module: Any = modules[type(layer).__module__]
        query, key = own_module.apply_rotary_pos_emb(query, key, *others["position_embeddings"])
    return layer.dense(_attend(layer, query, key, value, layer.inv_norm_factor)), None


def _falcon_slopes(layer: Any) -> Tensor | None:
    """Scaled with the scores. In the model's own code they have the precision of bfloat16."""
    if not layer.config.alibi:
        return None
    scale: float = layer.inv_norm_factor
    return alibi_slopes(layer.num_heads).bfloat16().float() * scale


def _bloom(layer: Any, hidden_states: Tensor, residual: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
    query, key, value = _split(layer.query_key_value(hidden_states), layer.num_heads, layer.head_dim)
    return layer.dense(_attend(layer, query, key, value, layer.inv_norm_factor)) + residual, None


def _split(fused: Tensor, kv_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``[1, tokens, ...]``, which has each KV head's queries, key and value together, what `_attend` takes."""
    by_head = fused.view(*fused.shape[:2], kv_heads, -1, dim)
    query = by_head[:, :, :, :-2].flatten(2, 3)
    return query.transpose(1, 2), by_head[:, :, :, -2].transpose(1, 2), by_head[:, :, :, -1].transpose(1, 2)


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """``[1, tokens, heads * dim]`` to ``[1, heads, tokens, dim]``."""
    return rows.view(*rows.shape[:2], heads, -1).transpose(1, 2)


def _mpt(layer: Any, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
    fused = layer.Wqkv(hidden_states)
    if layer.clip_qkv:
        fused = fused.clamp(min=-layer.clip_qkv, max=layer.clip_qkv)
    query, key, value = (_by_head(part, layer.n_heads) for part in fused.chunk(3, dim=2))
    return layer.out_proj(_attend(layer, query, key, value, layer.softmax_scale)), None


def _mpt_model(base: Any, input_ids: Tensor, **_: object) -> BaseModelOutputWithPast:
    """MPT's own makes a mask and biases for its whole context in every pass."""
    hidden = base.wte(input_ids)
    for block in base.blocks:
        hidden, _weights = block(hidden, position_bias=None, attention_mask=None)
    return BaseModelOutputWithPast(last_hidden_state=base.norm_f(hidden))


def _xglm(layer: Any, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
    products = layer.q_proj(hidden_states) * layer.scaling, layer.k_proj(hidden_states), layer.v_proj(hidden_states)
    query, key, value = (_by_head(product, layer.num_heads) for product in products)
    return layer.out_proj(_attend(layer, query, key, value, 1.0)), None


_LAYERS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "bloom": ("BloomAttention", _with_forward(_bloom, lambda layer: alibi_slopes(layer.num_heads))),
    "codegen": ("CodeGenAttention", _with_own_attention(lambda layer: 1 / layer.scale_attn)),
    "falcon": ("FalconAttention", _with_forward(_falcon, _falcon_slopes)),
    "gpt_neo": ("GPTNeoSelfAttention", _with_own_attention(lambda _: 1.0)),
    "gpt_neox_japanese": ("GPTNeoXJapaneseAttention", _with_own_attention(lambda layer: 1 / layer.norm_factor)),
    "gptj": ("GPTJAttention", _with_own_attention(lambda layer: 1 / layer.scale_attn)),
    "mpt": ("MptAttention", _with_forward(_mpt, lambda layer: mpt_slopes(layer.n_heads))),
    "xglm": ("XGLMAttention", _with_forward(_xglm)),
}
"""By model type: the class of attention layers, and what is done to each of them."""


def alibi_slopes(heads: int) -> Tensor:
    """fp32 ``[heads]``: a geometric sequence, as in Press et al. 2021 (arXiv:2108.12409).

    Where heads are no power of two, those beyond take every second one of the next power's.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    whole = 2 ** floor(log2(heads))
    exponents = [8 * i / whole for i in range(1, whole + 1)]
    exponents += [4 * i / whole for i in range(1, 2 * (heads - whole), 2)]
    return torch.tensor([2.0**-each for each in exponents])


def mpt_slopes(heads: int) -> Tensor:
    """As `alibi_slopes`, in MPT's order: where heads are no power of two, some of the next power's, even ones first."""
    whole = 2 ** ceil(log2(heads))
    slopes = [2.0 ** (-8 * i / whole) for i in range(1, whole + 1)]
    return torch.tensor(slopes if whole == heads else (slopes[1::2] + slopes[::2])[:heads])

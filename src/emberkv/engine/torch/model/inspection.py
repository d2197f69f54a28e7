"""What a model is, found without its weights, and the refusal of models whose state is of another kind.

A model is built on torch's meta device, where it has shapes but no weights, and run once with an attention
function that only takes notes. What is served is then what the model really does, not what its name promises.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf, prod
from threading import get_ident
from traceback import walk_tb
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from emberkv.engine.torch.layers import expert_shapes, linear_parts, output_layer
from emberkv.engine.torch.model.attention_interface import calls_interface, use_interface
from emberkv.engine.torch.model.geometry import HeadShape, LayerGeometry, ModelGeometry, Window
from emberkv.engine.torch.model.latent import into_latents, out_of_latents, use_latents
from emberkv.engine.torch.model.multimodal import text_config
from emberkv.engine.torch.model.state_layers import StateGeometry, state_layers
from emberkv.errors import CorruptModelError, EmberError, UnsupportedModelError, reason_of

SERVED_ROPE_TYPES = frozenset({"default", "dynamic", "linear", "llama3", "longrope", "proportional", "yarn"})


def rope_types(config: PretrainedConfig) -> set[str]:
    """The types of RoPE that a model's layers have; none where positions are not rotary."""
    return {parameters["rope_type"] for parameters in _parameters(config)}


def stated_context(config: PretrainedConfig) -> int | None:
    """The context in tokens by the config, which MPT and BLOOM name in their own ways; None where it does not say."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    return next((value for name in names if (value := getattr(config, name, None))), None)


def rotation_limit(config: PretrainedConfig, context: int) -> int:
    """The most tokens, at most the model's ``context``, for which a position's rotation depends on that position alone.

    "longrope" and "dynamic" take other frequencies, for every position, once the longest sequence in the batch
    outgrows the length that the model was first trained for. Keys stored before that would silently be wrong after
    it, for a longer prompt as well as for the neighbours in a batch; so such a model is served up to that length only.
    For "dynamic" it is the context that the config states.
    """
    changes = [
        parameters["original_max_position_embeddings"]
        for parameters in _parameters(config)
        if parameters["rope_type"] == "longrope"
    ]
    return int(min([context, *changes]))


def with_fixed_rotation(config: PretrainedConfig) -> PretrainedConfig:
    """A copy in which "dynamic", which looks at the positions' values, is the "default" that it is up to the limit."""
    fixed = copy.deepcopy(config)
    for parameters in _parameters(fixed):
        if parameters["rope_type"] == "dynamic":
            parameters["rope_type"] = "default"
    return fixed


def _parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """RoPE's parameters, defaults filled in: one set for all layers, or one for each type of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in given.values() if isinstance(each, dict)]
    return [each for each in nested or [given] if each.get("rope_type")]


MOST_LAYERS = 1000
_MOST_MODULES = 50_000
_LONGEST_CONTEXT = 2**31 - 1
SERVED_LAYER_TYPES = frozenset(
    {"chunked_attention", "conv", "full_attention", "hybrid", "linear_attention", "sliding_attention"}
)
_FEED_FORWARD_TYPES = frozenset({"mlp", "moe"})
"""Of layers that neither attend nor keep a state (Nemotron-H)."""

_KNOWN_STATES = "Mamba-2 and the gated delta net"

_HARMLESS_ARGUMENTS = frozenset(
    {
        "dropout", "scaling", "sliding_window", "softcap", "is_causal", "position_ids", "use_cache",
        "output_attentions", "output_hidden_states", "output_router_logits", "s_aux", "alibi_slopes",
    }
)  # fmt: skip
"""What a layer may hand to its attention function; anything else could change the result unseen."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What one layer handed to its attention function."""

    layer_idx: int
    query_shape: tuple[int, ...]  # (batch, heads, tokens, head_dim)
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    key: torch.Tensor
    shares: int | None  # the first earlier call that was given the very same keys
    is_causal: bool
    has_mask: bool
    arguments: dict[str, Any]  # those that are set

    @property
    def head_shape(self) -> HeadShape:
        return HeadShape(self.query_shape[1], self.key_shape[1], max(self.key_shape[3], self.value_shape[3]))


_calls: ContextVar[list[_Call]] = ContextVar("_calls")


def _note(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function that writes down what it was given and answers with the right shape."""
    given = {name: argument for name, argument in arguments.items() if argument is not None}
    causal = bool(getattr(module, "is_causal", True)) and given.get("is_causal", True) is not False
    calls = _calls.get()
    calls.append(
        _Call(
            layer_idx=int(getattr(module, "layer_idx", -1)),
            query_shape=tuple(into_latents(module, query).shape),
            key_shape=tuple(key.shape),
            value_shape=tuple(value.shape),
            key=key,
            shares=next((index for index, call in enumerate(calls) if call.key is key), None),
            is_causal=causal,
            has_mask=attention_mask is not None,
            arguments=given,
        )
    )
    batch, heads, tokens, _ = query.shape
    out = query.new_empty(batch * tokens, heads, value.shape[-1])
    return out_of_latents(module, out).view(batch, tokens, heads, -1), None


_NOTE_TAKER = "emberkv_note_taker"
AttentionInterface.register(_NOTE_TAKER, _note)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """shapes: of each parameter and buffer of the model's state, by name, with ``prefix`` before those of its base.

    parameters: names of the state's parameters. linears: the linear layers' weights, as ``(out, in)``. experts: those
    stacked by expert, as ``(experts, out, in)``. output: the name of the output layer's weight; tied: whether it is the
    embedding's.
    """

    geometry: ModelGeometry
    shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]
    linears: Mapping[str, tuple[int, ...]]
    experts: Mapping[str, tuple[int, int, int]]
    output: str | None
    tied: bool
    prefix: str

    def name_of(self, stored: str) -> str | None:
        """The name in ``shapes`` of a tensor that is stored with or without the prefix; None where there is none."""
        return next((name for name in (stored, f"{self.prefix}{stored}") if name in self.shapes), None)

    @property
    def shared(self) -> frozenset[str]:
        """Names in ``shapes`` whose values are another's."""
        return frozenset({self.output} if self.tied and self.output is not None else ())

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for name, shape in self.shapes.items() if name not in self.shared)

    def num_bytes(self, dtype: torch.dtype, held: Mapping[str, int], *, packed: bool = False) -> int:
        """What the state takes in memory. held: bytes of what is not held in ``dtype``, by name.

        packed: as layers hold it on a CPU, where an output layer has a copy of its own of the embedding that it shares.
        """
        left_out: frozenset[str] = frozenset() if packed else self.shared
        return sum(held.values()) + sum(
            prod(shape) * dtype.itemsize
            for name, shape in self.shapes.items()
            if name not in held and name not in left_out
        )

    def is_tied_embedding(self, name: str) -> bool:
        """Whether the output layer has the values of the weight of that name."""
        return any(name != output and self.shapes[name] == self.shapes[output] for output in self.shared)

    def is_product(self, name: str) -> bool:
        """Whether it is the weight of a linear layer or of experts, which the kernels pack."""
        return name in self.linears or name in self.experts


def inspect_geometry(config: PretrainedConfig) -> ModelGeometry:
    """The attention geometry of the model that ``config`` describes, without its weights. Raises as `inspect_model`."""
    return inspect_model(text_config(config)).geometry


def inspect_model(config: PretrainedConfig) -> ModelShape:
    """What the model that ``config`` describes would be, without its weights.

    It is built and traced once for all configs that say the same.

    Raises UnsupportedModelError naming the layer type when the model keeps other state than per-token keys and
    values, or attends in a way that this engine does not compute; CorruptModelError when it describes no model.
    """
    try:
        text = _text_of(config)
        if text is None:
            return _inspect(config)
        return _inspected(_Described(text, type(config), MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), config))
    except EmberError:
        raise
    except Exception as error:  # the architecture's own code, on unchecked values
        raise CorruptModelError(
            f"config.json describes no {config.model_type} model that can be built: {reason_of(error)}"
        ) from error


@dataclass(frozen=True, slots=True)
class _Described:
    """A config, equal to others of the same text and classes."""

    text: str
    config_class: type
    model_class: object
    config: PretrainedConfig = field(compare=False)


def _text_of(config: PretrainedConfig) -> str | None:
    """All that an inspection depends on; None for values that JSON does not have, as a program may have set them."""
    try:
        values = config.to_dict()
        values.pop("_name_or_path", None)
        text = json.dumps(values, sort_keys=True)
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
    experts = getattr(config, "_experts_implementation_internal", None)  # `to_dict` leaves it out
    return f"{experts!r} {text}"


@lru_cache(maxsize=64)
def _inspected(described: _Described) -> ModelShape:
    return _inspect(described.config)


def _inspect(config: PretrainedConfig) -> ModelShape:
    _refuse_by_config(config)
    if config.num_hidden_layers > MOST_LAYERS:
        raise CorruptModelError(f"config.json gives {config.num_hidden_layers} layers; at most {MOST_LAYERS} are built")
    bare = with_fixed_rotation(config)
    vars(bare)["pad_token_id"] = None  # with one, some models look at the tokens, which have no values on this device
    bare._attn_implementation = "eager"
    # Not from_config: it sets torch's default dtype, which is one for the process, and other threads may load models.
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"), _bounded_modules():
        model = model_class(bare).to(torch.bfloat16).eval()
    _refuse_by_class(config, model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    modules = {f"{name}.weight": module for name, module in model.named_modules()}
    found = {name: linear_parts(module) for name, module in modules.items()}
    output = output_layer(model)
    return ModelShape(
        _geometry(config, _trace(config, model), state_layers(model)),
        shapes,
        parameters=frozenset(name for name, _ in model.named_parameters()),
        linears={name: tuple(parts[0].shape) for name, parts in found.items() if parts is not None},
        experts={
            f"{name}.{own}": shape
            for name, module in model.named_modules()
            for own, shape in expert_shapes(module).items()
        },
        output=next((name for name, module in modules.items() if module is output), None),
        tied=bool(config.tie_word_embeddings),
        prefix=f"{model.base_model_prefix}.",
    )


@contextmanager
def _bounded_modules() -> Iterator[None]:
    """Stop a model that is built within, on this thread, once it has more parts than any model has."""
    here, count = get_ident(), 0

    def added(*_: object) -> None:
        nonlocal count
        count += get_ident() == here
        if count > _MOST_MODULES:
            raise CorruptModelError(f"config.json describes a model of more than {_MOST_MODULES:,} modules")

    handle = register_module_module_registration_hook(added)
    try:
        yield
    finally:
        handle.remove()


def _refuse(config: PretrainedConfig, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{config.model_type} cannot be served: {reason}; accepted are decoder-only models whose layers are all "
        f"{' or '.join(sorted(SERVED_LAYER_TYPES))}"
    )


def _refuse_by_config(config: PretrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise _refuse(config, "it is an encoder-decoder")
    if config.get_text_config() is not config:
        raise _refuse(config, "it is multimodal, and the text model inside it is not known")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refuse(config, "it has no causal language model head")
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - SERVED_LAYER_TYPES - _FEED_FORWARD_TYPES)
    if foreign:
        raise _refuse(config, f"it has layers of type {', '.join(map(repr, foreign))}")
    strange = sorted(rope_types(config) - SERVED_ROPE_TYPES)
    if strange:
        raise _refuse(config, f"its positions are rotated by RoPE of type {', '.join(map(repr, strange))}")
    if getattr(config, "quantization", None):
        raise _refuse(config, "its weights are quantised by MLX")
    if getattr(config, "quantization_config", None):
        raise _refuse(config, "its weights are quantized")
    if getattr(config, "alibi", False) and calls_interface(config):
        raise _refuse(config, "it has ALiBi position biases")
    ignored = [name for name in ("qk_ln", "prefix_lm") if getattr(getattr(config, "attn_config", None), name, False)]
    if ignored:
        raise _refuse(config, f"its attn_config sets {' and '.join(ignored)}, which transformers does not compute")


def _refuse_by_class(config: PretrainedConfig, model: PreTrainedModel) -> None:
    layers = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "layer_idx")})
    named = ", ".join(layers) or type(model).__name__
    states = state_layers(model)
    if model._is_stateful and not states:
        raise _refuse(config, f"{named} keeps recurrent state of another kind than {_KNOWN_STATES}")
    if sum(isinstance(module, torch.nn.Conv1d) for module in model.modules()) != len(states):
        raise _refuse(config, f"{named} has convolutions over past tokens")


@contextmanager
def _taking_notes(calls: list[_Call]) -> Iterator[None]:
    token = _calls.set(calls)
    try:
        yield
    finally:
        _calls.reset(token)


def _trace(config: PretrainedConfig, model: PreTrainedModel) -> list[_Call]:
    """Every attention call of one forward pass over three tokens.

    The architecture's own code runs here, so any of the usual errors says that it cannot be traced.
    """
    calls: list[_Call] = []
    use_latents(model)
    use_interface(model, _NOTE_TAKER)
    tokens = torch.zeros(1, 3, dtype=torch.long, device="meta")
    try:
        with _taking_notes(calls), torch.inference_mode():
            model(input_ids=tokens, use_cache=False)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        where = _failed_module(error)
        raise _refuse(config, f"the forward pass of {where} cannot be traced ({reason_of(error)})") from error
    if not calls:
        layers = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "layer_idx")})
        named = ", ".join(layers) or type(model).__name__
        raise _refuse(config, f"{named} does not go through transformers' AttentionInterface")
    return calls


def _failed_module(error: Exception) -> str:
    """The class of the innermost module in whose code the error was raised. Torch's own layers are no help to name."""
    own = (frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__))
    modules = [type(each) for each in own if isinstance(each, torch.nn.Module)]
    return next(kind.__name__ for kind in reversed(modules) if not kind.__module__.startswith("torch."))


def _geometry(config: PretrainedConfig, calls: list[_Call], states: tuple[StateGeometry, ...]) -> ModelGeometry:
    attending = [call.layer_idx for call in calls]
    others = {each.layer for each in states} | _feed_forwards(config)
    missing = set(range(config.num_hidden_layers)) - others - set(attending)
    kinds = getattr(config, "layer_types", None) or ()
    foreign = [layer for layer in sorted(missing) if layer < len(kinds) and kinds[layer] == "linear_attention"]
    if foreign:
        raise _refuse(config, f"layer {foreign[0]} keeps recurrent state of another kind than {_KNOWN_STATES}")
    if missing or attending != sorted(set(attending)) or not set(attending) <= set(range(config.num_hidden_layers)):
        count = config.num_hidden_layers - len(others - set(attending))
        order = ", ".join(map(str, attending)) or "none"
        raise _refuse(config, f"its layers ({count}) attend not once each in order but: {order}")
    for call in calls:
        if call.key_shape[:3] != call.value_shape[:3]:
            raise _refuse(config, f"its keys {call.key_shape} and values {call.value_shape} differ in heads")
    usual = calls[0].head_shape
    context = stated_context(config)
    if not context:
        raise _refuse(config, "its config gives no context length (max_position_embeddings)")
    limit = rotation_limit(config, context)
    if not 0 < limit <= _LONGEST_CONTEXT:
        raise CorruptModelError(
            f"config.json gives a context of {limit} tokens; it must be from 1 to {_LONGEST_CONTEXT:,}"
        )
    return ModelGeometry(
        num_heads=usual.heads,
        num_kv_heads=usual.kv_heads,
        head_dim=usual.dim,
        vocab_size=config.vocab_size,
        context_length=limit,
        layers=tuple(_layer(config, call, usual) for call in calls),
        stated_context=int(context),
        states=states,
        ends_with_attention=all(each.layer < attending[-1] for each in states),
        attending=tuple(attending) if len(attending) < config.num_hidden_layers else (),
        model_layers=config.num_hidden_layers,
    )


def _feed_forwards(config: PretrainedConfig) -> set[int]:
    """Numbers of layers that, by the config, have no part that looks at other tokens."""
    kinds = getattr(config, "layer_types", None) or ()
    return {layer for layer, kind in enumerate(kinds) if kind in _FEED_FORWARD_TYPES}


def _layer(config: PretrainedConfig, call: _Call, usual: HeadShape) -> LayerGeometry:
    unknown = sorted(call.arguments.keys() - _HARMLESS_ARGUMENTS)
    if unknown:
        raise _refuse(config, f"its attention takes {', '.join(unknown)}")
    if call.has_mask or not call.is_causal:
        raise _refuse(config, f"the attention of layer {call.layer_idx} is not causal")
    sliding = call.arguments.get("sliding_window") or None
    if (sliding is not None) != _says_sliding(config, call.layer_idx) and not _slides_over_all(config):
        raise _refuse(config, f"layer {call.layer_idx} slides by its config or in its forward pass, but not both")
    window = window_of(config, call.layer_idx, sliding)
    if window is not None and not (isinstance(window.size, int) and window.size > 0):
        kind = "chunks" if window.chunked else "a sliding window"
        raise _refuse(config, f"layer {call.layer_idx} has {kind} of {window.size} tokens")
    scaling = call.arguments.get("scaling", call.query_shape[-1] ** -0.5)
    sinks = call.arguments.get("s_aux")
    if sinks is not None and sinks.shape != call.query_shape[1:2]:
        raise _refuse(config, f"layer {call.layer_idx} has sinks of shape {list(sinks.shape)}, not one a head")
    return LayerGeometry(
        window,
        call.arguments.get("softcap"),
        float(scaling),
        sinks=sinks is not None,
        alibi="alibi_slopes" in call.arguments,
        shares=call.shares,
        head_shape=None if call.head_shape == usual else call.head_shape,
    )


def window_of(config: PretrainedConfig, layer: int, sliding_window: int | None) -> Window | None:
    """Of a layer that is given ``sliding_window``. Chunks are in the config alone: no layer is given them."""
    if sliding_window:
        return Window(sliding_window)
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[layer] == "chunked_attention":
        return Window(config.attention_chunk_size, chunked=True)
    return None


def _slides_over_all(config: PretrainedConfig) -> bool:
    """Whether the config's window is as long as the context, so that no token is outside of it (Phi-3.5-MoE)."""
    return (getattr(config, "sliding_window", None) or 0) >= (stated_context(config) or inf)


def _says_sliding(config: PretrainedConfig, layer: int) -> bool:
    """Whether the config wants a window here: some models put it into the mask and tell attention nothing."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return bool(layer_types[layer] == "sliding_attention")
    attention_layers = getattr(config, "attention_layers", None)  # GPT-Neo's
    if attention_layers:
        return bool(attention_layers[layer] == "local")
    return bool(getattr(config, "sliding_window", None))

"""A transformer's shape, in parameters and bytes, read from a Hugging Face ``config.json`` or by a known name; and how
many users with how much context fit into a machine's memory beside it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from math import floor
from pathlib import Path
from typing import Any

from emberkv.errors import ConfigError, UnsupportedModelError

DTYPE_BITS = {"fp32": 32.0, "fp16": 16.0, "bf16": 16.0, "fp8": 8.0, "int8": 8.5, "int4": 4.25}
"""Bits of a parameter. 8-bit integers come with a 16-bit scale for each group of 32, 4-bit ones with a 16-bit scale and
a 16-bit zero point for each group of 128."""

ON_LOAD_BITS = {"int8": 8 + 16 / 32, "int4": 4 + 2 * 16 / 32}
"""Bits of a parameter that emberkv itself rounds while it loads a model (`--quantize`): each group of 32 has a 16-bit
scale, and in 4 bits a 16-bit offset."""

ON_LOAD_OUTPUT = "int8"
"""The type to which emberkv rounds the output layer, whatever `--quantize` says."""

KV_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8}
"""Bits of a value of the KV cache. In int8, each token has a 16-bit scale for a head's keys and one for its values."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes of a decoder. intermediate: width of a dense layer's MLP; of one expert: expert_intermediate.

    moe_layers: how many layers are mixtures of ``experts``, of which a token goes through experts_per_token and,
    always, a shared one of width shared_intermediate. window: tokens that a query sees in window_layers of the layers;
    the others see all. weights_dtype: of the layers' linear weights; embeddings, norms and routers have base_dtype, as
    quantised checkpoints leave them. rounded_on_load: whether emberkv rounds the linear weights itself (`--quantize`),
    and the output layer to 8 bits, in a copy where the embedding is the same tensor. context: the most tokens that the
    model was made for.

    >>> from emberkv.sim.model_spec import load_spec
    >>> spec = load_spec("llama-3.1-8b")
    >>> spec.parameters, spec.kv_bytes_per_token, spec.context
    (8030261248, 131072, 131072)
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    tied: bool = False
    moe_layers: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    window: int = 0
    window_layers: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    head_norms: bool = False
    norms: int = 2
    base_dtype: str = "bf16"
    weights_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    rounded_on_load: bool = False

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of the keys of one token and layer; values are as many."""
        return self.kv_heads * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """The parameters of one layer's linear weights of attention."""
        return self.hidden * (2 * self.query_size + 2 * self.kv_size)

    @property
    def linear_parameters(self) -> int:
        """All layers' linear weights, every expert included: what quantisation shrinks."""
        dense = (self.layers - self.moe_layers) * 3 * self.hidden * self.intermediate
        expert = 3 * self.hidden * self.expert_intermediate
        shared = 3 * self.hidden * self.shared_intermediate
        return self.layers * self.attention_parameters + dense + self.moe_layers * (self.experts * expert + shared)

    @property
    def other_parameters(self) -> int:
        """Embedding, output head, norms, biases and routers."""
        biases = (self.query_size + 2 * self.kv_size) * self.qkv_bias + self.hidden * self.output_bias
        each_layer = self.norms * self.hidden + biases + 2 * self.head_dim * self.head_norms
        routers = self.moe_layers * (self.hidden * self.experts + self.hidden * (self.shared_intermediate > 0))
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.layers * each_layer + self.hidden + routers

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """The parameters that one token goes through; the embedding counts whole."""
        idle = self.moe_layers * (self.experts - self.experts_per_token) * 3 * self.hidden * self.expert_intermediate
        return self.parameters - idle

    @property
    def linear_bits(self) -> float:
        """Bits of a parameter of the layers' linear weights, its share of scales included."""
        return (ON_LOAD_BITS if self.rounded_on_load else DTYPE_BITS)[self.weights_dtype]

    @property
    def output_bits(self) -> float:
        """Bits of a parameter of the output layer, likewise."""
        return ON_LOAD_BITS[ON_LOAD_OUTPUT] if self.rounded_on_load else DTYPE_BITS[self.base_dtype]

    @property
    def weight_bytes(self) -> int:
        base, output = DTYPE_BITS[self.base_dtype], self.vocab * self.hidden
        bits = self.linear_parameters * self.linear_bits + self.other_parameters * base
        if self.rounded_on_load:
            bits += output * (self.output_bits - (0 if self.tied else base))
        return round(bits / 8)

    @property
    def kv_bytes_per_layer(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        scale = 16 if self.kv_dtype == "int8" else 0
        return 2 * self.kv_heads * (self.head_dim * KV_BITS[self.kv_dtype] + scale) // 8

    @property
    def kv_bytes_per_token(self) -> int:
        """Over all layers; a window's layers keep theirs too, as a shared prefix cache needs them."""
        return self.layers * self.kv_bytes_per_layer

    def with_dtypes(self, *, weights: str | None = None, kv: str | None = None, on_load: bool = False) -> "ModelSpec":
        """The same shapes in other types. Raises ConfigError naming those accepted.

        on_load: whether emberkv serves the model: it then rounds plain weights to int8 or int4 in its own way.

        >>> spec = load_spec("llama-3.1-8b")
        >>> [spec.with_dtypes(weights="int4", on_load=each).linear_bits for each in (False, True)]
        [4.25, 5.0]
        """
        if weights is not None and weights not in DTYPE_BITS:
            raise ConfigError(f"dtype is {weights!r}; use one of {', '.join(DTYPE_BITS)}")
        if kv is not None and kv not in KV_BITS:
            raise ConfigError(f"the KV dtype is {kv!r}; use one of {', '.join(KV_BITS)}")
        found = replace(self, kv_dtype=kv or self.kv_dtype)
        if weights is None or weights == self.weights_dtype:
            return found
        is_plain = self.weights_dtype == self.base_dtype
        return replace(found, weights_dtype=weights, rounded_on_load=on_load and is_plain and weights in ON_LOAD_BITS)


_TORCH_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})
_OTHER_STATE = ("kv_lora_rank", "linear_num_key_heads", "ssm_state_size", "mamba_d_state", "cross_attention_layers")
"""Keys of models whose cache is not keys and values of every token and head."""

_OTHER_SHAPES = (
    "global_head_dim", "num_global_key_value_heads", "swa_num_key_value_heads", "swa_head_dim", "v_head_dim",
    "swa_v_head_dim", "num_attention_heads_per_layer", "per_layer_config", "num_kv_shared_layers",
)  # fmt: skip
"""Keys that give some layers another number or size of heads than the others have, values another size than keys, or
layers keys and values in common.
"""
_SAME_AS = {
    "global_head_dim": "head_dim", "swa_head_dim": "head_dim", "v_head_dim": "head_dim", "swa_v_head_dim": "head_dim",
    "num_global_key_value_heads": "num_key_value_heads", "swa_num_key_value_heads": "num_key_value_heads",
    "num_attention_heads_per_layer": "num_attention_heads",
}  # fmt: skip
"""The key whose value each of these repeats in a model whose layers are alike."""

DEMO_NAME = "emberkv-demo"


def spec_from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Read a ``config.json``; that of a model for text and images by its text part.

    Raises ConfigError naming a key that is missing or no number, and UnsupportedModelError for models whose state is
    not per-token keys and values, or differs from layer to layer.
    """
    text = config.get("text_config")
    found = {**text, **_quantisation_of(config)} if isinstance(text, Mapping) else dict(config)
    others = [key for key in _OTHER_STATE if found.get(key)]
    kinds = set(found.get("layer_types") or ()) - _SERVED_LAYERS
    if others or kinds:
        raise UnsupportedModelError(
            f"{name} keeps other state than per-token keys and values ({', '.join([*others, *sorted(kinds)])})"
        )
    differing = [key for key in _OTHER_SHAPES if _differs(found, key)]
    if differing:
        raise UnsupportedModelError(
            f"{name} has layers that differ in heads or share keys and values, or values of another size than keys "
            f"({', '.join(differing)}), which the simulator does not compute; emberkv models and emberkv size read "
            "such a model's folder with its weights"
        )
    return _read(_Fields(name, found))


def _differs(config: Mapping[str, Any], key: str) -> bool:
    """Whether the value of a key in `_OTHER_SHAPES` makes a difference."""
    value = config.get(key)
    if not value:
        return False
    usual = config.get(_SAME_AS.get(key, ""))
    if usual is None and _SAME_AS.get(key) == "head_dim":
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        usual = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None
    return any(each != usual for each in (value if isinstance(value, list) else [value]))


def load_spec(model: str) -> ModelSpec:
    """A named model, a ``config.json``, or a folder with one. Raises ConfigError, UnsupportedModelError."""
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        source: Path | Traversable = path
        name = path.parent.name if path.name == "config.json" else path.stem
    else:
        source, name = _named(model), model.lower()
    try:
        config = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} cannot be read as a model's config: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{source} is not a JSON object; a model's config.json is expected")
    return spec_from_config(config, name)


def model_names() -> list[str]:
    folder = files("emberkv.sim") / "models"
    return sorted([DEMO_NAME, *(each.name.removesuffix(".json") for each in folder.iterdir())])


def _named(model: str) -> Traversable:
    name = model.lower()
    if name == DEMO_NAME:
        return files("emberkv") / "demo_model" / "config.json"
    if name not in model_names():
        known = ", ".join(model_names())
        raise ConfigError(f"no model {model!r}; give a config.json, a folder that has one, or one of {known}")
    return files("emberkv.sim") / "models" / f"{name}.json"


class _Fields:
    """A config's values, each asked for by all its names."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name = name
        self.values = values

    def number(self, *keys: str, default: int | None = None) -> int:
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{self.name}: {key} is {value!r}; a whole number is expected")
            return value
        if default is None:
            raise ConfigError(f"{self.name}: the config has no {' or '.join(keys)}")
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        return default if value is None else bool(value)


def _read(fields: _Fields) -> ModelSpec:
    kind = str(fields.values.get("model_type", ""))
    hidden, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    layers = fields.number("num_hidden_layers")
    base = str(fields.values.get("torch_dtype") or fields.values.get("dtype") or "bfloat16")
    base_dtype = _TORCH_NAMES.get(base.removeprefix("torch."))
    if base_dtype is None:
        raise ConfigError(f"{fields.name}: dtype is {base!r}; use one of {', '.join(_TORCH_NAMES)}")
    quantised = _weights_dtype(fields)
    bias = fields.flag("attention_bias")
    return ModelSpec(
        name=fields.name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(fields, kind, heads),
        head_dim=fields.number("head_dim", default=hidden // max(1, heads)),
        intermediate=fields.number("intermediate_size", default=0),
        vocab=fields.number("vocab_size"),
        context=fields.number("max_position_embeddings", default=0),
        tied=fields.flag("tie_word_embeddings", default=kind.startswith("gemma")),
        qkv_bias=bias or kind.startswith("qwen2"),
        output_bias=bias,
        head_norms=kind.startswith(("qwen3", "gemma3")),
        norms=4 if kind.startswith(("gemma2", "gemma3")) else 2,
        base_dtype=base_dtype,
        weights_dtype=quantised or base_dtype,
        kv_dtype=base_dtype,
        rounded_on_load=False,
        **_mixture(fields, layers),
        **_windows(fields, layers),
    )


_NO_SHARED_HEADS = frozenset({"biogpt", "gpt_neox", "gpt_neox_japanese", "modernbert-decoder", "opt", "persimmon"})
"""Types of models that have as many heads of keys as of queries, whatever else their configs hold."""


def _kv_heads(fields: _Fields, kind: str, heads: int) -> int:
    """Falcon's configs have ``num_kv_heads``, which counts in its newer decoder alone."""
    if kind in _NO_SHARED_HEADS:
        return heads
    if kind != "falcon":
        return fields.number("num_key_value_heads", default=heads)
    if fields.flag("new_decoder_architecture"):
        return fields.number("num_kv_heads", default=heads)
    return 1 if fields.flag("multi_query", default=True) else heads


def _mixture(fields: _Fields, layers: int) -> dict[str, int]:
    experts = fields.number("num_experts", "num_local_experts", "n_routed_experts", default=0)
    if not experts:
        return {}
    dense = set(fields.values.get("mlp_only_layers") or ()) | set(
        range(fields.number("first_k_dense_replace", default=0))
    )
    step = fields.number("decoder_sparse_step", default=1)
    width = fields.number("moe_intermediate_size", "intermediate_size")
    shared = fields.number("n_shared_experts", default=0) * width
    return {
        "experts": experts,
        "experts_per_token": fields.number("num_experts_per_tok"),
        "expert_intermediate": width,
        "shared_intermediate": fields.number("shared_expert_intermediate_size", default=shared),
        "moe_layers": sum(layer not in dense and (layer + 1) % max(1, step) == 0 for layer in range(layers)),
    }


def _windows(fields: _Fields, layers: int) -> dict[str, int]:
    """The layers that attend to a window: listed one by one, by a switch (Qwen), or by the width alone (Mistral)."""
    window = fields.number("sliding_window", default=0)
    kinds = fields.values.get("layer_types")
    if kinds:
        count = sum(kind == "sliding_attention" for kind in kinds)
    elif not fields.flag("use_sliding_window", default=True):
        count = 0
    elif "max_window_layers" in fields.values:
        count = max(0, layers - fields.number("max_window_layers"))
    else:
        count = layers
    return {"window": window, "window_layers": count} if window and count else {}


def _quantisation_of(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("quantization_config", "torch_dtype", "dtype") if config.get(key)}


def _weights_dtype(fields: _Fields) -> str | None:
    """The type that the weights are quantised to, or None. Raises ConfigError for a scheme that is not known."""
    scheme = fields.values.get("quantization_config")
    if not isinstance(scheme, Mapping):
        return None
    groups = scheme.get("config_groups") or {}
    weights = next((group.get("weights") or {} for group in groups.values()), {}) if groups else scheme
    bits = weights.get("bits") or weights.get("num_bits")
    method = scheme.get("quant_method")
    if bits == 4 or weights.get("load_in_4bit"):
        return "int4"
    if method in ("fp8", "fbgemm_fp8") or (bits == 8 and weights.get("type") == "float"):
        return "fp8"
    if bits == 8 or weights.get("load_in_8bit"):
        return "int8"
    raise ConfigError(f"{fields.name}: quantised by {method!r} to {bits} bits; 4 and 8 bits and fp8 are known")


_MULTIPLES = {"k": 1_000, "m": 1_000_000, "ki": 1024, "mi": 1024**2}


def parse_tokens(text: str, option: str) -> int:
    """A number of tokens, with or without a multiple: "200000", "200k", "128Ki", "1M".

    option: what gave it, for the error. Raises ConfigError.

    >>> parse_tokens("200k", "--context"), parse_tokens("128Ki", "--context")
    (200000, 131072)
    """
    digits = text.strip().lower().rstrip("kmi")
    multiple = _MULTIPLES.get(text.strip().lower().removeprefix(digits), None if text.strip()[len(digits) :] else 1)
    try:
        tokens = floor(float(digits.replace(",", "").replace("_", "")) * (multiple or 0))
    except (ValueError, OverflowError):
        tokens = 0
    if multiple is None or tokens < 1:
        raise ConfigError(f"{option} is {text!r}; use a number of tokens such as 32768, 200k or 128Ki")
    return tokens


@dataclass(frozen=True, slots=True)
class Precision:
    """A choice of number types, with what the model takes in them.

    weights, kv: the types' names. weight_bytes: of all weights. kv_bytes_per_token: of one token's keys and values over
    all layers. options: of `emberkv serve`, that choose it; None: it is not served here.
    """

    weights: str
    kv: str
    weight_bytes: int
    kv_bytes_per_token: int
    options: str | None = ""


@dataclass(frozen=True, slots=True)
class ContextDemand:
    """What is asked for: ``users`` at the same time, each with ``context`` tokens, of which the first ``shared`` are
    the same for all (a system prompt with its tools), so that their KV state is kept once.
    """

    context: int
    users: int = 1
    shared: int = 0

    def __post_init__(self) -> None:
        if self.shared > self.context:
            raise ConfigError(
                f"--shared is {self.shared:,} tokens; --context has {self.context:,}, so use at most that"
            )

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are in the pool.

        >>> ContextDemand(context=200_000, users=5, shared=20_000).tokens
        920000
        """
        return self.shared + self.users * (self.context - self.shared)


@dataclass(frozen=True, slots=True)
class Fit:
    """What a precision makes of a demand in ``memory`` bytes.

    users: how many fit at the context asked for. context: the longest one that fits for the users asked for.
    """

    precision: Precision
    kv_bytes: int
    total_bytes: int
    fits: bool
    users: int
    context: int


def fit(precision: Precision, demand: ContextDemand, memory: int, longest: int = 0) -> Fit:
    """Compute what fits beside the weights in ``memory`` bytes. longest: the model's own context; 0: unknown.

    >>> eight_bits = Precision("int8", "bfloat16", weight_bytes=8 * 2**30, kv_bytes_per_token=2**17)
    >>> found = fit(eight_bits, ContextDemand(context=32_768, users=4), memory=32 * 2**30)
    >>> found.fits, found.users, found.context
    (True, 6, 49152)
    """
    kv_bytes = demand.tokens * precision.kv_bytes_per_token
    total = precision.weight_bytes + kv_bytes
    tokens = max(0, memory - precision.weight_bytes) // max(1, precision.kv_bytes_per_token)
    own = demand.context - demand.shared
    users = max(0, tokens - demand.shared) // own if own else 0
    context = demand.shared + (tokens - demand.shared) // demand.users if tokens > demand.shared else tokens
    if own == 0 and tokens >= demand.shared:
        users = demand.users
    return Fit(precision, kv_bytes, total, total <= memory, users, min(context, longest) if longest else context)


def fits(precisions: Iterable[Precision], demand: ContextDemand, memory: int, longest: int = 0) -> list[Fit]:
    """`fit` for each precision, in the order given: from the most precise to the smallest."""
    return [fit(each, demand, memory, longest) for each in precisions]

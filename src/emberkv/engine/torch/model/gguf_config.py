"""A model's config from a GGUF file's metadata, for architectures of which every number that matters is understood.

What could change a model's results and is not known here is refused, not ignored.
"""

from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from emberkv.engine.torch.model.inspection import MOST_LAYERS
from emberkv.errors import CorruptModelError, UnsupportedModelError, reason_of

ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "gpt-oss": "gpt_oss",
}
"""The type of model in transformers, by ``general.architecture``. Mistral's files call themselves llama, and so do
Mixtral's, which have experts.
"""

ENDS = tuple(f"tokenizer.ggml.{name}" for name in ("eos_token_id", "eos_token_ids", "eot_token_id", "eom_token_id"))

Fields = Mapping[str, Any]
Floats = Callable[[str], Tensor]
"""float32: a tensor of the file, by name; empty where there is none."""

_EPSILON = "attention.layer_norm_rms_epsilon"
_NUMBERS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_UNDERSTOOD = frozenset(
    {
        *_NUMBERS, _EPSILON, "vocab_size", "attention.key_length", "attention.value_length", "attention.sliding_window",
        "attention.sliding_window_pattern", "attn_logit_softcapping", "final_logit_softcapping",
        "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.type", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.finetuned",
        "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
        "attention.layer_norm_epsilon", "tensor_data_layout", "attention.causal",
        "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_gating_func", "expert_weights_norm",
        "expert_shared_feed_forward_length",
    }
)  # fmt: skip
_EXPERTS = {
    "llama": "num_local_experts",
    "qwen2moe": "num_experts",
    "qwen3moe": "num_experts",
    "gpt-oss": "num_local_experts",
}
"""Architectures of mixtures, and how their configs name the number of experts."""
_SOFTMAX = 1
"""What ``expert_gating_func`` says of routers that weight experts by a softmax."""
_RESCALED = {"attn_factor": 1.0, "yarn_log_multiplier": 0.0}
"""Factors of the scores, with the values at which they change nothing."""
_WINDOWED = frozenset({"gemma2", "gemma3", "phi3", "gpt-oss"})
_LARGEST_GEMMAS = {"gemma2": 46, "gemma3": 62}
"""By their layers: their queries are scaled by hidden size and heads, which the metadata do not say."""


def config_of(path: Path, fields: Fields, stored: Container[str], floats: Floats) -> PretrainedConfig:
    """The config of the model in ``path``. stored: its tensors. Raises UnsupportedModelError and CorruptModelError."""
    name = str(fields.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path} cannot be served: its architecture is {name}; from GGUF files {', '.join(ARCHITECTURES)} are "
            "read, and other models from safetensors folders"
        )
    own = {key.removeprefix(f"{name}."): value for key, value in fields.items() if key.startswith(f"{name}.")}
    missing = [key for key in ("context_length", "block_count", "embedding_length", "attention.head_count") if
               not isinstance(own.get(key), int)]  # fmt: skip
    if missing:
        raise CorruptModelError(f"{path} gives no whole number as {name}.{missing[0]}")
    if not 0 < own["block_count"] <= MOST_LAYERS:
        raise CorruptModelError(f"{path} gives {own['block_count']} layers; 1 to {MOST_LAYERS} are built")
    try:
        settings = _settings(name, own, fields, floats) | _experts(name, own)
        kind = "mixtral" if name == "llama" and "num_local_experts" in settings else ARCHITECTURES[name]
        return AutoConfig.for_model(kind, **settings, tie_word_embeddings="output.weight" not in stored)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{path} cannot be served: {error}; the model's safetensors folder would work, with --quantize int8 or int4"
        ) from error
    except Exception as error:  # the architecture's own code, on unchecked values
        raise CorruptModelError(f"{path} has no usable metadata of a {name} model: {reason_of(error)}") from error


def token_ids(fields: Fields, key: str) -> object:
    """The value of ``key``, an id or a list of them, without ids that are no token's, such as -1 in 32 bits.

    None where that leaves none.
    """
    value, tokens = fields.get(key), fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return value
    if isinstance(value, list):
        return [each for each in value if not isinstance(each, int) or 0 <= each < len(tokens)] or None
    return None if isinstance(value, int) and not 0 <= value < len(tokens) else value


def _settings(name: str, own: Fields, fields: Fields, floats: Floats) -> dict[str, Any]:
    unknown = sorted(own.keys() - _UNDERSTOOD)
    if unknown:
        raise UnsupportedModelError(f"its metadata have {name}.{unknown[0]}, which is not understood")
    head_dim = own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"]
    if own.get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("its keys and values differ in length")
    if own.get("attention.causal") is False:
        raise UnsupportedModelError("its attention is not causal")
    settings = {
        **{ours: own[theirs] for theirs, ours in _NUMBERS.items() if theirs in own},
        "rms_norm_eps": own[_EPSILON],
        "head_dim": head_dim,
        "vocab_size": own.get("vocab_size") or len(fields["tokenizer.ggml.tokens"]),
        "rope_parameters": _rope(name, own, head_dim, floats),
        "bos_token_id": token_ids(fields, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": token_ids(fields, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": None,
    }
    if own.get("attention.sliding_window"):
        if name not in _WINDOWED:
            raise UnsupportedModelError(f"it has a sliding window, which is not known of {name}")
        settings["sliding_window"] = own["attention.sliding_window"]
    if "attention.sliding_window_pattern" in own:
        settings["layer_types"] = _layer_types(own)
    if own.get("attn_logit_softcapping"):
        settings["attn_logit_softcapping"] = own["attn_logit_softcapping"]
    if own.get("final_logit_softcapping"):
        settings["final_logit_softcapping"] = own["final_logit_softcapping"]
    if name in _LARGEST_GEMMAS:
        large = own["block_count"] == _LARGEST_GEMMAS[name]
        settings["query_pre_attn_scalar"] = (
            own["embedding_length"] // own["attention.head_count"] if large else head_dim
        )
    return settings


def _experts(name: str, own: Fields) -> dict[str, Any]:
    """The settings of a mixture; {} where there are no experts."""
    count = own.get("expert_count", 0)
    if not count and (name == "llama" or name not in _EXPERTS):
        return {}
    if name not in _EXPERTS:
        raise UnsupportedModelError(f"it has {count} experts, which are not known of {name}")
    among_chosen = name != "qwen2moe"
    weighted = own.get("expert_gating_func", _SOFTMAX), own.get("expert_weights_norm", among_chosen)
    if weighted != (_SOFTMAX, among_chosen):
        whole = "the chosen ones" if among_chosen else "all of them"
        raise UnsupportedModelError(f"its router weights experts otherwise than by a softmax over {whole}")
    most: int | None = None
    for key in ("expert_count", "expert_used_count"):
        value = own.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= (most or value):
            limit = "a positive whole number" if most is None else f"1 to {most}, of so many experts,"
            raise CorruptModelError(f"{name}.{key} is {value!r}; {limit} would work")
        most = value
    settings = {_EXPERTS[name]: count, "num_experts_per_tok": own["expert_used_count"]}
    if name in ("qwen2moe", "qwen3moe"):
        settings |= {"moe_intermediate_size": own["expert_feed_forward_length"], "norm_topk_prob": among_chosen}
    if name == "qwen2moe":
        settings["shared_expert_intermediate_size"] = own["expert_shared_feed_forward_length"]
    if name == "gpt-oss":
        settings |= {
            "intermediate_size": own["expert_feed_forward_length"],
            "sliding_window": own["attention.sliding_window"],  # the class has one of its own where there is none
        }
    return settings


def _layer_types(own: Fields) -> list[str]:
    """By the metadata's pattern: for each layer whether it slides, or after how many the one comes that does not."""
    pattern, layers = own["attention.sliding_window_pattern"], range(own["block_count"])
    slides = pattern if isinstance(pattern, list) else [(layer + 1) % pattern != 0 for layer in layers]
    return ["sliding_attention" if each else "full_attention" for each in slides]


def _rope(name: str, own: Fields, head_dim: int, floats: Floats) -> dict[str, Any]:
    theta = float(own.get("rope.freq_base", 1_000_000.0 if name == "gemma3" else 10_000.0))
    if name != "gemma3" and float(own.get("rope.freq_base_swa", theta)) != theta:
        raise UnsupportedModelError("its layers with a sliding window have a RoPE of their own")
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotated = own.get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        if name != "phi3":
            raise UnsupportedModelError(f"{rotated} of a head's {head_dim} values are rotated")
        parameters["partial_rotary_factor"] = rotated / head_dim
    kind = own.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        odd = [key for key, usual in _RESCALED.items() if own.get(f"rope.scaling.{key}", usual) != usual]
        if odd:
            raise UnsupportedModelError(f"its RoPE has scaling.{odd[0]}, which is not understood with {kind}")
        parameters |= {"rope_type": kind, "factor": float(own["rope.scaling.factor"])}
        if kind == "yarn":
            parameters["original_max_position_embeddings"] = int(own["rope.scaling.original_context_length"])
            bounds = {key: own.get(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
            parameters |= {key: float(bound) for key, bound in bounds.items() if bound is not None}
            if name == "gpt-oss":
                parameters["truncate"] = False  # of which the metadata do not speak
    factors = _factors(own, floats)
    if kind not in ("none", "linear", "yarn") and not factors:
        raise UnsupportedModelError(f"its RoPE is scaled by {kind!r}")
    parameters |= factors
    if name == "gemma3":
        local = float(own.get("rope.freq_base_swa", 10_000.0))
        return {
            "full_attention": parameters,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return parameters


def _factors(own: Fields, floats: Floats) -> dict[str, Any]:
    """What divides each rotation's frequency: stored as a tensor, for any length (Llama 3) or for two (Phi-3)."""
    always = floats("rope_freqs.weight").tolist()
    short, long = floats("rope_factors_short.weight").tolist(), floats("rope_factors_long.weight").tolist()
    if always:
        original, factor = int(own["context_length"]), 1.0
        short = long = always
    elif short and long:
        original = int(own["rope.scaling.original_context_length"])
        factor = float(own.get("rope.scaling.attn_factor", 1.0))
    else:
        return {}
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
        "attention_factor": factor,
        "factor": 1.0 if always else own["context_length"] / original,
    }


def q_and_k_rows(config: PretrainedConfig, name: str) -> Tensor | None:
    """int64 ``[out]``: the row of a stored query or key weight that is each row of the model's; None: its own.

    llama.cpp keeps the two halves of a head, which are rotated together, side by side in models of Llama's kind.
    """
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    count = next((number for part, number in heads.items() if part in name), None)
    if config.model_type not in ("llama", "mixtral") or count is None:
        return None
    return torch.arange(count * config.head_dim).view(count, config.head_dim // 2, 2).transpose(1, 2).reshape(-1)

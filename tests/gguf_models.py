"""Tiny random models as GGUF files, written from a checkpoint as llama.cpp's converter does."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from emberkv.engine.torch.model.gguf_config import ARCHITECTURES

KindOf = Callable[[str], Kind]
"""The type that a matrix is stored in, by its name in the file."""

_CONTROL, _NORMAL, _ADDED = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED


def write_gguf(
    checkpoint: Path,
    path: Path,
    kind_of: KindOf = lambda _: Kind.F32,
    tensors: Mapping[str, NDArray[np.float32]] | None = None,
    changed: Mapping[str, Any] | None = None,
    **extra: Any,
) -> Path:
    """Write the model in ``checkpoint`` to ``path``. tensors: further ones. extra: further metadata, for the writer's
    methods, as ``logit_scale`` for ``add_logit_scale``. changed: metadata that take the place of others; None: of none.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = model.config
    name = _architecture(config)
    writer = gguf.GGUFWriter(path, name)
    _add_shape(writer, name, config)
    _add_tokenizer(writer, checkpoint)
    for field, value in extra.items():
        getattr(writer, f"add_{field}")(value)
    for key, value in (changed or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    arch = next(each for each, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for parameter, tensor in model.state_dict().items():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for stored, part in _parts(names, config, parameter, tensor).items():
            values = _as_stored(name, config, stored, part).contiguous()
            kind = kind_of(stored) if values.ndim > 1 and "ffn_gate_inp" not in stored else Kind.F32
            writer.add_tensor(stored, _encoded(values, kind), raw_dtype=kind)
    for stored, values in (tensors or {}).items():
        writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _architecture(config: Any) -> str:
    kind = "llama" if config.model_type == "mixtral" else config.model_type
    return next(ours for ours, theirs in ARCHITECTURES.items() if theirs == kind)


def _parts(names: gguf.TensorNameMap, config: Any, parameter: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of the file that hold a parameter, each with its part of that.

    gpt-oss keeps experts' weights as ``[experts, in, out]``, and outputs of gate and up in turns; the file has
    ``[experts, out, in]`` for all, and gate and up apart.
    """
    if ".experts." not in parameter:
        found = names.get_name(parameter, try_suffixes=(".weight", ".bias")) or ""
        return {f"{found}.weight" if parameter.endswith("sinks") else found: value}
    layer, own = parameter.split(".")[2], parameter.rpartition(".")[2]
    kind = "bias" if own.endswith("_bias") else "weight"
    in_turns = config.model_type == "gpt_oss"
    if in_turns and kind == "weight":
        value = value.transpose(1, 2)
    if own.startswith("down_proj"):
        return {f"blk.{layer}.ffn_down_exps.{kind}": value}
    gate, up = (value[:, 0::2], value[:, 1::2]) if in_turns else value.chunk(2, dim=1)
    return {f"blk.{layer}.ffn_gate_exps.{kind}": gate, f"blk.{layer}.ffn_up_exps.{kind}": up}


def _encoded(values: torch.Tensor, kind: Kind) -> NDArray[Any]:
    if kind is Kind.BF16:  # which gguf rounds in NumPy, slowly
        return values.bfloat16().view(torch.uint8).numpy()
    return gguf.quantize(values.numpy(), kind)


def _as_stored(name: str, config: Any, stored: str, tensor: torch.Tensor) -> torch.Tensor:
    if name == "llama" and (".attn_q." in stored or ".attn_k." in stored):
        heads = config.num_attention_heads if ".attn_q." in stored else config.num_key_value_heads
        return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if stored.endswith("ffn_gate_inp_shexp.weight"):
        return tensor.squeeze(0)
    return tensor + 1 if name.startswith("gemma") and stored.endswith("norm.weight") else tensor


def _add_shape(writer: gguf.GGUFWriter, name: str, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if name in ("qwen2moe", "qwen3moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if name == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if name == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    parameters = config.rope_parameters
    writer.add_rope_freq_base(parameters.get("full_attention", parameters)["rope_theta"])
    if getattr(config, "sliding_window", None) and name in ("gemma2", "gemma3", "gpt-oss"):
        writer.add_sliding_window(config.sliding_window)
    if parameters.get("rope_type") == "yarn" and name == "gpt-oss":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(parameters["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(parameters["beta_slow"])


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    described = tokenizer.backend_tokenizer
    vocabulary = described.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    added = described.get_added_tokens_decoder().values()
    kinds = {token.content: _CONTROL if token.special else _ADDED for token in added}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, _NORMAL) for token in tokens])
    writer.add_token_merges(_merges(described))
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _merges(described: Any) -> list[str]:
    merges = json.loads(described.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def dequantised(checkpoint: Path, path: Path, folder: Path) -> Path:
    """Write to ``folder`` the plain checkpoint whose matrices are the file's, by gguf's own arithmetic."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    name = _architecture(model.config)
    arch = next(each for each, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for parameter, value in model.named_parameters():
        parts = []
        for stored in _parts(names, model.config, parameter, value):
            values = torch.from_numpy(gguf.dequantize(tensors[stored].data, tensors[stored].tensor_type).copy())
            parts.append(_from_stored(name, model.config, stored, values))
        value.data = _whole(model.config, parameter, parts)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def _whole(config: Any, parameter: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """What `_parts` takes apart."""
    if config.model_type != "gpt_oss" or ".experts." not in parameter:
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    whole = torch.stack(parts, dim=2).flatten(1, 2)
    return whole if parameter.endswith("_bias") else whole.transpose(1, 2).contiguous()


def _from_stored(name: str, config: Any, stored: str, tensor: torch.Tensor) -> torch.Tensor:
    if name == "llama" and (".attn_q." in stored or ".attn_k." in stored):
        heads = config.num_attention_heads if ".attn_q." in stored else config.num_key_value_heads
        return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if stored.endswith("ffn_gate_inp_shexp.weight"):
        return tensor.view(1, -1)
    return tensor - 1 if name.startswith("gemma") and stored.endswith("norm.weight") else tensor

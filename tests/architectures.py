"""Settings of tiny models, one an architecture: what must be served, how far hits go, and what must be refused."""

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 384
CONTEXT = 4096

_WIDE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}
_GPT2_LIKE = {"vocab_size": VOCAB_SIZE, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT,
              "tie_word_embeddings": False}  # fmt: skip
_FALCON = {name: value for name, value in _WIDE.items() if name != "head_dim"}
_SOME_EXPERTS = {"num_local_experts": 6, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}

_NO_EXPERTS = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96}
_MAMBA = {"mamba_d_state": 24, "mamba_chunk_size": 16}
_DELTA = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
          "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 24,
          "linear_value_head_dim": 16}  # fmt: skip

_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 40}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 32}
_SPARSE = {**_SOME_EXPERTS, "mlp_layer_types": ["dense", "sparse"]}
_GROUPS = {"n_group": 2, "topk_group": 1}
_ROUTED = {**_SOME_EXPERTS, **_GROUPS, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1}
_LATENT = {"head_dim": 8, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
           "qk_nope_head_dim": 8, "v_head_dim": 16}  # fmt: skip
_PER_LAYER_INPUT = {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8}
_SCALED = {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}

SUPPORTED: dict[str, dict[str, Any]] = {
    "llama": {**_WIDE, "num_hidden_layers": 3},
    "mistral": {**_WIDE, "sliding_window": 40},
    "qwen2": {**_WIDE, "tie_word_embeddings": True},
    "qwen3": {**_WIDE, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 56,
              "max_window_layers": 1},
    "gemma": _WIDE,
    "gemma2": {**_WIDE, "sliding_window": 40, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_WIDE, "sliding_window": 24, "query_pre_attn_scalar": 16, "num_hidden_layers": 3,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": _WIDE,
    "gpt2": _GPT2_LIKE,
}  # fmt: skip
"""Architectures that must be served, by transformers' model type."""

PLAIN = (
    "apertus", "arcee", "biogpt", "bitnet", "ernie4_5", "glm", "glm4", "gpt_neox", "helium", "hunyuan_v1_dense",
    "internlm3", "iquestcoder", "jais2", "nanochat", "nemotron", "olmo2", "persimmon", "seed_oss",
)  # fmt: skip
"""Further architectures that must be served, whose settings are those of a Llama."""

ALSO_SUPPORTED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(PLAIN, _WIDE),
    "cohere": {**_WIDE, "use_qk_norm": True},
    "granite": {**_WIDE, **_SCALED},
    "hyperclovax": {**_WIDE, **_SCALED},
    "olmo": {**_WIDE, "clip_qkv": 8.0},
    "opt": {**_WIDE, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {**_WIDE, "qk_layernorm": True},
    "smollm3": {**_WIDE, "no_rope_layers": [1, 0]},
    "cohere2": {**_WIDE, **_SLIDING},
    "cwm": {**_WIDE, **_SLIDING},
    "exaone4": {**_WIDE, **_SLIDING},
    "granite_swa": {**_WIDE, **_SLIDING, **_SCALED},
    "ministral": {**_WIDE, **_SLIDING},
    "modernbert-decoder": {**_WIDE, **_SLIDING, "local_attention": 40},
    "olmo3": {**_WIDE, **_SLIDING},
    "starcoder2": {**_WIDE, "sliding_window": 40},
    "vaultgemma": {**_WIDE, **_SLIDING, "query_pre_attn_scalar": 16},
    "aria_text": {**_WIDE, "moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1},
    "ernie4_5_moe": {
        **_WIDE,
        "moe_intermediate_size": 32,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
    },
    "flex_olmo": {**_WIDE, **_SOME_EXPERTS},
    "granitemoeshared": {**_WIDE, **_SOME_EXPERTS, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {**_WIDE, **_SOME_EXPERTS, "moe_topk": 2},
    "hy_v3": {**_WIDE, **_SPARSE},
    "minimax_m2": {**_WIDE, **_SOME_EXPERTS},
    "phimoe": {**_WIDE, **_SOME_EXPERTS, "sliding_window": CONTEXT},
    "solar_open": {**_WIDE, **_ROUTED},
    "afmoe": {**_WIDE, **_SLIDING, **_SOME_EXPERTS, "num_dense_layers": 1, "mup_enabled": True},
    "beam": {**_WIDE, **_SLIDING, **_SPARSE, **_GROUPS},
    "cohere2_moe": {**_WIDE, **_SLIDING, **_SPARSE, "num_shared_experts": 1},
    "dots1": {**_WIDE, **_SLIDING, **_ROUTED},
    "exaone_moe": {**_WIDE, **_SLIDING, **_SPARSE, **_GROUPS},
    "flint": {**_WIDE, **_SLIDING, **_SOME_EXPERTS, **_SHARED_EXPERT, "mlp_only_layers": [0]},
    "granitemoe_swa": {**_WIDE, **_SLIDING, **_SOME_EXPERTS, **_SCALED},
    "kolibri1": {**_WIDE, **_SLIDING, **_SOME_EXPERTS, **_SHARED_EXPERT},
    "laguna": {**_WIDE, **_SLIDING, **_SPARSE, **_SHARED_EXPERT, "num_attention_heads_per_layer": [4, 2]},
    "mimo_v2_flash": {**_WIDE, **_SLIDING, **_ROUTED, **_SPARSE, "v_head_dim": 8, "attention_value_scale": 0.7},
    "mellum": {**_WIDE, **_SLIDING, **_SPARSE},
    "minicpm3": {**_WIDE, **_LATENT},
    "youtu": {**_WIDE, **_LATENT},
    "axk1": {**_WIDE, **_LATENT, **_ROUTED, **_SPARSE},
    "glm4_moe_lite": {**_WIDE, **_LATENT, **_ROUTED, **_SPARSE},
    "zamba2": {
        **{name: value for name, value in _WIDE.items() if name != "head_dim"},
        **_MAMBA,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "use_shared_attention_adapter": True,
        "adapter_rank": 8,
        "use_mem_rope": True,
        "tie_word_embeddings": True,
    },
    "lfm3": {
        **_WIDE,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "sliding_attention", "full_attention"],
        "sliding_window": 40,
    },
    "gpt_oss": {**_WIDE, **_SOME_EXPERTS, "sliding_window": 40},
    "mixtral": {**_WIDE, **_SOME_EXPERTS},
    "qwen3_moe": {**_WIDE, **_SOME_EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True},
    "qwen2_moe": {**_WIDE, **_SOME_EXPERTS, "shared_expert_intermediate_size": 32},
    "glm4_moe": {
        **_WIDE,
        **_SOME_EXPERTS,
        "n_routed_experts": 6,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
    },
    "olmoe": {**_WIDE, **_SOME_EXPERTS},
    "granitemoe": {**_WIDE, **_SOME_EXPERTS},
    "ministral3": {
        **_WIDE,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 32.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "stablelm": _WIDE,
    "gemma3n_text": {
        **_WIDE,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "sliding_window": 24,
        "intermediate_size": 64,
        **_PER_LAYER_INPUT,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "gemma4_text": {
        **_WIDE,
        **_PER_LAYER_INPUT,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "sliding_window": 24,
        "global_head_dim": 32,
        "use_double_wide_mlp": True,
    },
    "gemma4_text-experts": {
        **_WIDE,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 24,
        "global_head_dim": 48,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "final_logit_softcapping": 30.0,
    },
    "falcon": {**_FALCON, "multi_query": True, "alibi": False},
    "falcon-new_decoder": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon-alibi": {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
    "bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": 96, "n_layer": 2, "n_head": 6, "seq_length": CONTEXT},
    "mpt": {"vocab_size": VOCAB_SIZE, "d_model": 96, "n_layers": 2, "n_heads": 6, "max_seq_len": CONTEXT},
    "gptj": {**_GPT2_LIKE, "rotary_dim": 8},
    "ctrl": {**_GPT2_LIKE, "dff": 96},
    "codegen": {**_GPT2_LIKE, "rotary_dim": 8},
    "gpt_neo": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 40,
        "max_position_embeddings": 512,
    },
    "gpt_neox_japanese": {**_WIDE, "hidden_act": "gelu"},
    "gpt_bigcode": {**_GPT2_LIKE, "multi_query": True},
    "xglm": {
        "vocab_size": VOCAB_SIZE,
        "d_model": 64,
        "ffn_dim": 96,
        "num_layers": 2,
        "attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
    "lfm2": {
        **_WIDE,
        "num_hidden_layers": 5,
        "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
    },
    "bamba": {
        **_WIDE,
        **_MAMBA,
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_n_groups": 2,
    },
    "granitemoehybrid": {
        **_WIDE,
        **_MAMBA,
        **_NO_EXPERTS,
        "num_hidden_layers": 4,
        "mamba_n_heads": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
    "qwen3_next": {**_WIDE, **_SOME_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 32},
    "nemotron_h-experts": {
        **_WIDE,
        "layers_block_type": ["linear_attention", "moe", "full_attention"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 24,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
    },
    "nemotron_h": {
        **_WIDE,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
        "num_hidden_layers": 5,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 24,
        "n_groups": 2,
        "chunk_size": 16,
        "mlp_hidden_act": "relu2",
    },
    "falcon_h1": {
        **_WIDE,
        **_MAMBA,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_ssm": 128,
        "mamba_rms_norm": False,
        "key_multiplier": 0.5,
    },
    "qwen3_next-equal_heads": {
        **_WIDE,
        **_SOME_EXPERTS,
        **_DELTA,
        "linear_num_key_heads": 4,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_5_text": {**_WIDE, **_DELTA},
    "qwen3_5_moe_text": {**_WIDE, **_SOME_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 32},
    "olmo_hybrid": {**_WIDE, **_DELTA, "linear_allow_neg_eigval": True},
    "lfm2_moe": {
        **_WIDE,
        **_SOME_EXPERTS,
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "granitemoehybrid-experts": {
        **_WIDE,
        **_MAMBA,
        **_SOME_EXPERTS,
        "shared_intermediate_size": 64,
        "mamba_n_heads": 8,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "llama4_text": {
        **_WIDE,
        **_SOME_EXPERTS,
        "num_hidden_layers": 3,
        "intermediate_size": 32,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 40,
        "floor_scale": 16,
        "attn_scale": 0.5,
    },
    "deepseek_v3": {
        **_WIDE,
        "head_dim": 8,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "deepseek_v2": {
        **_WIDE,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
}
"""Further architectures that must be served, and variants after a hyphen.

`tests/engine/torch/test_architectures.py` tests each.
"""

BY_BLOCKS = frozenset(
    {
        "bamba", "falcon_h1", "granitemoehybrid", "granitemoehybrid-experts", "lfm2", "lfm2_moe", "lfm3", "nemotron_h",
        "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen3_next-equal_heads", "zamba2",
    }
)  # fmt: skip
"""Those of both of which a hit ends at a whole block or a checkpoint: they keep state beside keys and values."""

BY_CHUNKS = frozenset({"nemotron_h-experts"})
"""Those of both of which a hit ends at a whole prefill chunk, with the kernels as well."""

MULTIMODAL = (
    "gemma3", "gemma4", "gemma4_unified", "llama4", "llava", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_vl",
    "qwen3_vl_moe",
)  # fmt: skip
"""Multimodal models whose text model must be served."""

REFUSED: dict[str, dict[str, Any]] = {
    "mamba": {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2},
    "jamba": {**_WIDE, **_EXPERTS, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
              "mamba_d_state": 8},
    "t5": {"vocab_size": VOCAB_SIZE, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 96},
    "bart": {"vocab_size": VOCAB_SIZE, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
             "decoder_ffn_dim": 96, "max_position_embeddings": CONTEXT},
}  # fmt: skip
"""Architectures that keep something other than per-token keys and values, or attend in their own way."""


def model_type(arch: str) -> str:
    """transformers' model type of an architecture, of which there may be variants: "falcon" of "falcon-alibi"."""
    return arch if arch in CONFIG_MAPPING else arch.rpartition("-")[0]

"""Tiny random models with real tokenizers, written to disk as checkpoints: the tests' model zoo."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

VOCAB_SIZE = 384
CONTEXT = 4096
EOS, USER_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXT = (
    "The library opens at nine and closes when the last reader has gone home.",
    "A river carries what the rain gives it; a lake keeps it for a while.",
    "She counted the lamps along the street: one, two, three, and then no more.",
    "def area(width, height):\n    return width * height\n",
    "Most of the work is waiting, and the rest of the work is knowing what to wait for.",
)

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
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
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

ALSO_SUPPORTED: dict[str, dict[str, Any]] = {
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
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "falcon": {**_FALCON, "multi_query": True, "alibi": False},
    "falcon-new_decoder": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon-alibi": {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
    "bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": 96, "n_layer": 2, "n_head": 6, "seq_length": CONTEXT},
    "mpt": {"vocab_size": VOCAB_SIZE, "d_model": 96, "n_layers": 2, "n_heads": 6, "max_seq_len": CONTEXT},
    "gptj": {**_GPT2_LIKE, "rotary_dim": 8},
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
        "bamba", "falcon_h1", "granitemoehybrid", "granitemoehybrid-experts", "lfm2", "lfm2_moe", "nemotron_h",
        "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen3_next-equal_heads",
    }
)  # fmt: skip
"""Those of both of which a hit ends at a whole block: they keep state beside keys and values."""

BY_CHUNKS = frozenset({"nemotron_h-experts"})
"""Those of both of which a hit ends at a whole prefill chunk, with the kernels as well."""

MULTIMODAL = ("gemma3", "llama4", "llava", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe")
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


def byte_level_bpe() -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens, trained here; ids 0 to 2 are its special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, USER_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every tiny model, with a chat template that rejects unknown roles."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(),
        bos_token=EOS,
        eos_token=TURN_END,
        extra_special_tokens=[USER_START],
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def model_type(arch: str) -> str:
    """transformers' model type of an architecture, of which there may be variants: "falcon" of "falcon-alibi"."""
    return arch.partition("-")[0]


def tiny_model(arch: str, folder: Path, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Path:
    """Write a random model of a SUPPORTED, ALSO_SUPPORTED or REFUSED architecture to ``folder`` as safetensors.

    The same arch, dtype and seed give the same weights, wide enough that greedy answers vary.
    """
    settings = {**_ENDS, **(SUPPORTED | ALSO_SUPPORTED | REFUSED)[arch]}
    config = AutoConfig.for_model(model_type(arch), **settings)
    factory = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.5 if "embed" in name or "wte" in name else 0.2)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder

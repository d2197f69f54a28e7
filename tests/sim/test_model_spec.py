"""Models by their public configs: parameters to the last one, bytes, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from emberkv.engine.torch.model.inspection import inspect_geometry
from emberkv.errors import ConfigError, UnsupportedModelError
from emberkv.sim.model_spec import load_spec, model_names, spec_from_config
from tests.architectures import ALSO_SUPPORTED, SUPPORTED, model_type

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [
        ("llama-3.1-8b", 8_030_261_248, 131_072),
        ("llama-3.1-70b", 70_553_706_496, 327_680),
        ("qwen2.5-0.5b", 494_032_768, 12_288),
        ("qwen2.5-7b", 7_615_616_512, 57_344),
        ("qwen3-32b", 32_762_123_264, 262_144),
        ("qwen3-30b-a3b", 30_532_122_624, 98_304),
        ("mixtral-8x7b", 46_702_792_704, 131_072),
        ("emberkv-demo", 5_770_496, 3_072),
    ],
)
def test_named_models_have_as_many_parameters_as_their_checkpoints(name: str, parameters: int, kv_bytes: int) -> None:
    spec = load_spec(name)
    assert (spec.parameters, spec.kv_bytes_per_token) == (parameters, kv_bytes)
    assert name in model_names()


def test_a_mixture_activates_some_of_its_experts() -> None:
    assert load_spec("qwen3-30b-a3b").active_parameters == 3_353_032_704
    assert load_spec("mixtral-8x7b").active_parameters == 12_879_925_248
    assert load_spec("qwen3-32b").active_parameters == load_spec("qwen3-32b").parameters


def test_a_small_model_by_hand() -> None:
    spec = spec_from_config(SMALL, "small")
    attention = 8 * 8 + 8 * 8 + 2 * 8 * 4  # queries, output, keys and values: 4 heads of 2, 2 of them for keys
    mlp = 3 * 8 * 16
    assert spec.head_dim == 2
    assert spec.linear_parameters == 2 * (attention + mlp)
    assert spec.other_parameters == 2 * 32 * 8 + 2 * 2 * 8 + 8
    assert spec.kv_bytes_per_layer == 2 * 2 * 2 * 2


def test_only_linear_weights_shrink_when_quantised() -> None:
    spec = spec_from_config(SMALL, "small")
    assert spec.weight_bytes == 2 * spec.parameters
    assert spec.with_dtypes(weights="fp8").weight_bytes == spec.linear_parameters + 2 * spec.other_parameters
    assert spec.with_dtypes(weights="int4").weight_bytes == round(
        spec.linear_parameters * 4.25 / 8 + 2 * spec.other_parameters
    )
    assert spec.with_dtypes(kv="fp8").kv_bytes_per_token == spec.kv_bytes_per_token // 2
    known = load_spec("llama-3.1-8b")  # heads of 128
    assert known.with_dtypes(kv="int8").kv_bytes_per_token == known.kv_bytes_per_token // 256 * 130


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8.5), ("int4", 5.0)])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_rounded_on_load_have_groups_of_32_and_an_output_layer_of_8_bits(
    weights: str, bits: float, tied: bool
) -> None:
    plain = spec_from_config(SMALL | {"tie_word_embeddings": tied}, "small")
    spec = plain.with_dtypes(weights=weights, on_load=True)
    output = 32 * 8
    others = spec.other_parameters - (0 if tied else output)  # a tied embedding stays as it is beside the rounded copy
    assert (spec.linear_bits, spec.output_bits) == (bits, 8.5)
    assert spec.weight_bytes == round((spec.linear_parameters * bits + output * 8.5 + others * 16) / 8)


def test_a_quantised_checkpoint_is_not_rounded_on_load() -> None:
    stored = spec_from_config(SMALL | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "small")
    assert stored.with_dtypes(weights="int4", on_load=True) == stored
    assert stored.with_dtypes(weights="int8", on_load=True).output_bits == 16
    assert not spec_from_config(SMALL, "small").with_dtypes(weights="fp8", on_load=True).rounded_on_load


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ({"quant_method": "gptq", "bits": 4}, "int4"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4"),
        ({"quant_method": "fp8"}, "fp8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "fp8",
        ),
    ],
)
def test_a_quantised_checkpoint_says_so(scheme: dict[str, Any], dtype: str) -> None:
    assert spec_from_config(SMALL | {"quantization_config": scheme}, "small").weights_dtype == dtype


@pytest.mark.parametrize(
    ("more", "window", "layers"),
    [
        ({}, 0, 0),
        ({"sliding_window": 4096}, 4096, 2),  # Mistral: the width alone
        ({"sliding_window": None}, 0, 0),
        ({"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 0}, 0, 0),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, 16, 1),
        ({"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}, 16, 1),
    ],
)
def test_which_layers_see_a_window(more: dict[str, Any], window: int, layers: int) -> None:
    spec = spec_from_config(SMALL | more, "small")
    assert (spec.window, spec.window_layers) == (window, layers)


def test_dense_layers_and_a_shared_expert_of_a_mixture() -> None:
    more = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 4,
        "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 6,
    }
    spec = spec_from_config(SMALL | more, "small")
    assert (spec.moe_layers, spec.shared_intermediate) == (1, 6)
    assert spec.parameters - spec.active_parameters == 6 * 3 * 8 * 4


def test_a_model_for_text_and_images_is_its_text_part() -> None:
    nested = {"model_type": "any", "text_config": SMALL, "vision_config": {"hidden_size": 99}}
    assert spec_from_config(nested, "small") == spec_from_config(SMALL, "small")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"global_head_dim": 512, "num_global_key_value_heads": 1}, r"global_head_dim, num_global_key_value_heads\)"),
        ({"num_kv_shared_layers": 3}, r"than keys \(num_kv_shared_layers\), .* emberkv size read"),
        ({"v_head_dim": 128}, "v_head_dim"),
        ({"v_head_dim": 2, "num_attention_heads": "many"}, "v_head_dim"),
        ({"swa_num_key_value_heads": 4}, "swa_num_key_value_heads"),
        ({"num_attention_heads_per_layer": [4, 8]}, "num_attention_heads_per_layer"),
    ],
)
def test_a_model_with_other_state_or_layers_that_differ_is_refused(more: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        spec_from_config(SMALL | more, "small")


@pytest.mark.parametrize(
    "more",
    [
        {"v_head_dim": 2},
        {"head_dim": 16, "global_head_dim": 16, "v_head_dim": 16},
        {"num_attention_heads_per_layer": [4, 4], "swa_num_key_value_heads": 2},
    ],
)
def test_keys_that_repeat_what_all_layers_have_are_no_difference(more: dict[str, Any]) -> None:
    head_dim = more.get("head_dim", 2)
    assert spec_from_config(SMALL | more, "small").kv_bytes_per_layer == 2 * 2 * head_dim * 2


@pytest.mark.parametrize("name", sorted(SUPPORTED | ALSO_SUPPORTED))
def test_a_spec_has_the_key_and_value_bytes_that_the_engine_keeps(name: str) -> None:
    """Of those of the engine's architectures that have a spec."""
    config = AutoConfig.for_model(model_type(name), **(SUPPORTED | ALSO_SUPPORTED)[name], dtype="bfloat16")
    try:
        spec = spec_from_config(config.to_dict(), name)
    except (ConfigError, UnsupportedModelError):
        return
    assert spec.kv_bytes_per_token == inspect_geometry(config).bytes_per_token(torch.bfloat16)


@pytest.mark.parametrize(
    ("more", "kv_heads"),
    [
        ({"num_kv_heads": 71, "multi_query": True, "new_decoder_architecture": False}, 1),  # Falcon 7B
        ({"num_kv_heads": 8, "new_decoder_architecture": True}, 8),  # Falcon 40B
        ({"num_kv_heads": 8, "multi_query": False}, 4),
        ({}, 1),
    ],
)
def test_falcon_names_its_heads_otherwise(more: dict[str, Any], kv_heads: int) -> None:
    assert spec_from_config(SMALL | {"model_type": "falcon"} | more, "falcon").kv_heads == kv_heads


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"hidden_size": None}, "has no hidden_size"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"torch_dtype": "int8"}, "dtype is 'int8'; use one of float32"),
        ({"quantization_config": {"quant_method": "odd", "bits": 3}}, "quantised by 'odd' to 3 bits"),
    ],
)
def test_a_config_that_cannot_be_used_says_why(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        spec_from_config(SMALL | more, "small")


def test_a_config_is_found_by_file_and_by_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    assert load_spec(str(folder)) == load_spec(str(folder / "config.json")) == spec_from_config(SMALL, "mine")


@pytest.mark.parametrize("text", ["[1]", "{"])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_spec(str(path))


def test_an_unknown_name_is_answered_with_those_known() -> None:
    with pytest.raises(ConfigError, match=r"no model 'gpt-5'; .*llama-3\.1-8b"):
        load_spec("gpt-5")


def test_unknown_number_types_are_refused() -> None:
    with pytest.raises(ConfigError, match="dtype is 'int3'; use one of"):
        load_spec("llama-3.1-8b").with_dtypes(weights="int3")
    with pytest.raises(ConfigError, match="KV dtype is 'int4'"):
        load_spec("llama-3.1-8b").with_dtypes(kv="int4")

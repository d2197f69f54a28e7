"""The text model of a multimodal checkpoint is loaded alone, and computes on text what the whole one does."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from emberkv.engine.torch.attention.paged_attention import ATTENTION_NAME
from emberkv.engine.torch.model.loader import load_model
from emberkv.engine.torch.native.kernels import Kernels
from tests.architectures import ALSO_SUPPORTED, MULTIMODAL
from tests.engine.driver import BLOCK, CHUNK, Driver
from tests.models import VOCAB_SIZE, save_tokenizer

TEXT = {**ALSO_SUPPORTED["qwen3_moe"], "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "sliding_window": 24}
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "depth": 1, "num_heads": 2, "embed_dim": 32, "out_hidden_size": 64,
    "deepstack_visual_indexes": [0], "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    "num_key_value_heads": 2,
}  # fmt: skip
HYBRID = {name: value for name, value in ALSO_SUPPORTED["qwen3_5_text"].items() if "linear" in name or "layer" in name}
THREE_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def write(model_type: str, folder: Path, **settings: Any) -> PreTrainedModel:
    """A tiny random model of such a type, with all its towers, which is also returned."""
    usual: dict[str, Any] = AutoConfig.for_model(model_type).to_dict()
    changed = {name: value for name, value in TEXT.items() if name in usual["text_config"] or name == "head_dim"}
    if "_vl" in model_type:
        changed["rope_parameters"] = THREE_AXES
    if model_type.startswith("gemma4"):
        changed |= ALSO_SUPPORTED["gemma4_text"]
    left_out = (
        "layer_types", "no_rope_layers", "moe_layers", "rope_parameters", "image_token_id", "per_layer_config"
    )  # fmt: skip
    kept = {name: value for name, value in usual["text_config"].items() if name not in left_out}
    if model_type.startswith("qwen3_5"):  # its default for so few layers is none with attention
        changed |= {**HYBRID, "rope_parameters": {**THREE_AXES, "partial_rotary_factor": 0.5}}
    usual["text_config"] = kept | changed
    if usual["vision_config"] is None:
        usual["vision_config"] = AutoConfig.for_model(f"{model_type}_vision").to_dict()
    usual["vision_config"] |= {name: value for name, value in VISION.items() if name in usual["vision_config"]}
    usual.pop("model_type")
    config = AutoConfig.for_model(model_type, **usual | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto_class: Any = AutoModelForImageTextToText
        model: PreTrainedModel = auto_class.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_its_text_is_served_as_exactly_as_any(model_type: str, tmp_path: Path, kernels: Kernels) -> None:
    rng = random.Random(0)
    whole = write(model_type, tmp_path, tie_word_embeddings=model_type == "qwen2_5_vl")
    loaded = load_model(str(tmp_path), dtype="float32", device="cpu", attn_implementation=ATTENTION_NAME)
    assert not any("vision" in name or "visual" in name for name, _ in loaded.model.named_parameters())
    ours = Driver(loaded, kernels=kernels)
    prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(CHUNK + BLOCK + 3)]
    cold = ours.run_one(prompt)
    warm = ours.run_one(prompt)
    assert warm.cached == (len(prompt) - 1) // ours.cache.hit_unit * ours.cache.hit_unit
    assert torch.equal(warm.logits[0], cold.logits[0])
    with torch.inference_mode():
        untyped: Any = whole
        expected = untyped(input_ids=torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(cold.logits[0], expected, rtol=2e-4, atol=2e-4)

"""Models whose rotary positions change with the length of what is being computed are served as far as they do not."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from emberkv.engine.torch.attention.paged_attention import ATTENTION_NAME
from emberkv.engine.torch.model.inspection import inspect_geometry
from emberkv.engine.torch.model.loader import load_model
from emberkv.errors import UnsupportedModelError
from tests.architectures import SUPPORTED
from tests.engine.conftest import DriverFactory
from tests.engine.torch.test_exactness import text
from tests.models import CONTEXT, save_tokenizer

FACTORS = {"short_factor": [1.0 + i / 4 for i in range(8)], "long_factor": [3.0 + i for i in range(8)]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS, "original_max_position_embeddings": 256}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


def config(arch: str, **settings: Any) -> Any:
    return AutoConfig.for_model(arch, **{**SUPPORTED[arch], "pad_token_id": 0, **settings})


@pytest.mark.parametrize(
    ("arch", "settings", "limit"),
    [
        ("llama", {"rope_parameters": LONGROPE}, 256),
        ("llama", {"rope_parameters": LONGROPE, "max_position_embeddings": 100}, 100),
        ("phi3", {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 512}, 512),
        ("llama", {"rope_parameters": DYNAMIC}, CONTEXT),
        ("gemma3_text", {"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DEFAULT}}, CONTEXT),
        ("gemma3_text", {"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": DEFAULT}}, 256),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, CONTEXT),
        ("gpt2", {}, CONTEXT),
    ],
    ids=str,
)
def test_the_context_ends_where_the_rotation_would_change(arch: str, settings: dict[str, Any], limit: int) -> None:
    assert inspect_geometry(config(arch, **settings)).context_length == limit


def test_an_unknown_rotation_is_refused() -> None:
    strange = config("llama", rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
    with pytest.raises(UnsupportedModelError, match="rotated by RoPE of type 'spiral'"):
        inspect_geometry(strange)


@pytest.mark.parametrize("rope", [LONGROPE, {**DYNAMIC}], ids=["longrope", "dynamic"])
@torch.inference_mode()
def test_up_to_the_limit_the_state_is_that_of_a_run_at_once(
    driver: DriverFactory, tmp_path: Path, rope: dict[str, Any]
) -> None:
    """Prefill, hits and decode choose the rotation that transformers chooses for the whole."""
    settings = config("llama", rope_parameters=rope, max_position_embeddings=CONTEXT if rope is LONGROPE else 256)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu", attn_implementation=ATTENTION_NAME)
    assert loaded.context_length == 256
    served, prompt = driver(loaded), text(random.Random(0), 250)
    served.run_one(prompt[:200])
    run = served.run_one(prompt, new=6)
    assert run.cached > 0
    auto_class: Any = AutoModelForCausalLM
    plain = auto_class.from_pretrained(tmp_path, attn_implementation="eager").eval()
    theirs = plain(torch.tensor([[*prompt, *run.tokens]])).logits[0, 249:-1]
    torch.testing.assert_close(torch.stack(run.logits), theirs, rtol=0, atol=1e-4)

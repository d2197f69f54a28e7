"""A model in memory has its checkpoint's fingerprint as long as it is what the checkpoint holds."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from emberkv.engine.torch.model.fingerprint import model_fingerprint, weights_fingerprint
from tests.conftest import CheckpointFactory


def load(folder: Path, **settings: object) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **settings)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "gemma3_text"])
def test_it_is_the_checkpoints(arch: str, dtype: torch.dtype, checkpoint: CheckpointFactory) -> None:
    folder = checkpoint(arch)
    model = load(folder, dtype=dtype, attn_implementation="eager")
    assert model_fingerprint(model) == weights_fingerprint(folder)


def test_files_that_name_tensors_without_the_base_models_prefix(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """As those of GPT-2 on the hub; the output layer is the embedding and in no file."""
    model = load(checkpoint("qwen2"))
    model.base_model.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as tensors:
        assert "embed_tokens.weight" in tensors.keys()  # noqa: SIM118 - not a dict
    assert model_fingerprint(load(tmp_path)) == weights_fingerprint(tmp_path)


def test_weights_that_the_files_lack(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    model = load(checkpoint("llama"))
    model.base_model.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    assert model_fingerprint(load(tmp_path)).startswith("in-memory-")  # its output layer is not tied


def test_a_changed_weight(checkpoint: CheckpointFactory) -> None:
    model = load(checkpoint("llama"))
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 3] += 1
    changed = model_fingerprint(model)
    assert changed.startswith("in-memory-")
    assert changed == model_fingerprint(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 3] += 1
    assert model_fingerprint(model) not in (changed, weights_fingerprint(checkpoint("llama")))


def test_a_changed_setting(checkpoint: CheckpointFactory) -> None:
    plain, changed = load(checkpoint("llama")), load(checkpoint("llama"), rms_norm_eps=0.5)
    assert model_fingerprint(changed).startswith("in-memory-")
    assert model_fingerprint(plain) != model_fingerprint(changed)


def test_the_files_are_gone_or_broken(checkpoint: CheckpointFactory, copied: Path) -> None:
    model = load(copied)
    named = model_fingerprint(model)
    assert named == weights_fingerprint(checkpoint("llama"))
    (copied / "config.json").write_text("{}")
    in_memory = model_fingerprint(model)
    assert in_memory.startswith("in-memory-")
    shutil.rmtree(copied)
    assert model_fingerprint(model) == in_memory


def test_a_model_that_was_never_loaded(checkpoint: CheckpointFactory) -> None:
    models = [AutoModelForCausalLM.from_config(load(checkpoint("llama")).config) for _ in range(2)]
    first, second = (model_fingerprint(model) for model in models)
    assert first.startswith("in-memory-")
    assert first != second

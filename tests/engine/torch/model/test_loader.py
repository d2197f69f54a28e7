"""Loading: every served architecture, and the choice of dtype and device."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, Qwen2Tokenizer

from emberkv.engine.torch.model.loader import ModelDtypes, choose_device, choose_dtype, load_model
from emberkv.engine.torch.model.source import read_tokenizer
from emberkv.errors import ConfigError, CorruptModelError
from tests.architectures import SUPPORTED
from tests.conftest import CheckpointFactory
from tests.models import CONTEXT, VOCAB_SIZE

CPU = torch.device("cpu")
EXPECTED_WINDOWS = {
    "mistral": (40, 40),
    "qwen3": (None, 56, 56),
    "gemma2": (40, None),
    "gemma3_text": (24, None, 24),
    "llama": (None, None, None),
}


@pytest.mark.parametrize("arch", sorted(SUPPORTED))
def test_every_served_architecture_loads(checkpoint: CheckpointFactory, arch: str) -> None:
    loaded = load_model(str(checkpoint(arch)))
    geometry = loaded.geometry
    kv_heads = 4 if arch == "gpt2" else 2
    assert (geometry.num_heads, geometry.num_kv_heads, geometry.head_dim) == (4, kv_heads, 16)
    assert (geometry.vocab_size, loaded.context_length) == (VOCAB_SIZE, CONTEXT)
    windows = tuple(layer.window and layer.window.size for layer in geometry.layers)
    assert windows == EXPECTED_WINDOWS.get(arch, (None, None))
    assert {layer.softcap for layer in geometry.layers} == {50.0 if arch == "gemma2" else None}
    assert {layer.scaling for layer in geometry.layers} == {0.25}
    assert (loaded.dtypes, loaded.device.type) == (ModelDtypes.all_of(torch.float32), choose_device("auto").type)
    assert loaded.eos_token_ids == {0, 2}  # the config's and the tokenizer's
    assert not loaded.model.training
    assert loaded.model.generation_config is not None


def test_attention_goes_through_the_function_asked_for(checkpoint: CheckpointFactory) -> None:
    queries: list[torch.Size] = []

    def attend(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        queries.append(query.shape)
        return query.transpose(1, 2), None

    AttentionInterface.register("test_loader_attention", attend)
    loaded = load_model(str(checkpoint("llama")), device="cpu", attn_implementation="test_loader_attention")
    loaded.model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    assert queries == [torch.Size([1, 4, 3, 16])] * 3


def test_loaded_weights_are_those_of_the_file(checkpoint: CheckpointFactory) -> None:
    folder = checkpoint("llama")
    loaded = load_model(str(folder), device="cpu")
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(loaded.model.state_dict()["lm_head.weight"], stored["lm_head.weight"])
    assert loaded.name == folder.name
    assert loaded.tokenizer.encode("<|im_start|>", add_special_tokens=True).tolist() == [1]


@pytest.mark.parametrize(
    ("asked", "stored", "device", "expected"),
    [
        ("auto", torch.bfloat16, "cpu", torch.bfloat16),
        ("auto", torch.float16, "cpu", torch.float32),
        ("auto", torch.float16, "cuda", torch.float16),
        ("auto", torch.float64, "cpu", torch.float32),
        ("auto", None, "cpu", torch.float32),
        ("bfloat16", torch.float32, "cpu", torch.bfloat16),
    ],
)
def test_dtype(asked: Any, stored: torch.dtype | None, device: str, expected: torch.dtype) -> None:
    assert choose_dtype(asked, stored, torch.device(device)) is expected


def test_dtype_of_the_checkpoint_is_kept(checkpoint: CheckpointFactory) -> None:
    loaded = load_model(str(checkpoint("llama", torch.bfloat16)), device="cpu")
    assert loaded.dtypes == ModelDtypes.all_of(torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_dtype_is_read_from_the_weights_when_the_config_says_nothing(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("llama", torch.bfloat16), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    assert load_model(str(folder), device="cpu").dtypes == ModelDtypes.all_of(torch.bfloat16)


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "meta"])
def test_devices_that_are_not_here_are_named(device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        choose_device(device)


def test_unknown_dtype_is_named() -> None:
    with pytest.raises(ConfigError, match=r"int3.*accepted are auto"):
        choose_dtype("int3", None, CPU)  # type: ignore[arg-type]  # what is refused


def test_progress_names_each_stage(checkpoint: CheckpointFactory) -> None:
    lines: list[str] = []
    load_model(str(checkpoint("llama")), progress=lines.append)
    assert [line.split()[0] for line in lines] == ["finding", "loading", "identifying", "loading"]


def test_changed_weights_change_the_fingerprint(checkpoint: CheckpointFactory) -> None:
    first = load_model(str(checkpoint("llama")))
    again = load_model(str(checkpoint("llama")))
    other = load_model(str(checkpoint("llama", seed=1)))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint


def test_weights_that_are_replaced_while_they_are_loaded_are_refused(
    checkpoint: CheckpointFactory, copied: Path
) -> None:
    other = checkpoint("llama", seed=1) / "model.safetensors"

    def replace(line: str) -> None:
        if "of weights" in line:  # they are identified, and not read yet
            shutil.copyfile(other, copied / "model.safetensors")

    with pytest.raises(CorruptModelError, match="changed while they were loaded"):
        load_model(str(copied), progress=replace)


def test_nothing_holds_the_vocabulary_beside_the_backend(copied: Path) -> None:
    config = copied / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": "Qwen2Tokenizer"}))
    tokenizer = read_tokenizer(copied)
    assert type(tokenizer) is Qwen2Tokenizer  # which keeps the vocabulary and the merges that it makes its backend of
    assert len(tokenizer) == VOCAB_SIZE
    assert max(len(part) for part in vars(tokenizer).values() if isinstance(part, dict | list)) < 100


def test_eos_tokens_may_be_a_list(copied: Path) -> None:
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_model(str(copied)).eos_token_ids == {0, 2, 7, 9}  # with the config's and the tokenizer's


def test_a_model_is_fetched_by_its_hub_id(checkpoint: CheckpointFactory) -> None:
    asked: list[str] = []

    def fetch(repo_id: str) -> Path:
        asked.append(repo_id)
        return checkpoint("llama")

    assert load_model("someone/tiny", fetch=fetch).name == "someone/tiny"
    assert asked == ["someone/tiny"]


def test_nothing_is_printed(checkpoint: CheckpointFactory, capfd: pytest.CaptureFixture[str]) -> None:
    folder = str(checkpoint("llama"))
    capfd.readouterr()
    load_model(folder)
    assert capfd.readouterr() == ("", "")


def test_models_of_two_dtypes_are_loaded_at_once(checkpoint: CheckpointFactory) -> None:
    folders = [checkpoint("llama", dtype) for dtype in (torch.float32, torch.bfloat16)] * 4
    with ThreadPoolExecutor(len(folders)) as threads:
        loaded = list(threads.map(lambda folder: load_model(str(folder), device="cpu"), folders))
    assert [each.model.lm_head.weight.dtype for each in loaded] == [torch.float32, torch.bfloat16] * 4
    assert torch.get_default_dtype() is torch.float32

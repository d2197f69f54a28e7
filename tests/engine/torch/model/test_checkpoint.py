"""Broken folders and unknown ids: each is refused by the name of what is wrong with it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from emberkv.engine.torch.model.checkpoint import WANTED_FILES, fetch_from_hub
from emberkv.engine.torch.model.loader import load_model
from emberkv.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from tests.machine import free_ports


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of the weight file, or take away those given as None; dots are written ``__``."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_hub_is_asked_for_no_pickles() -> None:
    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return "/somewhere"

    assert fetch_from_hub("someone/tiny", download=download) == Path("/somewhere")
    assert asked == {"repo_id": "someone/tiny", "allow_patterns": WANTED_FILES}
    assert not any(pattern.endswith(("bin", "pt", "py")) for pattern in WANTED_FILES)


def test_a_download_reports_how_much_is_there() -> None:
    def download(repo_id: str, *, allow_patterns: object, tqdm_class: Any) -> str:
        with (
            tqdm_class(desc="Fetching 3 files", total=3) as files,
            tqdm_class(total=0, unit="B", mininterval=0) as sent,
        ):
            sent.total = 4 * 2**20
            sent.update(2**20)
            sent.update(3 * 2**20)
            files.update(3)
        return "/somewhere"

    lines: list[str] = []
    assert fetch_from_hub("someone/tiny", progress=lines.append, download=download) == Path("/somewhere")
    shown = list(dict.fromkeys(lines))
    assert shown == [f"downloading someone/tiny: {done} of 4 MiB" for done in (1, 4)]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("cannot reach the hub"), "'a/b'.*cannot reach the hub.*accepted are a local folder"),
        (HFValidationError("bad"), "neither a folder nor a hub id"),
        (caused(LocalEntryNotFoundError("x"), httpx2.ReadTimeout("")), "Hugging Face did not answer in time;"),
        (httpx2.ProxyError("503 Service Unavailable"), r"cannot be reached \(no network\?\);"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set, and its cache does not hold that model;"),
        (
            PermissionError(13, "Permission denied"),
            r"did not give a model of that id \(\[Errno 13\] Permission denied\)",
        ),
    ],
)
def test_an_id_that_the_hub_does_not_give(error: Exception, message: str) -> None:
    def download(repo_id: str, **options: Any) -> str:
        raise error

    with pytest.raises(ModelNotFoundError, match=message):
        fetch_from_hub("a/b", download=download)


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    download = partial(snapshot_download, endpoint=f"http://127.0.0.1:{free_ports()}", cache_dir=tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"^no folder 'a/b' exists, and Hugging Face cannot be reached \(no"):
        fetch_from_hub("a/b", download=download)


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c"])
def test_paths_that_do_not_exist_are_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"no folder '{name}' exists"):
        load_model(name)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_a_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(ModelNotFoundError, match="is a file"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("{", CorruptModelError, "not valid JSON"),
        ("[]", CorruptModelError, "must be an object"),
        ("{}", CorruptModelError, "no model_type"),
        ('{"model_type": "quux"}', UnsupportedModelError, "quux"),
        ('{"model_type": "llama", "hidden_size": "wide"}', CorruptModelError, "hidden_size"),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path: Path, config: str, error: type[Exception], message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(error, match=message):
        load_model(str(tmp_path))


def test_truncated_weights_are_named(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptModelError, match=r"model\.safetensors is not a whole safetensors file"):
        load_model(str(copied))


def test_weights_that_are_no_safetensors(copied: Path) -> None:
    (copied / "model.safetensors").write_bytes(b"garbage" * 100)
    with pytest.raises(CorruptModelError, match="is not a whole safetensors file"):
        load_model(str(copied))


def test_a_missing_tensor_is_never_random(copied: Path) -> None:
    edit_weights(copied, model__layers__1__self_attn__k_proj__weight=None)
    with pytest.raises(CorruptModelError, match=r"lack model\.layers\.1\.self_attn\.k_proj\.weight"):
        load_model(str(copied))


def test_a_tensor_of_the_wrong_shape(copied: Path) -> None:
    edit_weights(copied, model__layers__1__self_attn__k_proj__weight=torch.zeros(3, 3))
    with pytest.raises(CorruptModelError, match=r"do not fit its config\.json"):
        load_model(str(copied))


def test_weights_of_another_format(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin.*safetensors"):
        load_model(str(copied))


def test_no_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="no weights"):
        load_model(str(copied))


def test_a_missing_shard(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptModelError, match=r"lacks model-00001-of-00001\.safetensors"):
        load_model(str(copied))


def test_shards_load_like_one_file(copied: Path) -> None:
    whole = load_model(str(copied)).model.state_dict()
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, copied / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = load_model(str(copied)).model.state_dict()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_a_missing_tokenizer(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    with pytest.raises(CorruptModelError, match=r"no tokenizer.*tokenizer\.json"):
        load_model(str(copied))


def test_a_tokenizer_that_cannot_be_read(copied: Path) -> None:
    (copied / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CorruptModelError, match=r"tokenizer in .* cannot be read"):
        load_model(str(copied))


def test_no_context_length(copied: Path) -> None:
    edit_config(copied, max_position_embeddings=None)
    with pytest.raises(CorruptModelError, match="max_position_embeddings"):
        load_model(str(copied))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobody-of-that-name/x", ""])
def test_names_that_can_be_no_paths(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="accepted are a local folder") as raised:
        load_model(name)
    assert len(str(raised.value)) < 300


def test_a_sentencepiece_model_alone(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(UnsupportedModelError, match=r"SentencePiece model only .* must hold tokenizer\.json"):
        load_model(str(copied))

"""The weights' identity follows their content: not their name, their folder or their age."""

import json
import os
from pathlib import Path

import pytest

from emberkv.engine.torch.model.fingerprint import file_states, weights_fingerprint
from emberkv.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError

SHA = "ab" * 32


def write_model(folder: Path, weights: bytes = b"one", config: str = "{}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def write_shards(folder: Path, shards: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    weight_map = {f"tensor.{name}": name for name in shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_hub_snapshot(hub: Path, revision: str, blob: str, content: bytes) -> Path:
    (hub / "blobs").mkdir(parents=True, exist_ok=True)
    (hub / "blobs" / blob).write_bytes(content)
    snapshot = hub / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / blob)
    return snapshot


def replace_bytes(path: Path, content: bytes, mtime_ns: int) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))


def test_equal_files_in_other_folders_are_the_same_weights(tmp_path: Path) -> None:
    first = weights_fingerprint(write_model(tmp_path / "a"))
    assert weights_fingerprint(write_model(tmp_path / "b")) == first
    assert len(first) == 32


def test_other_bytes_of_equal_length_are_other_weights(tmp_path: Path) -> None:
    first = weights_fingerprint(write_model(tmp_path / "a", b"one"))
    assert weights_fingerprint(write_model(tmp_path / "b", b"two")) != first


def test_another_config_is_another_model(tmp_path: Path) -> None:
    first = weights_fingerprint(write_model(tmp_path / "a"))
    assert weights_fingerprint(write_model(tmp_path / "b", config='{"rope_theta": 1}')) != first


def test_tokenizer_files_do_not_count(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a")
    first = weights_fingerprint(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert weights_fingerprint(folder) == first


def test_every_shard_counts(tmp_path: Path) -> None:
    first = weights_fingerprint(write_shards(tmp_path / "a", {"x.safetensors": b"1", "y.safetensors": b"2"}))
    same = write_shards(tmp_path / "b", {"y.safetensors": b"2", "x.safetensors": b"1"})
    other = write_shards(tmp_path / "c", {"x.safetensors": b"1", "y.safetensors": b"3"})
    swapped = write_shards(tmp_path / "d", {"x.safetensors": b"2", "y.safetensors": b"1"})
    assert weights_fingerprint(same) == first
    assert weights_fingerprint(other) != first
    assert weights_fingerprint(swapped) != first


def test_other_bytes_of_equal_size_and_times_are_other_weights(tmp_path: Path) -> None:
    """As ``cp -p``, ``tar`` and images with fixed times leave them; links to where the hub's client keeps files too."""
    folder = write_model(tmp_path / "a", b"one")
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1_000, 1_000))
    first = weights_fingerprint(folder)
    replace_bytes(weights, b"two", 1_000)
    assert weights_fingerprint(folder) != first


def test_a_link_is_followed_whatever_its_target_is_called(tmp_path: Path) -> None:
    first = weights_fingerprint(write_hub_snapshot(tmp_path / "hub1", "main", SHA, b"one"))
    assert weights_fingerprint(write_hub_snapshot(tmp_path / "hub2", "main", SHA, b"two")) != first
    assert weights_fingerprint(write_hub_snapshot(tmp_path / "hub3", "other", "cd" * 32, b"one")) == first
    assert weights_fingerprint(write_model(tmp_path / "plain", b"one")) == first


def test_files_that_are_written_or_replaced_show_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a", b"one")
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1_000, 1_000))
    before = file_states(folder)
    assert file_states(folder) == before
    copy = tmp_path / "copy"
    copy.write_bytes(b"two")
    os.utime(copy, ns=(1_000, 1_000))
    copy.replace(weights)
    replaced = file_states(folder)
    (folder / "config.json").write_text("{ }")
    assert len({tuple(states) for states in (before, replaced, file_states(folder))}) == 3


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "a", {"x.safetensors": b"1", "y.safetensors": b"2"})
    (folder / "y.safetensors").unlink()
    with pytest.raises(CorruptModelError, match=r"lacks y\.safetensors"):
        weights_fingerprint(folder)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="no weights"):
        weights_fingerprint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin"):
        weights_fingerprint(folder)

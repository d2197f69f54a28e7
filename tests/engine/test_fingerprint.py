"""The weights' identity follows their content: not their name, their folder or their age."""

import json
import os
from pathlib import Path

import pytest

from emberkv.engine.fingerprint import CACHE_FILE, weights_fingerprint
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
    first = weights_fingerprint(write_model(tmp_path / "a"), None)
    assert weights_fingerprint(write_model(tmp_path / "b"), None) == first
    assert len(first) == 32


def test_other_bytes_of_equal_length_are_other_weights(tmp_path: Path) -> None:
    first = weights_fingerprint(write_model(tmp_path / "a", b"one"), None)
    assert weights_fingerprint(write_model(tmp_path / "b", b"two"), None) != first


def test_another_config_is_another_model(tmp_path: Path) -> None:
    first = weights_fingerprint(write_model(tmp_path / "a"), None)
    assert weights_fingerprint(write_model(tmp_path / "b", config='{"rope_theta": 1}'), None) != first


def test_tokenizer_files_do_not_count(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a")
    first = weights_fingerprint(folder, None)
    (folder / "tokenizer.json").write_text("{}")
    assert weights_fingerprint(folder, None) == first


def test_every_shard_counts(tmp_path: Path) -> None:
    first = weights_fingerprint(write_shards(tmp_path / "a", {"x.safetensors": b"1", "y.safetensors": b"2"}), None)
    same = write_shards(tmp_path / "b", {"y.safetensors": b"2", "x.safetensors": b"1"})
    other = write_shards(tmp_path / "c", {"x.safetensors": b"1", "y.safetensors": b"3"})
    swapped = write_shards(tmp_path / "d", {"x.safetensors": b"2", "y.safetensors": b"1"})
    assert weights_fingerprint(same, None) == first
    assert weights_fingerprint(other, None) != first
    assert weights_fingerprint(swapped, None) != first


def test_changed_weights_of_equal_name_and_size_are_noticed_by_their_time(tmp_path: Path) -> None:
    folder, cache = write_model(tmp_path / "a", b"one"), tmp_path / "cache"
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1_000, 1_000))
    first = weights_fingerprint(folder, cache)
    replace_bytes(weights, b"two", 2_000)
    second = weights_fingerprint(folder, cache)
    assert second != first
    replace_bytes(weights, b"one", 3_000)
    assert weights_fingerprint(folder, cache) == first


def test_unchanged_weights_are_not_read_again(tmp_path: Path) -> None:
    folder, cache = write_model(tmp_path / "a", b"one"), tmp_path / "cache"
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1_000, 1_000))
    first = weights_fingerprint(folder, cache)
    replace_bytes(weights, b"two", 1_000)  # only a file that is not read can hide this
    assert weights_fingerprint(folder, cache) == first
    assert weights_fingerprint(folder, None) != first
    assert [path.name for path in cache.iterdir()] == [CACHE_FILE]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 3, "y": [1, 2]}', '"\\ud800"'])
def test_a_corrupt_cache_costs_a_reading_only(tmp_path: Path, content: str) -> None:
    folder, cache = write_model(tmp_path / "a"), tmp_path / "cache"
    first = weights_fingerprint(folder, None)
    cache.mkdir()
    (cache / CACHE_FILE).write_text(content)
    assert weights_fingerprint(folder, cache) == first
    assert len(json.loads((cache / CACHE_FILE).read_text())) == 1


def test_a_cache_that_is_no_json_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, cache = write_model(tmp_path / "a"), tmp_path / "cache"
    cache.mkdir()
    (cache / CACHE_FILE).write_text("{")
    weights_fingerprint(folder, cache)
    assert f"{cache / CACHE_FILE} is no JSON and will be written anew" in caplog.text


def test_a_hub_file_is_known_by_its_blob_and_not_read(tmp_path: Path) -> None:
    first = weights_fingerprint(write_hub_snapshot(tmp_path / "hub1", "main", SHA, b"one"), None)
    same_blob = write_hub_snapshot(tmp_path / "hub2", "other", SHA, b"not what the name says")
    other_blob = write_hub_snapshot(tmp_path / "hub3", "main", "cd" * 32, b"one")
    assert weights_fingerprint(same_blob, None) == first
    assert weights_fingerprint(other_blob, None) != first


def test_a_link_that_is_no_hub_blob_is_read(tmp_path: Path) -> None:
    target = write_model(tmp_path / "target")
    folder = write_model(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target / "model.safetensors")
    assert weights_fingerprint(folder, None) == weights_fingerprint(target, None)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "a", {"x.safetensors": b"1", "y.safetensors": b"2"})
    (folder / "y.safetensors").unlink()
    with pytest.raises(CorruptModelError, match=r"lacks y\.safetensors"):
        weights_fingerprint(folder, None)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="no weights"):
        weights_fingerprint(folder, None)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin"):
        weights_fingerprint(folder, None)


def test_what_a_killed_process_left_beside_the_hashes_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f"{CACHE_FILE}.abcd1234.tmp"
    left.write_text("{")
    os.utime(left, (0, 0))
    weights_fingerprint(write_model(tmp_path / "model"), tmp_path)
    assert not left.exists()
    assert (tmp_path / CACHE_FILE).is_file()


@pytest.mark.parametrize("folder", ["file", "file/below", "taken"])
def test_a_folder_that_cannot_keep_the_hashes_costs_a_reading_only(
    tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / CACHE_FILE).mkdir(parents=True)
    model = write_shards(tmp_path / "model", {"a.safetensors": b"one", "b.safetensors": b"two"})
    assert weights_fingerprint(model, tmp_path / folder) == weights_fingerprint(model, None)
    assert caplog.text.count("weights are read anew at each start") == 1

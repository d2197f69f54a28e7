"""A model's files: where they are, which of them hold weights, and whether they are whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from emberkv.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "*.tiktoken"]

_ACCEPTED = (
    "accepted are a local folder with config.json and safetensors weights, or a hub id such as 'Qwen/Qwen3-0.6B'"
)

Fetch = Callable[[str], Path]
"""Turns a hub id into a local folder; raises ModelNotFoundError."""


def fetch_from_hub(repo_id: str, *, download: Callable[..., str] = snapshot_download) -> Path:
    """Download a hub model, or find it in the hub's cache when the hub cannot be reached.

    Raises ModelNotFoundError.
    """
    try:
        return Path(download(repo_id, allow_patterns=WANTED_FILES))
    except HFValidationError as error:
        raise ModelNotFoundError(f"{repo_id!r} is neither a folder nor a hub id; {_ACCEPTED}") from error
    except (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError) as error:
        raise ModelNotFoundError(
            f"no folder {repo_id!r} exists, and the hub did not give a model of that id "
            f"({str(error).splitlines()[0]}); {_ACCEPTED}"
        ) from error


def find_folder(name_or_path: str, fetch: Fetch = fetch_from_hub) -> Path:
    """The local folder of a model that is given by path or hub id.

    Raises ModelNotFoundError when there is none, or the folder has no config.json.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        folder = path
    elif path.exists():
        raise ModelNotFoundError(f"{name_or_path!r} is a file; {_ACCEPTED}")
    elif path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise ModelNotFoundError(f"no folder {name_or_path!r} exists; {_ACCEPTED}")
    else:
        folder = fetch(name_or_path)
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{name_or_path!r} is no model: {folder} has no config.json; {_ACCEPTED}")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CorruptModelError when it is not one."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptModelError(f"{path} holds a JSON {type(content).__name__}; it must be an object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model's weights, sorted; all of them exist.

    Raises UnsupportedModelError when weights are there but in another format, ModelNotFoundError when there are
    none, CorruptModelError when a shard is missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
        if others:
            raise UnsupportedModelError(
                f"{folder} has weights in {', '.join(others)} only; accepted are safetensors files"
            )
        raise ModelNotFoundError(f"{folder} has no weights; it must hold {SINGLE_FILE} or {INDEX_FILE}")
    shards = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CorruptModelError(f"{folder / INDEX_FILE} has no weight_map; it must map tensors to files")
    names = sorted({str(name) for name in shards.values()})
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise CorruptModelError(f"{folder} lacks {', '.join(missing)}, which {INDEX_FILE} lists")
    return [folder / name for name in names]


def check_weight_files(files: list[Path]) -> str | None:
    """Read each file's header, which also proves that the file is as long as its tensors need.

    Returns the safetensors dtype of the first floating-point tensor ("F32", "BF16", ...), None without one.
    Raises CorruptModelError naming the file.
    """
    dtype: str | None = None
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys() if dtype is None else ():
                    found = tensors.get_slice(name).get_dtype()
                    if "F" in found:
                        dtype = found
                        break
        except (SafetensorError, OSError) as error:
            raise CorruptModelError(f"{path} is not a whole safetensors file: {error}") from error
    return dtype

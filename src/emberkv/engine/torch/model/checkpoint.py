"""A model's files: where they are, which of them hold weights, and whether they are whole."""

import codecs
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from emberkv.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError, reason_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "*.tiktoken"]

_LONGEST_SHOWN = 100
_ACCEPTED = (
    "accepted are a local folder with config.json and safetensors weights, a GGUF file, or a hub id such as "
    "'Qwen/Qwen3-0.6B'"
)

_http: Any = import_module(next(each.__module__ for each in HfHubHTTPError.__mro__ if each.__name__ == "HTTPError"))
"""The HTTP library of the hub's client: httpx2, or httpx in its earlier versions."""

Fetch = Callable[[str], Path]
"""Turns a hub id into a local folder; raises ModelNotFoundError."""


def fetch_from_hub(
    repo_id: str,
    *,
    progress: Callable[[str], None] | None = None,
    download: Callable[..., str] = snapshot_download,
) -> Path:
    """Download a hub model, or find it in the hub's cache when the hub cannot be reached.

    progress: called several times a second with a line that says how much is there.

    Raises ModelNotFoundError.
    """
    bars = {} if progress is None else {"tqdm_class": _reported_bars(repo_id, progress)}
    try:
        return Path(download(repo_id, allow_patterns=WANTED_FILES, **bars))
    except HFValidationError as error:
        raise ModelNotFoundError(f"{_shown(repo_id)} is neither a folder nor a hub id; {_ACCEPTED}") from error
    except (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled, _http.HTTPError, OSError) as error:
        raise ModelNotFoundError(f"no folder {repo_id!r} exists, and {_hub_problem(error)}; {_ACCEPTED}") from error


def _reported_bars(repo_id: str, progress: Callable[[str], None]) -> type:
    """A tqdm class that draws nothing and reports what its bars of bytes hold."""

    def silent(bar: Any, *args: Any, **options: Any) -> None:
        tqdm.__init__(bar, *args, **{**options, "file": io.StringIO()})

    def display(bar: Any, *_: Any, **__: Any) -> None:
        if bar.unit == "B" and bar.n and bar.total:
            progress(f"downloading {repo_id}: {bar.n / 2**20:,.0f} of {bar.total / 2**20:,.0f} MiB")

    return type("ReportedBar", (tqdm,), {"__init__": silent, "display": display})


def _hub_problem(error: Exception) -> str:
    """Why the hub gave nothing. Its client wraps what the network said, often more than once."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(each, OfflineModeIsEnabled) for each in causes):
        return "the hub is not asked, as HF_HUB_OFFLINE is set, and its cache does not hold that model"
    for kind, problem in _HUB_PROBLEMS.items():
        if any(isinstance(each, kind) for each in causes):
            return problem
    return f"the hub did not give a model of that id ({reason_of(error)})"


_HUB_PROBLEMS: dict[type[BaseException], str] = {
    GatedRepoError: "the hub gives that model only to those who accepted its terms: accept them, and set HF_TOKEN",
    RepositoryNotFoundError: "the hub has no model of that id, or a private one: check the spelling, or set HF_TOKEN",
    _http.TimeoutException: "Hugging Face did not answer in time",
    _http.TransportError: "Hugging Face cannot be reached (no network?)",
}
"""By what the client raised; the more special kind stands first."""


GGUF_SUFFIX = ".gguf"


def find_model(name_or_path: str, fetch: Fetch = fetch_from_hub) -> Path:
    """The local folder, or the GGUF file, of a model that is given by path or hub id.

    Raises ModelNotFoundError when there is none, or the folder has no config.json.
    """
    return local_model(name_or_path) or _with_config(fetch(name_or_path), name_or_path)


def local_model(name_or_path: str) -> Path | None:
    """The folder or the GGUF file of a model on this machine; None for what may be a hub id. The hub is not asked.

    Raises ModelNotFoundError as `find_model` does. It needs no PyTorch.
    """
    path = _local(name_or_path)
    if path is not None and path.is_file() and path.suffix == GGUF_SUFFIX:
        return path
    if path is not None and path.is_dir():
        return _with_config(path, name_or_path)
    if path is not None and path.exists():
        raise ModelNotFoundError(f"{name_or_path!r} is a file; {_ACCEPTED}")
    if path is None or path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise ModelNotFoundError(f"no folder {_shown(name_or_path)} exists; {_ACCEPTED}")
    return None


def _with_config(folder: Path, name_or_path: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{name_or_path!r} is no model: {folder} has no config.json; {_ACCEPTED}")
    return folder


def _local(name: str) -> Path | None:
    """The path that ``name`` would be; None where it cannot be one."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown user's home
        return None
    return path if name else None


def _shown(name: str) -> str:
    return repr(name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}…")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CorruptModelError when it is not one."""
    text = path.read_bytes()
    if text.startswith(codecs.BOM_UTF8):
        raise CorruptModelError(f"{path} begins with a byte-order mark; save it as UTF-8 without one")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptModelError(f"{path} is not valid JSON: {reason_of(error)}") from error
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
            named = next((name for name in others if name.endswith(GGUF_SUFFIX)), None)
            hint = "" if named is None else f", or the GGUF file itself: {folder / named}"
            raise UnsupportedModelError(
                f"{folder} has weights in {', '.join(others)} only; accepted are safetensors files{hint}"
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


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """What the headers of weight files say. dtype: safetensors' name of the first floating-point tensor's ("F32",
    "BF16", ...); None without one. shapes: of each tensor.
    """

    dtype: str | None
    shapes: dict[str, tuple[int, ...]]


def read_headers(files: list[Path]) -> StoredTensors:
    """Read each file's header, which also proves that the file is as long as its tensors need.

    Raises CorruptModelError naming the file.
    """
    dtypes: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    tensor = tensors.get_slice(name)
                    dtypes.append(tensor.get_dtype())
                    shapes[name] = tuple(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise CorruptModelError(f"{path} is not a whole safetensors file: {reason_of(error)}") from error
    return StoredTensors(next((dtype for dtype in dtypes if "F" in dtype), None), shapes)

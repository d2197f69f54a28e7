"""The fingerprint of a model's weights: by their content, never by name or time; of files and of a model in memory."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from emberkv.engine.torch.model.checkpoint import weight_files
from emberkv.engine.torch.quantization.layers import (
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    ReorderedLinear,
)
from emberkv.errors import ModelError

_CHUNK_BYTES = 4 << 20

FileState = tuple[int, int, int, int, int]
"""Device, inode, size, and times of modification and change in nanoseconds."""


def weights_fingerprint(folder: Path) -> str:
    """Hex identity of the weights and config in ``folder``, the same wherever equal files lie.

    Every byte is read each time, and links are followed: times, sizes and names of files can be copied from another
    model's. Loading needs the same bytes next, and then finds them in the page cache. Tokenizer files do not count.

    Raises the errors of ``weight_files``, and OSError when a file cannot be read.
    """
    return files_fingerprint((folder / "config.json").read_bytes(), weight_files(folder))


def files_fingerprint(config: bytes, files: list[Path]) -> str:
    """Hex identity of a config's bytes and of the content of files, which are named in it."""
    whole = xxhash.xxh3_128()
    whole.update(config)
    for path in files:
        whole.update(f"\0{path.name}\0{_file_hash(path)}".encode())
    return whole.hexdigest()


def file_fingerprint(path: Path) -> str:
    """Hex identity of a file that holds a whole model, whatever it is called."""
    return xxhash.xxh3_128(f"file\0{_file_hash(path)}".encode()).hexdigest()


def quantised_fingerprint(fingerprint: str, how: str) -> str:
    """The fingerprint of weights that are rounded while they are loaded. how: all that says to which values."""
    return xxhash.xxh3_128(f"{fingerprint}\0{how}".encode()).hexdigest()


def file_states(folder: Path) -> list[FileState]:
    """What shows that the files of `weights_fingerprint` were written to or replaced between two calls."""
    return states_of([folder / "config.json", *weight_files(folder)])


def states_of(files: list[Path]) -> list[FileState]:
    """What shows that one of the files was written to or replaced between two calls."""
    found = [path.stat() for path in files]
    return [(each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found]


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


_NOT_STATE = frozenset({"_name_or_path", "_attn_implementation", "attn_implementation", "dtype", "torch_dtype",
                        "transformers_version", "use_cache"})  # fmt: skip
"""Settings on which the KV state does not depend, or that the block hashes cover in another way."""


def model_fingerprint(model: PreTrainedModel) -> str:
    """The fingerprint that serving gives the checkpoint which ``model`` was loaded from, when that is what it holds.

    Weights and settings are compared with the files, not believed: a model that was changed since, or whose files are
    not here or name their tensors in another way, gets a fingerprint of its own content.
    """
    folder = None if _quantised_parts(model) else _checkpoint_folder(model)
    if folder is not None and _is_unchanged(model, folder):
        return weights_fingerprint(folder)
    return f"in-memory-{_content_hash(model)}"


def _checkpoint_folder(model: PreTrainedModel) -> Path | None:
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    revision = getattr(model.config, "_commit_hash", None)
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # the name is no hub id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


@torch.inference_mode()
def _is_unchanged(model: PreTrainedModel, folder: Path) -> bool:
    """Whether every tensor of the model's state equals the stored one, or shares its memory with one that does."""
    try:
        files = weight_files(folder)
        stored_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ModelError, ValueError, OSError):  # nothing there to compare with
        return False
    if _settings(stored_config) != _settings(model.config):
        return False
    unproven = dict(model.state_dict())
    proven: set[tuple[object, ...]] = set()
    names = {name.removeprefix(f"{model.base_model_prefix}."): name for name in unproven}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            stored_names: list[str] = tensors.keys()
            for stored_name in stored_names:
                name = stored_name if stored_name in unproven else names.get(stored_name, "")
                if name not in unproven:
                    continue
                ours = unproven.pop(name)
                if not _same(ours, tensors.get_tensor(stored_name)):
                    return False
                proven.add(_place(ours))
    return all(_place(tensor) in proven for tensor in unproven.values())


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _same(ours: Tensor, stored: Tensor) -> bool:
    return ours.shape == stored.shape and torch.equal(ours, stored.to(ours.device, ours.dtype))


def _settings(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _NOT_STATE}


def _quantised_parts(model: PreTrainedModel) -> dict[str, Tensor]:
    """What quantised layers hold besides the parameters of the model's state."""
    found: dict[str, Tensor | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            held = module.quantized
            found |= {f"{name}.codes": held.codes, f"{name}.scales": held.scales, f"{name}.offsets": held.offsets}
        if isinstance(module, QuantizedExperts):
            for number, held in enumerate(module.quantized):
                of_one = {"codes": held.codes, "scales": held.scales, "offsets": held.offsets}
                found |= {f"{name}.{number}.{part}": each for part, each in of_one.items()}
        if isinstance(module, QuantizedLinear):
            found[f"{name}.bias"] = module.bias
        if isinstance(module, ReorderedLinear):
            found[f"{name}.order"] = module.order
    return {name: each for name, each in found.items() if each is not None}


def _content_hash(model: PreTrainedModel) -> str:
    whole = xxhash.xxh3_128(json.dumps(_settings(model.config), sort_keys=True, default=str).encode())
    for name, tensor in chain(model.named_parameters(), model.named_buffers(), _quantised_parts(model).items()):
        whole.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()

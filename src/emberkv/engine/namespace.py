"""Under which name blocks outlive the process: everything that their bytes depend on."""

import platform
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from emberkv.core.hashing import Identity

_FORMAT = b"emberkv-tiers-2"
_OWN_SOURCES = Path(__file__).parent
_LIBRARY = "transformers."
_MODELS = "transformers.models."


def tier_namespace(root: Identity, model: nn.Module, device: torch.device) -> bytes:
    """The 32 bytes that name what ``model`` stores in the tiers.

    root: of the block hashes without a salt; it covers weights, config, dtype and layout. A stored block must be what
    this process would compute, and that changes with the libraries, with the code of the model's own layers and of this
    engine, with the processor's instructions and the number of threads.
    """
    named = sha256(_FORMAT + root)
    for part in (*_libraries(), *_processor(device)):
        named.update(f"\0{part}".encode())
    for path in _sources(model):
        named.update(f"\0{path.name}\0".encode() + sha256(path.read_bytes()).digest())
    return named.digest()


def _libraries() -> list[str]:
    return [torch.__version__, str(torch.version.git_version), str(transformers.__version__)]


def _processor(device: torch.device) -> list[str]:
    if device.type == "cuda":
        cudnn: Any = torch.backends.cudnn  # its functions are untyped
        return [torch.cuda.get_device_name(device), str(torch.version.cuda), str(cudnn.version())]
    instructions = sorted(name for name, present in torch.cpu.get_capabilities().items() if present is True)
    threads = str(torch.get_num_threads())
    return [device.type, platform.machine(), torch.backends.cpu.get_cpu_capability(), *instructions, threads]


def _sources(model: nn.Module) -> list[Path]:
    """The files whose code may run in a forward pass, sorted by name and place.

    They are this engine's own, those that define the classes of the model's layers, and those that define what these
    files use of transformers. Its version does not tell where an installation was patched.
    """
    classes = {base.__module__ for module in model.modules() for base in type(module).__mro__} & sys.modules.keys()
    layers = {name for name in classes if name.startswith(_MODELS) or not _is_named_by_version(name)}
    used = {getattr(value, "__module__", None) for name in layers for value in vars(sys.modules[name]).values()}
    modules = layers | {name for name in used if isinstance(name, str) and name.startswith(_LIBRARY)}
    files = {file for name in modules if (file := getattr(sys.modules.get(name), "__file__", None)) is not None}
    return sorted({*map(Path, files), *_OWN_SOURCES.rglob("*.py")}, key=lambda path: (path.name, str(path)))


def _is_named_by_version(module: str) -> bool:
    package = module.partition(".")[0]
    return package in ("torch", "transformers", "emberkv") or package in sys.stdlib_module_names

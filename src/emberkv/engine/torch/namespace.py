"""The namespace of stored blocks: everything that their bytes depend on besides what the block hash covers.

A block hash says which tokens, under which weights; the namespace says whether the stored bytes are the ones that this
process would compute. It is checked whenever a stored block is read.
"""

import dataclasses
import json
import os
import platform
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import emberkv.engine.torch
from emberkv.core.hashing import BlockHash
from emberkv.engine.torch.engine import TorchEngine
from emberkv.engine.torch.model.loader import LoadedModel, dtype_name
from emberkv.engine.torch.native.kernels import Kernels

_FORMAT = b"emberkv-namespace-3"
_OWN_SOURCES = Path(emberkv.engine.torch.__path__[0])
_LIBRARY_SETTINGS = ("DNNL_", "MKL_", "ONEDNN_")
"""What variables begin with by which oneDNN and MKL choose their kernels and precision."""

_LIBRARY = "transformers."
_MODELS = "transformers.models."
_TORCH_LAYOUT = "layers-kv-tokens-heads-dim.1"
_INT8_LAYOUT = "layers-kv-heads-pairs-scales.1"


@dataclass(frozen=True, slots=True)
class Namespace:
    """Two processes can use each other's stored blocks if and only if all of these fields are equal.

    root: of the block hashes, so that each model has its own namespace in a shared folder. weights_dtype: in which the
    weights are computed with; as they are stored, the fingerprint covers them. layout: the order of a block's values.
    kernels: the identity of the compiled kernels, or "torch". alignment, batch_invariant: which tokens have the state
    of a cold prefill (see `TorchEngine`). libraries: versions. processor: the device and its instructions. threads: how
    many compute on a CPU. sources: name and digest of every file whose code may run in a forward pass.

    Exactness is a property of each stored block, not of the namespace.
    A native decoder has no field: it computes only where the start found its bits equal to those of the model's modules
    (`self_check.decoder_agrees`).
    """

    root: BlockHash
    weights_dtype: str
    activations_dtype: str
    kv_dtype: str
    layout: str
    kernels: str
    alignment: int
    batch_invariant: bool
    libraries: tuple[str, ...]
    processor: tuple[str, ...]
    threads: int
    sources: tuple[tuple[str, str], ...]

    def digest(self) -> bytes:
        """The 32 bytes under which the tiers keep blocks: SHA-256 of the format's name and the fields as JSON."""
        named = dataclasses.asdict(self) | {"root": self.root.hex()}
        return sha256(_FORMAT + json.dumps(named, sort_keys=True).encode()).digest()


def namespace_of(engine: TorchEngine, root: BlockHash) -> Namespace:
    """The namespace of what ``engine`` computes in this process, as it is set up now."""
    found = namespace(
        engine.loaded, engine.kernels, root, alignment=engine.alignment, batch_invariant=engine.batch_invariant
    )
    return dataclasses.replace(found, kv_dtype=dtype_name(engine.pool.dtype))


def namespace(
    loaded: LoadedModel, kernels: Kernels | None, root: BlockHash, *, alignment: int, batch_invariant: bool
) -> Namespace:
    """The namespace of what this process computes. kernels: those that do compute; None where torch does."""
    dtypes, device = loaded.dtypes, loaded.device
    return Namespace(
        root=root,
        weights_dtype=dtype_name(dtypes.weights),
        activations_dtype=dtype_name(dtypes.activations),
        kv_dtype=dtype_name(dtypes.kv),
        layout=_layout(dtypes.kv, kernels),
        kernels=kernels.identity if kernels is not None else "torch",
        alignment=alignment,
        batch_invariant=batch_invariant,
        libraries=(torch.__version__, str(torch.version.git_version), str(transformers.__version__)),
        processor=_processor(device),
        threads=torch.get_num_threads() if device.type != "cuda" else 0,
        sources=tuple((path.name, sha256(path.read_bytes()).hexdigest()) for path in forward_sources(loaded.model)),
    )


def _layout(kv_dtype: torch.dtype, kernels: Kernels | None) -> str:
    if kv_dtype is torch.int8:
        return _INT8_LAYOUT
    return "kernels" if kernels is not None else _TORCH_LAYOUT


def _processor(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        cudnn: Any = torch.backends.cudnn  # its functions are untyped
        return (torch.cuda.get_device_name(device), str(torch.version.cuda), str(cudnn.version()))
    instructions = sorted(name for name, present in torch.cpu.get_capabilities().items() if present is True)
    libraries = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(_LIBRARY_SETTINGS))
    return (device.type, platform.machine(), torch.backends.cpu.get_cpu_capability(), *instructions, *libraries)


def forward_sources(model: nn.Module) -> list[Path]:
    """The files whose code may run in a forward pass of ``model``, sorted by name and place.

    They are those of this package, those that define the classes of the model's layers, and those that define what
    these files use of transformers. The version of transformers does not show where an installation was patched. The
    C++ sources are in the identity of the compiled kernels.
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

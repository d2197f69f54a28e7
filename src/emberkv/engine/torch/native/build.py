"""Compiles the kernels for this machine's processor, once for each version of them and of the compiler."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from emberkv.errors import KernelsError, UntrustedPathError
from emberkv.trusted_paths import check_owner

_SOURCES = Path(__file__).parent
_COMPILERS = ("g++", "c++")
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-fopenmp", "-fPIC",
    "-fvisibility=hidden",
)  # fmt: skip
_PATIENCE = 300.0  # seconds for a compiler's run; a few are usual


def build(folder: Path, on_compile: Callable[[], None] = lambda: None) -> Path:
    """The compiled library, below ``folder``, whose name is its identity: of sources, compiler, flags and processor.

    on_compile: called where it is not there yet, before it is compiled.

    Raises KernelsError, which says why there are no kernels here: among others, because somebody else could write
    into the folder, and so choose what this process runs.
    """
    if sys.platform != "linux":
        raise KernelsError(f"the C++ kernels are for Linux; this is {sys.platform}")
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise KernelsError(f"no C++ compiler: none of {', '.join(_COMPILERS)} is on the PATH")
    sources = sorted(_SOURCES.glob("*.cpp"))
    known = hashlib.sha256(_predefined(compiler))
    for part in (*_FLAGS, *(path.name for path in _openmp())):
        known.update(f"\0{part}".encode())
    for path in (*sources, *sorted(_SOURCES.glob("*.hpp"))):
        known.update(b"\0" + path.read_bytes())
    library = folder / f"kernels-{known.hexdigest()[:16]}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_owner(folder)
        if not library.exists():
            on_compile()
            _compile(compiler, sources, library)
        check_owner(library)
    except UntrustedPathError as error:
        raise KernelsError(f"the C++ kernels are not taken from {folder} (EMBERKV_MACHINE_CACHE): {error}") from error
    except OSError as error:
        raise KernelsError(f"the C++ kernels cannot be put into {folder}: {error}") from error
    return library


def _predefined(compiler: str) -> bytes:
    """The compiler's version and what it knows of the processor."""
    return _run([compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull], _SOURCES)


def _openmp() -> list[Path]:
    """torch's own OpenMP, where it brings one: the threads of a second one would get into its way."""
    package = Path(torch.__file__).parent
    folders = package / "lib", package.parent / "torch.libs"
    return sorted(path for folder in folders for path in folder.glob("libgomp*.so*"))[:1]


def _compile(compiler: str, sources: list[Path], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="kernels-build-") as name:
        work = Path(name)
        _run([compiler, *_FLAGS, "-c", *map(str, sources)], work)
        objects = [f"{source.stem}.o" for source in sources]
        openmp = list(map(str, _openmp())) or ["-fopenmp"]
        _run([compiler, "-shared", *objects, *openmp, "-o", library.name], work)
        with (work / library.name).open("rb") as made:
            os.fsync(made.fileno())  # before its name is there: a half-written library would be found for ever
        (work / library.name).replace(library)


def _run(command: list[str], folder: Path) -> bytes:
    try:
        done = subprocess.run(  # noqa: S603 - a fixed list, without a shell
            command, cwd=folder, capture_output=True, timeout=_PATIENCE, check=True
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or ["without a word"]
        raise KernelsError(f"{command[0]} cannot compile the C++ kernels: {said[0]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsError(f"{command[0]} cannot compile the C++ kernels: {error}") from error
    return done.stdout

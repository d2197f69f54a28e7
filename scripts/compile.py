"""Compile the scheduler, the prefix cache, routing, workloads and the simulator's hot modules with mypyc.

    python scripts/compile.py           # a C compiler, and mypy and setuptools of the dev extra, are needed
    python scripts/compile.py --clean   # back to the Python sources
    python scripts/compile.py --into build/compiled   # leaves src as it is; for PYTHONPATH=build/compiled

The extension modules are put beside their sources in ``src``, where Python prefers them. They hold the sources as they
were when they were compiled, so compile again after a change. Without them the Python sources are used.

mypyc does not compile the constructors that dataclasses generate: classes of which a simulation makes many write theirs
out.

With ``--into``, a copy of the package is compiled instead, and made anew only when the sources have changed since.
"""

import argparse
import ast
import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src"
PACKAGES = ("core", "workload")
HOT = {
    "cluster": ("feed", "hash_ring", "policies", "routing"),
    "sim": ("cache_only", "outcome", "replica", "roofline", "simulator", "summary", "tiers", "timing"),
}
"""Of other packages, the modules that run for every request or step."""
NOT_COMPILED = {"numpy", "pydantic"}
"""Packages whose importers stay Python: pydantic's classes are built at run time, numpy's calls gain nothing."""
SHARED_LIBRARY = "emberkv_compiled"
EXTENSIONS = (".so", ".pyd")
STAMP = "compiled-from"
"""The file in a compiled copy that has the digest of its sources."""
MYPY_CONFIG = """\
[mypy]
python_version = 3.11
strict = true
cache_dir = {cache}

[mypy-emberkv.engine.*,emberkv.llm,emberkv.serving.*,matplotlib.*,torch.*,transformers.*]
follow_imports = skip

[mypy-mooncake.*]
ignore_missing_imports = true
"""


def imported_packages(source: Path) -> set[str]:
    """The top-level names of the packages that a source file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.split(".")[0])
    return names


def compiled_sources(folder: Path = SOURCES) -> list[Path]:
    """The source files of ``folder`` that are compiled, sorted: of ``PACKAGES`` and ``HOT`` less ``NOT_COMPILED``."""
    emberkv = folder / "emberkv"
    in_packages = [file for package in PACKAGES for file in (emberkv / package).rglob("*.py")]
    hot = [emberkv / package / f"{name}.py" for package, names in HOT.items() for name in names]
    return sorted(
        file
        for file in (*in_packages, *hot)
        if file.name != "__init__.py" and not imported_packages(file) & NOT_COMPILED
    )


def products() -> Iterator[Path]:
    """The extension modules that an earlier compilation put into ``src``."""
    yield from SOURCES.glob(f"{SHARED_LIBRARY}__mypyc.*")
    for package in (*PACKAGES, *HOT):
        for suffix in EXTENSIONS:
            yield from (SOURCES / "emberkv" / package).rglob(f"*{suffix}")


def clean() -> int:
    """Remove the extension modules; returns how many there were."""
    found = list(products())
    for file in found:
        file.unlink()
    return len(found)


def digest(folder: Path) -> str:
    """Of all files of the package in ``folder``, with their names."""
    walked = os.walk(folder / "emberkv", followlinks=True)
    files = sorted(Path(parent, name) for parent, _, names in walked for name in names)
    hashed = hashlib.sha256()
    for file in files:
        if "__pycache__" not in file.parts and file.suffix not in EXTENSIONS:
            content = file.read_bytes()
            hashed.update(f"{file.relative_to(folder)} {len(content)}\n".encode() + content)
    return hashed.hexdigest()


def copy_package(source: Path, target: Path) -> bool:
    """Make ``target`` a copy of the package in ``source``, without extension modules.

    False, and nothing is changed, if it is a copy of the same files that was compiled: `STAMP` says of which it was.
    """
    stamp = target / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest(source):
        return False
    if target.exists():
        if not stamp.is_file() and any(target.iterdir()):
            raise SystemExit(f"{target} is not empty, and not a compiled copy of an earlier time; name another folder")
        shutil.rmtree(target)
    ignored = shutil.ignore_patterns("__pycache__", *(f"*{suffix}" for suffix in EXTENSIONS))
    shutil.copytree(source / "emberkv", target / "emberkv", ignore=ignored)
    (target / STAMP).write_text("", encoding="utf-8")  # not compiled yet
    return True


def compile_sources(folder: Path, work: Path) -> int:
    """Compile the package in ``folder`` and put the extension modules there; returns of how many modules.

    work: for what the compiler writes.
    """
    from mypyc.build import mypycify  # noqa: PLC0415 - the rest of this file works without the dev extra
    from setuptools import setup  # noqa: PLC0415

    config = work / "mypy.ini"
    config.write_text(MYPY_CONFIG.format(cache=work / "mypy_cache"), encoding="utf-8")
    names = [str(file.relative_to(folder)) for file in compiled_sources(folder)]
    extensions = mypycify(
        [f"--config-file={config}", *names],
        opt_level="2",
        debug_level="0",
        target_dir=str(work / "c"),
        group_name=SHARED_LIBRARY,
    )
    setup(
        name="emberkv",
        ext_modules=extensions,
        script_args=["--quiet", "build_ext", "--build-temp", str(work / "objects"), "--build-lib", str(folder)],
    )
    return len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the simulator's hot modules with mypyc, or undo that.")
    parser.add_argument("--clean", action="store_true", help="remove the extension modules and compile nothing")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="compile a copy of the package in this folder")
    options = parser.parse_args()
    if options.clean:
        sys.stdout.write(f"removed {clean()} extension modules from {SOURCES}; the Python sources are used\n")
        return
    folder = SOURCES if options.into is None else options.into.resolve()
    if options.into is None:
        clean()
    elif not copy_package(SOURCES, folder):
        sys.stdout.write(f"the modules in {folder} are up to date\n")
        return
    with tempfile.TemporaryDirectory(prefix="emberkv-compile-") as work, contextlib.chdir(folder):
        count = compile_sources(folder, Path(work))
    if options.into is None:
        sys.stdout.write(f"compiled {count} modules of {SOURCES}; --clean removes them\n")
    else:
        (folder / STAMP).write_text(digest(folder), encoding="utf-8")
        sys.stdout.write(f"compiled {count} modules; PYTHONPATH={folder} uses them\n")


if __name__ == "__main__":
    main()

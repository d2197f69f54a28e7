"""Compile the scheduler, the prefix cache, routing, workloads and the simulator's hot modules with mypyc.

    python scripts/compile.py           # a C compiler, and mypy and setuptools of the dev extra, are needed
    python scripts/compile.py --clean   # back to the Python sources

The extension modules are put beside their sources in ``src``, where Python prefers them. They hold the sources as they
were when they were compiled, so compile again after a change. Without them the Python sources are used.
"""

import argparse
import ast
import contextlib
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
MYPY_CONFIG = """\
[mypy]
python_version = 3.11
strict = true
cache_dir = {cache}

[mypy-emberkv.engine.*,emberkv.llm,emberkv.serving.*,matplotlib.*,numpy.*,torch.*,transformers.*]
follow_imports = skip
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


def compiled_sources() -> list[Path]:
    """The source files that are compiled, sorted: those of ``PACKAGES`` and ``HOT`` less ``NOT_COMPILED``."""
    emberkv = SOURCES / "emberkv"
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
        for suffix in ("*.so", "*.pyd"):
            yield from (SOURCES / "emberkv" / package).rglob(suffix)


def clean() -> int:
    """Remove the extension modules; returns how many there were."""
    found = list(products())
    for file in found:
        file.unlink()
    return len(found)


def compile_sources(sources: list[Path], work: Path) -> None:
    """Compile ``sources`` and put the extension modules into ``src``; ``work`` is for what the compiler writes."""
    from mypyc.build import mypycify  # noqa: PLC0415 - the rest of this file works without the dev extra
    from setuptools import setup  # noqa: PLC0415

    config = work / "mypy.ini"
    config.write_text(MYPY_CONFIG.format(cache=work / "mypy_cache"), encoding="utf-8")
    names = [str(file.relative_to(SOURCES)) for file in sources]
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
        script_args=["--quiet", "build_ext", "--build-temp", str(work / "objects"), "--build-lib", str(SOURCES)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the simulator's hot modules with mypyc, or undo that.")
    parser.add_argument("--clean", action="store_true", help="remove the extension modules and compile nothing")
    options = parser.parse_args()
    removed = clean()
    if options.clean:
        sys.stdout.write(f"removed {removed} extension modules from {SOURCES}; the Python sources are used\n")
        return
    sources = compiled_sources()
    with tempfile.TemporaryDirectory(prefix="emberkv-compile-") as work, contextlib.chdir(SOURCES):
        compile_sources(sources, Path(work))
    sys.stdout.write(f"compiled {len(sources)} modules of {SOURCES}; --clean removes them\n")


if __name__ == "__main__":
    main()

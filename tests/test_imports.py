"""Imports point one way, the core stays pure, and what needs no torch works without it."""

import ast
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import emberkv

SOURCE = Path(emberkv.__file__).parent
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] != "examples")

LEAVES = {"", "config", "defaults", "errors", "files", "heap", "settings", "tensors", "validation", "yaml_files"}
"""Modules directly in the package (the package itself is ''), which every layer above the core may use."""

ALLOWED = {
    "": {"tiers", "engine", "llm", "sim"},
    "errors": set[str](),
    "event_wire": {"core", "errors"},
    "validation": set[str](),
    "config": {"core", "defaults"},
    "defaults": set[str](),
    "settings": {"config", "defaults", "validation", "errors", "yaml_files"},
    "files": {"errors"},
    "heap": set[str](),
    "yaml_files": {"errors"},
    "tensors": {"errors"},
    "core": {"core", "errors"},
    "tiers": {"tiers", "core", *LEAVES},
    "engine": {"engine", "tiers", "core", *LEAVES} - {"config", "settings"},
    "serving": {"serving", "engine", "tiers", "core", *LEAVES},
    "llm": {"serving", "engine", "tiers", "core", *LEAVES},
    "bench": {"bench", *LEAVES},
    "workload": {"workload", "core", *LEAVES},
    "cluster": {"cluster", "serving", "engine", "tiers", "core", "event_wire", *LEAVES},
    "sim": {"sim", "workload", "cluster", "tiers", "core", *LEAVES},
    "cli": {"cli", "bench", "workload", "sim", "cluster", "serving", "engine", "tiers", "core", *LEAVES},
}

PACKAGES = sorted(path.parent for path in MODULES if path.name == "__init__.py" and path.parent != SOURCE)

IMPURE = {"asyncio", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "random", "socket", "subprocess",
          "tempfile", "threading", "time"}  # fmt: skip
"""Of the standard library, what does I/O, starts threads, reads clocks or draws numbers."""

TORCH_EXTRA = ("torch", "transformers", "tokenizers", "safetensors", "psutil", "jinja2")


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@cache
def import_statements(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """At a file's top or inside a function."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function; ``emberkv.core`` for names taken from it."""
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            assert not node.level, f"{name_of(path)}:{node.lineno} imports relatively"
            assert node.module
            if node.module == "emberkv":
                yield from (f"emberkv.{alias.name}" for alias in node.names)
            else:
                yield node.module


def layer(module: str) -> str:
    """The part of emberkv that a module belongs to; names of the package itself, as __version__, are ''."""
    first = (*module.split("."), "")[1]
    return first if (SOURCE / first).is_dir() or (SOURCE / f"{first}.py").is_file() else ""


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    own = {"__init__": "", "__main__": "cli"}.get(first, first)
    used = {layer(module) for module in imports(path) if module.split(".")[0] == "emberkv"}
    assert used <= ALLOWED[own]


def module_name(path: Path) -> str:
    return ".".join(("emberkv", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


@cache
def graph() -> dict[str, set[str]]:
    """The modules of emberkv that each module imports, wherever in it, by name; the package itself is left out."""
    names = {module_name(path) for path in MODULES} - {"emberkv"}
    found = {}
    for path in MODULES:
        used = set()
        for node in import_statements(path):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            else:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names} & names
                used |= submodules or {node.module or ""}
        found[module_name(path)] = used & names - {module_name(path)}
    return {name: used for name, used in found.items() if name in names}


def cycle_in(edges: Mapping[str, set[str]]) -> list[str]:
    """The members of some cycle; none if there is no cycle."""
    sorter = TopologicalSorter(edges)
    try:
        sorter.prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycle_in(graph()) == []


@pytest.mark.parametrize("folder", PACKAGES, ids=name_of)
def test_the_parts_of_a_package_do_not_import_each_other_in_a_circle(folder: Path) -> None:
    prefix = f"{module_name(folder)}."

    def part(module: str) -> str:
        return module.removeprefix(prefix).split(".")[0]

    edges = defaultdict[str, set[str]](set)
    for module, used in graph().items():
        if module.startswith(prefix):
            edges[part(module)] |= {part(other) for other in used if other.startswith(prefix)} - {part(module)}
    assert cycle_in(edges) == []


def test_a_circle_is_found() -> None:
    assert set(cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize("path", sorted((SOURCE / "core").rglob("*.py")), ids=name_of)
def test_the_core_needs_only_the_pure_part_of_the_standard_library(path: Path) -> None:
    tops = {module.split(".")[0] for module in imports(path)} - {"emberkv"}
    assert tops <= sys.stdlib_module_names - IMPURE


IMPORT_ALL = """
import fastapi, httpx, importlib, json, numpy, os, pkgutil, pydantic, rich.console, sys, traceback, typer, uvicorn

def all_of(name):
    package = importlib.import_module(name)
    found = pkgutil.walk_packages(getattr(package, "__path__", []), name + ".")
    names = [each.name for each in found if not each.name.endswith("__main__")]
    for each in names:
        importlib.import_module(each)
    return len(names)

def in_a_process_of_its_own(name, missing):
    reader, writer = os.pipe()
    if os.fork() == 0:
        sys.modules.update(dict.fromkeys(missing))
        try:
            outcome = all_of(name)
        except BaseException:
            outcome = traceback.format_exc()[-4000:]
        os.write(writer, json.dumps(outcome).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        return json.loads(pipe.read())

assert not [name for name in sys.modules if name.startswith("emberkv")]
print(json.dumps({name: in_a_process_of_its_own(name, missing) for name, missing in json.loads(sys.argv[1]).items()}))
"""

WITHOUT_TORCH = [
    f"emberkv.{name}"
    for name in ("errors", "tensors", "core", "tiers", "bench", "workload", "cluster", "sim", "cli", "engine.loop")
]


@pytest.fixture(scope="module")
def imported_without_torch() -> dict[str, int | str]:
    """How many modules each package has that could all be imported, or the traceback. Each in a process of its own,
    forked off one that has imported other libraries, in which the modules of the torch extra are missing.
    """
    missing = {
        package: [
            name for name in TORCH_EXTRA if (package, name) != ("emberkv.cluster", "psutil")
        ]  # Ray brings its own
        for package in WITHOUT_TORCH
    }
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(missing)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    found: dict[str, int | str] = json.loads(answer)
    return found


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_works_without_torch_and_all_that_comes_with_it(
    package: str, imported_without_torch: dict[str, int | str]
) -> None:
    assert imported_without_torch[package] == len(modules_in(package))


TORCH_FREE = {path.stem for path in (SOURCE / "engine").glob("*.py")} - {"__init__", "warmup"}
"""The engine's own modules: the contract with executors and everything above it. Its packages need torch, and warmup
imports them when it is called.
"""


@pytest.mark.parametrize("name", sorted(TORCH_FREE))
def test_what_is_above_the_executor_names_no_module_below_it(name: str) -> None:
    """At its top, inside a function, or for types alone."""
    used = [module.split(".") for module in imports(SOURCE / "engine" / f"{name}.py")]
    assert not {parts[0] for parts in used} & set(TORCH_EXTRA)
    assert {parts[2] for parts in used if parts[:2] == ["emberkv", "engine"]} <= TORCH_FREE


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"asyncio", "fastapi", "httpx", "matplotlib", "msgspec", "numpy", "pydantic", "rich", "typer", "xxhash"}
    heavy |= set(TORCH_EXTRA)
    command = [sys.executable, "-c", "import sys, emberkv; print(*sys.modules)"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert "emberkv.tiers.byte_cache" in loaded
    assert heavy.isdisjoint(loaded)


def modules_in(package: str) -> list[Path]:
    folder = SOURCE.joinpath(*package.split(".")[1:])
    return [path for path in folder.rglob("*.py") if path.name != "__init__.py" or path.parent != folder]

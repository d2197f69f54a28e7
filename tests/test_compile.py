"""Which modules `scripts/compile.py` compiles, in which copy, and how `scripts/test` uses it. Nothing is compiled."""

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts.compile import HOT, SOURCES, STAMP, compiled_sources, copy_package, digest, imported_packages

from tests import conftest, machine

ROOT = Path(__file__).parents[1]
COMPILED = {str(file.relative_to(SOURCES / "emberkv")) for file in compiled_sources()}

STAND_IN = """#!/bin/sh
echo "$(basename "$0") $* PYTHONPATH=${PYTHONPATH:-}" >> "$CALLS"
case "$*" in *"$FAILS"*) exit 1;; esac
"""


def test_the_modules_that_run_for_every_request_are_compiled_and_exist() -> None:
    wanted = {"core/scheduler.py", "core/policies/eviction.py", "cluster/routing.py", "workload/source.py"}
    assert wanted | {f"{package}/{name}.py" for package, names in HOT.items() for name in names} <= COMPILED
    assert all(file.is_file() for file in compiled_sources())


def test_modules_of_pydantic_and_numpy_stay_python() -> None:
    assert "pydantic" in imported_packages(SOURCES / "emberkv/workload/spec.py")
    assert "workload/spec.py" not in COMPILED
    assert not [file for file in compiled_sources() if imported_packages(file) & {"numpy", "pydantic"}]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A package of one module, compiled in place, with a link to data."""
    package = tmp_path / "src" / "emberkv"
    package.mkdir(parents=True)
    (package / "module.py").write_text("x = 1\n", encoding="utf-8")
    (package / "module.cpython.so").write_bytes(b"compiled before")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "data.yaml").write_text("a: 1\n", encoding="utf-8")
    (package / "examples").symlink_to("../../examples")
    return tmp_path / "src"


def test_a_copy_has_all_but_what_was_compiled_before(sources: Path, tmp_path: Path) -> None:
    copy = tmp_path / "build" / "compiled"
    assert copy_package(sources, copy)
    assert {file.name for file in (copy / "emberkv").iterdir()} == {"module.py", "examples"}
    assert (copy / "emberkv" / "examples" / "data.yaml").read_text(encoding="utf-8") == "a: 1\n"
    assert digest(copy) == digest(sources)


def test_a_compiled_copy_is_made_anew_only_after_a_change(sources: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    assert copy_package(sources, copy)
    assert copy_package(sources, copy)  # it was never compiled: the compiler failed, or was interrupted
    (copy / STAMP).write_text(digest(copy), encoding="utf-8")
    (copy / "emberkv" / "module.cpython.so").write_bytes(b"compiled")
    assert not copy_package(sources, copy)
    assert (copy / "emberkv" / "module.cpython.so").exists()
    (sources / "emberkv" / "module.py").write_text("x = 2\n", encoding="utf-8")
    assert copy_package(sources, copy)
    assert not (copy / "emberkv" / "module.cpython.so").exists()
    assert (copy / "emberkv" / "module.py").read_text(encoding="utf-8") == "x = 2\n"


def test_a_folder_with_other_files_is_left_alone(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"mine is not empty, and not a compiled copy"):
        copy_package(sources, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text(encoding="utf-8") == "keep"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that is set up, with stand-ins that write down how they are called."""
    (tmp_path / "scripts").mkdir()
    for name in ("setup", "test"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts" / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    wanted = subprocess.run(
        ["/bin/sh", "-c", "cat pyproject.toml constraints.txt | cksum"], cwd=tmp_path, capture_output=True, check=True
    )
    (tmp_path / ".venv" / "installed-torch,cluster,dev").write_bytes(wanted.stdout)
    for name in ("python", "ruff", "mypy"):
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(STAND_IN, encoding="utf-8")
        program.chmod(0o755)
    return tmp_path


def called(checkout: Path, *given: str, fails: str = "nothing fails") -> tuple[int, list[str]]:
    """The exit status of `scripts/test`, and its calls of pytest and of the compiler."""
    calls = checkout / "calls"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, "CALLS": str(calls), "FAILS": fails}
    done = subprocess.run([checkout / "scripts" / "test", *given], env=environment, check=False)
    lines = calls.read_text(encoding="utf-8").replace(str(checkout), "ROOT").splitlines()
    return done.returncode, [line.removeprefix("python ") for line in lines if line.startswith("python ")]


def test_tests_run_on_the_sources_and_then_on_the_compiled_copy(checkout: Path) -> None:
    assert called(checkout, "--compiled", "tests/core", "-x") == (0, [
        "-m pytest tests/core -x PYTHONPATH=",
        "scripts/compile.py --into ROOT/build/compiled PYTHONPATH=",
        "-m pytest --compiled tests/core -x PYTHONPATH=ROOT/build/compiled",
    ])  # fmt: skip


def test_nothing_is_compiled_unless_it_is_asked_for(checkout: Path) -> None:
    assert called(checkout, "tests/core", "-x") == (0, ["-m pytest tests/core -x PYTHONPATH="])


@pytest.mark.parametrize(("fails", "calls"), [("pytest", 1), ("scripts/compile.py", 2), ("pytest --compiled", 3)])
def test_each_failure_is_the_scripts(checkout: Path, fails: str, calls: int) -> None:
    status, found = called(checkout, "--compiled", fails=fails)
    assert status == 1
    assert len(found) == calls


def test_tests_of_compiled_modules_never_run_on_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def configure(option: str, *, compiled: bool) -> None:
        monkeypatch.setattr(machine, "COMPILED", compiled)
        conftest.pytest_configure(SimpleNamespace(getoption=option.__eq__))

    configure("--long", compiled=False)
    configure("--compiled", compiled=True)
    with pytest.raises(pytest.UsageError, match=r"scheduler is not compiled; scripts/test --compiled compiles a copy"):
        configure("--compiled", compiled=False)

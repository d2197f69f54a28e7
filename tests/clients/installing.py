"""Installs clients into ``build/clients``, where they do not lie yet in the version that is asked for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "clients"
INSTALL_SECONDS = 1500.0


def environment(requirements: str) -> Path:
    """The Python of the environment with the requirements in this file."""
    folder, wanted = FOLDER / Path(requirements).stem, (HERE / requirements).read_text()
    python = folder / "bin" / "python"
    if not _has(folder, wanted):
        _run(sys.executable, "-m", "venv", "--clear", folder)
        _run(python, "-m", "pip", "install", "-q", "uv")
        _run(python, "-m", "uv", "pip", "install", "-q", "-r", HERE / requirements)
        _installed(folder).write_text(wanted)
    return python


def npm_program(name: str, package: str) -> Path:
    """A program of an npm package, which is given with its version. Skips the test where npm is not installed."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"npm installs {package}, and is not on the PATH")
    folder = FOLDER / name
    if not _has(folder, package):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _run(npm, "install", "--prefix", folder, "--no-audit", "--no-fund", "--no-update-notifier", package)
        _installed(folder).write_text(package)
    return folder / "node_modules" / ".bin" / name


def _has(folder: Path, wanted: str) -> bool:
    return _installed(folder).is_file() and _installed(folder).read_text() == wanted


def _installed(folder: Path) -> Path:
    """The file that is written last."""
    return folder / "installed.txt"


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, timeout=INSTALL_SECONDS)

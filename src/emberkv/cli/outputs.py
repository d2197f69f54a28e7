"""Files that a command writes: looked at before its work begins, confirmed after it."""

import os
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from emberkv.errors import ConfigError


def check_outputs(**files: Path | None) -> None:
    """Raises ConfigError for a file that could not be written, named by its option: ``check_outputs(csv=path)``."""
    for option, path in files.items():
        if path is None:
            continue
        reason = _reason(path)
        if reason is not None:
            raise ConfigError(f"cannot write --{option.replace('_', '-')} {path}: {reason}")


def _reason(path: Path) -> str | None:
    folder = path.parent
    if path.is_dir():
        return "it is a folder"
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if not os.access(path if path.exists() else folder, os.W_OK):
        return "permission denied"
    return None


def write_text(path: Path, text: str) -> None:
    """Raises ConfigError naming the file."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def confirm_written(errors: Console, files: Sequence[Path | None]) -> None:
    """One line that names them, if there are any."""
    named = [typer.format_filename(path) for path in files if path is not None]
    if named:
        errors.print(f"Wrote {', '.join(named)}.", soft_wrap=True)

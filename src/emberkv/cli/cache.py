"""The cache commands: look at a folder of cached blocks, check every one, empty it."""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ByteSize
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from emberkv.cli.command import App
from emberkv.cli.telling import errors_told
from emberkv.errors import CacheFolderError
from emberkv.tiers.disk.files import BlockFiles
from emberkv.tiers.disk.layout import BLOCKS, BlockFile, scan
from emberkv.tiers.disk.verify import verify

app = App(name="cache", help="Inspect, check and empty a folder of cached blocks.")

Folder = Annotated[Path, typer.Argument(metavar="PATH", help="The folder given to serve as --cache-dir.")]

_SHOWN_BAD = 50
_MODEL_DIGITS = 12
_SPANS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


@app.command("ls")
def ls(folder: Folder) -> None:
    """List what is kept, by model and owner."""
    with errors_told():
        groups = defaultdict[tuple[str, str], list[BlockFile]](list)
        for file in _listed(_existing(folder)):
            groups[_model(file), file.owner].append(file)
        table = Table("model", "owner", box=None)
        for heading in ("blocks", "not exact", "size", "last used", "least recently"):
            table.add_column(heading, justify="right")
        for (model, owner), files in sorted(groups.items()):
            rounded = sum(not file.exact for file in files)
            table.add_row(model, _owner(owner), f"{len(files):,}", f"{rounded:,}", _size(files), *_ages(files))
        Console().print(table if groups else "No blocks.")


@app.command("stats")
def stats(folder: Folder) -> None:
    """Sum up what is kept."""
    with errors_told():
        listed = _listed(_existing(folder))
        last, least = _ages(listed)
        rows = [
            ("Blocks", f"{len(listed):,}, of which {sum(file.exact for file in listed):,} are exact"),
            ("Size", _size(listed)),
            ("Models", f"{len({file.namespace for file in listed}):,}"),
            ("Owners", f"{len({file.owner for file in listed}):,}"),
            ("Last used", f"{last} ago" if listed else last),
            ("Least recently", f"{least} ago" if listed else least),
        ]
        table = Table(show_header=False, box=None)
        for row in rows:
            table.add_row(*row)
        Console().print(table)


@app.command("verify")
def verify_command(
    folder: Folder,
    *,
    remove: Annotated[bool, typer.Option("--remove", help="Delete the bad blocks.")] = False,
) -> None:
    """Read every block and check it; exit with 1 if any is bad.

    A bad block is never served: the server refuses and removes it when it comes upon it.
    """
    with errors_told() as errors:
        files = _existing(folder)
        with _alone(files, folder) if remove else nullcontext():
            listed = _listed(files)
            watched = track(listed, "reading", console=errors, transient=True)
            bad = [(file, fault) for file, fault in verify(files, watched) if fault]
            removed = _remove(files, [file for file, _ in bad]) if remove else 0
        outcome = f"{len(bad):,} bad, {removed:,} removed" if bad else "all sound"
        if bad:
            _print_bad(bad)
        Console().print(f"{len(listed):,} blocks, {_size(listed)}: {outcome}.")
    if bad:
        raise typer.Exit(1)


@app.command("clear")
def clear(
    folder: Folder,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete all blocks, of all models. A server that uses the folder must be stopped first."""
    with errors_told():
        files = _existing(folder)
        with _alone(files, folder):
            listed = _listed(files)
            if listed and not yes:
                typer.confirm(f"Delete {len(listed):,} blocks, {_size(listed)}?", abort=True)
            Console().print(f"{_remove(files, listed):,} blocks deleted.")


def _existing(folder: Path) -> BlockFiles:
    if not (folder / BLOCKS).is_dir():
        raise CacheFolderError(f"{folder} is no cache folder: it holds no folder '{BLOCKS}'")
    return BlockFiles(folder)


@contextmanager
def _alone(files: BlockFiles, folder: Path) -> Iterator[None]:
    """Nobody else writes there meanwhile. Raises CacheFolderError where somebody does, or nobody may."""
    try:
        held = files.lock()
    except OSError as error:
        raise CacheFolderError(f"{folder} cannot be changed: {error.strerror}") from error
    if held is None:
        raise CacheFolderError(f"{folder} is in use by a running server; stop it, or use its admin routes")
    try:
        yield
    finally:
        os.close(held)


def _listed(files: BlockFiles) -> list[BlockFile]:
    return list(scan(files.blocks))


def _remove(files: BlockFiles, listed: Iterable[BlockFile]) -> int:
    count = 0
    for file in listed:
        try:
            files.unlink(file.path)
        except OSError as error:
            raise CacheFolderError(f"{file.path} cannot be deleted: {error.strerror}; {count:,} were") from error
        count += 1
    return count


def _print_bad(bad: list[tuple[BlockFile, str]]) -> None:
    """One a line, with its path, unbroken for whoever reads it by a program."""
    kinds = Counter(fault for _, fault in bad)
    for file, fault in bad[:_SHOWN_BAD]:
        typer.echo(f"{fault}: {BLOCKS}{os.sep}{file.path}")
    if len(bad) > _SHOWN_BAD:
        typer.echo(f"... in all: {', '.join(f'{count:,} {fault}' for fault, count in kinds.most_common())}")


def _model(file: BlockFile) -> str:
    return file.namespace.hex()[:_MODEL_DIGITS]


def _owner(owner: str) -> Text:
    """Printed as it is, though without what would control the terminal."""
    return Text(owner or "-")


def _size(files: Iterable[BlockFile]) -> str:
    return ByteSize(sum(file.size for file in files)).human_readable()


def _ages(files: list[BlockFile]) -> tuple[str, str]:
    """How long ago the most and the least recently used were of use."""
    if not files:
        return "never", "never"
    now = time.time_ns()
    times = [file.mtime_ns for file in files]
    return _span(now - max(times)), _span(now - min(times))


def _span(nanoseconds: int) -> str:
    """In the largest unit that fits; what the clock says was used in the future was used now."""
    seconds = max(nanoseconds, 0) / 1e9
    width, unit = next((each for each in _SPANS if seconds >= each[0]), _SPANS[-1])
    return f"{seconds / width:.0f} {unit}"

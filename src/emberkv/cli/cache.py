"""The cache commands: look at a folder of cached blocks, check every one, empty it."""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ByteSize
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from emberkv.cli.command import App, errors_reported, printable
from emberkv.errors import CacheFolderError
from emberkv.serving.cache.other_models import model_names
from emberkv.serving.warmup.learned_prompts import prefix_files
from emberkv.tiers.disk.files import BLOCKS, BlockFile, BlockFiles, scan, verify
from emberkv.tiers.disk.index import JournalWriter

app = App(name="cache", help="Inspect, check and empty a folder of cached blocks.")

Folder = Annotated[Path, typer.Argument(metavar="PATH", help="The folder given to serve as --cache-dir.")]

_SHOWN_BAD = 50
_MODEL_DIGITS = 12
_SPANS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


@app.command("ls")
def ls(folder: Folder) -> None:
    """List the cached blocks by model and owner: the tenant that they belong to, or - where there are no tenants."""
    with errors_reported():
        names = model_names(folder)
        groups = defaultdict[tuple[str, str], list[BlockFile]](list)
        for file in _listed(_existing(folder)):
            groups[file.namespace.hex(), file.owner].append(file)
        table = Table("model", "owner", box=None)
        for heading in ("blocks", "not exact", "size", "last used", "least recently"):
            table.add_column(heading, justify="right")
        for (model, owner), files in sorted(groups.items()):
            rounded = sum(not file.exact for file in files)
            counts = f"{len(files):,}", f"{rounded:,}", _size(files)
            table.add_row(_named(model, names), _owner(owner), *counts, *_ages(files))
        Console().print(table if groups else "No blocks.")


@app.command("stats")
def stats(folder: Folder) -> None:
    """Sum up what is kept."""
    with errors_reported():
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
    with errors_reported() as errors:
        files = _existing(folder)
        with _alone(files, folder) if remove else nullcontext():
            passed_over: list[str] = []
            listed = list(scan(files.blocks, passed_over.append))
            watched = track(listed, "reading", console=errors, transient=True)
            bad = [(file, fault) for file, fault in verify(files, watched) if fault]
            removed = _remove(files, [file for file, _ in bad]) if remove else 0
        outcome = f"{len(bad):,} bad, {removed:,} removed" if bad else "all sound"
        if bad:
            _print_bad(bad)
        Console().print(f"{len(listed):,} blocks, {_size(listed)}: {outcome}.")
        for path in passed_over[:_SHOWN_BAD]:
            typer.echo(printable(f"not a block by its name, not read: {BLOCKS}{os.sep}{path}"))
        if len(passed_over) > _SHOWN_BAD:
            typer.echo(f"... {len(passed_over):,} such names in all")
    if bad:
        raise typer.Exit(1)


@app.command("clear")
def clear(
    folder: Folder,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete all blocks and learned prompts, of all models. Servers that use the folder must be stopped first."""
    with errors_reported():
        files = _existing(folder)
        with _alone(files, folder):
            listed, learned = _listed(files), prefix_files(folder)
            if (listed or learned) and not yes:
                question = (
                    f"Delete {len(listed):,} blocks, {_size(listed)}, and {len(learned):,} lists of learned prompts?"
                )
                typer.confirm(question, abort=True)
            removed = _remove(files, listed)
            for path in learned:
                _delete(path, removed)
            Console().print(f"{removed:,} blocks{_and_lists(learned)} deleted.")


def _existing(folder: Path) -> BlockFiles:
    if not folder.exists():
        raise CacheFolderError(f"there is no folder {folder}")
    if not (folder / BLOCKS).is_dir():
        raise CacheFolderError(f"{folder} is no cache folder: it holds no folder '{BLOCKS}'")
    return BlockFiles(folder)


@contextmanager
def _alone(files: BlockFiles, folder: Path) -> Iterator[None]:
    """Keeps other processes from writing there. Raises CacheFolderError where one does, or where none may."""
    try:
        held = files.lock()
        if held is not None:
            files.tidy()
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
    try:
        JournalWriter(files.blocks).begin()  # so that processes that read here scan the folder again
    except OSError as error:
        raise CacheFolderError(f"the journal cannot be written: {error.strerror}; {count:,} were deleted") from error
    return count


def _print_bad(bad: list[tuple[BlockFile, str]]) -> None:
    """One bad block a line, with its path, unbroken so that a program can read it."""
    kinds = Counter(fault for _, fault in bad)
    for file, fault in bad[:_SHOWN_BAD]:
        typer.echo(printable(f"{fault}: {BLOCKS}{os.sep}{file.path}"))
    if len(bad) > _SHOWN_BAD:
        typer.echo(f"... in all: {', '.join(f'{count:,} {fault}' for fault, count in kinds.most_common())}")


def _and_lists(learned: list[Path]) -> str:
    return f" and {len(learned):,} lists of learned prompts" if learned else ""


def _delete(path: Path, removed: int) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CacheFolderError(f"{path} cannot be deleted: {error.strerror}; {removed:,} blocks were") from error


def _named(namespace: str, names: Mapping[str, str]) -> Text:
    """The model's name where it is known, and the beginning of its blocks' namespace."""
    return Text(printable(f"{names.get(namespace, '')} {namespace[:_MODEL_DIGITS]}".strip()))


def _owner(owner: str) -> Text:
    return Text(printable(owner or "-"))


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

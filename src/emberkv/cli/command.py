"""What the commands share: help in plain text within 80 columns, reports of errors, and output files.

Exit codes of every command: 0, success; 1, the command ran and found a problem (failed requests, bad blocks); 2, a bad
option, file or server, so that nothing was done; 130, interrupted with Ctrl-C.
"""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from textwrap import wrap
from typing import Any, ClassVar, Protocol

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from emberkv.errors import ConfigError, EmberError
from emberkv.validation import in_plain_words, shown

USAGE_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130

SUMMARY_CHARACTERS = 200
"""At most so much of a command's help is shown in a list of commands."""


def error_console() -> Console:
    """The console on standard error, which prints text as it is: without markup and without highlighting."""
    return Console(stderr=True, markup=False, highlight=False)


def print_error(message: str, hint: str = "") -> None:
    """Print ``error: message``, and the hint on a line of its own.

    A terminal gets lines that break between words; a file or a pipe gets one line. Control characters, which could
    change what the terminal shows, are printed as escapes.
    """
    console = error_console()
    console.print(Text.assemble(("error: ", "bold red"), printable(message)), soft_wrap=not console.is_terminal)
    if hint:
        console.print(Text(hint, "dim"), soft_wrap=not console.is_terminal)


def printable(text: str) -> str:
    """The text with control characters and lone surrogates escaped as Python writes them; newlines stay."""
    return "".join(char if char.isprintable() or char == "\n" else _escape(char) for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


@contextmanager
def errors_reported() -> Iterator[Console]:
    """Give the console for standard error. An error is printed there as one sentence, and the command exits with 2.

    These are EmberError, and an OSError about a file that the user named. Ctrl-C exits with 130.
    """
    try:
        yield error_console()
    except EmberError as error:
        print_error(str(error))
        raise typer.Exit(USAGE_EXIT_CODE) from error
    except OSError as error:
        if error.filename is None:
            raise
        print_error(f"cannot use {error.filename}: {error.strerror}")
        raise typer.Exit(USAGE_EXIT_CODE) from error
    except KeyboardInterrupt as error:
        error_console().print("interrupted", style="yellow")
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from error


NAME_COLUMNS = 28
"""Columns for an option's name; the help of one with a longer name begins on the next line."""

_VALUES = {"int": "N", "float": "NUMBER", "str": "TEXT", "Path": "PATH", "path": "PATH", "file": "PATH"}
"""What help calls an option's value, by its type, where the option does not name it (``metavar``)."""


class HelpFormatter(Protocol):
    """The part of click's help formatter that is used here; click within typer is private."""

    width: int

    def section(self, name: str) -> AbstractContextManager[None]: ...
    def write(self, string: str) -> None: ...


class EmberCommand(TyperCommand):
    """A command whose errors are one sentence, and whose help is grouped by each option's ``rich_help_panel``."""

    def invoke(self, ctx: Any) -> Any:
        with errors_reported():
            for param in self.get_params(ctx):
                value = ctx.params.get(param.name)
                if isinstance(value, str) and any(0xD800 <= ord(char) <= 0xDFFF for char in value):
                    raise ConfigError(f"{param.opts[-1]}: use text in UTF-8")
            return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: HelpFormatter) -> None:
        _write_options(self.get_params(ctx), ctx, formatter)


class Group(TyperGroup):
    """A command with subcommands; without one, it prints its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            raise typer.Exit
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: HelpFormatter) -> None:
        _write_options(self.get_params(ctx), ctx, formatter)
        _write_rows("Commands", list(self.summaries().items()), formatter)

    def summaries(self) -> dict[str, str]:
        """What each command does, in one sentence, by name; without hidden ones."""
        public = {name: command for name, command in self.commands.items() if not command.hidden}
        return {name: command.get_short_help_str(SUMMARY_CHARACTERS) for name, command in public.items()}

    def main(self, *args: Any, **extra: Any) -> Any:
        standalone = extra.pop("standalone_mode", True)
        extra["standalone_mode"] = False
        if not standalone:
            return super().main(*args, **extra)
        try:
            code = super().main(*args, **extra)
        except TyperException as error:
            context = getattr(error, "ctx", None)
            print_error(_sentence(error), f"Try '{context.command_path} --help'." if context is not None else "")
            sys.exit(error.exit_code)
        except typer.Abort:
            print_error("not confirmed, so nothing was done")
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


@dataclass(frozen=True)
class Deferred:
    """A command whose module is imported when the command is used. target: ``module:name`` of its function or App.
    summary: the first sentence of its help.
    """

    target: str
    summary: str

    def load(self) -> Any:
        return _loaded(self.target)


@cache
def _loaded(target: str) -> Any:
    module, _, name = target.partition(":")
    found = getattr(import_module(module), name)
    if isinstance(found, typer.Typer):
        return typer.main.get_group(found)
    alone = App(add_completion=False)
    alone.command()(found)
    return typer.main.get_command(alone)


class DeferredCommands(Mapping[str, Any]):
    """Commands by name: deferred ones, each imported when it is looked up, and then those that are ready."""

    def __init__(self, deferred: Mapping[str, Deferred], ready: Mapping[str, Any]) -> None:
        self._all = {**deferred, **ready}

    def __getitem__(self, name: str) -> Any:
        found = self._all[name]
        return found.load() if isinstance(found, Deferred) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def summary(self, name: str) -> str:
        """What a command does, without importing it."""
        found = self._all[name]
        return found.summary if isinstance(found, Deferred) else str(found.get_short_help_str(SUMMARY_CHARACTERS))


class DeferringGroup(Group):
    """A group some of whose commands are imported when they are used, so that the others start without them.

    A subclass names these in ``deferred``.
    """

    deferred: ClassVar[Mapping[str, Deferred]] = {}

    def __init__(self, **settings: Any) -> None:
        ready = settings.pop("commands", None) or {}
        super().__init__(**settings)
        self.known = DeferredCommands(self.deferred, ready)
        self.commands: Any = self.known

    def summaries(self) -> dict[str, str]:
        return {name: self.known.summary(name) for name in self.known}


class App(typer.Typer):
    """A Typer application of such commands."""

    def __init__(self, cls: type[Group] = Group, **settings: Any) -> None:
        super().__init__(cls=cls, rich_markup_mode=None, pretty_exceptions_enable=False, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        return super().command(name, cls=EmberCommand, **settings)


def _sentence(error: TyperException) -> str:
    """What is wrong with the command line. A value is named by its option: ``--port 'x': use a whole number``."""
    if isinstance(error.__cause__, ValidationError) and isinstance(error, typer.BadParameter) and error.param:
        detail = error.__cause__.errors(include_url=False)[0]
        name = error.param.opts[-1] if error.param.param_type_name == "option" else error.param.name
        words = re.sub("^.* is not one of ", "use one of ", in_plain_words(detail)).rstrip(".")
        return f"{name} {shown(detail['input'])}: {words}"
    message = error.format_message().removeprefix("Invalid value for ").rstrip(".")
    return message[:1].lower() + message[1:]


def _write_options(params: Sequence[Any], ctx: Any, formatter: HelpFormatter) -> None:
    """Write the arguments, then each group of options under its heading, and options without a group last."""
    groups = defaultdict[str, list[tuple[str, str]]](list)
    for param in params:
        record = param.get_help_record(ctx)
        if record is not None:
            is_argument = param.param_type_name == "argument"
            title = "Arguments" if is_argument else getattr(param, "rich_help_panel", None) or ""
            names = (param.metavar or param.name) if is_argument else re.sub("<([^>]*)>", _value_name, record[0])
            groups[title].append((names, record[1]))
    arguments, ungrouped = groups.pop("Arguments", []), groups.pop("", [])
    for title, rows in [("Arguments", arguments), *groups.items(), ("Other" if groups else "Options", ungrouped)]:
        _write_rows(title, rows, formatter)


def _write_rows(title: str, rows: Sequence[tuple[str, str]], formatter: HelpFormatter) -> None:
    """Write names and their help in two columns. Lines break at spaces only, so that no option's name is cut."""
    if not rows:
        return
    column = min(NAME_COLUMNS, max(len(name) for name, _ in rows) + 2)
    with formatter.section(typer.style(title, bold=True)):
        for name, text in rows:
            lines = wrap(text, formatter.width - column - 2, break_on_hyphens=False, break_long_words=False) or [""]
            if len(name) > column - 2:
                lines.insert(0, "")
            for index, line in enumerate(lines):
                formatter.write(f"  {name if index == 0 else '':<{column}}{line}".rstrip() + "\n")


def _value_name(match: re.Match[str]) -> str:
    """``<list[Path]>`` becomes PATH, ``<int range>`` N; choices, ``<chat|completions>``, only lose their brackets."""
    kinds = match[1].removeprefix("list[").removesuffix("]").removesuffix(" range").split(",")
    return " ".join(_VALUES.get(kind, kind) for kind in kinds)


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

"""How commands report errors: one sentence on standard error, and an exit code.

Exit codes of every command: 0, success; 1, the command ran and found a problem (failed requests, bad blocks); 2, a bad
option, file or server, so that nothing was done; 130, interrupted with Ctrl-C.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from emberkv.errors import EmberError

USAGE_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130


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

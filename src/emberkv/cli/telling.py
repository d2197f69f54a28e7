"""The voice: how commands tell what went wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from emberkv.errors import EmberError


@contextmanager
def errors_told() -> Iterator[Console]:
    """Gives the console for standard error, which takes text as it is. An error of ours is printed there, and the
    command exits with 2.
    """
    errors = Console(stderr=True, markup=False, highlight=False)
    try:
        yield errors
    except EmberError as error:
        errors.print(str(error), style="red", soft_wrap=True)
        raise typer.Exit(2) from error

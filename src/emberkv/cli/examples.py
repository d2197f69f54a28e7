"""``emberkv examples``: the workloads and configuration files that come with the package."""

from importlib.resources import files
from typing import Annotated

import typer

from emberkv.errors import ConfigError
from emberkv.validation import suggestion

_FOLDER = files("emberkv") / "examples"

Name = Annotated[str | None, typer.Argument(metavar="NAME", help="The one to print; without it, all are listed.")]


def examples(name: Name = None) -> None:
    """List the example files, or print one: emberkv examples chat > chat.yaml"""
    texts = {
        each.name.removesuffix(".yaml"): each.read_text(encoding="utf-8")
        for each in sorted(_FOLDER.iterdir(), key=lambda each: each.name.removesuffix(".yaml"))
        if each.name.endswith(".yaml")
    }
    if name is None:
        width = max(map(len, texts))
        typer.echo("".join(f"{known:<{width}}  {_about(text)}\n" for known, text in texts.items()), nl=False)
        return
    known = name.removesuffix(".yaml")
    if known not in texts:
        raise ConfigError(f"no example {name!r}{suggestion(known, texts)}; 'emberkv examples' lists them")
    typer.echo(texts[known], nl=False)


def _about(text: str) -> str:
    """What a file's first comment says, up to its first colon or full stop."""
    return text.partition("\n")[0].removeprefix("# ").partition(": ")[0].partition(". ")[0].rstrip(".")

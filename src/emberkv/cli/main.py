"""The ``emberkv`` command."""

import secrets
from importlib.resources import files
from typing import Annotated

import typer

from emberkv import __version__
from emberkv.cli import cache, cluster, workload
from emberkv.cli.bench import bench
from emberkv.cli.calibrate import calibrate
from emberkv.cli.command import App
from emberkv.cli.explain import explain
from emberkv.cli.gateway import gateway
from emberkv.cli.launch import launch
from emberkv.cli.models import models, size
from emberkv.cli.plan import plan
from emberkv.cli.serve import serve
from emberkv.cli.simulate import simulate
from emberkv.cli.top import top
from emberkv.errors import ConfigError
from emberkv.serving.tenancy import key_digest
from emberkv.validation import suggestion

KEY_BYTES = 32
_EXAMPLES = files("emberkv") / "examples"

app = App(name="emberkv", help="A verified prefix KV cache for LLM inference.")
app.command("serve")(serve)
app.command("gateway")(gateway)
app.command("launch")(launch)
app.command("bench")(bench)
app.command("models")(models)
app.command("size")(size)
app.command("calibrate")(calibrate)
app.command("explain")(explain)
app.command("top")(top)
app.command("simulate")(simulate)
app.command("plan")(plan)
app.add_typer(workload.app)
app.add_typer(cache.app)
app.add_typer(cluster.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"emberkv {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A verified prefix KV cache for LLM inference: it serves, explains, simulates and plans.

    Exit codes: 0 success; 1 failed requests or bad blocks were found; 2 a bad option, file or server; 130 interrupted.
    """


ExampleName = Annotated[
    str | None, typer.Argument(metavar="NAME", help="The one to print; without it, all are listed.")
]


@app.command("examples")
def examples(name: ExampleName = None) -> None:
    """List the example files, or print one: emberkv examples chat > chat.yaml"""
    texts = {
        each.name.removesuffix(".yaml"): each.read_text(encoding="utf-8")
        for each in sorted(_EXAMPLES.iterdir(), key=lambda each: each.name.removesuffix(".yaml"))
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


tenants = App(name="tenants", help="Make API keys for a tenants file.")
app.add_typer(tenants)


@tenants.callback()
def _tenants() -> None:
    """Make API keys for a tenants file."""


@tenants.command("key")
def key() -> None:
    """Print a new API key, drawn at random, and the line that lets it in.

    The key goes to the client; the line goes under a tenant's keys in the file given to serve as --tenants.
    """
    drawn = secrets.token_urlsafe(KEY_BYTES)
    typer.echo(f"key: {drawn}\nline: - sha256: {key_digest(drawn).hex()}")


if __name__ == "__main__":
    app()

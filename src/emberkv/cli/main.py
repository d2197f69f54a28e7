"""The ``emberkv`` command."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Annotated, ClassVar

import typer

from emberkv import __version__
from emberkv.cli.command import App, Deferred, DeferringGroup
from emberkv.errors import ConfigError
from emberkv.validation import suggestion

_EXAMPLES = files("emberkv") / "examples"


class EmberKV(DeferringGroup):
    """All commands. Each imports what it alone needs."""

    deferred: ClassVar[Mapping[str, Deferred]] = {
        "serve": Deferred(
            "emberkv.cli.serve:serve",
            "Serve a model over the OpenAI and Anthropic HTTP APIs, with a verified prefix cache.",
        ),
        "gateway": Deferred(
            "emberkv.cli.gateway:gateway",
            "Serve the APIs of emberkv over many workers: each request goes where its first token is expected soonest.",
        ),
        "launch": Deferred("emberkv.cli.launch:launch", "Start a coding agent with a running server."),
        "bench": Deferred(
            "emberkv.cli.bench:bench",
            "Time any OpenAI-compatible server with multi-turn conversations over a shared system prompt.",
        ),
        "models": Deferred(
            "emberkv.cli.models:models",
            "Say what a model is, what it takes and what of it is served how exactly, before any weights are loaded.",
        ),
        "size": Deferred(
            "emberkv.cli.models:size",
            "Say whether a model with so much context for so many users fits into memory, and what would.",
        ),
        "calibrate": Deferred(
            "emberkv.cli.calibrate:calibrate",
            "Measure matrix products, prefills, the lower tiers and a server's answers here; takes some minutes.",
        ),
        "explain": Deferred(
            "emberkv.cli.explain:explain",
            "Say where a prompt's tokens come from: which are cached, and why the others are not.",
        ),
        "top": Deferred(
            "emberkv.cli.top:top",
            "Show what a server or a gateway does now: "
            "load, where prompts' tokens come from, memory, sessions, prefixes.",
        ),
        "simulate": Deferred(
            "emberkv.cli.simulate:simulate",
            "Replay a workload through the scheduler, cache and router that serve, in virtual time.",
        ),
        "plan": Deferred(
            "emberkv.cli.plan:plan",
            "Say what a cache of each size would find of a workload, what that does to waiting times, and what to get.",
        ),
        "workload": Deferred("emberkv.cli.workload:app", "Generate, describe and convert workloads."),
        "cache": Deferred("emberkv.cli.cache:app", "Inspect, check and empty a folder of cached blocks."),
        "cluster": Deferred("emberkv.cli.cluster:app", "Run workers and a gateway on Ray Serve."),
        "tenants": Deferred("emberkv.cli.tenants:app", "Make API keys for a tenants file."),
    }


app = App(cls=EmberKV, name="emberkv", help="A verified prefix KV cache for LLM inference.")


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


if __name__ == "__main__":
    app()

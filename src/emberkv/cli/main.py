"""The ``emberkv`` command."""

from typing import Annotated

import typer

from emberkv import __version__
from emberkv.cli import cache, cluster, tenants, workload
from emberkv.cli.bench import bench
from emberkv.cli.calibrate import calibrate
from emberkv.cli.command import App
from emberkv.cli.examples import examples
from emberkv.cli.explain import explain
from emberkv.cli.plan import plan
from emberkv.cli.serve import serve
from emberkv.cli.simulate import simulate
from emberkv.cli.top import top

app = App(name="emberkv", help="A verified prefix KV cache for LLM inference.")
app.command("serve")(serve)
app.command("bench")(bench)
app.command("calibrate")(calibrate)
app.command("explain")(explain)
app.command("top")(top)
app.command("simulate")(simulate)
app.command("plan")(plan)
app.command("examples")(examples)
app.add_typer(workload.app)
app.add_typer(cache.app)
app.add_typer(tenants.app)
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


if __name__ == "__main__":
    app()

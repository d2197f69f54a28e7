"""``--list-models`` and ``--list-hardware``: what simulate and plan know by name."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from emberkv.sim.hardware import load_profile, profile_names
from emberkv.sim.model_config import load_spec, model_names
from emberkv.sim.words import rate_words, size_words


def _show_models(wanted: bool) -> None:
    if not wanted:
        return
    table = Table("model", "parameters", "weights", "KV a token", "context")
    for name in model_names():
        spec = load_spec(name)
        table.add_row(
            name, f"{spec.parameters / 1e9:,.3g} B", f"{size_words(spec.weight_bytes)} {spec.weights_dtype}",
            size_words(spec.kv_bytes_per_token), f"{spec.context:,}",
        )  # fmt: skip
    Console().print(table)
    raise typer.Exit


def _show_hardware(wanted: bool) -> None:
    if not wanted:
        return
    table = Table("hardware", "what", "memory", "bandwidth", "bf16")
    for name in profile_names():
        profile = load_profile(name)
        table.add_row(
            name, profile.name, f"{profile.memory_gib:g} GiB", f"{rate_words(profile.memory_gb_per_s)} GB/s",
            f"{rate_words(profile.flops('bf16') / 1e12)} TFLOPS",
        )  # fmt: skip
    Console().print(table)
    raise typer.Exit


ListModels = Annotated[
    bool, typer.Option("--list-models", callback=_show_models, is_eager=True, help="Show the models known by name.")
]
ListHardware = Annotated[
    bool, typer.Option("--list-hardware", callback=_show_hardware, is_eager=True, help="Show the profiles known.")
]

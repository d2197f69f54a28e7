"""The models and size commands: what a model is before it is loaded, and how much context for how many users fits."""

import json
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from emberkv.cli.command import errors_reported
from emberkv.errors import ConfigError
from emberkv.sim.formatting import format_count, format_size
from emberkv.sim.hardware import GIB, load_profile
from emberkv.sim.model_spec import ContextDemand, Fit, ModelSpec, Precision, fits, load_spec, model_names, parse_tokens

if TYPE_CHECKING:
    from emberkv.engine.torch.model.description import ModelDescription

REFUSED_EXIT_CODE = 1

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, or an id of the hub.")]
SizedName = Annotated[
    str, typer.Argument(metavar="MODEL", help="As for serve; or a name that simulate --list-models gives.")
]
DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of weights that are not quantised.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def models(
    model: ModelName,
    *,
    dtype: DType = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps; auto takes what is there.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Say what a model is, what it takes and what of it is served how exactly, before any weights are loaded.

    The files of a model of the hub are downloaded first, where they are not here yet.

    Exit code 1: it cannot be served; the output says why, and what would work.
    """
    with errors_reported() as errors:
        with errors.status("reading the model's config and headers"):
            found = _described(model, dtype, device)
        if as_json:
            typer.echo(json.dumps({**asdict(found), "fitting_tokens": found.fitting_tokens}, indent=1))
        else:
            Console(highlight=False).print(_model_table(found))
        if found.refusal is not None:
            raise typer.Exit(REFUSED_EXIT_CODE)


def size(
    model: SizedName,
    *,
    context: Annotated[str, typer.Option(help="Tokens of a user's prompt and answer: 32768, 200k, 128Ki.")],
    users: Annotated[int, typer.Option(min=1, help="How many at the same time.")] = 1,
    shared: Annotated[str, typer.Option(help="Tokens at the beginning that are the same for all users.")] = "0",
    hardware: Annotated[
        str | None, typer.Option(help="A profile's name, or its YAML file; default: this machine's free memory.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many of --hardware.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say whether a model with so much context for so many users fits into memory, and what would.

    The prefix that users share is kept once. What does not fit the pool still hits from --cache-dir, more slowly.
    """
    with errors_reported() as errors:
        demand = ContextDemand(
            parse_tokens(context, "--context"), users, parse_tokens(shared, "--shared") if shared != "0" else 0
        )
        if hardware is None and devices > 1:
            raise ConfigError(f"--devices is {devices}; give --hardware with it, or leave it out for this machine")
        with errors.status("reading the model's config and headers"):
            precisions, longest = _precisions(model, served_here=hardware is None)
        memory, machine = _memory(hardware, devices)
        asked = min(demand.context, longest) if longest else demand.context
        found = fits(precisions, ContextDemand(asked, users, min(demand.shared, asked)), memory, longest)
        if as_json:
            typer.echo(json.dumps(_as_json(found, memory, longest, demand), indent=1))
            return
        console = Console(highlight=False)
        for line in _heading(model, demand, asked, memory, machine):
            console.print(line)
        console.print(_fit_table(found, ContextDemand(asked, users)))
        for line in _advice(model, found):
            console.print(line, soft_wrap=line.startswith("emberkv"), markup=False)


def _described(model: str, dtype: Any, device: str) -> "ModelDescription":
    if find_spec("torch") is None:
        raise ConfigError("reading a model needs the torch extra: pip install 'emberkv[torch]'")
    from emberkv.engine.torch.model.checkpoint import local_model  # noqa: PLC0415 - of the torch extra

    local_model(model)  # refuses a wrong path before the seconds that importing PyTorch takes
    from emberkv.engine.torch.model.description import describe_model  # noqa: PLC0415 - imports PyTorch

    return describe_model(model, dtype=dtype, device=device)


def _model_table(found: "ModelDescription") -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for label, text in _model_rows(found):
        table.add_row(label, text)
    return table


def _model_rows(found: "ModelDescription") -> list[tuple[str, str]]:
    rows = [("model", found.name), ("architecture", found.architecture)]
    if found.refusal is not None:
        return [*rows, ("refused", found.refusal)]
    weights, per_token, context = found.weight_bytes or 0, found.kv_bytes_per_token or 0, found.context or 0
    limit = f", of {found.stated_context:,} stated" if found.stated_context and found.stated_context > context else ""
    held = "" if found.held is None else f"; held in {found.held}"
    state = found.state_bytes_per_block
    beside = f", with {format_size(state)} of other state in each block of {found.block_size} tokens" if state else ""
    rounded = [f"{name} {format_size(size)}" for name, size in (found.quantised_bytes or {}).items()]
    int8 = found.int8_kv_bytes_per_token
    int8_kv = f" ({int8:,} with --kv-dtype int8)" if int8 else ""
    return [
        *rows,
        ("parameters", f"{_in_millions(found.parameters or 0)} in {found.layers} layers"),
        ("stored as", f"{found.stored_as}{held}"),
        ("computed in", f"{found.computed_as} on {found.device}"),
        ("weights", format_size(weights) + (f" ({', '.join(rounded)} with --quantize)" if rounded else "")),
        (
            "KV",
            f"{per_token:,} bytes a token{int8_kv}{beside}; {format_size(per_token * context)} for the whole context",
        ),
        ("context", f"{context:,} tokens{limit}"),
        ("hits", found.reuse or ""),
        ("fits", _fitting(found)),
    ]


def _in_millions(parameters: int) -> str:
    millions = parameters / 1e6
    return f"{millions:,.0f} million" if millions >= 10 else f"{millions:.2g} million"


def _fitting(found: "ModelDescription") -> str:
    tokens, context, free = found.fitting_tokens or 0, found.context or 1, format_size(found.free_bytes)
    if not tokens:
        return f"no: the weights take {format_size(found.weight_bytes or 0)} of the {free} that are free"
    whole = f"{format_count(tokens // context, 'whole context')}" if tokens >= context else "less than one context"
    return f"{tokens:,} tokens of KV beside the weights in the {free} that are free: {whole}"


_SERVED_KINDS = ("int8", "int4")
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _precisions(model: str, *, served_here: bool) -> tuple[list[Precision], int]:
    """The choices of number types, from the most precise one on, and the model's longest context."""
    path = Path(model)
    if model.lower() in model_names() or (path.is_file() and path.suffix == ".json"):
        spec = load_spec(model)
        return _of_spec(spec, served_here=served_here), spec.context
    if not served_here and path.is_dir():
        spec = load_spec(model)
        return _of_spec(spec, served_here=False), spec.context
    found = _described(model, "auto", "auto")
    if found.refusal is not None:
        raise ConfigError(found.refusal)
    per_token, computed = found.kv_bytes_per_token or 0, _SHORT.get(found.computed_as or "", "")
    own = Precision("as stored" if found.held else computed, computed, found.weight_bytes or 0, per_token)
    rounded = [
        Precision(name, computed, found.quantised_bytes[name], per_token, f" --quantize {name}")
        for name in _SERVED_KINDS
        if found.quantised_bytes
    ]
    return with_int8_kv([own, *rounded], found.int8_kv_bytes_per_token), found.context or 0


def with_int8_kv(choices: list[Precision], bytes_per_token: int | None) -> list[Precision]:
    """Each choice, and behind it the same weights with KV in int8, which takes ``bytes_per_token``; None: refused."""
    if bytes_per_token is None:
        return choices
    option = " --kv-dtype int8"
    return [
        each
        for own in choices
        for each in (
            own,
            replace(
                own,
                kv="int8",
                kv_bytes_per_token=bytes_per_token,
                options=None if own.options is None else own.options + option,
            ),
        )
    ]


_SPEC_CHOICES = (("fp32", "fp32"), ("bf16", "bf16"), ("fp8", "bf16"), ("int4", "bf16"), ("fp8", "fp8"), ("int4", "fp8"))


def _of_spec(spec: ModelSpec, *, served_here: bool) -> list[Precision]:
    own = Precision(spec.weights_dtype, spec.kv_dtype, spec.weight_bytes, spec.kv_bytes_per_token)
    if served_here:
        rounded = [
            Precision(
                name, own.kv, spec.with_dtypes(weights=name, on_load=True).weight_bytes, own.kv_bytes_per_token, None
            )
            for name in _SERVED_KINDS
            if spec.weights_dtype == spec.base_dtype
        ]
        int8_kv = spec.with_dtypes(kv="int8").kv_bytes_per_token
        return with_int8_kv([replace(own, options=None), *rounded], int8_kv)
    found = []
    for weights, kv in _SPEC_CHOICES:
        changed = spec.with_dtypes(weights=weights, kv=kv)
        each = Precision(weights, kv, changed.weight_bytes, changed.kv_bytes_per_token, None)
        if each.weight_bytes <= own.weight_bytes:
            found.append(each)
    return found


def _memory(hardware: str | None, devices: int) -> tuple[int, str]:
    """Bytes for weights and KV, and what has them."""
    if hardware is None:
        if find_spec("torch") is None:
            raise ConfigError("this machine's memory is read with the torch extra; give --hardware NAME without it")
        import torch  # noqa: PLC0415 - takes seconds

        from emberkv.engine.torch.model.description import RUNTIME_BYTES  # noqa: PLC0415 - as above
        from emberkv.engine.torch.model.loader import choose_device, free_memory  # noqa: PLC0415 - as above

        device: torch.device = choose_device("auto")
        return max(0, free_memory(device) - RUNTIME_BYTES), f"this machine ({device}), of what is free now"
    profile = load_profile(hardware)
    usable = profile.memory_bytes - round(profile.runtime_gib * GIB)
    return usable * devices, f"{devices} x {profile.name}"


def _heading(model: str, demand: ContextDemand, asked: int, memory: int, machine: str) -> list[str]:
    users = format_count(demand.users, "user")
    lines = [f"{model}: {users} with {demand.context:,} tokens each, in {format_size(memory)} of {machine}"]
    if asked < demand.context:
        lines.append(f"The model takes at most {asked:,} tokens, whatever the memory: the figures are for these.")
    return lines


def _fit_table(found: list[Fit], demand: ContextDemand) -> Table:
    table = Table("weights/KV")
    users, context = f"users at {demand.context:,}", f"context for {demand.users:,}"
    for heading in ("weights", "KV cache", "together", "fits", users, context):
        table.add_column(heading, justify="right")
    for each in found:
        own = each.precision
        table.add_row(
            f"{own.weights}/{own.kv}", format_size(own.weight_bytes), format_size(each.kv_bytes),
            format_size(each.total_bytes), "yes" if each.fits else "no", f"{each.users:,}", f"{each.context:,}",
        )  # fmt: skip
    return table


def _advice(model: str, found: list[Fit]) -> list[str]:
    """What to do about it: sentences, and a command where the model is served here."""
    first = next((each for each in found if each.fits), None)
    if first is None:
        best = max(found, key=lambda each: (each.users, each.context))
        if not best.context:
            return ["It does not fit: the weights alone are larger than the memory, in every type."]
        instead = f"{format_count(best.users, 'user')} at that context" if best.users else f"{best.context:,} tokens"
        kind = f"{best.precision.weights} weights and {best.precision.kv} KV"
        return [f"It does not fit. With {kind}, {instead} would."]
    kind = "as it is stored" if first.precision.weights == "as stored" else f"with {first.precision.weights} weights"
    if first.precision.options is None:
        return [f"It fits {kind} and {first.precision.kv} KV."]
    pool = max(1, -(-first.kv_bytes // 2**20))
    return [f"It fits {kind}:", f"emberkv serve {model}{first.precision.options} --cache-ram {pool}MiB"]


def _as_json(found: list[Fit], memory: int, longest: int, demand: ContextDemand) -> dict[str, Any]:
    return {
        "memory_bytes": memory,
        "longest_context": longest or None,
        "asked": asdict(demand),
        "choices": [asdict(each) for each in found],
    }

"""The workload commands: generate requests, say what a workload is made of, turn one trace format into another."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from emberkv.cli.command import App, check_outputs, errors_reported
from emberkv.errors import WorkloadError
from emberkv.sim.formatting import format_count, format_share
from emberkv.workload.description import Description, Lengths, describe
from emberkv.workload.source import ASSUMED, ServiceTime, is_description, open_requests
from emberkv.workload.trace import TraceFormat, clip, merge, scale_rate, scopes, write_trace

app = App(name="workload", help="Generate, describe and convert workloads.")

FirstToken = Annotated[float, typer.Option(min=0.0, help="Seconds to a first token, assumed for generated turns.")]
PerToken = Annotated[float, typer.Option(min=0.0, help="Seconds for each further token, likewise.")]
BlockSize = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a block; default: the workload's own, or 16 (Mooncake: 512).")
]
TraceBlockSize = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a Mooncake trace's block, where its lines do not say; default 512.")
]
From = Annotated[TraceFormat | None, typer.Option("--from", help="The format; default: inferred from the file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
To = Annotated[TraceFormat, typer.Option("--to", help="The format to write.")]


@app.command("generate")
def generate(
    description: Annotated[Path, typer.Argument(help="A YAML file with a workload.")],
    output: Annotated[Path, typer.Argument(help="The trace to write.")],
    *,
    to: To = TraceFormat.EMBERKV,
    block_size: BlockSize = None,
    first_token: FirstToken = ASSUMED.first_token,
    per_token: PerToken = ASSUMED.per_token,
    overwrite: Overwrite = False,
) -> None:
    """Write a described workload as a trace.

    A follow-up comes a think time after the turn before it completes.

    Nothing is simulated here: each turn is assumed to take the time that the options give.

    emberkv's own format also keeps which request follows which.
    """
    service = ServiceTime(first_token, per_token)
    with errors_reported() as errors:
        _check_output(output, overwrite)
        if not is_description(description):
            raise WorkloadError(f"{description} is not a .yaml file; convert turns traces into traces")
        requests = open_requests(description, service=service)
        note = f"generated; assumed {first_token:g} s to the first token and {per_token:g} s for each further one"
        count = write_trace(output, requests, format=to, block_size=block_size, note=note)
        errors.print(f"{count:,} requests in {output} ({note})", soft_wrap=True)


@app.command("describe")
def describe_command(
    workload: Annotated[Path, typer.Argument(help="A trace, or a YAML file with a workload.")],
    *,
    format: From = None,
    block_size: BlockSize = None,
    trace_block_size: TraceBlockSize = None,
    first_token: FirstToken = ASSUMED.first_token,
    per_token: PerToken = ASSUMED.per_token,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what a workload is made of, and what share of its prompts an unlimited cache would find."""
    service = ServiceTime(first_token, per_token)
    with errors_reported() as errors:
        requests = open_requests(workload, format=format, block_size=trace_block_size, service=service)
        found = describe(requests, block_size)
        if found is None:
            raise WorkloadError(f"{workload} has no requests")
        if as_json:
            typer.echo(json.dumps(_as_json(found), indent=1))
        else:
            Console().print(_table(found, workload.name))
        if is_description(workload):
            errors.print(
                f"Assumed {first_token:g} s to a first token and {per_token:g} s for each further one.", soft_wrap=True
            )


@app.command("convert")
def convert(
    inputs: Annotated[list[Path], typer.Argument(help="Traces; several are merged by arrival.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace to write.")],
    format: From = None,
    to: To = TraceFormat.EMBERKV,
    block_size: BlockSize = None,
    trace_block_size: TraceBlockSize = None,
    rate: Annotated[float, typer.Option(help="Multiplies the requests a second.")] = 1.0,
    start: Annotated[float, typer.Option(help="Seconds; what arrives before is left out.")] = 0.0,
    stop: Annotated[float, typer.Option(help="Seconds; what arrives then or later is left out.")] = math.inf,
    overwrite: Overwrite = False,
) -> None:
    """Turn traces into another format, merged, clipped (in recorded time) and then sped up, as the options say."""
    with errors_reported() as errors:
        _check_output(output, overwrite)
        names = scopes(inputs) if len(inputs) > 1 else [None]
        traces = [
            open_requests(path, format=format, block_size=trace_block_size, scope=name)
            for path, name in zip(inputs, names, strict=True)
        ]
        requests = scale_rate(clip(merge(*traces), start, stop), rate)
        count = write_trace(output, requests, format=to, block_size=block_size)
        errors.print(f"{count:,} requests in {output}", soft_wrap=True)


def _check_output(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise WorkloadError(f"{path} exists; name another file, or replace it with --overwrite")
    check_outputs(output=path)


def _as_json(found: Description) -> dict[str, Any]:
    cache = found.cache
    return {
        "requests": found.requests,
        "duration_s": found.duration,
        "requests_per_s": found.rate,
        "prompt_tokens": asdict(found.prompt),
        "output_tokens": asdict(found.output),
        "sessions": found.sessions,
        "longest_session": found.longest_session,
        "unlimited_cache": {
            "prefixes_told": cache.content_known,
            "block_size": cache.block_size,
            "block_references": cache.references,
            "unique_blocks": cache.unique,
            "block_hits": cache.hits,
            "block_hit_rate": cache.block_hit_rate,
            "prompt_tokens": cache.prompt_tokens,
            "hit_tokens": cache.hit_tokens,
            "token_hit_rate": cache.token_hit_rate,
        },
    }


def _lengths(of: Lengths) -> str:
    return f"mean {of.mean:,.0f}, p50 {of.p50:,}, p90 {of.p90:,}, p99 {of.p99:,}, max {of.max:,}"


def _sessions(found: Description) -> str:
    if not found.sessions:
        return "not given"
    return f"{found.sessions:,}; the longest has {format_count(found.longest_session, 'turn')}"


def _table(found: Description, title: str) -> Table:
    cache = found.cache
    rate = "" if found.rate is None else f", {found.rate:,.2f} a second"
    hits, hit_tokens = "the workload does not say what prompts share", ""
    if cache.content_known:
        hits = f"{cache.hits:,} prefix hits, {format_share(cache.block_hit_rate)}"
        hit_tokens = f"{cache.hit_tokens:,} of {cache.prompt_tokens:,}, {format_share(cache.token_hit_rate)}"
    rows = [
        ("Requests", f"{found.requests:,} over {found.duration:,.1f} s{rate}"),
        ("Sessions", _sessions(found)),
        ("Prompt tokens", _lengths(found.prompt)),
        ("Output tokens", _lengths(found.output)),
        (f"Blocks of {cache.block_size}", f"{cache.references:,} references, {cache.unique:,} unique"),
        ("Unlimited cache, blocks", hits),
        ("Unlimited cache, tokens", hit_tokens),
    ]
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for label, value in rows:
        table.add_row(label, value)
    return table

"""The bench command: time any OpenAI-compatible server with conversations over a shared system prompt."""

import asyncio
import json
import secrets
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from emberkv.bench.client import Endpoint, Target
from emberkv.bench.runner import BenchWorkload, RequestRecord, first_model, run_workload, tokens_per_word
from emberkv.bench.summary import Summary, as_json, print_errors, render, summarize
from emberkv.cli.command import error_console
from emberkv.cli.connection import ServerUrl, connection


def connect(url: str, key: str | None, timeout: float) -> httpx.AsyncClient:
    """A client for the server at ``url``, given with or without its ``/v1``; it opens one connection a request.

    timeout: seconds without a byte after which a request fails.
    """
    return httpx.AsyncClient(
        **connection(url.rstrip("/").removesuffix("/v1"), key),
        timeout=timeout,
        limits=httpx.Limits(max_connections=None),
    )


async def _prepare(
    client: httpx.AsyncClient, target: Target, workload: BenchWorkload, console: Console
) -> tuple[Target, BenchWorkload]:
    """Fills in the model's name and the length of a word in its tokens."""
    if not target.model:
        target = replace(target, model=await first_model(client))
    ratio = await tokens_per_word(client, target, workload.nonce, time.perf_counter)
    if ratio is None:
        console.print("The server reports no prompt tokens: lengths are in words.", style="yellow")
        return target, workload
    return target, replace(workload, tokens_per_word=ratio)


async def _run(
    client: httpx.AsyncClient, target: Target, workload: BenchWorkload, console: Console
) -> tuple[Target, BenchWorkload, list[RequestRecord]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with client:
        target, workload = await _prepare(client, target, workload, console)
        with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
            task = progress.add_task("requests", total=workload.requests)
            records = await run_workload(
                client, target, workload, time.perf_counter, on_record=lambda _: progress.advance(task)
            )
    return target, workload, records


def _result(
    url: str, target: Target, workload: BenchWorkload, records: list[RequestRecord], summary: Summary
) -> dict[str, Any]:
    how = {"url": url, "model": target.model, "endpoint": target.endpoint.value, "extensions": target.extensions}
    return {"target": how, "workload": asdict(workload), **as_json(records, summary)}


def bench(
    *,
    url: ServerUrl,
    sessions: Annotated[int, typer.Option(min=1, help="Conversations.")] = 8,
    turns: Annotated[int, typer.Option(min=1, help="Questions in each conversation.")] = 4,
    concurrency: Annotated[int, typer.Option(min=1, help="Conversations at a time.")] = 4,
    system_tokens: Annotated[int, typer.Option(min=0, help="Length of the shared system prompt.")] = 1000,
    user_tokens: Annotated[int, typer.Option(min=1, help="Length of each question.")] = 50,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Limit of each answer.")] = 32,
    seed: Annotated[int, typer.Option(help="Makes the texts, and is sent with each request.")] = 0,
    nonce: Annotated[str | None, typer.Option(help="Repeats an earlier run's texts; default: fresh ones.")] = None,
    model: Annotated[str, typer.Option(help="Default: the first of /v1/models.")] = "",
    key: Annotated[str | None, typer.Option("--key", "--api-key", help="Sent as a bearer token.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds of silence that fail a request.")] = 300.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Writes every request and the summary.")] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="Which API to use.")] = Endpoint.CHAT,
    extensions: Annotated[bool, typer.Option(help="Send ignore_eos, which OpenAI itself does not know.")] = True,
) -> None:
    """Time any OpenAI-compatible server with multi-turn conversations over a shared system prompt.

    Every run has fresh texts unless --nonce is given, so that no run profits from an earlier one.

    Exits with 1 when a request failed, and with 2 when the server cannot be used.
    """
    workload = BenchWorkload(
        sessions=sessions, turns=turns, concurrency=concurrency, system_tokens=system_tokens,
        user_tokens=user_tokens, answer_tokens=answer_tokens, seed=seed, nonce=nonce or secrets.token_hex(8),
    )  # fmt: skip
    target = Target(model, endpoint, extensions, seed)
    errors = error_console()
    target, workload, records = asyncio.run(_run(connect(url, key, timeout), target, workload, errors))
    summary = summarize(records)
    Console().print(render(summary, f"{target.model} at {url} (nonce {workload.nonce})"))
    if json_file:
        json_file.write_text(json.dumps(_result(url, target, workload, records, summary), indent=1) + "\n")
    failures = [record.error for record in records if record.error]
    print_errors(errors, failures)
    if failures:
        raise typer.Exit(1)

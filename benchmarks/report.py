"""What becomes of results: each benchmark publishes its own, and the page gathers what all have published."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Row, markdown

HEADER = """\
# Benchmarks

Written by `python -m benchmarks` from what it measured; the notes at the end are `benchmarks/notes.md`. Values are
medians over rounds with the lowest and the highest in parentheses; a ratio is taken round by round, of figures
measured in the same round. A target is for the ratio, and where there is none, for the figure. Each table is
of the code of its date; the notes say which are old.
"""


def _cpu_facts() -> dict[str, str]:
    """What Linux says of its last core; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def machine() -> dict[str, Any]:
    """What the figures are taken on."""
    facts = _cpu_facts()
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "amx_bf16": "amx_bf16" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }


def command(module: str, arguments: Sequence[str]) -> str:
    """A command line without --out, and with PATH for absolute paths, which differ from machine to machine."""
    shown = ["python", "-m", module]
    skip = False
    for argument in arguments:
        if not skip and argument != "--out":
            shown.append("PATH" if Path(argument).is_absolute() else argument)
        skip = argument == "--out"
    return " ".join(shown)


def about(module: str, doc: str | None, **settings: Any) -> dict[str, Any]:
    """What is published with a benchmark's figures; to be called when it starts.

    doc: the module's, of which the first line is the title. load_at_start: above 0.5 means that something else was
    running, if only the benchmark before.
    """
    return {
        "title": (doc or module).splitlines()[0].rstrip("."),
        "command": command(module, sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load_at_start": os.getloadavg()[0],
        "machine": machine(),
        "settings": settings,
    }


def publish(rows: Sequence[Row], about: Mapping[str, Any], out: Path | None) -> int:
    """Prints the table and, given ``out``, writes out.json and out.md. Returns 0 when every target is met, else 1."""
    print(f"{json.dumps(dict(about), indent=1)}\n\n{markdown(rows)}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        result = dict(about) | {"rows": [row.as_json() for row in rows]}
        out.with_suffix(".md").write_text(markdown(rows) + "\n")
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row.met is False for row in rows) else 0


def machine_line(facts: Mapping[str, Any]) -> str:
    extras = [name for name in ("amx_bf16", "avx512_bf16") if facts[name]]
    cpu = f"{facts['cpu']} ({', '.join(extras)})" if extras else facts["cpu"]
    return (
        f"Machine: {cpu}, {facts['cores']} cores, {facts['memory_gib']} GiB of memory, {facts['system']}, "
        f"Python {facts['python']}, torch {facts['torch']}."
    )


def section(result: Mapping[str, Any], table: str) -> str:
    return f"## {result['title']}\n\n`{result['command']}` on {result['date']}:\n\n{table}"


def page(folder: Path, names: Sequence[str], notes: str) -> str:
    """The page of all results in ``folder``, in the order of ``names``; one that is missing is left out.

    Raises ValueError when they come from different machines, as one line could not describe them.
    """
    present = [folder / f"{name}.json" for name in names if (folder / f"{name}.json").exists()]
    results = [json.loads(path.read_text()) for path in present]
    lines = {machine_line(result["machine"]) for result in results}
    if len(lines) > 1:
        raise ValueError(f"the results in {folder} come from different machines or versions; delete it and run all")
    sections = [section(r, path.with_suffix(".md").read_text()) for r, path in zip(results, present, strict=True)]
    return "\n".join([HEADER, *(f"{line}\n" for line in lines), *sections, f"## Notes\n\n{notes}"])

"""emberkv beside llama.cpp's server, in 16, 8 and 4 bits: the same weights, client and prompts, each server alone.

    python -m benchmarks.vs_llama_cpp --llama-cpp FOLDER [--emberkv "COMMAND"] [--rounds 3] [--out PREFIX]

FOLDER holds llama-server and llama-quantize, built with ``-DGGML_NATIVE=ON``, as from the source distribution of
llama-cpp-python (0.3.36 for what is published). The model is random, of Qwen2.5-0.5B's shape. llama.cpp gets it as a
GGUF file in BF16, and what its own quantiser makes of that: Q8_0 and Q4_K_M. Exits with 1 when a target is missed.
"""

import asyncio
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks import arguments, lib, report
from benchmarks.figures import Comparison, Figure, Row
from benchmarks.memory import resident
from benchmarks.random_qwen2 import ensure_half_billion
from gguf import GGMLQuantizationType
from tests.gguf_models import write_gguf

from emberkv.bench.client import TimedAnswer
from emberkv.cli.bench import connect

LONG, SHORT = 4000, 32
ANSWER = 64
STREAMS = 16
CONTEXT = 8192
SLOT = 1024  # tokens of context for each of the STREAMS in llama.cpp
ONE, MANY, COLD, HIT, RESIDENT = "one stream", f"{STREAMS} streams", "cold", "hit", "resident"


@dataclass(frozen=True, slots=True)
class Format:
    """How many bits a weight has, and how each server is given it. one_stream: the least ratio of tokens a second."""

    name: str
    flags: tuple[str, ...]
    quantised: str
    one_stream: float


FORMATS = (
    Format("bf16", ("--dtype", "bfloat16"), "BF16", 1.0),
    Format("8 bits", ("--dtype", "bfloat16", "--quantize", "int8"), "Q8_0", 1.0),
    Format("4 bits", ("--dtype", "bfloat16", "--quantize", "int4"), "Q4_K_M", 1.1),
)
Results = dict[tuple[str, str, str], list[float]]
"""One value a round, by format, server and measure."""


def memory_rate(gib: int = 1, repeats: int = 7) -> float:
    """Bytes a second at which all cores together read memory that no cache holds: the best of ``repeats`` by a sum, and
    by a matrix times a vector, which reads several rows at once.
    """
    values, vector = torch.ones(gib * 2**14, 2**14), torch.ones(2**14)
    times = []
    for read in (values.sum, lambda: values @ vector):
        for _ in range(repeats):
            began = time.perf_counter()
            read()
            times.append(time.perf_counter() - began)
    return values.nbytes / min(times)


def ensure_files(folder: Path, llama_cpp: Path) -> tuple[Path, Mapping[str, Path]]:
    """The model's folder, and its GGUF files by llama.cpp's name of the format, written where they are missing."""
    model = ensure_half_billion(folder)
    files = {each.quantised: folder / f"{model.name}-{each.quantised}.gguf" for each in FORMATS}
    plain = files["BF16"]
    if not plain.exists():
        unfinished = plain.with_suffix(".part")
        write_gguf(model, unfinished, lambda _: GGMLQuantizationType.BF16, changed={"tokenizer.ggml.pre": "qwen2"})
        unfinished.rename(plain)
    for kind, path in files.items():
        if not path.exists():
            unfinished = path.with_suffix(".part")
            subprocess.run([llama_cpp / "llama-quantize", plain, unfinished, kind], check=True, capture_output=True)
            unfinished.rename(path)
    return model, files


def llama_server(folder: Path, file: Path, slots: int) -> lib.Server:
    threads = str(len(os.sched_getaffinity(0)))
    context = CONTEXT if slots == 1 else slots * SLOT
    flags = ["--host", "127.0.0.1", "-t", threads, "-tb", threads, "-c", str(context), "-np", str(slots)]
    command = [str(folder / "llama-server"), "-m", str(file), *flags]
    return lib.Server("llama.cpp", lambda port: [*command, "--port", str(port)], "/health")


def rate(answer: TimedAnswer) -> float:
    """Tokens a second after the first."""
    return (answer.output_tokens - 1) / (answer.piece_times[-1] - answer.piece_times[0])


async def alone(prompter: lib.Prompter, samples: int) -> dict[str, float]:
    """Medians of one client's measures: tokens a second, and seconds to the first token."""
    found: dict[str, list[float]] = {ONE: [], COLD: [], HIT: []}
    for _ in range(samples):
        found[ONE].append(rate(await prompter.ask(prompter.fresh(SHORT), max_tokens=ANSWER)))
        prompt = prompter.fresh(LONG)
        found[COLD].append(await prompter.ttft(prompt, cached=False))
        found[HIT].append(await prompter.ttft(prompt + prompter.fresh(SHORT), cached=True))
    return {name: statistics.median(values) for name, values in found.items()}


async def together(prompter: lib.Prompter) -> float:
    """Tokens a second of all streams in sum, from the first request to the last answer's end, prompts included."""
    prompts = [prompter.fresh(SHORT) for _ in range(STREAMS)]
    answers = await asyncio.gather(*(prompter.ask(prompt, max_tokens=ANSWER) for prompt in prompts))
    seconds = max(answer.ended for answer in answers) - min(answer.sent for answer in answers)
    return sum(answer.output_tokens for answer in answers) / seconds


async def measure(url: str, nonce: str, samples: int, *, one: bool, many: bool) -> dict[str, float]:
    """The same nonce asks the same."""
    async with connect(url, None, timeout=1200) as client:
        prompter = await lib.Prompter.connect(client, random.Random(nonce))
        await prompter.ask(prompter.fresh(SHORT), max_tokens=8)
        found = await alone(prompter, samples) if one else {}
        return found | ({MANY: await together(prompter)} if many else {})


def compare(results: Results, bytes_read: int, memory_bytes: float) -> list[Row]:
    """bytes_read: of the bf16 weights, for one token. memory_bytes: a second, as measured."""

    def row(
        name: str, unit: str, measure: str, each: str, target: float | None, *, at_least: bool = False,
        of: str = "llama.cpp", other: str | None = None,
    ) -> Comparison:  # fmt: skip
        top, bottom = results[each, "emberkv", measure], results[other or each, of, measure]
        return Comparison(f"{name}, {each}", unit, "emberkv", top, f"{of}, {other or each}", bottom, target, at_least)

    reached = [value * bytes_read / memory_bytes for value in results["bf16", "emberkv", ONE]]
    formats = {each.name: each for each in FORMATS}
    return [
        *(row("one stream", "tok/s", ONE, each, formats[each].one_stream, at_least=True) for each in formats),
        Figure("one stream, bf16, of what the memory's rate allows", "", reached, 0.85, at_least=True),
        *(row(MANY, "tok/s", MANY, each, 4.0 if each == "8 bits" else None, at_least=True) for each in formats),
        *(row("first token, 4,000 new", "s", COLD, each, 0.5 if each == "8 bits" else None) for each in formats),
        row("first token, 4,000 new", "s", COLD, "8 bits", 1.0, of="emberkv", other="bf16"),
        *(row("first token, 4,000 cached and 32 new", "s", HIT, each, 0.3) for each in formats),
        *(row("resident at the end", "MiB", RESIDENT, each, None) for each in formats),
    ]  # fmt: skip


def main() -> int:
    parser = arguments.server_parser(__doc__, rounds=3)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=2, help="of each measure of one client, in a round")
    parser.add_argument("--work", type=Path, default=arguments.WORK)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    model, files = ensure_files(given.work, given.llama_cpp)
    about = report.about("benchmarks.vs_llama_cpp", __doc__, rounds=given.rounds, samples=given.samples)
    memory_bytes = memory_rate()
    about["memory_gb_per_second"] = round(memory_bytes / 1e9, 1)
    results: Results = {}

    def run(server: lib.Server, each: Format, nonce: str, *, one: bool = True, many: bool = True) -> None:
        with lib.running(server, given.work / f"{server.name}.log") as started:
            found = asyncio.run(measure(started.url, nonce, given.samples, one=one, many=many))
            if one:
                found[RESIDENT] = resident(started.pid) / 2**20
        print(f"{each.name}: {server.name} {found}", file=sys.stderr)
        for name, value in found.items():
            results.setdefault((each.name, server.name, name), []).append(value)

    for _ in range(given.rounds):
        for each in FORMATS:
            nonce = os.urandom(8).hex()
            run(lib.emberkv_server(given.emberkv, model, "--cache-ram", "1GiB", *each.flags), each, nonce)
            file = files[each.quantised]
            run(llama_server(given.llama_cpp, file, 1), each, nonce, many=False)
            run(llama_server(given.llama_cpp, file, STREAMS), each, nonce, one=False)
    bytes_read = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return report.publish(compare(results, bytes_read, memory_bytes), about, given.out)


if __name__ == "__main__":
    sys.exit(main())

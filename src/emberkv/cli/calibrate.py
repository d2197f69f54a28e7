"""``emberkv calibrate``: measure this machine with a model, and write the hardware profile that simulations take.

The times of a real server, as a client on the same machine sees them, give what HTTP, JSON and tokenizing add to the
engine's own.
"""

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from emberkv.bench.client import Clock, Message, Target, TimedAnswer, ask
from emberkv.bench.runner import BenchWorkload
from emberkv.cli.command import check_outputs
from emberkv.config import ServeConfig
from emberkv.defaults import DEFAULT_PREFILL_CHUNK
from emberkv.errors import ConfigError, EmberError
from emberkv.settings import serve_config
from emberkv.sim.calibrated import Measurements, calibrated_profile, check_fit, deviation, with_request_times
from emberkv.sim.hardware import GB, MICROSECOND, HardwareProfile, MeasuredWith, TierRates, dump_profile
from emberkv.sim.model_spec import DEMO_NAME, ModelSpec, spec_from_config
from emberkv.sim.roofline import Roofline
from emberkv.sim.timing import ChunkWork, StepWork
from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.memory import MemoryTier

if TYPE_CHECKING:
    from emberkv.engine.torch.calibration import EngineBench


Sleep = Callable[[float], Awaitable[None]]

NAME = "calibrated"
READY_SECONDS = 600.0
ASK_AGAIN_SECONDS = 0.1
ROUNDS = 3
PAUSE_SECONDS = (0.05, 1.0)
STREAMS = (1, 2, 4, 8)
STREAM_WORDS = (30, 300, 1200)
STREAM_TOKENS = 40
SYSTEM_WORDS = (0, 300, 900)
BESIDE_TOKENS = 24


def server_command(config: ServeConfig) -> list[str]:
    """The command line of a server to measure, with these settings. Its log is JSON, of which one record has the URL.

    >>> command = server_command(ServeConfig(model="folder", quantize="int8"))
    >>> command[3:5], command[command.index("--quantize") + 1]
    (['serve', 'folder'], 'int8')
    """
    model = [] if config.model is None else [config.model]
    flags = {
        "--port": 0, "--served-name": NAME, "--dtype": config.dtype, "--device": config.device,
        "--block-size": config.block_size, "--prefill-chunk": config.prefill_chunk,
        "--cache-ram": int(config.cache_ram or 0) or None, "--quantize": config.quantize,
        "--kv-dtype": config.kv_dtype, "--kernels": config.kernels, "--log-format": "json",
    }  # fmt: skip
    options = [str(part) for name, value in flags.items() if value is not None for part in (name, value)]
    return [sys.executable, "-m", "emberkv.cli.main", "serve", *model, *options, "--no-warmup"]


@contextmanager
def served(config: ServeConfig, log: Path) -> Iterator[str]:
    """The URL of a server process with these settings; it ends with the context. log: takes what the server prints.

    Raises EmberError, with the log's last error, when it does not become ready.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBERKV_")}
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - this program
            server_command(config), stdout=output, stderr=output, env=environment
        )
    try:
        yield _ready_url(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _ready_url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        records = log_records(log.read_text(errors="replace"))
        url = next((record["url"] for record in records if "url" in record), None)
        if url is not None and _is_ready(url):
            return str(url)
        try:
            process.wait(ASK_AGAIN_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        break
    text = log.read_text(errors="replace")
    errors = [str(record["message"]) for record in log_records(text) if record.get("level") == "error"]
    raise EmberError(f"the server to measure did not become ready: {(errors or [text])[-1][-500:].strip()}")


def log_records(text: str) -> list[dict[str, Any]]:
    r"""The records of a log in JSON. What libraries print beside them is left out, as is a line not yet whole.

    >>> log_records('a warning\n{"message": "ready", "url": "http://127.0.0.1:8000"}\n{"mess')
    [{'message': 'ready', 'url': 'http://127.0.0.1:8000'}]
    """
    found = []
    for line in text.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).is_success
    except httpx.TransportError:  # it does not listen yet
        return False


async def decode_times(client: httpx.AsyncClient, *, clock: Clock = time.perf_counter) -> list[tuple[StepWork, float]]:
    """Decode steps by streams and context, each with the mean of its seconds over `ROUNDS`.

    One round more comes first and does not count: a server takes longer for the first steps of each shape.
    """
    found = []
    for words in STREAM_WORDS:
        for streams in STREAMS:
            _, *rounds = [
                await _decode(client, streams, words, f"{words} {streams} {number}", clock)
                for number in range(1 + ROUNDS)
            ]
            found.append((rounds[0][0], statistics.fmean(seconds for _, seconds in rounds)))
    return found


async def request_times(
    client: httpx.AsyncClient,
    roofline: Roofline,
    rng: Random,
    *,
    clock: Clock = time.perf_counter,
    sleep: Sleep = asyncio.sleep,
) -> list[tuple[int, float]]:
    """(prompt tokens, seconds from sending a request to its first text beyond what ``roofline`` expects of its steps).

    Half of the requests come beside another answer, when server and client have more to do. The others come after a
    pause, as most requests do: the server's threads sleep then, and its data has left the processor's caches.
    """
    found = []
    for words in SYSTEM_WORDS:
        script = BenchWorkload(system_tokens=words, user_tokens=40, nonce=f"calibrate requests {words}")
        await _ask(client, [*script.opening(), script.question(0, 0)], 1, clock)  # the beginning is cached from here on
        for number in range(1, 4 * ROUNDS):
            messages = [*script.opening(), script.question(number, 0)]
            await sleep(rng.uniform(*PAUSE_SECONDS))
            found.append(await _idle(client, messages, roofline, clock))
            messages = [*script.opening(), script.question(number, 1)]
            found.append(await _busy(client, messages, script.question(number, 2), roofline, clock))
    return found


async def _decode(
    client: httpx.AsyncClient, streams: int, words: int, nonce: str, clock: Clock
) -> tuple[StepWork, float]:
    script = BenchWorkload(sessions=streams, user_tokens=words, nonce=f"calibrate {nonce}")
    await _together(client, script, streams, 1, clock)  # cached then, so that the streams begin together
    answers = await _together(client, script, streams, STREAM_TOKENS, clock)
    context = sum((each.usage.prompt_tokens or 0) + STREAM_TOKENS // 2 for each in answers if each.usage is not None)
    each_token = [(each.piece_times[-1] - each.piece_times[0]) / (STREAM_TOKENS - 1) for each in answers]
    return StepWork(streams, context), statistics.fmean(each_token)


async def _together(
    client: httpx.AsyncClient, script: BenchWorkload, streams: int, tokens: int, clock: Clock
) -> Sequence[TimedAnswer]:
    return await asyncio.gather(
        *(_ask(client, [script.question(stream, 0)], tokens, clock) for stream in range(streams))
    )


async def _ask(client: httpx.AsyncClient, messages: Sequence[Message], tokens: int, clock: Clock) -> TimedAnswer:
    return _sound(await ask(client, Target(NAME), messages, max_tokens=tokens, clock=clock))


def _sound(answer: TimedAnswer) -> TimedAnswer:
    if answer.error or answer.usage is None or not answer.piece_times:
        raise EmberError(f"a request to measure by failed: {answer.error or 'it came without text or usage'}")
    return answer


async def _idle(
    client: httpx.AsyncClient, messages: Sequence[Message], roofline: Roofline, clock: Clock
) -> tuple[int, float]:
    answer = await _ask(client, messages, 1, clock)
    chunk = _chunk(answer)
    return chunk.stop, (answer.ttft or 0.0) - roofline.terms_of(StepWork(0, 0, (chunk,))).total


async def _busy(
    client: httpx.AsyncClient, messages: Sequence[Message], other: Message, roofline: Roofline, clock: Clock
) -> tuple[int, float]:
    started = asyncio.Event()
    asked = ask(client, Target(NAME), [other], max_tokens=BESIDE_TOKENS, clock=clock, on_text=started.set)
    streaming = asyncio.create_task(asked)
    streaming.add_done_callback(lambda _: started.set())
    await started.wait()
    answer = await _ask(client, messages, 1, clock)
    chunk, beside = _chunk(answer), _chunk(_sound(await streaming))
    context = beside.stop + BESIDE_TOKENS // 2
    step = roofline.terms_of(StepWork(1, context, (chunk,))).total
    waited = roofline.decode_seconds(1, context) / 2  # for the step under way, on average
    return chunk.stop, (answer.ttft or 0.0) - step - waited


def _chunk(answer: TimedAnswer) -> ChunkWork:
    assert answer.usage is not None
    return ChunkWork(answer.usage.cached_tokens or 0, answer.usage.prompt_tokens or 0, True)


TIER_BYTES = 1024 * 2**20

T = TypeVar("T")

_console = Console(stderr=True)


def calibrate(
    model: Annotated[str | None, typer.Argument(help="A model folder or hub id; the bundled demo without one.")] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write, a .yaml file.")],
    name: Annotated[str | None, typer.Option(help="What to call it. (default: the file's name)")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    quantize: Annotated[str, typer.Option(help="Round the weights: none, int8 or int4.")] = "none",
    kv_dtype: Annotated[str, typer.Option(help="Of the KV pool: auto or int8.")] = "auto",
    kernels: Annotated[str, typer.Option(help="On a CPU: auto, native or torch.")] = "auto",
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens per prefill pass.")] = DEFAULT_PREFILL_CHUNK,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per KV block.")] = 16,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Write no profile that misses the times measured by a larger share (median).")
    ] = 0.15,
    folder: Annotated[
        Path | None, typer.Option(help="Where to measure the disk. (default: beside the profile)")
    ] = None,
) -> None:
    """Measure matrix products, prefills, the lower tiers and a server's answers here; takes some minutes.

    Nothing else should run meanwhile: a profile that misses the times measured by more than --tolerance is not written.

    `emberkv simulate --hardware FILE` then predicts this machine. The profile says with which number types and
    kernels it was measured, and a simulation of a model with other number types says so.
    """
    check_outputs(output=output)
    given = {
        "model": model, "dtype": dtype, "device": device, "quantize": quantize, "kv_dtype": kv_dtype,
        "kernels": kernels, "prefill_chunk": prefill_chunk, "block_size": block_size,
    }  # fmt: skip
    profile = _measure(serve_config(given, {}), name or output.stem, folder or output.parent, tolerance)
    output.write_text(dump_profile(profile), encoding="utf-8")
    _console.print(f"{output}: pass it as --hardware {output}", highlight=False)


def _measure(config: ServeConfig, name: str, folder: Path, tolerance: float) -> HardwareProfile:
    with _console.status("loading the model") as status, TemporaryDirectory(prefix="emberkv-", dir=folder) as place:
        with ThreadPoolExecutor(1) as alone:  # a thread that ends; see `EngineBench`
            bench = alone.submit(_engine_bench, config, lambda line: status.update(escape(line))).result()
        spec = measured_spec(config, bench)  # refuses what cannot be simulated, before anything else is measured
        prefills = _prefills(bench, status)
        status.update("lower tiers")
        tiers = _tier_rates(bench, Path(place))
        with_types = MeasuredWith(weights=spec.weights_dtype, kv=spec.kv_dtype, kernels=bench.backend)
        about = f"{spec.name} on {bench.device}: {with_types}"
        linears, memory = [(each.rows, each.seconds) for each in bench.linears], bench.memory
        passes: Literal["one", "each"] = "one" if bench.one_pass else "each"
        last_layer: Literal["all", "wanted"] = "wanted" if bench.last_layer_spares else "all"
        del bench  # its memory is the server's from here on
        status.update("a server's answers")
        with served(config, Path(place, "server.log")) as url:
            decodes = asyncio.run(_with_client(url, decode_times))
            measured = Measurements(linears, [*prefills, *decodes], passes, memory, tiers, last_layer, with_types)
            profile = calibrated_profile(name, about, spec, measured)
            beside = asyncio.run(
                _with_client(url, partial(request_times, roofline=Roofline(spec, profile), rng=Random(0)))
            )
    off, cores = deviation(profile, spec, measured), os.cpu_count() or 1
    check_fit(off, tolerance=tolerance, load=os.getloadavg()[1], cores=cores)
    _console.print(f"the profile takes the times measured within {off:.0%} (median)")
    return with_request_times(profile, beside)


def _engine_bench(config: ServeConfig, progress: Callable[[str], None]) -> "EngineBench":
    """Imports torch here alone, so that the command line works without it."""
    try:
        from emberkv.engine.torch.calibration import DEFAULT_CACHE_BYTES, EngineBench  # noqa: PLC0415 - needs torch
        from emberkv.serving.engine_setup import engine_config, model_options  # noqa: PLC0415 - needs torch
        from emberkv.tiers.kinds import TierConfig  # noqa: PLC0415 - needs torch
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"measuring needs the torch extra ({error.name} is missing): pip install '.[torch]' in emberkv's folder"
        ) from error
    settings = engine_config(config, int(config.cache_ram or DEFAULT_CACHE_BYTES), TierConfig())
    return EngineBench(model_options(config), settings, progress)


async def _with_client(url: str, measure: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        return await measure(client)


def measured_spec(config: ServeConfig, bench: "EngineBench") -> ModelSpec:
    dtypes = bench.loaded.dtypes
    facts = bench.loaded.model.config.to_dict() | {"torch_dtype": str(dtypes.activations)}
    spec = spec_from_config(facts, DEMO_NAME if config.model is None else bench.loaded.name)
    weights, kv = (
        None if each.is_floating_point else str(each).removeprefix("torch.") for each in (dtypes.weights, dtypes.kv)
    )
    return spec.with_dtypes(weights=weights, kv=kv, on_load=config.quantize != "none")


def _prefills(bench: "EngineBench", status: Status) -> list[tuple[StepWork, float]]:
    measured = bench.prefills(ROUNDS, status.update)
    return [(StepWork(0, 0, (ChunkWork(start, stop, True),)), seconds) for (start, stop), seconds in measured.items()]


def _tier_rates(bench: "EngineBench", folder: Path) -> dict[str, TierRates]:
    found = {}
    disk = DiskTier.open(folder / "blocks", TIER_BYTES, namespace=b"calibration")
    for tier in (MemoryTier(TIER_BYTES), disk):
        times = bench.tier(tier)
        tier.close()
        found[tier.name] = TierRates(
            latency_us=times.latency / MICROSECOND,
            read_gb_per_s=times.read_rate / GB,
            write_gb_per_s=times.write_rate / GB,
        )
    return found

"""``emberkv calibrate``: measure this machine with a model, and write the hardware profile that simulations take."""

import asyncio
import statistics
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, TypeVar

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from emberkv.cli.http_times import decode_times, request_times, served
from emberkv.config import DEFAULT_PREFILL_CHUNK, ServeConfig, serve_config
from emberkv.errors import ConfigError, EmberError
from emberkv.sim.calibrated import Measurements, calibrated_profile, deviation, with_request_times
from emberkv.sim.hardware import GB, MICROSECOND, HardwareProfile, TierRates, dump_profile
from emberkv.sim.model_config import DEMO_NAME, spec_from_config
from emberkv.sim.model_spec import ModelSpec
from emberkv.sim.roofline import Roofline
from emberkv.sim.work import Chunk, Work
from emberkv.tiers.disk import DiskTier
from emberkv.tiers.memory import MemoryTier

if TYPE_CHECKING:
    from emberkv.engine.assembly import AssembledEngine
    from emberkv.engine.loader import LoadedModel as ModelOnDevice

CACHE_BYTES = 256 * 2**20
TIER_BYTES = 1024 * 2**20
ROUNDS = 3

T = TypeVar("T")

_console = Console(stderr=True)


def calibrate(
    model: Annotated[str | None, typer.Argument(help="A model folder or hub id; the bundled demo without one.")] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write, a .yaml file.")],
    name: Annotated[str | None, typer.Option(help="What to call it. (default: the file's name)")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens per prefill pass.")] = DEFAULT_PREFILL_CHUNK,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per KV block.")] = 16,
    folder: Annotated[
        Path | None, typer.Option(help="Where to measure the disk. (default: beside the profile)")
    ] = None,
) -> None:
    """Measure matrix products, prefills, the lower tiers and a server's answers here; takes about a minute.

    Nothing else should run meanwhile. `emberkv simulate --hardware FILE` then predicts this machine.
    """
    try:
        if not output.parent.is_dir():
            raise ConfigError(f"output is {str(output)!r}; {str(output.parent)!r} must be a folder that exists")
        given = {
            "model": model, "dtype": dtype, "device": device, "prefill_chunk": prefill_chunk, "block_size": block_size
        }  # fmt: skip
        profile = _measure(serve_config(given, {}), name or output.stem, folder or output.parent)
        output.write_text(dump_profile(profile), encoding="utf-8")
    except EmberError as error:
        _console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error
    except OSError as error:
        _console.print(f"[bold red]error:[/] cannot write {escape(str(output))}: {error.strerror}", soft_wrap=True)
        raise typer.Exit(1) from error
    _console.print(f"{output}: pass it as --hardware {output}", highlight=False)


def _measure(config: ServeConfig, name: str, folder: Path) -> HardwareProfile:
    try:
        from emberkv.engine import calibration  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"measuring needs the torch extra ({error.name} is missing): pip install 'emberkv[torch]'"
        ) from error
    with _console.status("loading the model") as status, TemporaryDirectory(prefix="emberkv-", dir=folder) as place:
        # On a thread that ends: as long as the thread of an OpenMP team lives, the team counts, and with more of them
        # than cores, those of other threads sleep between operations. The engine's steps then take twice as long.
        with ThreadPoolExecutor(1) as alone:
            engine, linears = alone.submit(_load, config, status).result()
        loaded, unit = engine.executor.loaded, engine.executor.alignment
        engine.loop.start()
        try:
            prefills = _prefills(engine, config, status)
        finally:
            engine.loop.stop()
        status.update("lower tiers")
        tiers = _tier_rates(engine.executor.pool.block_bytes, config.block_size, Path(place))
        spec = _spec_of(config, loaded)
        about = f"{spec.name} in {spec.base_dtype} on {loaded.device}"
        memory = calibration.device_memory(loaded.device)
        del engine, loaded
        status.update("a server's answers")
        with served(config, Path(place, "server.log")) as url:
            decodes = asyncio.run(_with_client(url, decode_times))
            measured = Measurements(
                linears, [*prefills, *decodes], "each" if unit == config.prefill_chunk else "one", memory, tiers
            )
            profile = calibrated_profile(name, about, spec, measured)
            beside = asyncio.run(_with_client(url, partial(request_times, roofline=Roofline(spec, profile))))
    _console.print(f"the profile takes the times measured within {deviation(profile, spec, measured):.0%} (median)")
    return with_request_times(profile, beside)


async def _with_client(url: str, measure: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        return await measure(client)


def _load(config: ServeConfig, status: Status) -> "tuple[AssembledEngine, list[tuple[int, float]]]":
    """The engine, and the times of the model's linear layers."""
    from emberkv.engine import assembly, calibration, loader  # noqa: PLC0415
    from emberkv.engine.paged_attention import ATTENTION_NAME  # noqa: PLC0415

    source = config.model or str(files("emberkv") / "demo_model")
    loaded = loader.load_model(
        source, dtype=config.dtype, device=config.device, attn_implementation=ATTENTION_NAME,
        progress=lambda line: status.update(escape(line)),
    )  # fmt: skip
    engine = assembly.assemble(
        loaded,
        assembly.EngineConfig(
            int(config.cache_ram or CACHE_BYTES),
            config.block_size,
            config.prefill_chunk,
            max_step_tokens=config.max_step_tokens,
        ),
    )
    status.update("matrix products")
    return engine, [(each.rows, each.seconds) for each in calibration.time_linears(loaded.model)]


def _spec_of(config: ServeConfig, loaded: "ModelOnDevice") -> ModelSpec:
    told = loaded.model.config.to_dict() | {"torch_dtype": str(loaded.dtype)}
    return spec_from_config(told, DEMO_NAME if config.model is None else loaded.name)


def _linears(loaded: "ModelOnDevice", status: Status) -> list[tuple[int, float]]:
    from emberkv.engine.calibration import time_linears  # noqa: PLC0415

    status.update("matrix products")
    return [(each.rows, each.seconds) for each in time_linears(loaded.model)]


def _prefills(engine: "AssembledEngine", config: ServeConfig, status: Status) -> list[tuple[Work, float]]:
    """The median of `ROUNDS` rounds over all: a machine's pace changes, for seconds at a time."""
    from emberkv.engine.calibration import PrefillBench, prefill_grid  # noqa: PLC0415

    bench = PrefillBench(engine.loop, engine.executor.loaded.geometry.vocab_size)
    unit = engine.executor.alignment
    budget = config.max_step_tokens if unit < config.prefill_chunk else config.prefill_chunk
    grid = list(prefill_grid(engine.loop.context_length, unit, budget))
    found: defaultdict[Work, list[float]] = defaultdict(list)
    for number in range(1, ROUNDS + 1):
        status.update(f"first tokens, round {number} of {ROUNDS}")
        for start, stop in grid:
            found[Work(0, 0, (Chunk(start, stop, True),))].append(bench.prefill(start, stop))
    return [(work, statistics.median(seconds)) for work, seconds in found.items()]


def _tier_rates(block_bytes: int, block_size: int, folder: Path) -> dict[str, TierRates]:
    from emberkv.engine.calibration import time_tier  # noqa: PLC0415

    found = {}
    disk = DiskTier.open(folder / "blocks", TIER_BYTES, namespace=b"calibration")
    for tier in (MemoryTier(TIER_BYTES), disk):
        times = time_tier(tier, block_bytes, block_size)
        tier.close()
        found[tier.name] = TierRates(
            latency_us=times.latency / MICROSECOND,
            read_gb_per_s=times.read_rate / GB,
            write_gb_per_s=times.write_rate / GB,
        )
    return found

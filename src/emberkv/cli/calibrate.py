"""``emberkv calibrate``: measure this machine with a model, and write the hardware profile that simulations take."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from emberkv.cli.command import check_outputs
from emberkv.cli.http_times import decode_times, request_times, served
from emberkv.config import ServeConfig
from emberkv.defaults import DEFAULT_PREFILL_CHUNK
from emberkv.errors import ConfigError
from emberkv.settings import serve_config
from emberkv.sim.calibrated import Measurements, calibrated_profile, check_fit, deviation, with_request_times
from emberkv.sim.hardware import GB, MICROSECOND, HardwareProfile, TierRates, dump_profile
from emberkv.sim.model_config import DEMO_NAME, spec_from_config
from emberkv.sim.model_spec import ModelSpec
from emberkv.sim.roofline import Roofline
from emberkv.sim.timing import Chunk, Work
from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.memory import MemoryTier

if TYPE_CHECKING:
    from emberkv.engine.torch.calibration import EngineBench

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
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Write no profile that misses the times measured by a larger share (median).")
    ] = 0.15,
    folder: Annotated[
        Path | None, typer.Option(help="Where to measure the disk. (default: beside the profile)")
    ] = None,
) -> None:
    """Measure matrix products, prefills, the lower tiers and a server's answers here; takes some minutes.

    Nothing else should run meanwhile: a profile that misses the times measured by more than --tolerance is not written.

    `emberkv simulate --hardware FILE` then predicts this machine.
    """
    check_outputs(output=output)
    given = {
        "model": model, "dtype": dtype, "device": device, "prefill_chunk": prefill_chunk, "block_size": block_size
    }  # fmt: skip
    profile = _measure(serve_config(given, {}), name or output.stem, folder or output.parent, tolerance)
    output.write_text(dump_profile(profile), encoding="utf-8")
    _console.print(f"{output}: pass it as --hardware {output}", highlight=False)


def _measure(config: ServeConfig, name: str, folder: Path, tolerance: float) -> HardwareProfile:
    with _console.status("loading the model") as status, TemporaryDirectory(prefix="emberkv-", dir=folder) as place:
        with ThreadPoolExecutor(1) as alone:  # a thread that ends; see `EngineBench`
            bench = alone.submit(_engine_bench, config, lambda line: status.update(escape(line))).result()
        prefills = _prefills(bench, status)
        status.update("lower tiers")
        tiers = _tier_rates(bench, Path(place))
        spec = _spec_of(config, bench)
        about = f"{spec.name} in {spec.base_dtype} on {bench.device}"
        linears, memory = [(each.rows, each.seconds) for each in bench.linears], bench.memory
        passes: Literal["one", "each"] = "one" if bench.one_pass else "each"
        last_layer: Literal["all", "wanted"] = "wanted" if bench.last_layer_spares else "all"
        del bench  # its memory is the server's from here on
        status.update("a server's answers")
        with served(config, Path(place, "server.log")) as url:
            decodes = asyncio.run(_with_client(url, decode_times))
            measured = Measurements(linears, [*prefills, *decodes], passes, memory, tiers, last_layer)
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
            f"measuring needs the torch extra ({error.name} is missing): pip install 'emberkv[torch]'"
        ) from error
    settings = engine_config(config, int(config.cache_ram or DEFAULT_CACHE_BYTES), TierConfig())
    return EngineBench(model_options(config), settings, progress)


async def _with_client(url: str, measure: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        return await measure(client)


def _spec_of(config: ServeConfig, bench: "EngineBench") -> ModelSpec:
    facts = bench.loaded.model.config.to_dict() | {"torch_dtype": str(bench.loaded.dtypes.weights)}
    return spec_from_config(facts, DEMO_NAME if config.model is None else bench.loaded.name)


def _prefills(bench: "EngineBench", status: Status) -> list[tuple[Work, float]]:
    measured = bench.prefills(ROUNDS, status.update)
    return [(Work(0, 0, (Chunk(start, stop, True),)), seconds) for (start, stop), seconds in measured.items()]


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

"""``emberkv calibrate``: measure this machine with a model, and write the hardware profile that simulations take."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from emberkv.cli.http_overhead import http_overhead
from emberkv.config import DEFAULT_PREFILL_CHUNK, ServeConfig, serve_config
from emberkv.errors import ConfigError, EmberError
from emberkv.sim.calibrated import Measurements, calibrated_profile
from emberkv.sim.hardware import GB, MICROSECOND, HardwareProfile, TierRates, dump_profile
from emberkv.sim.model_config import DEMO_NAME, spec_from_config
from emberkv.sim.model_spec import ModelSpec
from emberkv.sim.roofline import Chunk, Roofline, Work
from emberkv.tiers.disk import DiskTier
from emberkv.tiers.memory import MemoryTier

if TYPE_CHECKING:
    from emberkv.engine.assembly import AssembledEngine
    from emberkv.engine.loader import LoadedModel as ModelOnDevice

CACHE_BYTES = 256 * 2**20
TIER_BYTES = 1024 * 2**20

_console = Console(stderr=True)


def calibrate(
    model: Annotated[str | None, typer.Argument(help="A model folder or hub id; the bundled demo without one.")] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write, a .yaml file.")],
    name: Annotated[str | None, typer.Option(help="What to call it. [default: the file's name]")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens per prefill pass.")] = DEFAULT_PREFILL_CHUNK,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per KV block.")] = 16,
    folder: Annotated[
        Path | None, typer.Option(help="Where to measure the disk. [default: beside the profile]")
    ] = None,
) -> None:
    """Measure matrix products, decode steps, prefills, HTTP and the lower tiers here; takes about a minute.

    Nothing else should run meanwhile. `emberkv simulate --hardware FILE` then predicts this machine.
    """
    try:
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
        from emberkv.engine import assembly, calibration, loader  # noqa: PLC0415
        from emberkv.engine.paged_attention import ATTENTION_NAME  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"measuring needs the torch extra ({error.name} is missing): pip install 'emberkv[torch]'"
        ) from error
    with _console.status("loading the model") as status:
        source = config.model or str(files("emberkv") / "demo_model")
        loaded = loader.load_model(source, dtype=config.dtype, device=config.device, attn_implementation=ATTENTION_NAME)
        spec = _spec_of(config, loaded)
        memory = calibration.device_memory(loaded.device)
        engine = assembly.assemble(
            loaded,
            assembly.EngineConfig(
                CACHE_BYTES, config.block_size, config.prefill_chunk, max_step_tokens=config.max_step_tokens
            ),
        )
        engine.loop.start()
        try:
            measured = Measurements(
                linears=_linears(loaded, status),
                steps=[*_decodes(engine, loaded, status), *_prefills(engine, loaded, config, status)],
                passes="each" if engine.executor.alignment == config.prefill_chunk else "one",
                memory_bytes=memory,
                tiers=_tier_rates(engine.executor.pool.block_bytes, config.block_size, folder, status),
            )
            profile = calibrated_profile(name, f"{spec.name} in {spec.base_dtype} on {loaded.device}", spec, measured)
            status.update("requests over HTTP")
            seconds = http_overhead(engine.loop, loaded.tokenizer, Roofline(spec, profile))
        finally:
            engine.loop.stop()
    return profile.model_copy(update={"request_us": seconds / MICROSECOND})


def _spec_of(config: ServeConfig, loaded: "ModelOnDevice") -> ModelSpec:
    told = loaded.model.config.to_dict() | {"torch_dtype": str(loaded.dtype)}
    return spec_from_config(told, DEMO_NAME if config.model is None else loaded.name)


def _linears(loaded: "ModelOnDevice", status: Status) -> list[tuple[int, float]]:
    from emberkv.engine.calibration import time_linears  # noqa: PLC0415

    status.update("matrix products")
    return [(each.rows, each.seconds) for each in time_linears(loaded.model)]


def _decodes(engine: "AssembledEngine", loaded: "ModelOnDevice", status: Status) -> Iterator[tuple[Work, float]]:
    from emberkv.engine.calibration import StepBench, decode_grid  # noqa: PLC0415

    bench = StepBench(engine.loop, loaded.geometry.vocab_size)
    for sequences, context in decode_grid(engine.loop.context_length, engine.scheduler.config.max_running):
        status.update(f"decode steps of {sequences} sequences of {context} tokens")
        found = bench.decode(sequences, context)
        yield Work(found.sequences, found.context), found.seconds


def _prefills(
    engine: "AssembledEngine", loaded: "ModelOnDevice", config: ServeConfig, status: Status
) -> Iterator[tuple[Work, float]]:
    from emberkv.engine.calibration import StepBench, prefill_grid  # noqa: PLC0415

    bench = StepBench(engine.loop, loaded.geometry.vocab_size, seed=1)
    unit = engine.executor.alignment
    budget = config.max_step_tokens if unit < config.prefill_chunk else config.prefill_chunk
    for start, stop in prefill_grid(engine.loop.context_length, unit, budget):
        status.update(f"first tokens of {stop - start} tokens after {start}")
        found = bench.prefill(start, stop)
        yield Work(0, 0, (Chunk(found.start, found.stop, True),)), found.seconds


def _tier_rates(block_bytes: int, block_size: int, folder: Path, status: Status) -> dict[str, TierRates]:
    from emberkv.engine.calibration import time_tier  # noqa: PLC0415

    status.update("lower tiers")
    found = {}
    with TemporaryDirectory(prefix="emberkv-calibrate-", dir=folder) as place:
        disk = DiskTier.open(Path(place), TIER_BYTES, namespace=b"calibration")
        for tier in (MemoryTier(TIER_BYTES), disk):
            times = time_tier(tier, block_bytes, block_size)
            tier.close()
            found[tier.name] = TierRates(
                latency_us=times.latency / MICROSECOND,
                read_gb_per_s=times.read_rate / GB,
                write_gb_per_s=times.write_rate / GB,
            )
    return found

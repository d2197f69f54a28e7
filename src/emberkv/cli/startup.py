"""The start of a server, and what it prints: the model is loaded and warmed while HTTP already answers /health."""

import gc
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emberkv.cli import command
from emberkv.config import ServeConfig, TierSettings
from emberkv.core.explaining.ledger import Ledger
from emberkv.errors import ConfigError
from emberkv.heap import freed_memory_returned
from emberkv.serving.api.warmup_requests import read_warmup_requests, request_prompts
from emberkv.serving.cache.ledger_store import LedgerStore
from emberkv.serving.cache.service import cache_service
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.lifecycle import Lifecycle, ModelDims, ServedModel, ServerPhase, chosen_output_format, model_names
from emberkv.serving.request_context import JsonFormatter, TextFormatter
from emberkv.serving.server import HttpServer
from emberkv.serving.template_study import agent_warnings, rewrites_turns
from emberkv.serving.tenancy import Tenants
from emberkv.serving.warmup.warm_prompt import configured_prompts, public_tokens, standard_prompts
from emberkv.serving.warmup.warmup import Warmup, make_warmup
from emberkv.tiers.kinds import SHARED_OUT

if TYPE_CHECKING:
    from emberkv.engine.assembly import AssembledEngine
    from emberkv.engine.torch.model.geometry import ModelGeometry
    from emberkv.engine.torch.model.loader import LoadedModel as ModelOnDevice

_HANDLER = "emberkv serve"

console = Console(stderr=True)
"""Silent while the log is JSON, which then is alone on its stream."""

_log = logging.getLogger("emberkv.serve")


def set_up_logging(log_format: str | None, level: str = "info") -> None:
    """Log to stderr, as JSON alone for the format "json", else as text. A second call replaces the first's settings."""
    console.quiet = log_format == "json"
    handler = logging.StreamHandler()
    handler.name = _HANDLER
    handler.setFormatter(
        JsonFormatter() if console.quiet else TextFormatter((lambda: console.width) if console.is_terminal else None)
    )
    root = logging.getLogger()
    for earlier in [each for each in root.handlers if each.name == _HANDLER]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(console.quiet)
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


@contextmanager
def stages(first: str) -> Iterator[Callable[[str], None]]:
    """Show which stage of the start is going on, from ``first`` on; what it gives takes the next ones.

    On a terminal it is one line that changes; elsewhere each stage is a line of the log.
    """
    if console.is_terminal and not console.quiet:
        with console.status(first) as status:
            yield lambda line: status.update(escape(line))
    else:
        _log.info("%s", first)
        yield lambda line: _log.info("%s", line)


def print_error(message: str) -> None:
    """Say why the server does not start or has stopped."""
    if console.quiet:
        _log.error("%s", message)
    else:
        command.print_error(message)


def print_summary(
    url: str,
    name: str,
    loaded: "ModelOnDevice",
    engine: "AssembledEngine",
    config: ServeConfig,
    ready: str,
) -> None:
    pool = engine.executor.pool
    tokens, mib = pool.num_blocks * pool.block_size, pool.num_blocks * pool.block_bytes / 2**20
    cache = "off" if not config.prefix_cache else "exact reuse only" if config.exact else "on"
    table = Table.grid(padding=(0, 2))
    rows = {
        "model": f"{name} ({loaded.dtypes}, {loaded.device})",
        "context": context_line(loaded.geometry, tokens),
        "weights": f"{_weight_bytes(loaded) / 2**20:,.0f} MiB in {loaded.device} memory",
        "KV pool": f"{mib:,.0f} MiB: {tokens:,} tokens in blocks of {pool.block_size}",
        "parsers": str(chosen_output_format(loaded.tokenizer, config.tool_parser, config.reasoning_parser)),
        "kernels": engine.executor.description,
        "prefix cache": f"{cache}, eviction {config.eviction}, prefill chunks of {config.prefill_chunk}",
        "tiers": _tiers_line(config),
        "listening": f"{url}  (OpenAI: {url}/v1, Anthropic: {url})",
        "health": "/health  /ready  /metrics",
        "ready in": ready,
    }
    if console.quiet:
        fields = {label.lower().replace(" ", "_"): text for label, text in rows.items()}
        _log.info("ready", extra={"fields": {"message": "ready", "url": url, **fields}})
        return
    for label, text in rows.items():
        table.add_row(f"[bold]{label}[/]", escape(text))
    console.print(table)
    needs_key = bool(config.api_keys or config.api_key_file or config.tenants)
    curl = curl_line(url, name, needs_key, chats=loaded.tokenizer.chat_problem is None)
    console.print(f"\nTry it:\n{curl}", soft_wrap=True, highlight=False, markup=False)


def _tiers_line(config: TierSettings) -> str:
    from emberkv.serving.engine_setup import tier_specs  # noqa: PLC0415 - imports PyTorch, which takes seconds

    return ", ".join(map(str, tier_specs(config))) or "none below the pool"


def context_line(geometry: "ModelGeometry", pool_tokens: int) -> str:
    """The most tokens that a prompt and its answer may have, and what limits them below the model's own context."""
    if pool_tokens <= geometry.context_length:
        return f"{pool_tokens:,} tokens: all that the KV pool holds, of the model's {geometry.context_length:,}"
    if geometry.context_length < geometry.stated_context:
        longest = f"{geometry.context_length:,} tokens, of the model's {geometry.stated_context:,}"
        return f"{longest}: beyond these, its RoPE rotates all positions otherwise"
    return f"{geometry.context_length:,} tokens"


def curl_line(url: str, name: str, needs_key: bool, *, chats: bool) -> str:
    """A request to try: a chat, or where the model answers none, a completion."""
    text = "What does json.dumps do?"
    asked: dict[str, object] = {"messages": [{"role": "user", "content": text}]} if chats else {"prompt": text}
    body = {"model": name, **asked, "max_tokens": 64, "temperature": 0.3}
    path = "chat/completions" if chats else "completions"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    return f"curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


T = TypeVar("T")


DEMO_MODEL_NAME = "emberkv-demo"


class Startup:
    """Loads the model on a thread of its own, then warms it and lets requests in."""

    def __init__(
        self,
        config: ServeConfig,
        lifecycle: Lifecycle,
        server: HttpServer,
        tenants: Tenants,
        canonical: CanonicalRules | None,
    ) -> None:
        self._config = config
        self._tenants = tenants
        self._canonical = canonical
        self._system_prompts = configured_prompts(config)
        self._warmup_requests = read_warmup_requests(config.warmup_requests if config.warmup else ())
        self._lifecycle = lifecycle
        self._server = server
        self._engine: AssembledEngine | None = None
        self._warmup: Warmup | None = None
        self._ledger_store = LedgerStore(Ledger())
        self._failure: Exception | None = None
        self.thread = threading.Thread(target=self._run, name="emberkv-startup", daemon=True)

    def begin(self) -> None:
        """Load the model now, or with --model-on-demand when it is first needed."""
        if self._config.model_on_demand:
            self._lifecycle.on_demand(self)
            _log.info("listening  %s  (the model is loaded when a request first needs it)", self._server.url)
        else:
            self.thread.start()

    def finish(self) -> None:
        """Stop the warmup and the engine; raise what kept it from starting."""
        if self._warmup is not None:
            self._warmup.close()
        if self.thread.ident is not None:
            self.thread.join(timeout=0 if self._failure is None and self._engine is None else None)
        if self._engine is not None:
            self._engine.close()
        if self._failure is not None:
            raise self._failure

    def load(self) -> None:
        """Load the model and let requests in. Raises EmberError for a model that cannot be loaded."""
        self._serve()

    def unload(self) -> None:
        """Stop the engine and free what it and the model hold."""
        if self._warmup is not None:
            self._warmup.close()
        if self._engine is not None:
            self._engine.close()
        self._warmup = self._engine = None
        self._ledger_store = LedgerStore(Ledger())
        gc.unfreeze()
        gc.collect()
        _log.info("the model is unloaded")

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            loaded, engine, warmup, name = self._serve()
        except Exception as error:  # noqa: BLE001 - carried over to the main thread, which raises it
            self._failure = error
            self._lifecycle.failed(str(error))
            self._server.stop()
            return
        warmup.first_pass_ended.wait()
        is_ready = self._lifecycle.phase is ServerPhase.READY
        ready = f"{time.perf_counter() - began:.1f} s" if is_ready else "more time: see /ready"
        print_summary(self._server.url, name, loaded, engine, self._config, ready)

    def _serve(self) -> "tuple[ModelOnDevice, AssembledEngine, Warmup, str]":
        """Load the model, start its engine and begin to warm it. Returns these and the model's name."""
        with freed_memory_returned(), gc_frozen():
            loaded, engine, warmup = _on_a_thread_that_ends(self._load)
        self._warmup = warmup
        self._engine = engine
        own_name = DEMO_MODEL_NAME if self._config.model is None else loaded.name
        names, patterns = model_names(self._config.served_names, own_name, strict=self._config.strict_names)
        name = names[0]
        cache = cache_service(
            engine,
            self._ledger_store,
            name=name,
            folder=self._config.cache_dir,
            background=self._lifecycle.background,
            warmup=warmup,
        )
        engine.loop.start()
        output_format = chosen_output_format(loaded.tokenizer, self._config.tool_parser, self._config.reasoning_parser)
        reasons = output_format.reasoning is not None
        model = ServedModel(
            names,
            int(time.time()),
            engine.loop,
            loaded.tokenizer,
            warmup,
            cache,
            engine.public,
            {
                "dtype": str(loaded.dtypes),
                "device": str(loaded.device),
                "kernels": engine.executor.backend,
            },
            loaded.sampling_defaults,
            dims=_dims(loaded),
            assembled=engine,
            output_format=output_format,
            rewrites_turns=rewrites_turns(loaded.tokenizer, reasons=reasons),
            takes_borders=engine.scheduler.cache.takes_borders,
            fingerprint=loaded.fingerprint,
            on_overflow=self._config.on_overflow,
            name_patterns=patterns,
        )
        for warning in agent_warnings(loaded.tokenizer, engine.loop.max_prompt_tokens, reasons=reasons):
            _log.warning("%s", warning)
        self._lifecycle.loaded(model, warming=True)
        warmup.start()
        return loaded, engine, warmup, name

    def _load(self) -> "tuple[ModelOnDevice, AssembledEngine, Warmup]":
        config = self._config
        if config.kernels != "torch":
            _let_torch_threads_sleep()
        with stages("importing PyTorch") as stage:
            try:
                from emberkv.engine.torch.model.checkpoint import local_model  # noqa: PLC0415 - of the torch extra

                if config.model is not None:
                    local_model(config.model)  # refuses a wrong path before the seconds that the next line takes
                from emberkv.engine.torch import assembly  # noqa: PLC0415 - takes seconds, which show
                from emberkv.serving import engine_setup  # noqa: PLC0415 - as above
            except ModuleNotFoundError as error:
                raise ConfigError(
                    f"serving needs the torch extra ({error.name} is missing): pip install '.[torch]' in "
                    "emberkv's folder"
                ) from error
            sizes = engine_setup.cache_sizes(config)
            loaded, kernels = assembly.load_configured(
                engine_setup.model_options(config),
                sizes,
                stage,
                shows_downloads=console.is_terminal and not console.quiet,
            )
            prompts, problems = standard_prompts(self._system_prompts, loaded.tokenizer, self._canonical)
            of_requests, refused = request_prompts(self._warmup_requests, loaded.tokenizer, self._canonical)
            prompts, problems = [*prompts, *of_requests], [*problems, *refused]
            public = public_tokens(self._tenants.public_prefixes, loaded.tokenizer, self._canonical)
            cache_bytes = sizes.pool_bytes(loaded)
            tiers = engine_setup.tier_config(config, {tier: self._tenants.shares(tier) for tier in SHARED_OUT})
            engine = assembly.assemble(
                loaded,
                engine_setup.engine_config(config, cache_bytes, tiers, self._tenants.weights),
                kernels=kernels,
                public_prefixes=[*(prompt.tokens for prompt in prompts), *public],
                on_crash=lambda error: self._lifecycle.failed(f"the engine stopped: {type(error).__name__}"),
                progress=stage,
            )
        warmup = make_warmup(
            config,
            engine,
            self._tenants,
            prompts,
            problems,
            on_ready=self._lifecycle.warmed,
            background=self._lifecycle.background,
        )
        return loaded, engine, warmup


def _dims(loaded: "ModelOnDevice") -> ModelDims:
    """What the model's listing says of its shape."""
    shape = loaded.geometry
    return ModelDims(shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim, _weight_bytes(loaded))


def _weight_bytes(loaded: "ModelOnDevice") -> int:
    from emberkv.engine.torch.assembly import resident_bytes  # noqa: PLC0415 - imports PyTorch, which takes seconds

    return resident_bytes(loaded.model)


@contextmanager
def gc_frozen() -> Iterator[None]:
    """The garbage collector leaves alone what is made within: libraries and model are hundreds of thousands of objects,
    and each search through them stops all threads for a quarter of a second.
    """
    gc.disable()
    try:
        yield
        gc.collect()
        gc.freeze()
    finally:
        gc.enable()


def _let_torch_threads_sleep() -> None:
    """Have PyTorch's OpenMP threads spin for microseconds only after an operation, when the kernels' own threads need
    the cores. GNU's OpenMP reads this when PyTorch is imported; what the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _on_a_thread_that_ends(work: Callable[[], T]) -> T:
    """The OpenMP threads of a thread that used torch and lives on slow down every step of the engine's."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - carried over to the thread that waits for the result
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="emberkv-load", daemon=True)
    thread.start()
    thread.join()
    return outcome.result()

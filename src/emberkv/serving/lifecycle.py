"""The state of a server: loading, warming, ready, draining or failed; its model, and the answers that are running."""

import asyncio
import logging
import re
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

from emberkv.core.hashing import PublicPrefixes
from emberkv.engine.assembly import AssembledEngine
from emberkv.engine.request import Engine, EngineStats, SamplingParams
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.errors import EmberError, EngineStoppedError, PromptTooLongError, RequestError
from emberkv.serving.answers.answer_memory import AnswerMemory
from emberkv.serving.background import Background
from emberkv.serving.cache.ledger_store import ReuseWatch
from emberkv.serving.cache.service import CacheService
from emberkv.serving.errors import ModelNotLoadedError, NotReadyError, UnknownModelError
from emberkv.serving.parsing.formats import OutputFormat, chosen_format
from emberkv.serving.warmup.warmup import Warmup, WarmupPhase, WarmupReport

_log = logging.getLogger(__name__)

COUNTED_CONTEXTS = 8

UNLOAD_SECONDS = 60.0
"""How long running answers may take to finish when the model is to be unloaded."""


class ServerPhase(Enum):
    IDLE = "idle"  # no model is loaded, and the next request loads it
    UNLOADING = "unloading"
    LOADING = "loading"
    WARMING = "warming"  # requests are answered, but the server is not ready: prompts are being warmed
    READY = "ready"
    DRAINING = "draining"  # running answers may finish, new ones are refused
    FAILED = "failed"  # the model could not be loaded


@dataclass(frozen=True, slots=True)
class ModelDims:
    """A model's size: attention layers, heads of queries and of keys, elements a head, and bytes of its weights.

    Heads are those of the first layer, where layers differ in them. Where K and V differ in head size, it is the
    larger one, to which the pool pads the other.
    """

    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    weight_bytes: int = 0


class ModelHost(Protocol):
    """Loads and unloads a server's model. Both block, and neither is called while the other runs."""

    def load(self) -> None:
        """Ends with `Lifecycle.loaded`. Raises EmberError for a model that cannot be loaded."""
        ...

    def unload(self) -> None:
        """Stop the engine and free its memory."""
        ...


AGENT_MODEL_NAMES = ("claude-*", "gpt-*", "chatgpt-*", "codex-*", "o1*", "o3*", "o4*")
"""Names by which coding agents ask for their vendors' models. Agents send such names beside the configured model, for
titles and for subagents.
"""
OPEN_MODEL_NAMES = ("gpt-oss*",)
"""Models that anyone can serve: a request for one of them means that model, whatever `AGENT_MODEL_NAMES` match."""
MOST_LOGGED_NAMES = 100


class NamePatterns:
    """Further names for a model, in which ``*`` stands for any characters and every other character for itself.

    The first use of each name is logged.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self.patterns = tuple(patterns)
        self._seen: set[str] = set()

    def match(self, name: str) -> bool:
        plain = without_provider(name)
        patterns: Iterable[str] = self.patterns
        if _matches_any(plain, OPEN_MODEL_NAMES):
            patterns = [pattern for pattern in patterns if pattern not in AGENT_MODEL_NAMES]
        if not (_matches_any(name, patterns) or _matches_any(plain, patterns)):
            return False
        if name not in self._seen and len(self._seen) < MOST_LOGGED_NAMES:
            self._seen.add(name)
            _log.info("requests for the model %.100r are answered by the model served here", name)
        return True


def _matches_any(name: str, patterns: Iterable[str]) -> bool:
    escaped = (re.sub(r"[?\[]", r"[\g<0>]", pattern) for pattern in patterns)
    return any(fnmatchcase(name, pattern) for pattern in escaped)


def without_provider(name: str) -> str:
    """A model's name without what LiteLLM and other clients put before it: ``openai/NAME`` is NAME."""
    provider, slash, rest = name.partition("/")
    return rest if slash and provider in ("openai", "anthropic", "hosted_vllm") else name


def model_names(served: Sequence[str], own_name: str, *, strict: bool) -> tuple[tuple[str, ...], NamePatterns]:
    """The names of a model, and the patterns of further ones. served: names and patterns that an operator gave.

    strict: coding agents' names for other models are not among the patterns.
    """
    names = [name for name in served if "*" not in name]
    patterns = [name for name in served if "*" in name]
    return tuple(dict.fromkeys([*names, own_name])), NamePatterns([*patterns, *(() if strict else AGENT_MODEL_NAMES)])


FirstDifference = Callable[[str], Awaitable[int | None]]
"""Where the prompt of a request, by its id in the engine, first differed from what was cached; None if it did not, or
if too little was missed for that.
"""


class AnsweringWorkers(Protocol):
    """The workers of a gateway that have answered requests, at which the next prompts can be computed."""

    def worker_of(self, request_id: str) -> str:
        """The worker that has answered a request, and has its blocks; "" where that is not known."""
        ...

    def epoch_of(self, worker_id: str) -> bytes | None:
        """Another one after each start of a worker, which has lost its blocks then; None while it is not up."""
        ...

    def free_tokens(self, worker_id: str) -> int | None:
        """What the pool of a worker that has nothing to do holds beside its running requests; None where the worker is
        not up or has something to do.
        """
        ...


@dataclass(frozen=True)
class ServedModel:
    """A model that can be served.

    names: what it is called; the first is its usual name. name_patterns: what else requests may call it. created: when
    it was loaded, in seconds since 1970. warmup: what keeps its prompts warm; None: nothing does. cache: what it has
    cached; None where that is not looked into. public: the prefixes that all tenants share. about: how it is computed,
    as short words by name ("dtype": "bfloat16"), for metrics. sampling_defaults: the model's, for what requests do not
    set. dims: its size, for routes that report what is loaded. headers: further headers of the answer to a request, by
    the request's id in the engine. assembled: the engine with its parts, where it is in this process. fingerprint: of
    weights and config. on_overflow: whether a ``max_tokens`` that, with the prompt, exceeds the context is clipped to
    the rest of it, or refused. output_format: how it writes reasoning and tool calls. answer_memory: a tenant's
    answers, where they are remembered. rewrites_turns: whether the user's next question makes its chat template render
    earlier turns in another way. takes_borders: whether the engine leaves checkpoints at a prompt's borders.
    first_difference: of requests that a worker answers. answering_workers: at which their next prompts are computed;
    both are None of a model in this process.
    """

    names: tuple[str, ...]
    created: int
    engine: Engine
    tokenizer: Tokenizer
    warmup: Warmup | None = None
    cache: CacheService | None = None
    public: PublicPrefixes | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    sampling_defaults: SamplingParams = field(default_factory=SamplingParams)
    headers: Callable[[str], Mapping[str, str]] = lambda _: {}
    assembled: AssembledEngine | None = None
    fingerprint: str = ""
    dims: ModelDims = field(default_factory=ModelDims)
    on_overflow: Literal["clip", "refuse"] = "clip"
    name_patterns: NamePatterns = field(default_factory=NamePatterns)
    output_format: OutputFormat = field(default_factory=OutputFormat)
    answer_memory: AnswerMemory | None = None
    rewrites_turns: bool = False
    takes_borders: bool = False
    first_difference: FirstDifference | None = None
    answering_workers: AnsweringWorkers | None = None

    def seen_by(self, tenant: str, memory: AnswerMemory | None = None) -> "ServedModel":
        """The model as a tenant sees it: nothing is faster because another has sent it. memory: of all tenants."""
        return replace(
            self,
            tokenizer=self.tokenizer.remembering_for(tenant),
            answer_memory=None if memory is None else memory.of(tenant),
        )

    @property
    def countable_tokens(self) -> int:
        """The longest prompt that is encoded for questions about prompts, which need not fit the model."""
        return COUNTED_CONTEXTS * self.engine.max_prompt_tokens

    def check_name(self, name: str) -> None:
        """Raises UnknownModelError for a name that is not this model's."""
        if not (name in self.names or without_provider(name) in self.names or self.name_patterns.match(name)):
            served = ", ".join(repr(known) for known in self.names)
            raise UnknownModelError(f"model is {name!r}; this server has {served}", param="model")


def chosen_output_format(tokenizer: Tokenizer, tool_parser: str, reasoning_parser: str) -> OutputFormat:
    """How the model writes thoughts and tool calls: the formats of these names, "auto" being by its chat templates.

    Raises ConfigError for an unknown name.
    """
    templates = tokenizer.description["chat_template"]
    text = "\n".join(templates.values()) if isinstance(templates, Mapping) else templates
    return chosen_format(text, tool_parser, reasoning_parser)


class RunningAnswer(Protocol):
    """An answer that is being made, which a shutdown waits for."""

    def interrupt(self, error: EmberError) -> None:
        """End it early, with ``error`` for its client."""
        ...


class Lifecycle:
    """The server's state. Model and phase may be set from the thread that loads the model."""

    def __init__(self) -> None:
        self.background = Background()
        self.phase = ServerPhase.LOADING
        self.detail = "the model is being loaded"
        self._model: ServedModel | None = None
        self._host: ModelHost | None = None
        self.wake: Callable[[], Awaitable[None]] | None = None
        """Has workers load their models, where they do that on demand; for a gateway."""
        self.on_unload: list[Callable[[], None]] = []
        """Are called when the model is gone, for those that keep what was made for it."""
        self._switching = asyncio.Lock()
        self._running: set[RunningAnswer] = set()
        self._tracked: set[RunningAnswer] = set()  # those, and answers that are being sent
        self.drained = asyncio.Event()
        """Set once a server that shuts down has ended all answers."""
        self._idle = asyncio.Event()
        self._idle.set()

    def loaded(self, model: ServedModel, *, warming: bool = False) -> None:
        """The model can be used from now on. warming: readiness waits for `warmed`."""
        self._model = model
        if self.phase is ServerPhase.LOADING and warming:
            self.phase, self.detail = ServerPhase.WARMING, "the model is loaded; prompts are being warmed"
        elif self.phase is ServerPhase.LOADING:
            self._ready(model.names[0])

    def warmed(self) -> None:
        """Readiness waits no longer."""
        if self.phase is ServerPhase.WARMING:
            self._ready(self.model().names[0])

    def _ready(self, served: str) -> None:
        self.phase, self.detail = ServerPhase.READY, f"serving {served}"

    def has_workers(self, is_up: bool, served: str = "", *, is_idle: bool = False) -> None:
        """Whether there is anything that answers, where that is elsewhere and comes and goes.

        served: what it answers for, where no model is loaded here. is_idle: whether there is something that would load
        its model on demand.
        """
        if self.phase not in (ServerPhase.IDLE, ServerPhase.LOADING, ServerPhase.WARMING, ServerPhase.READY):
            return
        if is_up and self.phase in (ServerPhase.IDLE, ServerPhase.LOADING) and (self._model is not None or served):
            self._ready(served if self._model is None else self._model.names[0])
        elif not is_up and is_idle:
            self._idle_without_model()
        elif not is_up and self.phase is not ServerPhase.LOADING:
            self.phase, self.detail = ServerPhase.LOADING, "no worker is up"

    def failed(self, reason: str) -> None:
        """The model cannot be loaded."""
        self.phase, self.detail = ServerPhase.FAILED, reason

    def on_demand(self, host: ModelHost) -> None:
        """The server begins without a model: the first request that needs one has ``host`` load it."""
        self._host = host
        self._idle_without_model()

    def _idle_without_model(self, problem: str = "") -> None:
        self.phase = ServerPhase.IDLE
        self.detail = f"no model is loaded; the next request loads it{problem}"

    async def ensure_model(self) -> None:
        """Have the model loaded on demand; at once where it is loaded, or is not loaded on demand. Others may wait for
        the same model. Raises what `ModelHost.load` raises.
        """
        if self._host is not None and (self._model is None or self.phase is ServerPhase.UNLOADING):
            await _to_the_end(self._load(self._host))
        elif self.wake is not None and self.phase in (ServerPhase.IDLE, ServerPhase.LOADING):
            await self.wake()

    async def unload_model(self) -> None:
        """Let running answers finish, for `UNLOAD_SECONDS` at most, and have the model unloaded.

        Raises RequestError where it would not be loaded again on demand.
        """
        if self._host is None:
            raise RequestError("the model stays loaded for as long as the server runs; start it with --model-on-demand")
        await _to_the_end(self._unload(self._host))

    async def _load(self, host: ModelHost) -> None:
        async with self._switching:
            if self.phase is not ServerPhase.IDLE:
                return
            self.phase, self.detail = ServerPhase.LOADING, "the model is being loaded"
            try:
                await _on_a_thread(host.load)
            except Exception as error:
                if self.phase is ServerPhase.LOADING:
                    self._idle_without_model(f" (it failed before: {error})")
                raise

    async def _unload(self, host: ModelHost) -> None:
        async with self._switching:
            if self._model is None or self.phase not in (ServerPhase.WARMING, ServerPhase.READY):
                return
            self.phase, self.detail = ServerPhase.UNLOADING, "the model is being unloaded"
            await self._wait_idle(UNLOAD_SECONDS)
            self.interrupt_answers()
            await self._wait_idle(5.0)
            self._model = None
            for forget in self.on_unload:
                forget()
            await _on_a_thread(host.unload)
            if self.phase is ServerPhase.UNLOADING:
                self._idle_without_model()

    @property
    def has_model(self) -> bool:
        return self._model is not None

    def model(self) -> ServedModel:
        """Raises NotReadyError before the model is loaded."""
        if self._model is None:
            kind = ModelNotLoadedError if self.phase is ServerPhase.IDLE else NotReadyError
            raise kind(f"the server cannot answer yet: {self.detail}")
        return self._model

    def engine_stats(self) -> EngineStats | None:
        return None if self._model is None else self._model.engine.stats()

    def about(self) -> Mapping[str, str]:
        """The model's name and how it is computed; empty before there is one."""
        return {} if self._model is None else {"model": self._model.names[0], **self._model.about}

    def weight_bytes(self) -> int:
        return 0 if self._model is None else self._model.dims.weight_bytes

    def tokenizer_cache_bytes(self) -> int:
        return 0 if self._model is None else self._model.tokenizer.cache_bytes

    def warmup_report(self) -> WarmupReport:
        if self._model is None:
            return WarmupReport(WarmupPhase.WAITING)
        return WarmupReport(WarmupPhase.OFF) if self._model.warmup is None else self._model.warmup.report()

    def reuse(self) -> ReuseWatch | None:
        cache = None if self._model is None else self._model.cache
        return None if cache is None else cache.reuse

    def check_accepting(self) -> None:
        """Raises NotReadyError unless new answers may be started."""
        if self.phase not in (ServerPhase.WARMING, ServerPhase.READY):
            raise NotReadyError(f"the server takes no new requests: {self.detail}")

    @property
    def running(self) -> int:
        """Requests whose answers are being made."""
        return len(self._running)

    @property
    def tracked(self) -> int:
        """Requests whose answers are being made or sent."""
        return len(self._tracked)

    def track(self, stream: RunningAnswer) -> None:
        """The answers to a request have begun; a shutdown waits until they are untracked."""
        self._running.add(stream)
        self._tracked.add(stream)
        self._idle.clear()

    def finished(self, stream: RunningAnswer) -> None:
        """The answers are made, and their last part is yet to be sent."""
        self._running.discard(stream)

    def untrack(self, stream: RunningAnswer) -> None:
        """The answers are sent, or given up."""
        self._running.discard(stream)
        self._tracked.discard(stream)
        if not self._tracked:
            self._idle.set()

    async def drain(self, seconds: float, *, grace: float = 5.0) -> None:
        """Refuse new answers, wait up to ``seconds`` for the running ones, then interrupt the rest.

        Interrupted answers end with their API's error event; ``grace`` seconds are theirs to send it.
        """
        self.phase, self.detail = ServerPhase.DRAINING, "the server is shutting down"
        await self._wait_idle(seconds)
        self.interrupt_answers()
        await self._wait_idle(grace)
        self.drained.set()

    def interrupt_answers(self) -> None:
        """End the running answers now."""
        for stream in tuple(self._tracked):
            stream.interrupt(EngineStoppedError("the server shut down before the answer was finished"))

    async def _wait_idle(self, seconds: float) -> None:
        waiter = asyncio.create_task(self._idle.wait())
        await asyncio.wait((waiter,), timeout=seconds)
        waiter.cancel()


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work``, which goes on even if the waiting is cancelled."""
    await asyncio.shield(asyncio.create_task(work))


async def _on_a_thread(work: Callable[[], None]) -> None:
    """Await ``work`` on a thread that does not keep the process from exiting."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:  # noqa: BLE001 - carried over to the one that awaits it
            done.set_exception(error)

    threading.Thread(target=run, name="emberkv-model", daemon=True).start()
    await asyncio.wrap_future(done)


@dataclass(frozen=True, slots=True)
class AnswerBudget:
    """tokens: the most that an answer may have. is_clipped: the request asked for more than fits."""

    tokens: int
    is_clipped: bool = False


def answer_budget(
    model: ServedModel, prompt_tokens: int, wanted: int | None, *, field: str = "max_tokens"
) -> AnswerBudget:
    """How many tokens an answer may have: as many as are ``wanted`` by the request's ``field``, as far as they fit.

    Raises PromptTooLongError for a prompt that does not fit, and where the model refuses what does not fit, for more
    tokens than do; RequestError for a prompt that is empty.
    """
    engine = model.engine
    if prompt_tokens == 0:
        raise RequestError("the prompt is empty; it must have at least one token", param="prompt")
    if prompt_tokens > engine.max_prompt_tokens:
        raise PromptTooLongError(
            f"the prompt has {prompt_tokens} tokens; at most {engine.max_prompt_tokens} are accepted",
            prompt_tokens=prompt_tokens,
            limit=engine.max_prompt_tokens,
        )
    remaining = engine.context_length - prompt_tokens
    if wanted is None or wanted <= remaining:
        return AnswerBudget(remaining if wanted is None else wanted)
    if model.on_overflow == "clip":
        return AnswerBudget(remaining, is_clipped=True)
    raise PromptTooLongError(
        f"{field} is {wanted}; after a prompt of {prompt_tokens} tokens, the context of {engine.context_length} tokens "
        f"has at most {remaining} left",
        param=field,
        prompt_tokens=prompt_tokens,
        wanted=wanted,
        limit=engine.context_length,
    )

"""Keeps prompts warm: before the server is ready, and again whenever their blocks have left the pool."""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from emberkv.config import ServeConfig
from emberkv.core.events import POOL, AllBlocksCleared, BlockRemoved
from emberkv.core.hashing import PUBLIC_OWNER, BlockHash, Chain
from emberkv.core.sequence import BACKGROUND_PRIORITY
from emberkv.engine.commands import CachedTokens, Command, Retain, Unretain
from emberkv.engine.loop import CacheUpdate
from emberkv.engine.request import GenerationRequest, OutputListener, SamplingParams
from emberkv.errors import EmberError, EngineStoppedError
from emberkv.serving.background import Background
from emberkv.serving.tenancy import Tenants
from emberkv.serving.warmup.learned_prompts import LearnedPrompts
from emberkv.serving.warmup.warm_prompt import (
    PinnedPrompt,
    Pins,
    WarmEngine,
    Warming,
    WarmPrompt,
    WarmupOutcome,
    kept_hashes,
    warm,
)
from emberkv.tiers.base import RemovalResult

if TYPE_CHECKING:
    from emberkv.engine.loop import EngineLoop
if TYPE_CHECKING:
    from emberkv.engine.assembly import AssembledEngine


class WarmupPhase(Enum):
    WAITING = "waiting"  # the model is not loaded yet
    OFF = "off"
    RUNNING = "running"  # the first pass over all prompts
    DONE = "done"  # it has warmed them all
    TIMED_OUT = "timed_out"  # it has not, for lack of time
    FAILED = "failed"  # it has not, for another reason


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """``phase`` is the first pass's; all else is of now.

    prompts: pinned ones, and those that could not become one. tokens: of the pinned ones, those that were cached when
    last looked at. problems: why prompts are not warm. learned, restored: prompts that an earlier run has written down,
    and those of them that the first pass has made warm. computed_tokens, seconds, timeouts: totals since the start.
    """

    phase: WarmupPhase
    required: bool = False
    prompts: int = 0
    warm_prompts: int = 0
    tokens: int = 0
    problems: tuple[str, ...] = ()
    learned: int = 0
    restored: int = 0
    computed_tokens: int = 0
    seconds: float = 0.0
    timeouts: int = 0

    @property
    def is_warm(self) -> bool:
        return self.warm_prompts == self.prompts

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "phase": self.phase.value, "seconds": round(self.seconds, 3)}

    def __str__(self) -> str:
        text = (
            f"{self.phase.value.replace('_', ' ')}: {self.warm_prompts} of {self.prompts} prompts warm, "
            f"{self.tokens:,} tokens, {self.seconds:.1f} s"
        )
        return f"{text}; {self.restored} of {self.learned} learned prompts restored" if self.learned else text


_CLOSE_SECONDS = 5.0
_ID_PREFIX = "warmup-"
"""Begins the ids of the requests that warm prompts."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WarmupOptions:
    """enabled: False warms only what is pinned later on. timeout: seconds that one pass over prompts may take.

    required: readiness waits until each prompt that was there at the start is warm, not only for the first pass.
    unit: see `PrefixCache.kept_unit`. block_size: tokens. rewarm_seconds: least time from one try to warm a prompt to
    the next, and how often a prompt is looked at that ends in a partial block.
    """

    enabled: bool = True
    timeout: float = 60.0
    required: bool = False
    unit: int = 1
    block_size: int = 1
    rewarm_seconds: float = 30.0


class Warmup:
    """Warms prompts on a thread of its own: pinned ones always, learned ones once, at the start, in the time left over.

    prompts: pinned from the start. problems: why others that were wished for are no prompts; they are never warm, nor
    are prompts shorter than ``settings.unit``.
    on_ready: called once, when readiness waits no longer: after the first pass, however it went, or with
    ``settings.required`` when all of ``prompts`` are warm. clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: WarmEngine,
        settings: WarmupOptions,
        prompts: Sequence[WarmPrompt] = (),
        *,
        problems: Sequence[str] = (),
        learned: LearnedPrompts | None = None,
        on_ready: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.first_pass_ended = threading.Event()
        self._engine = engine
        self._settings = settings
        self._learned = learned
        self._on_ready = on_ready
        self._clock = clock
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._removed = threading.Event()
        self._request_id = ""
        self._pins = Pins(settings.unit, settings.block_size)
        short = [prompt for prompt in prompts if not self._pins.add(prompt.tokens, prompt.tenant)]
        self._problems = (*problems, *(_too_short(prompt, settings.unit) for prompt in short))
        self._awaited = list(self._pins)
        self._totals = WarmupReport(WarmupPhase.RUNNING if settings.enabled else WarmupPhase.OFF, settings.required)
        self._is_ready = False
        self._thread = threading.Thread(target=self._run, name="emberkv-warmup", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop warming, and write down what was learned. Idempotent."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._engine.abort(self._request_id)
            self._thread.join(_CLOSE_SECONDS)
        if self._learned is not None:
            saving = threading.Thread(target=self._learned.save, name="emberkv-learned", daemon=True)
            saving.start()
            saving.join(_CLOSE_SECONDS)  # a disk that does not answer must not keep the server from ending

    def forget(self, block_hashes: Collection[BlockHash] | None) -> RemovalResult:
        """The operator removes these blocks, all for None: learned prompts with them go, in memory and on disk, and so
        do the pins of prompts that end in one of them. What is being warmed ends, and no learned prompt is restored any
        more by this process. Returns how many prefixes were learned.
        """
        self._removed.set()
        self._engine.abort(self._request_id)
        for pin in self._pins if block_hashes is not None else ():
            if pin not in self._awaited and pin.last is not None and pin.last in (block_hashes or ()):
                self._pins.remove(pin.prompt.tokens, pin.prompt.tenant)
        return self._learned.forget(block_hashes) if self._learned is not None else RemovalResult()

    def pin(self, tokens: Iterable[int], tenant: str = "") -> int:
        """Keep ``tokens`` warm for ``tenant`` from now on; how many of them, hits being rounded down."""
        count = self._pins.add(tokens, tenant)
        self._wake.set()
        return count

    def unpin(self, tokens: Iterable[int], tenant: str = "") -> bool:
        """Whether ``tokens`` were pinned for ``tenant``. What is cached stays until its blocks are needed.

        Raises EngineStoppedError.
        """
        pin = self._pins.remove(tokens, tenant)
        if pin is not None:
            self._engine.unretain(pin.block_hashes)
        return pin is not None

    def pins(self) -> list[WarmPrompt]:
        return [pin.prompt for pin in self._pins]

    def on_update(self, update: CacheUpdate) -> None:
        """What has changed in the cache: for `EngineLoop.on_update`."""
        if self._learned is not None:
            for sequence in update.admitted:
                if sequence.priority < BACKGROUND_PRIORITY:
                    self._learned.used(sequence.chain, sequence.cached_tokens)
        events = [event for event in update.events if event.tier == POOL]
        cleared = update.missed or any(isinstance(event, AllBlocksCleared) for event in events)
        removed = [lost for event in events if isinstance(event, BlockRemoved) for lost in event.block_hashes]
        self.pool_lost(None if cleared else removed)

    def pool_lost(self, block_hashes: Collection[BlockHash] | None) -> None:
        """Blocks have left the pool; None: it is unknown which. From any thread; returns at once."""
        if self._pins.lost(block_hashes):
            self._wake.set()

    def report(self) -> WarmupReport:
        """From any thread."""
        pins = list(self._pins)
        found = [f"prompt {n}: {pin.warming.problem}" for n, pin in enumerate(pins, 1) if pin.warming.problem]
        return replace(
            self._totals,
            prompts=len(pins) + len(self._problems),
            warm_prompts=sum(pin.is_warm for pin in pins),
            tokens=sum(pin.warming.cached for pin in pins),
            problems=(*self._problems, *found),
        )

    def tick(self) -> float | None:
        """Warm the pinned prompts that are due and save what was learned; the seconds until anything will be due."""
        self._wake.clear()
        now = self._clock()
        due = [pin for pin in self._pins.pending() if pin.due_at <= now]
        if due:
            self._warm_pins(due, now + self._settings.timeout)
            self._tell_if_ready()
        waits = [pin.due_at - self._clock() for pin in self._pins.pending()]
        if self._learned is not None:
            waits.append(self._learned.save_when_due())
        return max(0.0, min(waits)) if waits else None

    def _run(self) -> None:
        try:
            if self._settings.enabled:
                self._first_pass()
            self._tell_if_ready()
            self.first_pass_ended.set()
            while not self._closing.is_set():
                self._wake.wait(self.tick())
        except Exception:  # noqa: BLE001 - a server without a warmup is slower at first, and must go on
            _log.exception("warming has stopped; the server goes on without")
            self._totals = replace(self._totals, phase=WarmupPhase.FAILED)
        finally:
            self._tell_if_ready()
            self.first_pass_ended.set()

    def _first_pass(self) -> None:
        deadline = self._clock() + self._settings.timeout
        outcomes = self._warm_pins(self._pins, deadline)
        outcomes |= self._restore(deadline)
        if WarmupOutcome.TIMED_OUT in outcomes:
            phase = WarmupPhase.TIMED_OUT
        else:
            phase = WarmupPhase.FAILED if self._problems or outcomes - {WarmupOutcome.WARM} else WarmupPhase.DONE
        self._totals = replace(self._totals, phase=phase)
        report = self.report()
        _log.log(logging.INFO if phase is WarmupPhase.DONE else logging.WARNING, "warmup %s", report)
        for problem in report.problems:
            _log.warning("warmup, %s", problem)

    def _warm_pins(self, pins: Iterable[PinnedPrompt], deadline: float) -> set[WarmupOutcome]:
        outcomes = set()
        for pin in pins:
            warming = self._warm(pin.prompt, deadline, pin)
            self._pins.end(pin, warming, due_at=self._clock() + self._settings.rewarm_seconds)
            outcomes.add(warming.outcome)
        return outcomes

    def _restore(self, deadline: float) -> set[WarmupOutcome]:
        """Warm the prompts that an earlier run has learned, the best first, while there are time and empty blocks."""
        learned = self._learned.restore() if self._learned is not None else []
        prompts = [prompt for prompt in dict.fromkeys(map(self._pins.rounded, learned)) if prompt.tokens]
        self._totals = replace(self._totals, learned=len(prompts))
        for prompt in prompts:
            if self._removed.is_set():
                break
            if len(prompt.tokens) > self._engine.room():
                continue
            outcome = self._warm(prompt, deadline).outcome
            if outcome in (WarmupOutcome.TIMED_OUT, WarmupOutcome.FAILED):
                return {outcome}
            self._totals = replace(self._totals, restored=self._totals.restored + (outcome is WarmupOutcome.WARM))
        return set()

    def _warm(self, prompt: WarmPrompt, deadline: float, pin: PinnedPrompt | None = None) -> Warming:
        began = self._clock()
        try:
            chain = self._engine.chain(prompt)
        except EmberError as error:
            return Warming(WarmupOutcome.IMPOSSIBLE, problem=str(error))
        if pin is not None:
            self._pins.begin(pin, chain)
        self._request_id = f"{_ID_PREFIX}{uuid.uuid4().hex}"
        warming = warm(
            self._engine,
            prompt,
            chain,
            self._request_id,
            lambda: self._remaining(deadline),
            keep=pin is not None,
        )
        self._totals = replace(
            self._totals,
            computed_tokens=self._totals.computed_tokens + warming.computed,
            seconds=self._totals.seconds + self._clock() - began,
            timeouts=self._totals.timeouts + (warming.outcome is WarmupOutcome.TIMED_OUT),
        )
        return warming

    def _remaining(self, deadline: float) -> float:
        return 0.0 if self._closing.is_set() else deadline - self._clock()

    def _tell_if_ready(self) -> None:
        all_warm = not self._problems and all(pin.is_warm for pin in self._awaited)
        if not self._is_ready and (all_warm or not self._settings.required or not self._settings.enabled):
            self._is_ready = True
            self._on_ready()


def _too_short(prompt: WarmPrompt, unit: int) -> str:
    return (
        f"requests with a system prompt have {len(prompt.tokens)} tokens in common, too few to be kept warm: "
        f"{unit} are reused at a time"
    )


_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
_PATIENCE_SECONDS = 30.0

R = TypeVar("R")


class EngineWarmer:
    """The `WarmEngine` over an engine's loop. The prompts of no tenant are the operator's, and unsalted.

    block_size: tokens.
    """

    def __init__(self, loop: "EngineLoop", tenants: Tenants, *, block_size: int) -> None:
        self._loop = loop
        self._tenants = tenants
        self._block_size = block_size

    def chain(self, prompt: WarmPrompt) -> Chain:
        """Raises UnknownTenantError."""
        return self._loop.chain(self._request(prompt, ""))

    def cached_tokens(self, chain: Chain) -> int:
        return self._ask(CachedTokens(chain))

    def keep(self, chain: Chain) -> None:
        self._ask(Retain(kept_hashes(chain)))

    def unretain(self, block_hashes: Iterable[BlockHash]) -> None:
        self._ask(Unretain(tuple(block_hashes)))

    def room(self) -> int:
        stats = self._loop.stats()
        return (stats.free_blocks - stats.cached_blocks) * self._block_size

    def compute(self, prompt: WarmPrompt, request_id: str, listener: OutputListener) -> None:
        self._loop.submit(self._request(prompt, request_id), listener)

    def abort(self, request_id: str) -> None:
        self._loop.abort(request_id)

    def _request(self, prompt: WarmPrompt, request_id: str) -> GenerationRequest:
        is_operators = prompt.tenant in ("", PUBLIC_OWNER)
        salt = b"" if is_operators else self._tenants.named(prompt.tenant).salt
        return GenerationRequest(
            request_id, prompt.tokens, _ONE_TOKEN, salt, priority=BACKGROUND_PRIORITY, tenant=prompt.tenant
        )

    def _ask(self, command: Command[R]) -> R:
        try:
            return self._loop.execute(command).result(_PATIENCE_SECONDS)
        except TimeoutError as error:
            raise EngineStoppedError(f"the engine gave no answer within {_PATIENCE_SECONDS:g} s") from error


def make_warmup(
    config: ServeConfig,
    engine: "AssembledEngine",
    tenants: Tenants,
    prompts: Sequence[WarmPrompt],
    problems: Sequence[str],
    *,
    on_ready: Callable[[], None],
    background: Background,
) -> Warmup:
    """The warmup of ``prompts``, which watches the engine from now on and is not started yet.

    problems: why others are no prompts. on_ready: see `Warmup`. What use teaches is kept in ``config.cache_dir``.
    Without a prefix cache nothing is warmed.
    """
    warmer = EngineWarmer(engine.loop, tenants, block_size=engine.block_size)
    settings = WarmupOptions(
        config.warmup and config.prefix_cache,
        config.warmup_timeout,
        config.warmup_required,
        engine.kept_unit,
        engine.block_size,
    )
    if not settings.enabled:
        prompts, problems = (), ()
    learned = None
    if config.cache_dir is not None:
        learned = LearnedPrompts(config.cache_dir, engine.root, warmer.chain)
    warmup = Warmup(warmer, settings, prompts, problems=problems, learned=learned, on_ready=on_ready)
    engine.loop.on_update(background.work("warmup").guarded(warmup.on_update))
    return warmup

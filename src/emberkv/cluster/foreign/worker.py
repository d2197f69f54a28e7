"""A foreign worker as a gateway knows it: what it serves, what it is assumed to have cached, and how fast it is."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from emberkv.cluster.block_index import BlockIndex
from emberkv.cluster.foreign.assumed import DEFAULT_TOKENS, DEFAULT_TTL, AssumedBlocks, Held
from emberkv.cluster.foreign.prompts import RoutedPrompt
from emberkv.cluster.membership import EXACT, Replica, WorkerStatus
from emberkv.cluster.policies import ReplicaState
from emberkv.core.events import POOL, Event
from emberkv.core.explaining.explain import explain
from emberkv.core.explaining.explanation import Explanation, Outcome
from emberkv.core.explaining.ledger import Ledger
from emberkv.errors import ConfigError, WorkerTimeoutError
from emberkv.serving.cache.ledger_store import LedgerStore

if TYPE_CHECKING:  # an extra
    from emberkv.cluster.foreign.client import ForeignClient

APPROXIMATE = "degraded: approximate"

LEARNING = 0.2
"""Weight of the latest observation in a rate."""

LEAST_TOKENS = 128
"""Prompts with fewer tokens to compute say little of the rate at which a worker computes prompts."""

TEXT_SLACK = 0.1
"""Where prompts are compared as text, cached tokens say to about this share of the prompt how much text is cached."""


@dataclass(frozen=True, slots=True)
class ForeignSpec:
    """A foreign worker as the command line names it: ``URL[,NAME=VALUE...]``.

    worker_id: what it is called; by default its address. kv_events, kv_replay: where it publishes vLLM's KV events, and
    where it sends them again. tokens: about how many its cache holds. ttl: seconds after which an unused prompt is
    assumed to have left it. api_key_file: the key that it asks for.

    >>> spec = ForeignSpec.parse("http://127.0.0.1:8000/v1,id=a,tokens=50000")
    >>> spec.url, spec.worker_id, spec.tokens
    ('http://127.0.0.1:8000', 'a', 50000)
    """

    url: str
    worker_id: str
    kv_events: str | None = None
    kv_replay: str | None = None
    tokens: int = DEFAULT_TOKENS
    ttl: float = DEFAULT_TTL
    api_key_file: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "ForeignSpec":
        """Raises ConfigError for what is none."""
        url, *settings = text.split(",")
        url = url.rstrip("/").removesuffix("/v1")
        if not re.fullmatch(r"https?://[^/\s]+(/[^\s?#]*)?", url):
            raise ConfigError(f"--foreign-worker {text!r}: begin with a URL such as http://127.0.0.1:8000")
        given: dict[str, Any] = {"worker_id": _address(url)}
        for setting in settings:
            name, _, value = setting.partition("=")
            if name not in _SETTINGS or not value:
                raise ConfigError(
                    f"--foreign-worker {text!r}: {setting!r} is no setting; use one of "
                    f"{', '.join(f'{each}=...' for each in _SETTINGS)}"
                )
            field_name, parse = _SETTINGS[name]
            try:
                given[field_name] = parse(value)
            except ValueError as error:
                raise ConfigError(f"--foreign-worker {text!r}: {name}={value}: {error}") from error
        if given.get("kv_replay") and not given.get("kv_events"):
            raise ConfigError(f"--foreign-worker {text!r}: kv-replay needs kv-events=tcp://HOST:PORT beside it")
        return cls(url, **given)


def _address(url: str) -> str:
    """Host and port. Raises ConfigError for a port that is none, and for a password, which logs would show."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"--foreign-worker {url!r}: {error}") from error
    if "@" in parts.netloc:
        address = parts.netloc.rpartition("@")[2]
        raise ConfigError(
            f"--foreign-worker {parts.scheme}://...@{address}: the URL has a user or a password, which logs and "
            "/v1/cluster would show; give a key by api-key-file=FILE"
        )
    return parts.netloc


def _endpoint(value: str) -> str:
    if not re.fullmatch(r"(tcp://[^\s:/]+:\d{1,5}|ipc://\S+)", value):
        raise ValueError("use an endpoint such as tcp://127.0.0.1:5557")
    return value


def _tokens(value: str) -> int:
    if not value.isdecimal() or not 1 <= int(value) <= 10**9:
        raise ValueError("use a number of tokens from 1 to 1000000000")
    return int(value)


def _seconds(value: str) -> float:
    if not re.fullmatch(r"\d{1,9}(\.\d+)?", value) or not float(value):
        raise ValueError("use a number of seconds above 0")
    return float(value)


def _name(value: str) -> str:
    if not re.fullmatch(r"[\w.:@-]{1,128}", value):
        raise ValueError("use up to 128 letters, digits and any of . : @ _ -")
    return value


_SETTINGS = {
    "id": ("worker_id", _name),
    "kv-events": ("kv_events", _endpoint),
    "kv-replay": ("kv_replay", _endpoint),
    "tokens": ("tokens", _tokens),
    "ttl": ("ttl", _seconds),
    "api-key-file": ("api_key_file", Path),
}


class ExactFeed(Protocol):
    """What follows a worker's own events."""

    @property
    def has_heard(self) -> bool:
        """Whether any came that can be used; from then on, what the worker has is what they say."""

    @property
    def fault(self) -> str:
        """Why the index is not exact; "" while it is."""


@dataclass(slots=True)
class Rates:
    """Means of what a worker's answers showed, the latest counting most; None before any did.

    prefill: prompt tokens a second. step: seconds from one token to the next.
    """

    prefill: float | None = None
    step: float | None = None

    def computed(self, tokens: int, seconds: float) -> None:
        if tokens >= LEAST_TOKENS and seconds > 0:
            self.prefill = _mean(self.prefill, tokens / seconds)

    def decoded(self, tokens: int, seconds: float) -> None:
        if tokens > 0 and seconds > 0:
            self.step = _mean(self.step, seconds / tokens)


def _mean(before: float | None, now: float) -> float:
    return now if before is None else before + LEARNING * (now - before)


@dataclass(slots=True, eq=False)
class Sent:
    """A request under way. held: what of its prompt was assumed to be there. found_idle: no other one was waiting there
    for its first token.
    """

    request_id: str
    prompt: RoutedPrompt
    held: Held
    at: float
    found_idle: bool
    begun_at: float | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """An answer's ``usage``. cached: None where the worker does not say it."""

    prompt: int
    completion: int
    cached: int | None


class ForeignWorker(Replica):
    """One server that speaks the OpenAI API. Belongs to the event loop.

    usual_step: seconds of a step at all workers like it, so that none looks faster for having been asked less.
    models: what it serves, by id, as its ``/v1/models`` lists them. prompt_tokens, cached_tokens: of the answers that
    said both.
    """

    def __init__(
        self,
        spec: ForeignSpec,
        client: "ForeignClient",
        index: BlockIndex | None,
        *,
        block_size: int,
        usual_step: Callable[[], float],
    ) -> None:
        super().__init__(spec.url, spec.worker_id)
        self.spec = spec
        self.client = client
        self.usual_step = usual_step
        self.models: dict[str, dict[str, Any]] = {}
        self.models_read: float | None = None
        self.rates = Rates()
        self.feed: ExactFeed | None = None
        self.ledger = LedgerStore(Ledger())
        self.prompt_tokens = self.cached_tokens = 0
        self._block_index = index
        self._assumed = AssumedBlocks(self.publish, max_blocks=max(1, spec.tokens // block_size), ttl=spec.ttl)
        self._prompts: dict[str, int] = {}  # tokens of the running requests' prompts
        self._scopes: set[asyncio.Timeout] = set()

    @property
    def index(self) -> str:
        if self.feed is None or not self.feed.has_heard:
            fault = "" if self.feed is None else self.feed.fault
            return f"{APPROXIMATE}; {fault}" if fault else APPROXIMATE
        if self.feed.fault:
            return f"degraded: {self.feed.fault}"
        return EXACT if self.status is WorkerStatus.UP else "degraded: it is not up"

    def state(self) -> ReplicaState:
        """What this gateway has sent it, and the rates that its answers showed."""
        return ReplicaState(
            load=sum(self._prompts.values()),
            up=self.status is WorkerStatus.UP,
            queued_tokens=self.unreported_tokens,
            prefill_rate=self.rates.prefill,
            step_seconds=self.usual_step(),
        )

    def as_json(self) -> dict[str, Any]:
        """What is known of it beside what is known of all workers, as ``/v1/cluster`` shows it."""
        return {
            "models": sorted(self.models),
            "assumed_blocks": len(self._assumed),
            "prefill_rate": self.rates.prefill and round(self.rates.prefill, 1),
            "step_seconds": self.rates.step and round(self.rates.step, 5),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
        }

    def serves(self, model: object) -> bool:
        """Whether requests for a model may go there; those that name none, to any worker."""
        return model is None or model in self.models

    def publish(self, events: Sequence[Event]) -> None:
        """The blocks that it has have changed."""
        if self._block_index is not None and self.slot is not None:
            for event in events:
                self._block_index.apply(self.slot, event)
        self.ledger.apply(events)

    def forget(self) -> None:
        """It has restarted: nothing is assumed to be there, nor does anybody wait for what was sent before."""
        self._assumed.clear()

    def publish_own(self, events: Sequence[Event]) -> None:
        """The worker itself says what it has: nothing is assumed any more."""
        self._assumed.clear()
        self.publish(events)

    def begin(self, request_id: str, prompt: RoutedPrompt, expected: int, now: float) -> Sent:
        """A request is sent. expected: tokens of its prompt that need not be computed for it alone."""
        self._assumed.expire(now)
        sent = Sent(request_id, prompt, self._assumed.held(prompt.chain), now, not self.unreported_tokens)
        length = len(prompt.chain)
        self.ledger.admitted(request_id, prompt.chain, length, self._outcome(prompt), hit_unit=prompt.chain.block_size)
        self._prompts[request_id] = length
        self.sent(request_id, max(1, length - expected), now)
        return sent

    def explain(self, prompt: RoutedPrompt) -> Explanation:
        """Why a prompt would miss, by what is known now."""
        outcome = self._outcome(prompt)
        with self.ledger.reading() as ledger:
            return explain(ledger, prompt.chain, outcome, hit_unit=prompt.chain.block_size)

    def _outcome(self, prompt: RoutedPrompt) -> Outcome:
        """What of a prompt is known to be there: whole blocks, without the last token, which is always computed."""
        chain = prompt.chain
        with self.ledger.reading() as ledger:
            found = min(ledger.cached_run(chain), (len(chain) - 1) // chain.block_size) * chain.block_size
        return Outcome({POOL: found} if found > 0 else {})

    def first_token(self, sent: Sent, now: float) -> None:
        """The prompt is computed."""
        sent.begun_at = now
        self.begun(sent.request_id)
        if self.feed is None or not self.feed.has_heard:
            self._assumed.computed(sent.prompt.chain, now)

    def finish(self, sent: Sent, usage: Usage | None, now: float) -> None:
        """The answer has ended, however it did. usage: None where the worker did not say it."""
        self._prompts.pop(sent.request_id, None)
        self.ended(sent.request_id)
        if usage is None:
            return
        if usage.cached is not None:
            self.prompt_tokens += usage.prompt
            self.cached_tokens += usage.cached
            self._correct(sent, usage.prompt, usage.cached)
        if sent.begun_at is not None:
            if sent.found_idle:
                self.rates.computed(usage.prompt - (usage.cached or 0), sent.begun_at - sent.at)
            self.rates.decoded(usage.completion - 1, now - sent.begun_at)

    def _correct(self, sent: Sent, prompt_tokens: int, cached_tokens: int) -> None:
        """Learn from what the worker has reused of a prompt."""
        chain = sent.prompt.chain
        here = cached_tokens * len(chain) / max(1, prompt_tokens)  # in the chain's tokens
        if not sent.prompt.in_tokens:
            here += TEXT_SLACK * len(chain)
        self._assumed.corrected(sent.held, int(here) // chain.block_size)

    @asynccontextmanager
    async def waiting(self) -> AsyncGenerator[asyncio.Timeout, None]:
        """For what waits for an answer: `give_up`, or the scope's deadline, ends it with WorkerTimeoutError."""
        scope = asyncio.timeout(None)
        self._scopes.add(scope)
        try:
            async with scope:
                yield scope
        except TimeoutError as error:
            raise WorkerTimeoutError(f"{self} does not answer, and is given up") from error
        finally:
            self._scopes.discard(scope)

    def give_up(self) -> None:
        """Nothing more is expected of the answers under way."""
        for scope in tuple(self._scopes):
            scope.reschedule(0)

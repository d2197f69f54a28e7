"""The gateway's state of one foreign worker: its models, its measured rates and its cached blocks, known from its KV
events or else estimated by an LRU model of the prompts that were sent to it.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from emberkv.cluster.block_index import BlockIndex
from emberkv.cluster.foreign.prompts import RoutedPrompt
from emberkv.cluster.policies import ReplicaState
from emberkv.cluster.workers import EXACT, RoutedWorker, WorkerStatus
from emberkv.core.events import POOL, BlockRemoved, BlockStored, Event
from emberkv.core.explaining.explain import explain
from emberkv.core.explaining.explanation import CacheOutcome, Explanation
from emberkv.core.explaining.ledger import Ledger
from emberkv.core.hashing import BlockHash, TokenChain
from emberkv.errors import ConfigError, WorkerTimeoutError
from emberkv.serving.cache.ledger_store import LedgerStore

if TYPE_CHECKING:
    from emberkv.cluster.foreign.client import ForeignClient


DEFAULT_TOKENS = 1_000_000
DEFAULT_TTL = 3600.0

SLACK_BLOCKS = 2
"""A worker may reuse so many blocks fewer than assumed without having evicted any: its blocks may be larger, and the
last token of a prompt is always computed.
"""


@dataclass(frozen=True, slots=True)
class AssumedPrefix:
    """The leading blocks of a prompt that the worker is assumed to have, by the time of each one's last use."""

    used: Sequence[float]

    @property
    def blocks(self) -> int:
        return len(self.used)


class AssumedBlocks:
    """Blocks in the order in which an LRU cache evicts them: least recently used first, of one prompt the last first.

    publish: gets each change as the events that a cache would publish. max_blocks: the assumed capacity. ttl: seconds
    after which an unused block is assumed to be evicted. Times are monotonic seconds.
    """

    def __init__(
        self, publish: Callable[[Sequence[Event]], None], *, max_blocks: int, ttl: float = DEFAULT_TTL
    ) -> None:
        self._publish = publish
        self._max_blocks = max_blocks
        self._ttl = ttl
        self._used: OrderedDict[BlockHash, float] = OrderedDict()  # the next to be evicted first

    def __len__(self) -> int:
        return len(self._used)

    def held(self, chain: TokenChain) -> AssumedPrefix:
        """The leading blocks of a prompt that are assumed to be cached."""
        used = []
        for block_hash in chain.block_hashes:
            at = self._used.get(block_hash)
            if at is None:
                break
            used.append(at)
        return AssumedPrefix(used)

    def computed(self, chain: TokenChain, now: float) -> None:
        """Record that the worker has computed a prompt, so that all of its blocks are cached."""
        hashes = chain.block_hashes[: self._max_blocks]
        events: list[Event] = list(self._runs(chain, len(hashes)))
        for block_hash in reversed(hashes):
            self._used[block_hash] = now
            self._used.move_to_end(block_hash)
        gone = []
        while len(self._used) > self._max_blocks:
            gone.append(self._used.popitem(last=False)[0])
        self._publish([*events, *([BlockRemoved(tuple(gone))] if gone else [])])

    def corrected(self, held: AssumedPrefix, found_blocks: int) -> int:
        """Correct the estimate by an answer: the worker has reused ``found_blocks``, and ``held`` had been assumed.

        A missing block means that all blocks with no later last use are evicted, too. Returns the number of blocks that
        are removed from the estimate.
        """
        if found_blocks + SLACK_BLOCKS >= held.blocks:
            return 0
        return self._drop_until(held.used[found_blocks])

    def expire(self, now: float) -> None:
        """Remove blocks that have not been used for ``ttl`` seconds."""
        self._drop_until(now - self._ttl)

    def clear(self) -> None:
        """Remove all blocks."""
        self._drop_until(float("inf"))

    def _drop_until(self, last: float) -> int:
        gone = []
        for block_hash, used in self._used.items():
            if used > last:
                break
            gone.append(block_hash)
        for block_hash in gone:
            del self._used[block_hash]
        if gone:
            self._publish([BlockRemoved(tuple(gone))])
        return len(gone)

    def _runs(self, chain: TokenChain, stop: int) -> list[BlockStored]:
        """Events for the blocks of a prompt that are new, one for each run of consecutive blocks."""
        runs: list[list[int]] = []
        for index, block_hash in enumerate(chain.block_hashes[:stop]):
            if block_hash in self._used:
                continue
            if runs and runs[-1][-1] == index - 1:
                runs[-1].append(index)
            else:
                runs.append([index])
        return [
            BlockStored(
                tuple(chain.block_hashes[index] for index in run),
                chain.parent(run[0]),
                tuple(chain.block_tokens(index) for index in run),
                chain.block_size,
            )
            for run in runs
        ]


APPROXIMATE = "degraded: approximate"

LEARNING = 0.2
"""The weight of the latest observation in the moving average of a rate."""

LEAST_TOKENS = 128
"""Prompts with fewer tokens to compute are not used to estimate a worker's prefill rate."""

TEXT_SLACK = 0.1
"""If prompts are compared as text, cached text is known from cached tokens up to about this share of the prompt."""


@dataclass(frozen=True, slots=True)
class ForeignSpec:
    """A foreign worker as the command line names it: ``URL[,NAME=VALUE...]``.

    worker_id: by default its host and port. kv_events, kv_replay: endpoints of vLLM's KV events and of their replay.
    tokens: the approximate capacity of its cache. ttl: seconds after which an unused prompt is assumed to be evicted.
    api_key_file: a file with the key that it requires.

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
        """Parse the value of ``--foreign-worker``. Raises ConfigError for an invalid one."""
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
    """Host and port. Raises ConfigError for an invalid port, and for a user or password, which logs would show."""
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
    """A subscription to a worker's own KV events."""

    @property
    def has_heard(self) -> bool:
        """Whether usable events have arrived. From then on, they alone define the worker's cached blocks."""

    @property
    def fault(self) -> str:
        """Why the index may differ from the worker's cache; "" while it is exact."""


@dataclass(slots=True)
class ObservedRates:
    """Moving averages of a worker's rates; None before the first observation.

    prefill: prompt tokens per second. step: seconds from one token to the next.
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
class SentRequest:
    """A request that was sent to a worker.

    held: the blocks of its prompt that were assumed to be cached. at, begun_at: monotonic seconds of sending and of the
    first token. found_idle: whether no other request was waiting at the worker for its first token.
    """

    request_id: str
    prompt: RoutedPrompt
    held: AssumedPrefix
    at: float
    found_idle: bool
    begun_at: float | None = None


@dataclass(frozen=True, slots=True)
class ReportedUsage:
    """An answer's ``usage``, in tokens. cached: None if the worker does not report it."""

    prompt: int
    completion: int
    cached: int | None


class ForeignWorker(RoutedWorker):
    """One server with the OpenAI API. All methods are called from one event loop.

    usual_step: the mean seconds of a decode step at all foreign workers, so that a worker with fewer requests does not
    look faster. models: the cards of its ``/v1/models``, by id. prompt_tokens, cached_tokens: sums over answers that
    report both.
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
        self.rates = ObservedRates()
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
        """The load that this gateway has sent, and the measured rates."""
        return ReplicaState(
            load=sum(self._prompts.values()),
            up=self.status is WorkerStatus.UP,
            queued_tokens=self.unreported_tokens,
            prefill_rate=self.rates.prefill,
            step_seconds=self.usual_step(),
        )

    def as_json(self) -> dict[str, Any]:
        """The fields of ``/v1/cluster`` that only foreign workers have."""
        return {
            "models": sorted(self.models),
            "assumed_blocks": len(self._assumed),
            "prefill_rate": self.rates.prefill and round(self.rates.prefill, 1),
            "step_seconds": self.rates.step and round(self.rates.step, 5),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
        }

    def serves(self, model: object) -> bool:
        """Whether the worker serves the model. A request without a model may go to any worker."""
        return model is None or model in self.models

    def publish(self, events: Sequence[Event]) -> None:
        """Apply changes of the worker's cached blocks to the index and the ledger."""
        if self._block_index is not None and self.slot is not None:
            for event in events:
                self._block_index.apply(self.slot, event)
        self.ledger.apply(events)

    def forget(self) -> None:
        """Handle a restart: no blocks are assumed to be cached any more."""
        self._assumed.clear()

    def publish_own(self, events: Sequence[Event]) -> None:
        """Apply the worker's own KV events, which replace all assumed blocks."""
        self._assumed.clear()
        self.publish(events)

    def begin(self, request_id: str, prompt: RoutedPrompt, expected: int, now: float) -> SentRequest:
        """Record that a request is sent. expected: tokens of its prompt that are expected to be cached or in flight."""
        self._assumed.expire(now)
        sent = SentRequest(request_id, prompt, self._assumed.held(prompt.chain), now, not self.unreported_tokens)
        length = len(prompt.chain)
        self.ledger.admitted(request_id, prompt.chain, length, self._outcome(prompt), hit_unit=prompt.chain.block_size)
        self._prompts[request_id] = length
        self.sent(request_id, max(1, length - expected), now)
        return sent

    def explain(self, prompt: RoutedPrompt) -> Explanation:
        """Explain the hits and misses of a prompt by the blocks that are known now."""
        outcome = self._outcome(prompt)
        with self.ledger.reading() as ledger:
            return explain(ledger, prompt.chain, outcome, hit_unit=prompt.chain.block_size)

    def _outcome(self, prompt: RoutedPrompt) -> CacheOutcome:
        """The cached tokens of a prompt: whole blocks, without the last token, which is always computed."""
        chain = prompt.chain
        with self.ledger.reading() as ledger:
            found = min(ledger.cached_run(chain), (len(chain) - 1) // chain.block_size) * chain.block_size
        return CacheOutcome({POOL: found} if found > 0 else {})

    def first_token(self, sent: SentRequest, now: float) -> None:
        """Record that the prompt is computed."""
        sent.begun_at = now
        self.begun(sent.request_id)
        if self.feed is None or not self.feed.has_heard:
            self._assumed.computed(sent.prompt.chain, now)

    def finish(self, sent: SentRequest, usage: ReportedUsage | None, now: float) -> None:
        """Record the end of an answer, whether it is complete or not. usage: None if the worker did not report it."""
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

    def _correct(self, sent: SentRequest, prompt_tokens: int, cached_tokens: int) -> None:
        """Correct the assumed blocks by the cached tokens that the worker reports."""
        chain = sent.prompt.chain
        here = cached_tokens * len(chain) / max(1, prompt_tokens)  # in the chain's tokens
        if not sent.prompt.in_tokens:
            here += TEXT_SLACK * len(chain)
        self._assumed.corrected(sent.held, int(here) // chain.block_size)

    @asynccontextmanager
    async def waiting(self) -> AsyncGenerator[asyncio.Timeout, None]:
        """A context for waiting on an answer. `give_up`, or the scope's deadline, ends it with WorkerTimeoutError."""
        scope = asyncio.timeout(None)
        self._scopes.add(scope)
        try:
            async with scope:
                yield scope
        except TimeoutError as error:
            raise WorkerTimeoutError(f"{self} does not answer and is given up") from error
        finally:
            self._scopes.discard(scope)

    def give_up(self) -> None:
        """Abort all running requests at this worker with WorkerTimeoutError."""
        for scope in tuple(self._scopes):
            scope.reschedule(0)

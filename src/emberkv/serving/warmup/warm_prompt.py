"""Prompts that are kept warm: which ones, how the engine computes one, and which of them may have left the pool."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from emberkv.config import WarmupSettings
from emberkv.core.hashing import PUBLIC_OWNER, BlockHash, Chain, partial_hash
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import OutputListener, TokenOutput
from emberkv.engine.tokenization.tokenizer import Tokenizer, shared_prefix
from emberkv.engine.warmup import prompt_or_built_in, read_system_prompt
from emberkv.errors import ConfigError, EmberError, EngineStoppedError, RequestError
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.tenancy import PublicPrompt


@dataclass(frozen=True, slots=True)
class WarmPrompt:
    """Token ids whose blocks are to be cached, and the tenant that owns them."""

    tokens: tuple[int, ...]
    tenant: str = ""


def kept_hashes(chain: Chain) -> list[BlockHash]:
    """The hashes of the chain's full blocks, and of the partial block behind them where its end does not fill one."""
    count = len(chain.block_hashes)
    start = count * chain.block_size
    if start == len(chain):
        return list(chain.block_hashes)
    return [*chain.block_hashes, partial_hash(chain.parent(count), chain.encoded_slice(start, len(chain)))]


class WarmEngine(Protocol):
    """What warming needs of an engine. All may be called from any thread."""

    def chain(self, prompt: WarmPrompt) -> Chain:
        """The prompt's blocks as its tenant's requests name them. Raises EmberError for an unknown tenant."""
        ...

    def cached_tokens(self, chain: Chain) -> int:
        """How many leading tokens a longer request would hit in the pool now.

        Raises EngineStoppedError when the engine has stopped, or gives no answer in time.
        """
        ...

    def keep(self, chain: Chain) -> None:
        """Have the chain's blocks evicted after all that are not retained. Raises as `cached_tokens` does."""
        ...

    def unretain(self, block_hashes: Iterable[BlockHash]) -> None:
        """Undo `retain`. Raises EngineStoppedError."""
        ...

    def room(self) -> int:
        """How many tokens the pool can take without evicting any."""
        ...

    def compute(self, prompt: WarmPrompt, request_id: str, listener: OutputListener) -> None:
        """Queue the prompt at the lowest priority; raises what ``Engine.submit`` raises."""
        ...

    def abort(self, request_id: str) -> None: ...


class WarmupOutcome(Enum):
    WARM = "warm"
    TIMED_OUT = "timed_out"  # what was computed until then is cached
    FAILED = "failed"  # may go better another time
    IMPOSSIBLE = "impossible"  # can never be cached here


@dataclass(frozen=True, slots=True)
class Warming:
    """What warming a prompt came to. cached, computed: tokens. problem: why it is not warm."""

    outcome: WarmupOutcome
    cached: int = 0
    computed: int = 0
    problem: str = ""


def warm(
    engine: WarmEngine,
    prompt: WarmPrompt,
    chain: Chain,
    request_id: str,
    remaining: Callable[[], float],
    *,
    keep: bool = False,
) -> Warming:
    """Have a prompt's state cached. remaining: the seconds that are left; not above 0: the time is up.

    keep: evict it after others. When the time is up, the request is aborted between two steps of the engine, and what
    these computed stays cached.
    """
    if remaining() <= 0:
        return Warming(WarmupOutcome.TIMED_OUT, problem="the time was up before it began")
    try:
        warming = _warm(engine, prompt, chain, request_id, remaining)
        if keep and warming.outcome is WarmupOutcome.WARM:
            engine.keep(chain)
        return warming
    except EngineStoppedError as error:
        return Warming(WarmupOutcome.FAILED, problem=str(error))
    except EmberError as error:
        return Warming(WarmupOutcome.IMPOSSIBLE, problem=str(error))


def _warm(
    engine: WarmEngine, prompt: WarmPrompt, chain: Chain, request_id: str, remaining: Callable[[], float]
) -> Warming:
    before = engine.cached_tokens(chain)
    if before >= len(prompt.tokens):
        return Warming(WarmupOutcome.WARM, before)
    output = _last_output(engine, prompt, request_id, remaining)
    return _judge(output, len(prompt.tokens), before, engine.cached_tokens(chain))


def _last_output(
    engine: WarmEngine, prompt: WarmPrompt, request_id: str, remaining: Callable[[], float]
) -> TokenOutput | None:
    """None when the time was up before it came."""
    ended = threading.Event()
    outputs: list[TokenOutput] = []

    def listen(output: TokenOutput) -> None:
        if output.finish_reason is not None:
            outputs.append(output)
            ended.set()

    engine.compute(prompt, request_id, listen)
    if ended.wait(max(0.0, remaining())):
        return outputs[0]
    engine.abort(request_id)
    return None


def _judge(output: TokenOutput | None, wanted: int, before: int, after: int) -> Warming:
    computed = max(0, after - before)
    if output is None:
        return Warming(WarmupOutcome.TIMED_OUT, after, computed, "the time was up")
    if output.usage is not None and output.finish_reason is FinishReason.LENGTH:
        computed = output.usage.computed_tokens
    if after >= wanted:
        return Warming(WarmupOutcome.WARM, after, computed)
    if output.finish_reason is FinishReason.LENGTH:
        return Warming(WarmupOutcome.FAILED, after, computed, f"the pool has kept {after} of {wanted} tokens")
    return Warming(WarmupOutcome.FAILED, after, computed, output.error or "the engine gave it up")


_UNTRIED = Warming(WarmupOutcome.FAILED)


@dataclass(slots=True, eq=False)
class PinnedPrompt:
    """One prompt. stale: not known to be cached. due_at: not to be warmed before, by the warmup's clock. last: the hash
    of its last full block, once it was tried. has_partial: it ends in a partial block, whose loss no event reports.
    """

    prompt: WarmPrompt
    block_hashes: frozenset[BlockHash] = frozenset()
    last: BlockHash | None = None
    has_partial: bool = False
    stale: bool = True
    due_at: float = 0.0
    warming: Warming = _UNTRIED

    @property
    def is_warm(self) -> bool:
        return self.warming.outcome is WarmupOutcome.WARM and not self.stale


class Pins:
    """Pins by prompt, in the order in which they came; for any number of threads.

    unit: tokens that hits are rounded down to, and prompts with them. block_size: tokens.
    """

    def __init__(self, unit: int, block_size: int = 1) -> None:
        self._unit = unit
        self._block_size = block_size
        self._lock = threading.Lock()
        self._pins: dict[WarmPrompt, PinnedPrompt] = {}

    def __iter__(self) -> Iterator[PinnedPrompt]:
        with self._lock:
            return iter(list(self._pins.values()))

    def add(self, tokens: Iterable[int], tenant: str) -> int:
        """How many tokens are pinned; 0, and no pin, for a prompt shorter than the unit."""
        prompt = self.rounded(WarmPrompt(tuple(tokens), tenant))
        if prompt.tokens:
            with self._lock:
                self._pins.setdefault(prompt, PinnedPrompt(prompt))
        return len(prompt.tokens)

    def remove(self, tokens: Iterable[int], tenant: str) -> PinnedPrompt | None:
        """The pin of this prompt, or of one that has a few tokens more, which fill no block; it is a pin no longer."""
        wanted = self.rounded(WarmPrompt(tuple(tokens), tenant))
        count = len(wanted.tokens)
        with self._lock:
            for prompt in self._pins:
                is_same = prompt.tenant == tenant and prompt.tokens[:count] == wanted.tokens
                if count and is_same and len(prompt.tokens) - count < self._block_size:
                    return self._pins.pop(prompt)
        return None

    def lost(self, block_hashes: Collection[BlockHash] | None) -> bool:
        """Mark the pins that these blocks belong to, all for None, as stale; whether there are any."""
        with self._lock:
            hit = [
                pin
                for pin in self._pins.values()
                if block_hashes is None or not pin.block_hashes.isdisjoint(block_hashes)
            ]
            for pin in hit:
                pin.stale = True
        return bool(hit)

    def pending(self) -> list[PinnedPrompt]:
        """What is to be looked at from its ``due_at`` on: stale pins, but not those of prompts that can never be warm,
        and pins with a partial block.
        """
        return [
            pin
            for pin in self
            if (pin.stale or pin.has_partial) and pin.warming.outcome is not WarmupOutcome.IMPOSSIBLE
        ]

    def begin(self, pin: PinnedPrompt, chain: Chain) -> None:
        """From now on, what is lost counts again. chain: the prompt's."""
        with self._lock:
            pin.stale = False
            pin.block_hashes = frozenset(kept_hashes(chain))
            pin.last = chain.block_hashes[-1] if chain.block_hashes else None
            pin.has_partial = len(chain) % chain.block_size > 0

    def end(self, pin: PinnedPrompt, warming: Warming, *, due_at: float) -> None:
        with self._lock:
            pin.warming = warming
            pin.stale = pin.stale or warming.outcome is not WarmupOutcome.WARM
            pin.due_at = due_at

    def rounded(self, prompt: WarmPrompt) -> WarmPrompt:
        """What of a prompt can be hit."""
        return replace(prompt, tokens=prompt.tokens[: len(prompt.tokens) // self._unit * self._unit])


def configured_prompts(config: WarmupSettings) -> list[str]:
    """The texts of the system prompts to warm; none if nothing is to be warmed.

    Raises ConfigError for a file of ``config.warmup_system_files`` that is of no use.
    """
    if not config.warmup:
        return []
    if not config.warmup_system_files:
        return [prompt_or_built_in(config.warmup_fallback_file)]
    try:
        return [read_system_prompt(path.expanduser()) for path in config.warmup_system_files]
    except ConfigError as error:
        raise ConfigError(f"--warmup-system-file {error}") from error


def render_system_prompt(text: str, tokenizer: Tokenizer, rules: CanonicalRules | None) -> list[int]:
    """The tokens that all requests with a system prompt begin with, once ``rules`` have rewritten it as they do theirs.

    Raises RequestError for a prompt that the model's chat template does not take.
    """
    return shared_prefix(tokenizer, text if rules is None else rules.of_system([text]).texts[0])


def standard_prompts(
    texts: Sequence[str], tokenizer: Tokenizer, rules: CanonicalRules | None
) -> tuple[list[WarmPrompt], list[str]]:
    """These system prompts to warm, each once, and why others cannot be used with this model.

    They are public, so that all tenants also find the end of one that does not fill a block.
    """
    prompts, problems = [], []
    for number, text in enumerate(dict.fromkeys(texts), 1):
        try:
            prompts.append(WarmPrompt(tuple(render_system_prompt(text, tokenizer, rules)), PUBLIC_OWNER))
        except RequestError as error:
            problems.append(f"system prompt {number}: {error}")
    return list(dict.fromkeys(prompts)), problems


def public_tokens(
    declared: Iterable[PublicPrompt], tokenizer: Tokenizer, rules: CanonicalRules | None
) -> list[Sequence[int]]:
    """The token sequences for `PublicPrefixes`. The files of the prompts have been read, as `read_tenants` does.

    Raises ConfigError for a prompt that the model's chat template does not take.
    """
    tokens: list[Sequence[int]] = []
    for number, prompt in enumerate(declared):
        try:
            if prompt.system is not None:
                tokens.append(render_system_prompt(prompt.system, tokenizer, rules))
            elif prompt.text is not None:
                tokens.append(tokenizer.encode(prompt.text, add_special_tokens=True))
        except RequestError as error:
            raise ConfigError(f"public_prefixes.{number} cannot be used with this model: {error}") from error
    return tokens

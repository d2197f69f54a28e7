"""The prompts that are to stay warm, and which of them may have gone cold."""

import threading
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from emberkv.core.hashing import BlockHash, Chain
from emberkv.serving.warmup.warm_prompt import Outcome, Warming, WarmPrompt, kept_hashes

_UNTRIED = Warming(Outcome.FAILED)


@dataclass(slots=True, eq=False)
class Pin:
    """One prompt. stale: not known to be cached. due_at: not to be warmed before, by the warmup's clock. last: the hash
    of its last full block, once it was tried. has_partial: it ends in a partial block, of whose loss no event tells.
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
        return self.warming.outcome is Outcome.WARM and not self.stale


class Pins:
    """Pins by prompt, in the order in which they came; for any number of threads.

    unit: tokens that hits are rounded down to, and prompts with them. block_size: tokens.
    """

    def __init__(self, unit: int, block_size: int = 1) -> None:
        self._unit = unit
        self._block_size = block_size
        self._lock = threading.Lock()
        self._pins: dict[WarmPrompt, Pin] = {}

    def __iter__(self) -> Iterator[Pin]:
        with self._lock:
            return iter(list(self._pins.values()))

    def add(self, tokens: Iterable[int], tenant: str) -> int:
        """How many tokens are pinned; 0, and no pin, for a prompt shorter than the unit."""
        prompt = self.rounded(WarmPrompt(tuple(tokens), tenant))
        if prompt.tokens:
            with self._lock:
                self._pins.setdefault(prompt, Pin(prompt))
        return len(prompt.tokens)

    def remove(self, tokens: Iterable[int], tenant: str) -> Pin | None:
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

    def pending(self) -> list[Pin]:
        """What is to be looked at from its ``due_at`` on: stale pins, but not those of prompts that can never be warm,
        and pins with a partial block.
        """
        return [pin for pin in self if (pin.stale or pin.has_partial) and pin.warming.outcome is not Outcome.IMPOSSIBLE]

    def begin(self, pin: Pin, chain: Chain) -> None:
        """From now on, what is lost counts again. chain: the prompt's."""
        with self._lock:
            pin.stale = False
            pin.block_hashes = frozenset(kept_hashes(chain))
            pin.last = chain.block_hashes[-1] if chain.block_hashes else None
            pin.has_partial = len(chain) % chain.block_size > 0

    def end(self, pin: Pin, warming: Warming, *, due_at: float) -> None:
        with self._lock:
            pin.warming = warming
            pin.stale = pin.stale or warming.outcome is not Outcome.WARM
            pin.due_at = due_at

    def rounded(self, prompt: WarmPrompt) -> WarmPrompt:
        """What of a prompt can be hit."""
        return replace(prompt, tokens=prompt.tokens[: len(prompt.tokens) // self._unit * self._unit])

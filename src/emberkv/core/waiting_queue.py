"""The sequences that wait for admission, in lines that do not hold up one another. Between tenants, the next turn
belongs to the tenant with the fewest tokens computed.

Turns follow virtual token counters ("Fairness in Serving Large Language Models", Sheng et al., OSDI 2024): each tenant
has a counter of the tokens computed for it, divided by its weight, and the lowest counter is served next. A tenant that
comes back from idleness starts at the counter served last, as in start-time fair queueing (Goyal et al., SIGCOMM 1996),
so that idleness earns no credit.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from emberkv.core.sequence import Sequence, SequenceStatus
from emberkv.errors import ConfigError

K = TypeVar("K", bound=Hashable)


class TokenCounters(Generic[K]):
    """One virtual token counter for each key. weights: by key, above 0; 1 for all others. Raises ConfigError."""

    def __init__(self, weights: Mapping[K, float] | None = None) -> None:
        self._weights = dict(weights or {})
        for key, weight in self._weights.items():
            if not 0 < weight < float("inf"):
                raise ConfigError(f"the weight of {key!r} is {weight}; it must be a finite number above 0")
        self._counters: dict[K, float] = {}
        self._served = 0.0

    def weight(self, key: K) -> float:
        return self._weights.get(key, 1.0)

    def __getitem__(self, key: K) -> float:
        """Tokens computed for ``key``, divided by its weight, with what it missed by being idle added."""
        return self._counters.get(key, self._served)

    def activate(self, key: K) -> None:
        """``key`` has work again after having had none."""
        self._counters[key] = max(self[key], self._served)

    def serve(self, key: K, tokens: int) -> None:
        """It was ``key``'s turn, and ``tokens`` are computed for it."""
        counter = self._counters.get(key, self._served)
        self._served = max(self._served, counter)
        self._counters[key] = counter + tokens / self._weights.get(key, 1.0)

    def charge(self, key: K, tokens: int, steps: int = 1) -> None:
        """``tokens`` are computed for ``key`` in each of ``steps`` steps, outside its turns."""
        counter, share = self._counters.get(key, self._served), tokens / self._weights.get(key, 1.0)
        for _ in range(steps):  # one by one: a product would be rounded in another way
            counter += share
        self._counters[key] = counter


@dataclass(slots=True)
class Occupancy:
    """What running sequences occupy."""

    sequences: int = 0
    blocks: int = 0


@dataclass(slots=True)
class Claims:
    """What each tenant occupies, beside its share of the running sequences and of the pool's blocks.

    A tenant's share is its weight's part of all weights of the tenants that are present, and one sequence at least.
    max_sequences, num_blocks: what is shared out. weights: of the tenants present.
    """

    max_sequences: int
    num_blocks: int
    weights: Mapping[str, float]
    usage: dict[str, Occupancy] = field(default_factory=dict)

    @classmethod
    def of(
        cls, running: Iterable[Sequence], weights: Mapping[str, float], *, max_sequences: int, num_blocks: int
    ) -> "Claims":
        claims = cls(max_sequences, num_blocks, weights)
        for sequence in running:
            usage = claims.usage.setdefault(sequence.tenant, Occupancy())
            usage.sequences += 1
            usage.blocks += len(sequence.held.blocks)
        return claims

    def remove(self, sequence: Sequence) -> None:
        """``sequence``, which still holds its blocks, is about to stop running."""
        usage = self.usage[sequence.tenant]
        usage.sequences -= 1
        usage.blocks -= len(sequence.held.blocks)

    def blocks(self, tenant: str) -> int:
        return self.usage[tenant].blocks if tenant in self.usage else 0

    def load(self, tenant: str) -> float:
        """Blocks occupied, by weight."""
        return self.blocks(tenant) / self.weights.get(tenant, 1.0)

    def next_victim(self, candidates: Iterable[Sequence]) -> Sequence:
        """The least urgent one; among equals, the latest of the tenant with most blocks for its weight."""
        return max(candidates, key=lambda each: (each.priority, self.load(each.tenant), each.order))

    def excess_sequences(self, tenant: str) -> float:
        """Running sequences above the tenant's share; negative below it."""
        running = self.usage[tenant].sequences if tenant in self.usage else 0
        return running - max(1.0, self.max_sequences * self._part(tenant))

    def excess_blocks(self, tenant: str) -> float:
        """Blocks above the tenant's share; negative below it."""
        return self.blocks(tenant) - self.num_blocks * self._part(tenant)

    def _part(self, tenant: str) -> float:
        return self.weights[tenant] / sum(self.weights.values())


class Line(NamedTuple):
    """Which line a sequence waits in: its tenant's, for those with few tokens to compute (short) or for the others."""

    tenant: str
    short: bool


def line_of(sequence: Sequence) -> Line:
    return Line(sequence.tenant, sequence.short)


@dataclass(slots=True, init=False)
class _Waiting:
    """heap: by `Sequence.rank`. refused: when the first one was found not to fit, as (generation, blocks free then)."""

    heap: list[tuple[int, int, Sequence]]
    refused: tuple[int, int] | None

    def __init__(self) -> None:
        self.heap = []
        self.refused = None


class WaitingQueue:
    """For each line, a priority queue by `Sequence.rank`. A sequence that ends while it waits is passed over.

    Turns go by priority, then by the tenants' token counters, then by those of a tenant's two lines.

    A refusal is remembered, so that the first in a line is not matched against the cache at every step: it is
    considered again when more blocks are free for it than then, or after `forget_refusals`.

    free_for: the blocks that a sequence may have. weights: of tenants; 1 for all others. Raises ConfigError for a
    weight that is not above 0.
    """

    def __init__(self, free_for: Callable[[Sequence], int], weights: Mapping[str, float]) -> None:
        self._free_for = free_for
        self.tenants: TokenCounters[str] = TokenCounters(weights)
        self._of_tenant: dict[str, TokenCounters[bool]] = {}
        self.lines: dict[Line, _Waiting] = {}  # those with sequences in them, of which all may have ended
        self._generation = 0

    def push(self, sequence: Sequence, begun: Iterable[Sequence] = ()) -> None:
        """Add a sequence to its line. begun: the running sequences with prompt tokens left to compute."""
        tenant, line = sequence.tenant, line_of(sequence)
        begun_lines = {each.short for each in begun if each.tenant == tenant}
        if line.short not in begun_lines and self.first(line) is None:
            if not begun_lines and self.first(Line(tenant, not line.short)) is None:
                self.tenants.activate(tenant)
            if tenant not in self._of_tenant:
                self._of_tenant[tenant] = TokenCounters()
            self._of_tenant[tenant].activate(line.short)
        sequence.status = SequenceStatus.WAITING
        waiting = self.lines.get(line)
        if waiting is None:
            waiting = self.lines[line] = _Waiting()
        heappush(waiting.heap, (sequence.priority, sequence.order, sequence))
        waiting.refused = None

    def serve(self, line: Line, tokens: int) -> None:
        """It was the line's turn, and ``tokens`` of its prompts are computed."""
        self.tenants.serve(line.tenant, tokens)
        self._of_tenant[line.tenant].serve(line.short, tokens)

    def charge(self, decodes: Iterable[Sequence], steps: int) -> None:
        """``steps`` steps each decode a token of these sequences."""
        tenants = [sequence.tenant for sequence in decodes]
        for tenant in dict.fromkeys(tenants):
            self.tenants.charge(tenant, tenants.count(tenant), steps)

    def lead(self, sequence: Sequence, other: Sequence) -> float:
        """By how many tokens the line of ``sequence`` is ahead of the line of ``other``."""
        if sequence.tenant != other.tenant:
            return self.tenants[sequence.tenant] - self.tenants[other.tenant]
        lines = self._of_tenant[sequence.tenant]
        return lines[sequence.short] - lines[other.short]

    def turns(self, begun: Iterable[Sequence]) -> list[tuple[Line, Sequence | None]]:
        """The lines with prompts to compute, the one whose turn it is first, each with the first of its ``begun``."""
        first: dict[Line, Sequence] = {}
        for sequence in begun:
            line = line_of(sequence)
            if line not in first or sequence.rank < first[line].rank:
                first[line] = sequence
        lines = {*first, *self.lines}
        if len(lines) == 1:
            line = lines.pop()
            return [(line, first.get(line))] if line in first or self.first(line) is not None else []
        turns = []
        for line in lines:
            ranks = [each.rank for each in (first.get(line), self.first(line)) if each is not None]
            if ranks:
                priority, order = min(ranks)
                counters = self.tenants[line.tenant], self._of_tenant[line.tenant][line.short]
                turns.append(((priority, *counters, order), line))
        return [(line, first.get(line)) for _, line in sorted(turns)]

    def first(self, line: Line) -> Sequence | None:
        """The next sequence of a line, whether or not it fits."""
        waiting = self.lines.get(line)
        if waiting is None:
            return None
        while waiting.heap and waiting.heap[0][2].status is not SequenceStatus.WAITING:
            heappop(waiting.heap)
            waiting.refused = None
        if not waiting.heap:
            del self.lines[line]
            return None
        return waiting.heap[0][2]

    def is_refused(self, line: Line) -> bool:
        """Whether the sequence that `first` returned is known not to fit."""
        waiting = self.lines[line]
        if waiting.refused is None:
            return False
        generation, free = waiting.refused
        return generation == self._generation and self._free_for(waiting.heap[0][2]) <= free

    def pop(self, line: Line) -> None:
        """Take out the sequence that `first` returned."""
        waiting = self.lines[line]
        heappop(waiting.heap)
        waiting.refused = None
        if not waiting.heap:
            del self.lines[line]

    def refuse(self, line: Line) -> None:
        """The sequence that `first` returned does not fit."""
        waiting = self.lines[line]
        waiting.refused = (self._generation, self._free_for(waiting.heap[0][2]))

    def forget_refusals(self) -> None:
        """What is cached or held has changed: sequences may fit now, even into as few blocks."""
        self._generation += 1

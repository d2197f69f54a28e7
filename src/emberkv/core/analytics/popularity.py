"""Which prefixes are worth most: how often their tokens were reused, weighed by how long ago."""

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from emberkv.core.hashing import TOKEN_BYTES, BlockHash, Chain
from emberkv.errors import ConfigError

DAY = 86_400.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class PopularPrefix:
    """A prefix as what it adds to a shorter one.

    parent: which of the prefixes listed before it that is; None: it begins a chain. block_hash: of its last block.
    tokens: those it adds, encoded. owner: the tenant of its last block. score: reuses of all of it, each halved with
    every half-life since.
    """

    parent: int | None
    block_hash: BlockHash
    tokens: bytes
    owner: str
    score: float


@dataclass(slots=True, eq=False)
class _Run:
    """Consecutive blocks that were always reused together. tokens: encoded. score: as of time ``at``."""

    parent: "_Run | None"
    block_hashes: list[BlockHash]
    tokens: bytes
    owner: str
    score: float
    at: float
    children: "dict[BlockHash, _Run]" = field(default_factory=dict)


class PrefixPopularity:
    """A radix tree over the reused parts of prompts, of at most ``max_tokens`` tokens.

    What is reused longest ago and least often is forgotten first. Times are passed in, in seconds; ``half_life`` is
    how long it takes a reuse to count half.
    """

    def __init__(self, *, max_tokens: int = 2_000_000, half_life: float = DAY) -> None:
        if max_tokens < 1 or not half_life > 0:
            raise ConfigError(f"max_tokens is {max_tokens}, half_life {half_life}; both must be above 0")
        self._max_tokens = max_tokens
        self._half_life = half_life
        self._top = _Run(None, [], b"", "", 0.0, 0.0)
        self._bytes = 0

    @property
    def num_tokens(self) -> int:
        return self._bytes // TOKEN_BYTES

    def used(self, chain: Chain, hit_tokens: int, now: float, *, score: float = 1.0) -> None:
        """A request reused the first ``hit_tokens`` of ``chain``; whole blocks count. score: what it counts for."""
        stop = min(hit_tokens // chain.block_size, len(chain.block_hashes))
        node, at = self._top, 0
        while at < stop:
            run = node.children.get(chain.block_hashes[at])
            if run is None:
                run = self._grow(node, chain, at, stop)
            else:
                common = _common(run.block_hashes, chain.block_hashes[at:stop])
                if common < len(run.block_hashes):
                    run = self._split(run, common, chain.owner(at + common - 1))
            run.score = self._decayed(run, now) + score
            run.at = max(now, run.at)
            node, at = run, at + len(run.block_hashes)
        if self._bytes > self._max_tokens * TOKEN_BYTES:
            self._forget(now)

    def forget(self, block_hashes: Collection[BlockHash] | None) -> int:
        """Drop these blocks and all that extends them, everything for None; how many prefixes that leaves fewer."""
        before = sum(1 for _ in self._runs(self._top))
        pending = [self._top]
        while pending:
            node = pending.pop()
            for first, run in list(node.children.items()):
                cut = next(
                    (at for at, each in enumerate(run.block_hashes) if block_hashes is None or each in block_hashes),
                    None,
                )
                if cut is None:
                    pending.append(run)
                    continue
                self._bytes -= sum(len(each.tokens) for each in (run, *self._runs(run)))
                del node.children[first]
                if cut:
                    kept = len(run.tokens) // len(run.block_hashes) * cut
                    shorter = _Run(node, run.block_hashes[:cut], run.tokens[:kept], run.owner, run.score, run.at)
                    node.children[first] = shorter
                    self._bytes += kept
        return before - sum(1 for _ in self._runs(self._top))

    @staticmethod
    def _runs(top: _Run) -> Iterator[_Run]:
        """All runs below one."""
        pending = list(top.children.values())
        while pending:
            run = pending.pop()
            yield run
            pending += run.children.values()

    def best(self, now: float, *, least_score: float = 0.0) -> list[PopularPrefix]:
        """All prefixes that score so much, the best first; a prefix comes after the one that it extends.

        The order is by score alone: restoring costs by the token, and the score is what each token saves.
        """
        runs = [each for each in self._walk(now) if each[0] >= least_score]
        chosen = sorted(runs, key=lambda each: (-each[0], each[1]))
        index = {id(run): number for number, (_, _, run) in enumerate(chosen)}
        return [
            PopularPrefix(index.get(id(run.parent)), run.block_hashes[-1], run.tokens, run.owner, score)
            for score, _, run in chosen
        ]

    def restore(self, prefixes: Sequence[PopularPrefix], chains: Sequence[Chain | None], at: float) -> None:
        """Take in what another instance's ``best`` gave at time ``at``.

        chains: of each prefix, whole; None where it is none any more.
        """
        own = [prefix.score for prefix in prefixes]  # a score counts the reuses of all that extends the prefix, too
        for prefix in prefixes:
            if prefix.parent is not None:
                own[prefix.parent] -= prefix.score
        for chain, score in zip(chains, own, strict=True):
            if chain is not None:
                self.used(chain, len(chain), at, score=max(0.0, score))

    def _grow(self, parent: _Run, chain: Chain, start: int, stop: int) -> _Run:
        tokens = b"".join(chain.block_tokens(index) for index in range(start, stop))
        run = _Run(parent, list(chain.block_hashes[start:stop]), tokens, chain.owner(stop - 1), 0.0, 0.0)
        parent.children[run.block_hashes[0]] = run
        self._bytes += len(tokens)
        return run

    @staticmethod
    def _split(run: _Run, count: int, owner: str) -> _Run:
        """Cut ``run`` after ``count`` blocks, the last of which is ``owner``'s; returns the front."""
        cut = len(run.tokens) // len(run.block_hashes) * count
        assert run.parent is not None
        front = _Run(run.parent, run.block_hashes[:count], run.tokens[:cut], owner, run.score, run.at)
        run.parent.children[front.block_hashes[0]] = front
        run.parent, run.block_hashes, run.tokens = front, run.block_hashes[count:], run.tokens[cut:]
        front.children[run.block_hashes[0]] = run
        return front

    def _decayed(self, run: _Run, now: float) -> float:
        return float(run.score * 0.5 ** (max(0.0, now - run.at) / self._half_life))

    def _walk(self, now: float) -> Iterator[tuple[float, int, _Run]]:
        """Every run with its score and depth. Rounding never puts a run above the one that it extends."""
        pending = [(math.inf, 0, self._top)]
        while pending:
            bound, depth, run = pending.pop()
            score = min(bound, self._decayed(run, now)) if depth else bound
            if depth:
                yield score, depth, run
            pending += [(score, depth + 1, child) for child in run.children.values()]

    def _forget(self, now: float) -> None:
        """Drop the worst ends until a tenth of the room is free, so that this happens rarely."""
        ends = [(score, id(run), run) for score, _, run in self._walk(now) if not run.children]
        heapify(ends)
        while ends and self._bytes > 0.9 * self._max_tokens * TOKEN_BYTES:
            _, _, run = heappop(ends)
            assert run.parent is not None
            del run.parent.children[run.block_hashes[0]]
            self._bytes -= len(run.tokens)
            if run.parent is not self._top and not run.parent.children:
                heappush(ends, (self._decayed(run.parent, now), id(run.parent), run.parent))


def full_tokens(prefixes: Iterable[PopularPrefix]) -> list[bytes]:
    """The encoded tokens of each prefix from its chain's beginning. Raises ValueError for a parent that comes later."""
    whole: list[bytes] = []
    for prefix in prefixes:
        if prefix.parent is not None and not 0 <= prefix.parent < len(whole):
            raise ValueError(f"prefix {len(whole)} extends number {prefix.parent}; it must be one before it")
        whole.append((whole[prefix.parent] if prefix.parent is not None else b"") + prefix.tokens)
    return whole


def _common(left: Sequence[BlockHash], right: Sequence[BlockHash]) -> int:
    """How many leading block hashes are equal. They are chained: once two differ, so do all after them."""
    return bisect_left(range(min(len(left), len(right))), True, key=lambda index: left[index] != right[index])

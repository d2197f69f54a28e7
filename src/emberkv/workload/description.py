"""Measures a workload: lengths, sessions, and what a cache without limit would find."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import ceil

from emberkv.core.hashing import BlockHash
from emberkv.workload.request import Request, content_hashes

ROOT = sha256(b"emberkv-description-1").digest()


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens a request: the mean, and percentiles by nearest rank.

    >>> found = lengths([10, 20, 30, 40])
    >>> found.mean, found.p50, found.max
    (25.0, 20, 40)
    """

    mean: float
    p50: int
    p90: int
    p99: int
    max: int


def lengths(values: Sequence[int]) -> Lengths:
    """The statistics of at least one value."""
    ordered = sorted(values)
    p50, p90, p99 = (ordered[ceil(percent * len(ordered) / 100) - 1] for percent in (50, 90, 99))
    return Lengths(sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


@dataclass(slots=True)
class UnlimitedCache:
    """What a cache that never evicts finds: prompts and, where they are known, answers, one after the other.

    Blocks of ``block_size`` tokens. references: blocks of prompts, each partial last one included, as published figures
    of traces count; a pool shares full blocks only. hits: those of the longest run from the prompt's start that was
    seen before. unique: different blocks seen. content_known: whether any request says what its prompt is; without
    that, nothing is known to be shared.

    >>> from emberkv.workload.content import Content, Span, stream_key
    >>> prompt = {"content": Content([Span(stream_key("a"), 0, 32)]), "prompt_tokens": 32}
    >>> cache = UnlimitedCache(block_size=16)
    >>> for name in ("first", "second"):
    ...     cache.add(Request(request_id=name, arrival_time=0.0, output_tokens=1, max_output_tokens=1, **prompt))
    >>> cache.hits, cache.references, cache.token_hit_rate
    (2, 4, 0.5)
    """

    block_size: int
    references: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    content_known: bool = False
    _seen: set[BlockHash] = field(default_factory=set, repr=False)

    @property
    def unique(self) -> int:
        return len(self._seen)

    @property
    def block_hit_rate(self) -> float:
        return self.hits / self.references if self.references else 0.0

    @property
    def token_hit_rate(self) -> float:
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def add(self, request: Request) -> None:
        size, prompt = self.block_size, request.prompt_tokens
        blocks = request.block_references(ROOT, size)
        hits = next((at for at, block_hash in enumerate(blocks) if block_hash not in self._seen), len(blocks))
        self.content_known = self.content_known or len(request.content) > 0
        self.references += len(blocks)
        self.hits += hits
        self.prompt_tokens += prompt
        self.hit_tokens += min(hits * size, prompt)
        self._seen.update(blocks)
        known, filled = len(request.content) // size * size, prompt // size * size
        if known > filled:
            parent = blocks[filled // size - 1] if filled else ROOT
            self._seen.update(content_hashes(parent, request.content, filled, known, size))


@dataclass(frozen=True, slots=True)
class Description:
    """A workload in figures. duration: seconds from the first arrival to the last. sessions: 0 where it has none.

    >>> from emberkv.workload.content import Content
    >>> some = {"content": Content(), "prompt_tokens": 32, "output_tokens": 1, "max_output_tokens": 1}
    >>> found = describe(Request(request_id=str(at), arrival_time=at / 2, **some) for at in range(9))
    >>> found.requests, found.rate, found.prompt.p90
    (9, 2.0, 32)
    """

    requests: int
    duration: float
    prompt: Lengths
    output: Lengths
    sessions: int
    longest_session: int
    cache: UnlimitedCache

    @property
    def rate(self) -> float | None:
        """Requests a second; None when all arrive at once."""
        return (self.requests - 1) / self.duration if self.duration > 0 else None


DEFAULT_BLOCK_SIZE = 16


def describe(requests: Iterable[Request], block_size: int | None = None) -> Description | None:
    """Measure a workload in one pass; None when it is empty.

    block_size: tokens of a cache's block; by default that of the first request, or `DEFAULT_BLOCK_SIZE`.
    Memory grows with the number of different blocks and sessions.
    """
    prompts, outputs = array("q"), array("q")
    turns: Counter[str] = Counter()
    cache: UnlimitedCache | None = None
    first = last = 0.0
    for request in requests:
        if cache is None:
            cache = UnlimitedCache(block_size or request.block_size or DEFAULT_BLOCK_SIZE)
            first = request.arrival_time
        last = request.arrival_time
        prompts.append(request.prompt_tokens)
        outputs.append(request.output_tokens)
        if request.session_id:
            turns[request.session_id] += 1
        cache.add(request)
    if cache is None:
        return None
    return Description(
        requests=len(prompts),
        duration=last - first,
        prompt=lengths(prompts),
        output=lengths(outputs),
        sessions=len(turns),
        longest_session=max(turns.values(), default=0),
        cache=cache,
    )

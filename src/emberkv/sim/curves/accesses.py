"""The accesses of a request to a cache: the blocks that it looks up, and those that it leaves behind.

Counted as published figures of traces count: every block that a prompt takes is a reference, the partial last one
included. Where the answer is known, its full blocks stay in the cache too, and the prompt's partial block is part of
one of them; it then counts as a reference that cannot be found.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256

from emberkv.core.hashing import BlockHash
from emberkv.workload.chain import content_hashes
from emberkv.workload.request import Request

ROOT = sha256(b"emberkv-curves-1").digest()


@dataclass(frozen=True, slots=True)
class Access:
    """blocks: different ones, in chain order; the first ``asked`` are looked up, and all of them are left behind."""

    blocks: list[BlockHash]
    asked: int
    prompt_tokens: int
    block_size: int

    @property
    def references(self) -> int:
        return -(-self.prompt_tokens // self.block_size)

    def tokens(self, hits: int) -> int:
        """Prompt tokens that the first ``hits`` blocks hold."""
        return min(hits * self.block_size, self.prompt_tokens)


def access(request: Request, block_size: int, root: BlockHash = ROOT) -> Access:
    """root: requests of different roots share nothing."""
    prompt = request.prompt_tokens
    full = prompt - prompt % block_size
    known = len(request.content) - len(request.content) % block_size
    if known <= full:
        blocks = request.block_references(root, block_size)
        return Access(blocks, len(blocks), prompt, block_size)
    blocks = content_hashes(root, request.content, 0, known, block_size)
    return Access(blocks, full // block_size, prompt, block_size)


def accesses(
    requests: Iterable[Request], block_size: int, root_of: Callable[[Request], BlockHash] = lambda _: ROOT
) -> Iterator[Access]:
    """One request in memory at a time."""
    return (access(request, block_size, root_of(request)) for request in requests)


@dataclass(slots=True)
class Hits:
    """What a cache of one capacity found. capacity: in blocks; None is unlimited."""

    capacity: int | None
    references: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0

    @property
    def block_rate(self) -> float:
        return self.hits / self.references if self.references else 0.0

    @property
    def token_rate(self) -> float:
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

"""One request of a workload, recorded or generated, and its block hashes as the core's pool and cache use them."""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from emberkv.core.hashing import BlockHash
from emberkv.workload.content import Content, Span, stream_key


def chained(parent: BlockHash, blocks: Iterable[bytes]) -> list[BlockHash]:
    """The block hashes of blocks, given by their encoded tokens; ``parent`` is the hash of the block before."""
    block_hashes = []
    for tokens in blocks:
        parent = sha256(parent + tokens).digest()
        block_hashes.append(parent)
    return block_hashes


def content_hashes(parent: BlockHash, content: Content, start: int, stop: int, block_size: int) -> list[BlockHash]:
    """Chained block hashes of the blocks of tokens ``[start, stop)``, ``parent`` being that of the block before.

    ``start`` is a multiple of the block size; where ``stop`` is not, the last block hash is that of a partial block.
    """
    return chained(parent, content.encode_blocks(start, stop, block_size))


class ContentChain:
    """A core `Chain` over a content that is known beforehand: the prompt, and the answer that will be generated.

    length: the prompt's tokens. Each `append` takes the content's next token, whatever token is given: what a
    simulation generates is decided by the workload, and the cache must not change it.
    earlier: the chain of the conversation's turn before. Its block hashes are reused where this content begins with
    that one's.

    >>> content = Content([Span(stream_key("a prompt and its answer"), 0, 48)])
    >>> chain = ContentChain(bytes(32), content, length=40, block_size=16)
    >>> len(chain.block_hashes)
    2
    >>> chain.grow(8)
    >>> len(chain), len(chain.block_hashes)
    (48, 3)
    """

    __slots__ = ("_content", "_end", "_length", "_next_full", "_tokens", "block_hashes", "block_size", "root")

    def __init__(
        self, root: BlockHash, content: Content, length: int, block_size: int, earlier: "ContentChain | None" = None
    ) -> None:
        self.root = root
        self.block_size = block_size
        self._content = content
        self._end = len(content)
        self._length = 0
        known = earlier.blocks_shared(root, content, length, block_size) if earlier else 0
        self.block_hashes: list[BlockHash] = earlier.block_hashes[:known] if earlier else []
        self._tokens: list[bytes] = earlier._tokens[:known] if earlier else []
        self._next_full = (known + 1) * block_size  # the length at which one more block is full
        self.grow(length)

    def blocks_shared(self, root: BlockHash, content: Content, length: int, block_size: int) -> int:
        """How many blocks of this chain the first ``length`` tokens of ``content`` have too, all or none."""
        blocks = min(len(self.block_hashes), length // block_size)
        same = (root, block_size) == (self.root, self.block_size)
        return blocks if same and content.begins_like(self._content, blocks * block_size) else 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> int:
        at = range(self._length)[position]
        return self._content.token_ids(at, at + 1)[0]

    def slice(self, start: int, stop: int) -> list[int]:
        return self._content.token_ids(start, min(stop, self._length))

    def block_tokens(self, index: int) -> bytes:
        """Bytes that stand for the tokens of full block ``index``: the streams that they come from."""
        return self._tokens[index]

    def encoded_slice(self, start: int, stop: int) -> bytes:
        return self._content.encode(start, min(stop, self._length))

    def common_tokens(self, start: int, stop: int, encoded: bytes) -> int:
        return self._content.common_tokens(start, min(stop, self._length), encoded)

    def parent(self, index: int) -> BlockHash:
        return self.block_hashes[index - 1] if index else self.root

    def unsalted_parent(self, index: int) -> BlockHash:
        return self.parent(index)

    def owner(self, index: int) -> str:
        return ""

    def append(self, token: int) -> None:
        """Raises IndexError past the content's end."""
        if self._length + 1 < self._next_full and self._length < self._end:
            self._length += 1
        else:
            self.grow(1)

    def grow(self, count: int) -> None:
        """Take the content's next ``count`` tokens. Raises IndexError past the content's end."""
        length = self._length + count
        if length > self._end:
            raise IndexError(f"the content ends at {self._end} tokens; there is no further answer to take")
        self._length = length
        if length < self._next_full:
            return
        size, known = self.block_size, len(self.block_hashes)
        tokens = self._content.encode_blocks(known * size, length - length % size, size)
        self.block_hashes += chained(self.parent(known), tokens)
        self._tokens += tokens
        self._next_full = (length // size + 1) * size


class After(NamedTuple):
    """The request that this one follows: it arrives ``think_time`` seconds after that one completed.

    >>> After("s0.0", think_time=4.0).request_id
    's0.0'
    """

    request_id: str
    think_time: float


# not frozen, which would make one take several times as long to create; nothing changes one
@dataclass(slots=True, init=False, unsafe_hash=True)
class Request:
    """One request. arrival_time: seconds from the workload's start.

    content: what is known of the prompt and the answer together, from the first token on. It may end early, even
    before the prompt does, and is empty in traces of lengths only: the rest is private to this request and shared with
    no other request.
    block_size: the blocks in which a trace described the prompt, in tokens; None where it is known token by token, or
    by length only.
    output_tokens: the tokens really generated; max_output_tokens: the limit that was asked for.
    session_id: empty where the trace has no sessions. turn: 0 for a session's first request.

    >>> shared = Content([Span(stream_key("a system prompt"), 0, 32)])
    >>> lengths = {"prompt_tokens": 40, "output_tokens": 4, "max_output_tokens": 8}
    >>> first = Request(request_id="first", arrival_time=0.0, content=shared, **lengths)
    >>> second = Request(request_id="second", arrival_time=1.0, content=shared, **lengths)
    >>> blocks = zip(first.block_references(bytes(32), 16), second.block_references(bytes(32), 16), strict=True)
    >>> [one == other for one, other in blocks]
    [True, True, False]
    """

    request_id: str
    arrival_time: float
    prompt_tokens: int
    output_tokens: int
    max_output_tokens: int
    content: Content
    block_size: int | None
    client_id: str
    session_id: str
    turn: int
    after: After | None

    def __init__(
        self,
        *,
        request_id: str,
        arrival_time: float,
        prompt_tokens: int,
        output_tokens: int,
        max_output_tokens: int,
        content: Content,
        block_size: int | None = None,
        client_id: str = "",
        session_id: str = "",
        turn: int = 0,
        after: After | None = None,
    ) -> None:
        self.request_id = request_id
        self.arrival_time = arrival_time
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.max_output_tokens = max_output_tokens
        self.content = content
        self.block_size = block_size
        self.client_id = client_id
        self.session_id = session_id
        self.turn = turn
        self.after = after

    def full_content(self) -> Content:
        """Prompt and answer, to the last token."""
        missing = self.prompt_tokens + self.output_tokens - len(self.content)
        if missing <= 0:
            return self.content
        return self.content.followed_by([Span(stream_key("private", self.request_id), 0, missing)])

    def chain(self, root: BlockHash, block_size: int, earlier: ContentChain | None = None) -> ContentChain:
        """The chain of this request as a scheduler's sequence has it: the prompt, and `append` takes its own answer.

        earlier: the chain of the turn before, whose block hashes are reused for what both have.
        """
        return ContentChain(root, self.full_content(), self.prompt_tokens, block_size, earlier)

    def block_references(self, root: BlockHash, block_size: int) -> list[BlockHash]:
        """The hash of every block that the prompt takes, the partial last one included."""
        content = self.content if len(self.content) >= self.prompt_tokens else self.full_content()
        return content_hashes(root, content, 0, self.prompt_tokens, block_size)

"""Block hashes of a content, as the core's pool and cache use them."""

from collections.abc import Iterable
from hashlib import sha256

from emberkv.core.hashing import BlockHash
from emberkv.workload.content import Content


def chained(parent: BlockHash, blocks: Iterable[bytes]) -> list[BlockHash]:
    """The block hashes of blocks told by their encoded tokens, ``parent`` being that of the block before."""
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
    earlier: the chain of the conversation's turn before, whose block hashes are then not hashed again as far as this
    content begins with that one's.
    """

    __slots__ = ("_content", "_length", "_tokens", "block_hashes", "block_size", "root")

    def __init__(
        self, root: BlockHash, content: Content, length: int, block_size: int, earlier: "ContentChain | None" = None
    ) -> None:
        self.root = root
        self.block_size = block_size
        self._content = content
        self._length = 0
        known = earlier.blocks_shared(root, content, length, block_size) if earlier else 0
        self.block_hashes: list[BlockHash] = earlier.block_hashes[:known] if earlier else []
        self._tokens: list[bytes] = earlier._tokens[:known] if earlier else []
        self.grow(length)

    def blocks_shared(self, root: BlockHash, content: Content, length: int, block_size: int) -> int:
        """How many blocks of this chain the first ``length`` tokens of ``content`` have too, all or none."""
        blocks = min(len(self.block_hashes), length // block_size)
        same = (root, block_size) == (self.root, self.block_size)
        if not same or content.cut(0, blocks * block_size) != self._content.cut(0, blocks * block_size):
            return 0
        return blocks

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> int:
        at = range(self._length)[position]
        return self._content.token_ids(at, at + 1)[0]

    def slice(self, start: int, stop: int) -> list[int]:
        return self._content.token_ids(start, min(stop, self._length))

    def block_tokens(self, index: int) -> bytes:
        """What stands for the tokens of full block ``index``: where they come from."""
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
        self.grow(1)

    def grow(self, count: int) -> None:
        """Take the content's next ``count`` tokens. Raises IndexError past the content's end."""
        length = self._length + count
        if length > len(self._content):
            raise IndexError(f"the content ends at {len(self._content)} tokens; there is no further answer to take")
        self._length = length
        known = len(self.block_hashes)
        if length // self.block_size > known:
            start, stop = known * self.block_size, length - length % self.block_size
            tokens = self._content.encode_blocks(start, stop, self.block_size)
            self.block_hashes += chained(self.parent(known), tokens)
            self._tokens += tokens

"""The block hashes of the latest prompts, so that a conversation's next turn is hashed only from where it goes on."""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from emberkv.core.hashing import TOKEN_BYTES, BlockHash, TokenChain, common_tokens, encode_tokens, token_array

MAX_PROMPTS = 64
"""All are looked at for each prompt, which takes tens of microseconds."""

MAX_BYTES = 16 << 20


class _Prompt(NamedTuple):
    """identity: what its block hashes depend on beside its tokens. tokens: of its full blocks, encoded."""

    identity: tuple[BlockHash, bytes, int]
    tokens: bytes
    block_hashes: list[BlockHash]

    @property
    def size(self) -> int:
        """In bytes, about: a block hash is 65 and a pointer."""
        return len(self.tokens) + 73 * len(self.block_hashes)


class RecentChains:
    """Makes chains, and remembers the latest prompts of those that it is to. Safe to use from many threads.

    max_bytes: of all together, the first ones forgotten first; as are those beyond `MAX_PROMPTS`.
    """

    def __init__(self, block_size: int, max_bytes: int = MAX_BYTES) -> None:
        self._block_size = block_size
        self._width = block_size * TOKEN_BYTES
        self._max_bytes = max_bytes
        self._bytes = 0
        self._prompts: deque[_Prompt] = deque()
        self._lock = threading.Lock()

    @property
    def bytes_used(self) -> int:
        """Never above the limit."""
        return self._bytes

    def chain(
        self, root: BlockHash, tokens: Sequence[int], *, owner: str, salt: bytes, public_blocks: int, remember: bool
    ) -> TokenChain:
        """See `TokenChain`."""
        ids = token_array(tokens)
        full = len(ids) // self._block_size
        public_blocks = min(public_blocks, full)
        identity = root, salt, public_blocks
        encoded = encode_tokens(ids[: full * self._block_size])
        with self._lock:
            known = self._known(identity, encoded)
        chain = TokenChain(
            root, ids, self._block_size, owner=owner, salt=salt, public_blocks=public_blocks, known=known
        )
        if remember and full:
            self._remember(_Prompt(identity, encoded, chain.block_hashes[:full]))
        return chain

    def _known(self, identity: tuple[BlockHash, bytes, int], tokens: bytes) -> Iterable[BlockHash]:
        """The block hashes of the blocks that are also a remembered prompt's.

        A turn goes on behind the whole of the one before, so a look at where the shorter of two ends finds it. If none
        is like that, the latest with the same first block is as good a guess as any.
        """
        width, best, most = self._width, None, 0
        for prompt in self._prompts:
            if prompt.identity != identity:
                continue
            end = min(len(tokens), len(prompt.tokens))
            if end > most and prompt.tokens[end - width : end] == tokens[end - width : end]:
                if prompt.tokens[:end] == tokens[:end]:
                    best, most = prompt, end
            elif not most and prompt.tokens[:width] == tokens[:width]:
                best = prompt
        if best is None:
            return ()
        common = most or common_tokens(best.tokens, tokens) * TOKEN_BYTES
        return best.block_hashes[: common // width]

    def _remember(self, prompt: _Prompt) -> None:
        if prompt.size > self._max_bytes:
            return
        with self._lock:
            self._prompts.append(prompt)
            self._bytes += prompt.size
            while self._bytes > self._max_bytes or len(self._prompts) > MAX_PROMPTS:
                self._bytes -= self._prompts.popleft().size

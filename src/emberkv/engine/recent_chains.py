"""The chains of the latest prompts, so that a conversation's next turn is hashed only from where it goes on."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

from emberkv.core.hashing import Identity, TokenChain, encode_tokens, token_array

MAX_BLOCKS = 65_536
"""About 200 bytes each, for tokens and identity."""


class RecentChains:
    """Makes chains. Of those with one beginning, a first block under a salt, the latest is remembered.

    max_blocks: of all together; the least recently used are forgotten. Safe to use from many threads.
    """

    def __init__(self, block_size: int, max_blocks: int = MAX_BLOCKS) -> None:
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._blocks = 0
        self._chains: OrderedDict[tuple[bytes, bytes], tuple[TokenChain, int]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def blocks(self) -> int:
        """How many are remembered."""
        return self._blocks

    def chain(
        self, root: Identity, tokens: Sequence[int], *, owner: str, salt: bytes, public_blocks: int
    ) -> TokenChain:
        """See `TokenChain`."""
        ids = token_array(tokens)
        key = salt, encode_tokens(ids[: self._block_size])
        with self._lock:
            earlier, _ = self._chains.get(key, (None, 0))
        chain = TokenChain(
            root, ids, self._block_size, owner=owner, salt=salt, public_blocks=public_blocks, earlier=earlier
        )
        self._remember(key, chain)
        return chain

    def _remember(self, key: tuple[bytes, bytes], chain: TokenChain) -> None:
        blocks = len(chain.identities)
        if not 0 < blocks <= self._max_blocks:
            return
        with self._lock:
            _, replaced = self._chains.pop(key, (None, 0))
            self._chains[key] = chain, blocks
            self._blocks += blocks - replaced
            while self._blocks > self._max_blocks:
                _, (_, forgotten) = self._chains.popitem(last=False)
                self._blocks -= forgotten

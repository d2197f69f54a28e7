"""Block identity: a chained SHA-256 from which every other key follows.

A full block's identity is the digest of its parent's identity and its own tokens. The chain starts at a root that
covers everything else that the KV state depends on, so equal identities mean equal state.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Protocol

Identity = bytes
"""A block's 32-byte SHA-256 digest."""

TOKEN_BYTES = 4


def root_identity(*, fingerprint: str, dtype: str, layout: str, block_size: int, salt: bytes = b"") -> Identity:
    """The parent of every first block.

    fingerprint: the weights' identity by content; layout: how a block's bytes are arranged and computed; salt: only
    equal salts share blocks. Fields are length-prefixed, so that no two sets of fields run together.
    """
    digest = sha256(b"emberkv-root-1")
    for field in (fingerprint.encode(), dtype.encode(), layout.encode(), str(block_size).encode(), salt):
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.digest()


def token_array(tokens: Iterable[int]) -> "array[int]":
    """Token ids as 32-bit integers. Raises OverflowError for an id outside that range."""
    return array("i", tokens)


def encode_tokens(tokens: "array[int]") -> bytes:
    """Four little-endian bytes a token, on every machine."""
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return tokens.tobytes()


def chain_identities(parent: Identity, tokens: bytes, block_size: int) -> list[Identity]:
    """The identities of the full blocks of ``tokens`` (encoded), the first one's parent being ``parent``."""
    width = block_size * TOKEN_BYTES
    identities = []
    for start in range(0, len(tokens) - width + 1, width):
        parent = sha256(parent + tokens[start : start + width]).digest()
        identities.append(parent)
    return identities


class Chain(Protocol):
    """A sequence as the core sees it: its length and its full blocks' identities, however its tokens are described.

    ``block_tokens`` is what a hit is compared by: equal bytes if and only if the tokens are equal. `TokenChain` holds
    token ids; a recorded or generated workload may know its tokens by origin only.
    """

    block_size: int

    @property
    def identities(self) -> Sequence[Identity]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> int: ...

    def slice(self, start: int, stop: int) -> list[int]: ...

    def block_tokens(self, index: int) -> bytes: ...

    def parent(self, index: int) -> Identity: ...

    def append(self, token: int) -> None: ...


class TokenChain:
    """A sequence's tokens with the identities of its full blocks, each hashed once, when it fills."""

    __slots__ = ("_tokens", "block_size", "identities", "root")

    def __init__(self, root: Identity, tokens: Iterable[int], block_size: int) -> None:
        self.root = root
        self.block_size = block_size
        self._tokens = token_array(tokens)
        self.identities = chain_identities(root, self.encoded(), block_size)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, position: int) -> int:
        return self._tokens[position]

    def slice(self, start: int, stop: int) -> list[int]:
        return self._tokens[start:stop].tolist()

    def encoded(self) -> bytes:
        return encode_tokens(self._tokens)

    def block_tokens(self, index: int) -> bytes:
        """The encoded tokens of full block ``index``."""
        start = index * self.block_size
        return encode_tokens(self._tokens[start : start + self.block_size])

    def parent(self, index: int) -> Identity:
        return self.identities[index - 1] if index else self.root

    def append(self, token: int) -> None:
        self._tokens.append(token)
        index, rest = divmod(len(self._tokens), self.block_size)
        if not rest:
            self.identities += chain_identities(self.parent(index - 1), self.block_tokens(index - 1), self.block_size)

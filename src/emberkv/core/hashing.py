"""The block hash: a chained SHA-256 over model, block size, tenant's salt and all tokens up to a block's end.

    root    = SHA-256("emberkv-root-2" | len(fingerprint) as uint64 | fingerprint | block_size as uint64)
    private = SHA-256("emberkv-salt-1" | parent | salt)        in place of the first private block's parent
    block   = SHA-256(parent | tokens)                         parent: the block before it, the root for the first
    tail    = SHA-256("emberkv-partial-1" | parent | tokens)   a last block with fewer tokens than a full one

Hashes are 32 bytes, integers are little-endian, a token is an int32, the fingerprint is UTF-8 text (of weights and
config, by content; see `emberkv.engine.torch.model.fingerprint`), and ``|`` joins bytes. Nothing about the machine or
the process enters: every process that knows the fingerprint and the tokens computes the same hashes. Whether the
*bytes* of a stored block can be used is another question; the namespace of the stored block answers it
(`emberkv.engine.torch.namespace`).
"""

import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Protocol

BlockHash = bytes
"""A block's 32-byte SHA-256 digest."""

TOKEN_BYTES = 4

PUBLIC_OWNER = "public"
"""The owner of blocks that an operator declared to be shared by all tenants."""


def root_hash(fingerprint: str, block_size: int) -> BlockHash:
    """The parent of every first block. fingerprint: of the model's weights and config, by their content."""
    name = fingerprint.encode()
    return sha256(
        b"emberkv-root-2" + len(name).to_bytes(8, "little") + name + block_size.to_bytes(8, "little")
    ).digest()


def salted(parent: BlockHash, salt: bytes) -> BlockHash:
    """The parent of the first block that only holders of ``salt`` share; ``parent`` itself without a salt."""
    return sha256(b"emberkv-salt-1" + parent + salt).digest() if salt else parent


def token_array(tokens: Iterable[int]) -> "array[int]":
    """Token ids as 32-bit integers. Raises OverflowError for an id outside that range."""
    return array("i", tokens)


def encode_tokens(tokens: "array[int]") -> bytes:
    """Four little-endian bytes a token, on every machine."""
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return tokens.tobytes()


def decode_tokens(encoded: bytes) -> tuple[int, ...]:
    """The token ids that `encode_tokens` encoded."""
    starts = range(0, len(encoded), TOKEN_BYTES)
    return tuple(int.from_bytes(encoded[at : at + TOKEN_BYTES], "little", signed=True) for at in starts)


def hash_blocks(parent: BlockHash, tokens: bytes, block_size: int) -> list[BlockHash]:
    """The block hashes of the full blocks of ``tokens`` (encoded), the first one's parent being ``parent``."""
    width = block_size * TOKEN_BYTES
    block_hashes = []
    for start in range(0, len(tokens) - width + 1, width):
        parent = sha256(parent + tokens[start : start + width]).digest()
        block_hashes.append(parent)
    return block_hashes


def prompt_hashes(
    fingerprint: str, tokens: Iterable[int], *, block_size: int, salt: bytes = b"", public_blocks: int = 0
) -> list[BlockHash]:
    """The hashes of a prompt's full blocks, as every process computes them.

    salt: the tenant's. public_blocks: how many first blocks all tenants share, and so have no salt.

    Raises OverflowError for a token outside 32 bits.

        prompt_hashes("0f343b09", [1, 2, 3, 4, 5], block_size=2)  # two hashes of 32 bytes
    """
    root = root_hash(fingerprint, block_size)
    return TokenChain(root, tokens, block_size, salt=salt, public_blocks=public_blocks).block_hashes


def partial_hash(parent: BlockHash, tokens: bytes) -> BlockHash:
    """The hash of a block that holds fewer tokens than a full one; never equal to a full block's."""
    return sha256(b"emberkv-partial-1" + parent + tokens).digest()


def partial_hashes(parent: BlockHash, tokens: bytes, counts: Iterable[int]) -> dict[int, BlockHash]:
    """The `partial_hash` of each of the first ``counts`` of ``tokens``, encoded, which are hashed once for all.

    >>> partial_hashes(bytes(32), bytes(12), [2])[2] == partial_hash(bytes(32), bytes(8))
    True
    """
    begun = sha256(b"emberkv-partial-1" + parent)
    found, at = {}, 0
    for count in sorted(counts):
        begun.update(tokens[at * TOKEN_BYTES : count * TOKEN_BYTES])
        found[count] = begun.copy().digest()
        at = count
    return found


def partial_siblings_hash(parent: BlockHash) -> BlockHash:
    """Stands for all partial blocks with one parent where blocks are removed; it is no block's own hash."""
    return partial_hash(parent, b"")


def common_tokens(one: bytes, other: bytes) -> int:
    """How many leading tokens two encoded runs have in common."""
    shorter = min(len(one), len(other)) // TOKEN_BYTES
    ends = range(TOKEN_BYTES, (shorter + 1) * TOKEN_BYTES, TOKEN_BYTES)
    return bisect_left(ends, True, key=lambda end: one[:end] != other[:end])


class Chain(Protocol):
    """A sequence as the core sees it: its length and its full blocks' hashes, however its tokens are described.

    ``block_tokens`` is what a hit is compared by: equal bytes if and only if the tokens are equal. `TokenChain` holds
    token ids; a recorded or generated workload may know its tokens by origin only. Encoded blocks that begin with more
    equal tokens lie nearer to each other in the order of their bytes.
    """

    block_size: int

    @property
    def block_hashes(self) -> Sequence[BlockHash]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> int: ...

    def slice(self, start: int, stop: int) -> list[int]: ...

    def block_tokens(self, index: int) -> bytes: ...

    def encoded_slice(self, start: int, stop: int) -> bytes:
        """What stands for tokens ``[start, stop)`` of one block."""
        ...

    def common_tokens(self, start: int, stop: int, encoded: bytes) -> int:
        """How many leading tokens of ``[start, stop)`` an encoded block begins with."""
        ...

    def parent(self, index: int) -> BlockHash: ...

    def unsalted_parent(self, index: int) -> BlockHash:
        """As `parent`, but at the first private block the hash of what lies before it, without the tenant's salt."""
        ...

    def owner(self, index: int) -> str:
        """The tenant to whose share block ``index`` counts; "" where there is only one, or `PUBLIC_OWNER`."""
        ...

    def append(self, token: int) -> None: ...


class TokenChain:
    """A sequence's tokens with the block hashes of its full blocks, each hashed once, when it fills.

    root: the model's. The first ``public_blocks`` full blocks of ``tokens`` are chained from it and shared by all; the
    salt enters where they end, and all from there on is ``owner``'s. known: the block hashes of its first blocks, if
    they were hashed before.
    """

    __slots__ = (
        "_encoded",
        "_owner",
        "_private_parent",
        "_tokens",
        "block_hashes",
        "block_size",
        "public_blocks",
        "root",
        "salt",
    )  # fmt: skip

    def __init__(
        self,
        root: BlockHash,
        tokens: Iterable[int],
        block_size: int,
        *,
        owner: str = "",
        salt: bytes = b"",
        public_blocks: int = 0,
        known: Iterable[BlockHash] = (),
    ) -> None:
        self.root = root
        self.salt = salt
        self.block_size = block_size
        self._owner = owner
        self._tokens = token_array(tokens)
        self._encoded = self.encoded()  # of the prompt alone
        public = self.public_blocks = min(public_blocks, len(self._tokens) // block_size)
        self.block_hashes = list(known)
        self._hash(self.block_hashes[-1] if self.block_hashes else root, public)
        self._private_parent = salted(self.block_hashes[public - 1] if public else root, salt)
        is_private = len(self.block_hashes) > public
        self._hash(self.block_hashes[-1] if is_private else self._private_parent, len(self._tokens) // block_size)

    def _hash(self, parent: BlockHash, stop: int) -> None:
        """The prompt's blocks from the first without a block hash to ``stop``."""
        first, width = len(self.block_hashes), self.block_size * TOKEN_BYTES
        if first < stop:  # mypyc raises SystemError for a slice of bytes that would end before it begins
            self.block_hashes += hash_blocks(parent, self._encoded[first * width : stop * width], self.block_size)

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
        start, stop = index * self.block_size, (index + 1) * self.block_size
        encoded = self._encoded[start * TOKEN_BYTES : stop * TOKEN_BYTES]
        return encoded if stop * TOKEN_BYTES <= len(self._encoded) else encode_tokens(self._tokens[start:stop])

    def encoded_slice(self, start: int, stop: int) -> bytes:
        return encode_tokens(self._tokens[start:stop])

    def common_tokens(self, start: int, stop: int, encoded: bytes) -> int:
        return common_tokens(self.encoded_slice(start, stop), encoded)

    def parent(self, index: int) -> BlockHash:
        if index == self.public_blocks:
            return self._private_parent
        return self.unsalted_parent(index)

    def unsalted_parent(self, index: int) -> BlockHash:
        return self.block_hashes[index - 1] if index else self.root

    def owner(self, index: int) -> str:
        return PUBLIC_OWNER if index < self.public_blocks else self._owner

    def append(self, token: int) -> None:
        self._tokens.append(token)
        index, rest = divmod(len(self._tokens), self.block_size)
        if not rest:
            self.block_hashes += hash_blocks(self.parent(index - 1), self.block_tokens(index - 1), self.block_size)


class PublicPrefixes:
    """Declared token sequences, in whole blocks. The part of a block that a sequence's end leaves over is not public.

    A tree with a block's tokens on each branch: a prompt costs one dict look-up for each block that is public, and one
    more. prefixes: what of the sequences is public.
    """

    def __init__(self, prefixes: Iterable[Sequence[int]], block_size: int) -> None:
        self.block_size = block_size
        self._root: dict[tuple[int, ...], _Branches] = {}
        self.prefixes: list[Sequence[int]] = []
        for tokens in prefixes:
            branches = self._root
            self.prefixes.append(tokens[: len(tokens) - len(tokens) % block_size])
            for start in range(0, len(tokens) - block_size + 1, block_size):
                branches = branches.setdefault(tuple(tokens[start : start + block_size]), {})

    def blocks_of(self, tokens: Sequence[int]) -> int:
        """How many of the first full blocks of ``tokens`` are those of one declared sequence."""
        branches, count = self._root, 0
        while True:
            start = count * self.block_size
            following = branches.get(tuple(tokens[start : start + self.block_size]))
            if following is None:
                return count
            branches, count = following, count + 1


_Branches = dict[tuple[int, ...], "_Branches"]

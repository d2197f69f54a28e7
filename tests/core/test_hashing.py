"""Block identities: what they cover, and that they are the same whichever way a chain came to be."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.hashing import (
    PUBLIC_OWNER,
    TokenChain,
    chain_identities,
    encode_tokens,
    root_identity,
    salted,
    token_array,
)

TOKENS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40)
ROOT = root_identity(fingerprint="weights", dtype="float32", layout="paged", block_size=2)


def test_tokens_are_four_little_endian_bytes() -> None:
    assert encode_tokens(token_array([1, 256, -1])) == bytes([1, 0, 0, 0, 0, 1, 0, 0, 255, 255, 255, 255])


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1])
def test_a_token_outside_32_bits_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        TokenChain(ROOT, [token], 2)


def test_a_root_is_the_digest_of_its_length_prefixed_fields() -> None:
    def field(content: bytes) -> bytes:
        return len(content).to_bytes(8, "little") + content

    expected = sha256(b"emberkv-root-1" + field(b"f") + field(b"bf16") + field(b"l") + field(b"16") + field(b"s"))
    root = root_identity(fingerprint="f", dtype="bf16", layout="l", block_size=16, salt=b"s")
    assert root == expected.digest()


def test_each_field_of_the_root_matters() -> None:
    roots = {
        root_identity(fingerprint="a", dtype="b", layout="c", block_size=16),
        root_identity(fingerprint="x", dtype="b", layout="c", block_size=16),
        root_identity(fingerprint="a", dtype="x", layout="c", block_size=16),
        root_identity(fingerprint="a", dtype="b", layout="x", block_size=16),
        root_identity(fingerprint="a", dtype="b", layout="c", block_size=32),
        root_identity(fingerprint="a", dtype="b", layout="c", block_size=16, salt=b"x"),
        root_identity(fingerprint="ab", dtype="", layout="c", block_size=16),
    }
    assert len(roots) == 7


def test_an_identity_chains_its_parent_and_its_own_tokens() -> None:
    chain = TokenChain(ROOT, [1, 2, 3, 4, 5], 2)
    first = sha256(ROOT + bytes([1, 0, 0, 0, 2, 0, 0, 0])).digest()
    second = sha256(first + bytes([3, 0, 0, 0, 4, 0, 0, 0])).digest()
    assert chain.identities == [first, second]
    assert (chain.parent(0), chain.parent(1)) == (ROOT, first)


def test_a_chain_reads_like_a_sequence_of_tokens() -> None:
    chain = TokenChain(ROOT, [7, 8, 9], 2)
    assert (len(chain), chain[2], chain.slice(1, 3)) == (3, 9, [8, 9])
    assert chain.block_tokens(0) == encode_tokens(token_array([7, 8]))


@given(tokens=TOKENS, block_size=st.integers(1, 5), data=st.data())
def test_appending_hashes_as_building_does(tokens: list[int], block_size: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(tokens)))
    grown = TokenChain(ROOT, tokens[:start], block_size)
    for token in tokens[start:]:
        grown.append(token)
    whole = TokenChain(ROOT, tokens, block_size)
    assert grown.identities == whole.identities == chain_identities(ROOT, whole.encoded(), block_size)
    assert len(whole.identities) == len(tokens) // block_size
    assert grown.encoded() == whole.encoded()


@given(left=TOKENS, right=TOKENS)
def test_identities_are_equal_exactly_as_far_as_the_tokens_are(left: list[int], right: list[int]) -> None:
    one, other = TokenChain(ROOT, left, 2), TokenChain(ROOT, right, 2)
    for index, (mine, theirs) in enumerate(zip(one.identities, other.identities, strict=False)):
        stop = 2 * (index + 1)
        assert (mine == theirs) == (left[:stop] == right[:stop])


def test_a_salt_enters_where_the_public_part_ends() -> None:
    plain = TokenChain(ROOT, range(8), 2)
    mine = TokenChain(ROOT, range(8), 2, owner="me", salt=b"s", public_blocks=2)
    theirs = TokenChain(ROOT, range(8), 2, owner="they", salt=b"t", public_blocks=2)
    assert mine.identities[:2] == theirs.identities[:2] == plain.identities[:2]
    assert not set(mine.identities[2:]) & {*theirs.identities, *plain.identities}
    assert mine.parent(2) == salted(plain.identities[1], b"s")
    assert mine.identities[2] == sha256(mine.parent(2) + mine.block_tokens(2)).digest()
    assert [mine.owner(index) for index in range(4)] == [PUBLIC_OWNER, PUBLIC_OWNER, "me", "me"]
    assert plain.owner(0) == ""


def test_without_public_blocks_the_salt_enters_at_the_root() -> None:
    mine = TokenChain(ROOT, range(4), 2, salt=b"s")
    assert (mine.root, mine.parent(0)) == (ROOT, salted(ROOT, b"s"))
    assert mine.identities == chain_identities(salted(ROOT, b"s"), mine.encoded(), 2)


def test_no_salt_changes_nothing() -> None:
    assert salted(ROOT, b"") == ROOT
    assert salted(ROOT, b"s") == sha256(b"emberkv-salt-1" + ROOT + b"s").digest()


def test_what_is_generated_is_never_public() -> None:
    mine = TokenChain(ROOT, [1, 2, 3], 2, owner="me", salt=b"s", public_blocks=3)
    mine.append(4)
    assert [mine.owner(index) for index in range(2)] == [PUBLIC_OWNER, "me"]
    assert mine.parent(1) == salted(mine.identities[0], b"s")


@given(tokens=TOKENS, public=st.integers(0, 6), data=st.data())
def test_appending_to_a_salted_chain_hashes_as_building_does(
    tokens: list[int], public: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(min(2 * public, len(tokens)), len(tokens)))
    grown = TokenChain(ROOT, tokens[:start], 2, salt=b"s", public_blocks=public)
    for token in tokens[start:]:
        grown.append(token)
    whole = TokenChain(ROOT, tokens, 2, salt=b"s", public_blocks=start // 2 if public > start // 2 else public)
    assert grown.identities == whole.identities
    for index, identity in enumerate(whole.identities):
        assert identity == sha256(whole.parent(index) + whole.block_tokens(index)).digest()

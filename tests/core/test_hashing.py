"""Block hashes: what they cover, and that they are the same whichever way a chain came to be."""

from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.hashing import (
    PUBLIC_OWNER,
    TokenChain,
    encode_tokens,
    hash_blocks,
    partial_hash,
    prompt_hashes,
    root_hash,
    salted,
    token_array,
)

TOKENS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40)
ROOT = root_hash("weights", 2)


def test_tokens_are_four_little_endian_bytes() -> None:
    assert encode_tokens(token_array([1, 256, -1])) == bytes([1, 0, 0, 0, 0, 1, 0, 0, 255, 255, 255, 255])


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1])
def test_a_token_outside_32_bits_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        TokenChain(ROOT, [token], 2)


def test_a_root_is_the_digest_of_the_length_prefixed_fingerprint_and_the_block_size() -> None:
    expected = sha256(b"emberkv-root-2" + bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"fp" + bytes([16, 0, 0, 0, 0, 0, 0, 0]))
    assert root_hash("fp", 16) == expected.digest()


def test_fingerprint_and_block_size_matter_to_the_root() -> None:
    assert len({root_hash("a", 16), root_hash("b", 16), root_hash("a", 32), root_hash("", 16)}) == 4


FINGERPRINT = "0f343b0931126a20f133d67c2b018a3b"
TOKEN_IDS = [101, 102, 103, 104, 201, 202, 203, 204, 301]
VECTORS = {
    "root": "856459e50dba8dc7cf1005084a8af974acd60d4f0a42f9271348004fe8784880",
    "first": "1ab53a571989ded19d497c30e36f9aa648ad8f9fe0af01f0138532092b126fbf",
    "second": "b43b1e8f1c65b2e35f99a23fd674d6f57dccfb27e075dbf781a0feab7af76530",
    "tail": "b657b4b60d4534afccbce26f8fa3dce68ebfd4d7c228e58506b13bd2b365c71f",
    "first, salted": "0893ff4233a85514a7e8c41d47f6276796df4b11fbf42e57343d9a773b5a0aa4",
    "second, salted": "5ff86ce367e6aa2f5df8c14d6e888d3f444453c543df6e7826d424da626f7bc2",
    "second, salted behind a public block": "189cdc2dc3b47910a66c2174054ef240821f73aa8d4a0b8dc46f3ca429f7af78",
}
"""Blocks of 4 tokens; the salt is ``b"tenant"``. They never change: processes and machines compare hashes."""


def test_the_published_vectors() -> None:
    plain = prompt_hashes(FINGERPRINT, TOKEN_IDS, block_size=4)
    salted_ones = prompt_hashes(FINGERPRINT, TOKEN_IDS, block_size=4, salt=b"tenant")
    behind = prompt_hashes(FINGERPRINT, TOKEN_IDS, block_size=4, salt=b"tenant", public_blocks=1)
    tail = partial_hash(plain[-1], encode_tokens(token_array(TOKEN_IDS[8:])))
    assert behind[0] == plain[0]
    found = [root_hash(FINGERPRINT, 4), *plain, tail, *salted_ones, behind[1]]
    assert [each.hex() for each in found] == list(VECTORS.values())


def test_the_documentation_has_the_vectors() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [name for name, vector in VECTORS.items() if f"| {name} | `{vector}` |" not in page] == []
    assert f"`{FINGERPRINT}`" in page
    assert str(TOKEN_IDS)[1:-1] in page


def test_a_hash_chains_its_parent_and_its_own_tokens() -> None:
    chain = TokenChain(ROOT, [1, 2, 3, 4, 5], 2)
    first = sha256(ROOT + bytes([1, 0, 0, 0, 2, 0, 0, 0])).digest()
    second = sha256(first + bytes([3, 0, 0, 0, 4, 0, 0, 0])).digest()
    assert chain.block_hashes == [first, second]
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
    assert grown.block_hashes == whole.block_hashes == hash_blocks(ROOT, whole.encoded(), block_size)
    assert len(whole.block_hashes) == len(tokens) // block_size
    assert grown.encoded() == whole.encoded()


@given(left=TOKENS, right=TOKENS)
def test_hashes_are_equal_exactly_as_far_as_the_tokens_are(left: list[int], right: list[int]) -> None:
    one, other = TokenChain(ROOT, left, 2), TokenChain(ROOT, right, 2)
    for index, (mine, theirs) in enumerate(zip(one.block_hashes, other.block_hashes, strict=False)):
        stop = 2 * (index + 1)
        assert (mine == theirs) == (left[:stop] == right[:stop])


def test_a_salt_enters_where_the_public_part_ends() -> None:
    plain = TokenChain(ROOT, range(8), 2)
    mine = TokenChain(ROOT, range(8), 2, owner="me", salt=b"s", public_blocks=2)
    theirs = TokenChain(ROOT, range(8), 2, owner="they", salt=b"t", public_blocks=2)
    assert mine.block_hashes[:2] == theirs.block_hashes[:2] == plain.block_hashes[:2]
    assert not set(mine.block_hashes[2:]) & {*theirs.block_hashes, *plain.block_hashes}
    assert mine.parent(2) == salted(plain.block_hashes[1], b"s")
    assert mine.block_hashes[2] == sha256(mine.parent(2) + mine.block_tokens(2)).digest()
    assert [mine.owner(index) for index in range(4)] == [PUBLIC_OWNER, PUBLIC_OWNER, "me", "me"]
    assert plain.owner(0) == ""


def test_without_public_blocks_the_salt_enters_at_the_root() -> None:
    mine = TokenChain(ROOT, range(4), 2, salt=b"s")
    assert (mine.root, mine.parent(0)) == (ROOT, salted(ROOT, b"s"))
    assert mine.block_hashes == hash_blocks(salted(ROOT, b"s"), mine.encoded(), 2)


def test_no_salt_changes_nothing() -> None:
    assert salted(ROOT, b"") == ROOT
    assert salted(ROOT, b"s") == sha256(b"emberkv-salt-1" + ROOT + b"s").digest()


def test_what_is_generated_is_never_public() -> None:
    mine = TokenChain(ROOT, [1, 2, 3], 2, owner="me", salt=b"s", public_blocks=3)
    mine.append(4)
    assert [mine.owner(index) for index in range(2)] == [PUBLIC_OWNER, "me"]
    assert mine.parent(1) == salted(mine.block_hashes[0], b"s")


@given(tokens=TOKENS, public=st.integers(0, 6), data=st.data())
def test_hashing_goes_on_behind_known_hashes(tokens: list[int], public: int, data: st.DataObject) -> None:
    whole = TokenChain(ROOT, tokens, 2, salt=b"s", public_blocks=public)
    known = whole.block_hashes[: data.draw(st.integers(0, len(whole.block_hashes)))]
    again = TokenChain(ROOT, tokens, 2, salt=b"s", public_blocks=public, known=known)
    assert again.block_hashes == whole.block_hashes
    assert [again.parent(index) for index in range(len(known) + 1)] == [
        whole.parent(index) for index in range(len(known) + 1)
    ]


@given(tokens=TOKENS, public=st.integers(0, 6), data=st.data())
def test_appending_to_a_salted_chain_hashes_as_building_does(
    tokens: list[int], public: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(min(2 * public, len(tokens)), len(tokens)))
    grown = TokenChain(ROOT, tokens[:start], 2, salt=b"s", public_blocks=public)
    for token in tokens[start:]:
        grown.append(token)
    whole = TokenChain(ROOT, tokens, 2, salt=b"s", public_blocks=start // 2 if public > start // 2 else public)
    assert grown.block_hashes == whole.block_hashes
    for index, block_hash in enumerate(whole.block_hashes):
        assert block_hash == sha256(whole.parent(index) + whole.block_tokens(index)).digest()

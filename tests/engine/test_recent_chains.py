"""Chains that take their first block hashes from an earlier prompt are the chains that are hashed from their start."""

from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.hashing import TokenChain
from emberkv.engine.recent_chains import MAX_PROMPTS, RecentChains

SIZE = 4
ROOT = bytes(32)
BLOCK_BYTES = 4 * SIZE + 73

prompts = st.tuples(
    st.lists(st.integers(0, 1), max_size=30), st.sampled_from([b"", b"ann", b"bob"]), st.integers(0, 4), st.booleans()
)


def recent(chains: RecentChains, tokens: list[int], salt: bytes = b"", *, remember: bool = True) -> TokenChain:
    return chains.chain(ROOT, tokens, owner="", salt=salt, public_blocks=0, remember=remember)


def taken_over(later: TokenChain, earlier: TokenChain) -> int:
    """How many of its block hashes are not only equal, but were never hashed again."""
    return sum(one is other for one, other in zip(later.block_hashes, earlier.block_hashes, strict=False))


@given(st.lists(prompts, max_size=30))
def test_every_chain_is_what_it_would_be_alone(prompts: list[tuple[list[int], bytes, int, bool]]) -> None:
    chains = RecentChains(SIZE, max_bytes=12 * BLOCK_BYTES)
    for tokens, salt, public, remember in prompts:
        made = chains.chain(ROOT, tokens, owner="x", salt=salt, public_blocks=public, remember=remember)
        alone = TokenChain(ROOT, tokens, SIZE, owner="x", salt=salt, public_blocks=public)
        for token in (1, 0, 1, 1, 0):
            made.append(token)
            alone.append(token)
        assert made.block_hashes == alone.block_hashes
        blocks = range(len(alone.block_hashes))
        assert [made.parent(at) for at in blocks] == [alone.parent(at) for at in blocks]
        assert [made.block_tokens(at) for at in blocks] == [alone.block_tokens(at) for at in blocks]
        assert chains.bytes_used <= 12 * BLOCK_BYTES


def test_a_turn_takes_over_what_it_goes_on_from_however_many_others_begin_alike() -> None:
    chains = RecentChains(SIZE)
    system = list(range(8))
    firsts = [recent(chains, [*system, *[50 + session] * 9]) for session in range(5)]
    for session, first in enumerate(firsts):
        turn = recent(chains, [*system, *[50 + session] * 9, 1, 2, 3, 4])
        assert taken_over(turn, first) == 4


def test_a_prompt_that_goes_another_way_takes_over_what_is_common() -> None:
    chains = RecentChains(SIZE)
    first = recent(chains, list(range(20)))
    assert taken_over(recent(chains, [*range(9), *[70] * 20]), first) == 2
    assert taken_over(recent(chains, list(range(9))), first) == 2


def test_another_salt_shares_nothing() -> None:
    chains = RecentChains(SIZE)
    first = recent(chains, list(range(8)))
    assert taken_over(recent(chains, list(range(8)), b"salt"), first) == 0


def test_only_what_is_to_be_remembered_is() -> None:
    chains = RecentChains(SIZE)
    first = recent(chains, list(range(8)), remember=False)
    assert (taken_over(recent(chains, list(range(8))), first), chains.bytes_used) == (0, 2 * BLOCK_BYTES)


def test_the_first_ones_are_forgotten_first() -> None:
    chains = RecentChains(SIZE, max_bytes=4 * BLOCK_BYTES)
    old, new = recent(chains, list(range(8))), recent(chains, list(range(50, 58)))
    recent(chains, list(range(90, 98)))
    assert taken_over(recent(chains, list(range(8)), remember=False), old) == 0
    assert taken_over(recent(chains, list(range(50, 58)), remember=False), new) == 2


def test_there_are_never_more_than_can_be_looked_at() -> None:
    chains = RecentChains(SIZE)
    for number in range(MAX_PROMPTS + 5):
        recent(chains, [number] * 4)
    assert chains.bytes_used == MAX_PROMPTS * BLOCK_BYTES


def test_what_is_larger_than_all_together_or_shorter_than_a_block_is_not_remembered() -> None:
    chains = RecentChains(SIZE, max_bytes=4 * BLOCK_BYTES)
    recent(chains, list(range(20)))
    recent(chains, [1, 2, 3])
    assert chains.bytes_used == 0

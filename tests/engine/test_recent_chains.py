"""Chains that take their first identities from an earlier one are the chains that are hashed from their start."""

from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.hashing import TokenChain
from emberkv.engine.recent_chains import RecentChains

SIZE = 4
ROOT = bytes(32)

prompts = st.tuples(st.lists(st.integers(0, 1), max_size=30), st.sampled_from([b"", b"ann", b"bob"]), st.integers(0, 4))


def recent(chains: RecentChains, tokens: list[int], salt: bytes = b"") -> TokenChain:
    return chains.chain(ROOT, tokens, owner="", salt=salt, public_blocks=0)


@given(st.lists(prompts, max_size=30))
def test_every_chain_is_what_it_would_be_alone(prompts: list[tuple[list[int], bytes, int]]) -> None:
    chains = RecentChains(SIZE, max_blocks=12)
    for tokens, salt, public in prompts:
        made = chains.chain(ROOT, tokens, owner="x", salt=salt, public_blocks=public)
        alone = TokenChain(ROOT, tokens, SIZE, owner="x", salt=salt, public_blocks=public)
        for token in (1, 0, 1, 1, 0):
            made.append(token)
            alone.append(token)
        assert made.identities == alone.identities
        blocks = range(len(alone.identities))
        assert [made.parent(at) for at in blocks] == [alone.parent(at) for at in blocks]
        assert [made.block_tokens(at) for at in blocks] == [alone.block_tokens(at) for at in blocks]
        assert chains.blocks <= 12


def test_a_turn_takes_over_what_it_goes_on_from() -> None:
    chains = RecentChains(SIZE)
    first = recent(chains, list(range(12)))
    second = recent(chains, [*range(9), 70, 71, 72, 73])
    assert [one is other for one, other in zip(first.identities, second.identities, strict=True)] == [True, True, False]


def test_another_beginning_forgets_nothing_and_another_salt_shares_nothing() -> None:
    chains = RecentChains(SIZE)
    first, other = recent(chains, list(range(8))), recent(chains, list(range(8)), b"salt")
    recent(chains, list(range(50, 60)))
    assert recent(chains, list(range(8))).identities[1] is first.identities[1]
    assert recent(chains, list(range(8)), b"salt").identities[1] is other.identities[1]


def test_the_least_recently_used_are_forgotten_first() -> None:
    chains = RecentChains(SIZE, max_blocks=4)
    old, new = recent(chains, list(range(8))), recent(chains, list(range(50, 58)))
    recent(chains, list(range(8)))
    recent(chains, list(range(90, 98)))
    assert recent(chains, list(range(8))).identities[0] is old.identities[0]
    assert recent(chains, list(range(50, 58))).identities[0] is not new.identities[0]


def test_what_is_longer_than_all_together_or_shorter_than_a_block_is_not_remembered() -> None:
    chains = RecentChains(SIZE, max_blocks=4)
    recent(chains, list(range(20)))
    recent(chains, [1, 2, 3])
    assert chains.blocks == 0

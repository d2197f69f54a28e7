"""Lists of cached prefixes: lengths, heat, and what is left out."""

from emberkv.core.events import POOL, BlockStored
from emberkv.core.explaining.ledger import CachedPrefix, Ledger, first_tokens, hottest, largest, path_to, unshared
from emberkv.core.hashing import TokenChain
from tests.core.harness import chain
from tests.core.ledgers import ledger_with

SYSTEM = list(range(8))
FIRST = chain([*SYSTEM, 1, 1, 1, 1])
SECOND = chain([*SYSTEM, 2, 2, 2, 2, 3, 3, 3, 3])
OTHER = chain([90, 91, 92, 93])


def cached() -> Ledger:
    return ledger_with(FIRST, SECOND, OTHER)


def end(tokens: TokenChain, blocks: int = 0) -> bytes:
    return tokens.block_hashes[blocks - 1]


def test_the_largest_are_no_part_of_one_another() -> None:
    assert [(each.block_hash, each.tokens) for each in largest(cached(), 10)] == [
        (end(SECOND), 16),
        (end(FIRST), 12),
        (end(OTHER), 4),
    ]
    assert [each.tokens for each in largest(cached(), 1)] == [16]


def test_the_hottest_saved_most() -> None:
    ledger = cached()
    for now in (1.0, 2.0, 3.0):
        ledger.served(FIRST, 3, now)
    ledger.served(SECOND, 3, 4.0)
    assert hottest(ledger, 10) == [
        CachedPrefix(end(FIRST), 12, "", (POOL,), 3, 3.0),
        CachedPrefix(end(FIRST, 2), 8, "", (POOL,), 4, 4.0),
        CachedPrefix(end(SECOND, 3), 12, "", (POOL,), 1, 4.0),
    ]


def test_what_is_lost_is_not_listed() -> None:
    ledger = cached()
    ledger.served(SECOND, 4, 1.0)
    ledger.left(POOL, SECOND.block_hashes[3:], 2.0)
    assert [each.tokens for each in largest(ledger, 10)] == [12, 12, 4]
    assert hottest(ledger, 10) == []


def test_the_way_to_a_block() -> None:
    ledger = cached()
    assert [entry.block_hash for entry in path_to(ledger, end(FIRST))] == list(FIRST.block_hashes)
    assert first_tokens(ledger, end(FIRST), 9) == (*SYSTEM, 1)
    assert path_to(ledger, b"unknown") == []


def test_what_can_go_without_harm_to_others() -> None:
    ledger = cached()
    assert unshared(ledger, FIRST.block_hashes) == [end(FIRST)]
    assert set(unshared(ledger, SECOND.block_hashes[:3])) == set(SECOND.block_hashes[2:])
    assert set(unshared(ledger, FIRST.block_hashes[:2])) == {*FIRST.block_hashes, *SECOND.block_hashes}
    assert unshared(ledger, [b"unknown", b"other"]) == [b"other", b"unknown"]
    assert unshared(ledger, []) == []


def test_a_private_chain_goes_on_from_what_is_public() -> None:
    public = chain(SYSTEM)
    private = TokenChain(public.root, [*SYSTEM, 1, 1, 1, 1], 4, owner="ann", salt=b"hers", public_blocks=2)
    ledger = ledger_with(public)
    ledger.apply(BlockStored((end(private),), private.parent(2), (private.block_tokens(2),), 4), 1.0)
    ledger.served(private, 3, 2.0)
    assert hottest(ledger, 10) == largest(ledger, 10) == [CachedPrefix(end(private), 12, "ann", (POOL,), 1, 2.0)]
    assert first_tokens(ledger, end(private), 10) == (*SYSTEM, 1, 1)
    assert set(unshared(ledger, public.block_hashes)) == set(private.block_hashes)

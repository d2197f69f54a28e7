"""Leases: how much of a prompt is found, what is committed, and what is let go."""

import pytest

from emberkv.core.block import BlockState
from emberkv.core.block_pool import BlockPool
from emberkv.core.hashing import TokenChain
from emberkv.core.prefix_cache import Lease, PrefixCache
from emberkv.errors import ConfigError, NoFreeBlocksError
from tests.core.harness import chain


def cache(num_blocks: int = 16, *, alignment: int = 4, exact: bool = False, enabled: bool = True) -> PrefixCache:
    return PrefixCache(BlockPool(num_blocks, 4), alignment=alignment, exact=exact, enabled=enabled)


def computed(cache: PrefixCache, tokens: TokenChain, *, exact: bool = True) -> Lease:
    """A lease whose whole chain has been computed."""
    lease = cache.acquire(tokens)
    lease.extend(len(tokens))
    if exact:
        lease.commit_prefilled(len(tokens))
    else:
        lease.commit_decoded(len(tokens))
    return lease


def hit(cache: PrefixCache, count: int) -> int:
    """Tokens found of the prompt 0, 1, ... count - 1."""
    lease = cache.acquire(chain(range(count)))
    lease.release()
    return lease.hit_tokens


@pytest.mark.parametrize("alignment", [0, -4, 6, 2])
def test_alignment_is_a_positive_multiple_of_the_block(alignment: int) -> None:
    with pytest.raises(ConfigError, match=f"alignment {alignment} must be a positive multiple of the block size 4"):
        cache(alignment=alignment)


@pytest.mark.parametrize(
    ("alignment", "count", "expected"),
    [(4, 1, 0), (4, 4, 0), (4, 5, 4), (4, 8, 4), (4, 9, 8), (4, 20, 16), (4, 21, 20), (4, 40, 20),
     (8, 8, 0), (8, 9, 8), (8, 16, 8), (8, 17, 16), (8, 21, 16), (8, 40, 16), (12, 24, 12), (12, 40, 12)],
)  # fmt: skip
def test_a_hit_is_aligned_and_leaves_a_token(alignment: int, count: int, expected: int) -> None:
    shared = cache(alignment=alignment)
    computed(shared, chain(range(20))).release()
    assert hit(shared, count) == expected


def test_a_lease_pins_before_it_allocates() -> None:
    shared = cache(5)
    computed(shared, chain(range(20))).release()
    lease = shared.acquire(chain([*range(8), 9]))
    assert (lease.hit_tokens, lease.missing_blocks(9), shared.pool.num_free) == (8, 1, 3)
    lease.extend(20)
    assert [block.block_id for block in lease.blocks[:2]] == [0, 1]
    assert shared.pool.num_free == 0
    with pytest.raises(NoFreeBlocksError):
        lease.extend(21)
    shared.pool.check_integrity([lease.blocks])
    lease.release()
    assert shared.pool.num_free == 5


def test_finding_holds_nothing() -> None:
    shared = cache()
    computed(shared, chain(range(8))).release()
    assert len(shared.find(chain(range(9)))) == 2
    shared.pool.check_integrity([])


def test_blocks_are_committed_as_they_fill() -> None:
    shared = cache()
    lease = shared.acquire(chain(range(10)))
    lease.extend(10)
    lease.commit_decoded(3)
    assert shared.pool.num_cached == 0
    lease.commit_decoded(7)
    assert (shared.pool.num_cached, lease.num_committed) == (1, 1)
    lease.commit_decoded(10)
    assert (shared.pool.num_cached, lease.num_committed) == (2, 2)
    lease.release()
    lease.release()  # nothing left to let go
    assert shared.pool.num_free == 16


def test_whatever_follows_an_inexact_stretch_is_inexact() -> None:
    shared = cache()
    lease = shared.acquire(chain(range(12)))
    lease.extend(12)
    lease.commit_prefilled(4)
    lease.commit_decoded(8)
    lease.commit_prefilled(12)
    assert [block.exact for block in lease.blocks] == [True, False, False]


@pytest.mark.parametrize(
    ("stops", "expected"),
    [([16], [True] * 4), ([8, 16], [True] * 4), ([14], [True, True, False]), ([8, 12], [True, True, False])],
)
def test_prefill_is_exact_in_whole_alignment_units(stops: list[int], expected: list[bool]) -> None:
    lease = cache(alignment=8).acquire(chain(range(16)))
    lease.extend(16)
    for stop in stops:
        lease.commit_prefilled(stop)
    assert [block.exact for block in lease.blocks[: len(expected)]] == expected
    assert lease.num_committed == len(expected)


def test_an_inexact_hit_makes_what_follows_inexact() -> None:
    shared = cache()
    computed(shared, chain(range(4)), exact=False).release()
    lease = computed(shared, chain(range(8)))
    assert [block.exact for block in lease.blocks] == [False, False]


def test_exact_mode_reuses_only_exact_blocks_and_heals_the_others() -> None:
    shared = cache(exact=True)
    lease = shared.acquire(chain(range(8)))
    lease.extend(8)
    lease.commit_prefilled(4)
    lease.commit_decoded(8)
    lease.release()
    assert hit(shared, 9) == 4
    computed(shared, chain(range(8))).release()
    assert hit(shared, 9) == 8
    assert shared.pool.stats.replaced_blocks == 1


def test_a_disabled_cache_finds_and_keeps_nothing() -> None:
    shared = cache(enabled=False)
    computed(shared, chain(range(8))).release()
    assert (hit(shared, 9), shared.pool.num_cached, shared.pool.num_free) == (0, 0, 16)


def test_salts_do_not_share() -> None:
    shared = cache()
    computed(shared, chain(range(8), salt=b"a")).release()
    assert shared.acquire(chain(range(9), salt=b"b")).hit_tokens == 0
    assert shared.acquire(chain(range(9), salt=b"a")).hit_tokens == 8


def test_adopting_takes_over_what_others_committed_since() -> None:
    shared = cache()
    late = shared.acquire(chain(range(14)))
    late.extend(14)
    early = computed(shared, chain(range(14)))
    assert late.adopt(0) == 12
    assert late.blocks[:3] == early.blocks[:3]
    assert (late.hit_tokens, late.num_committed, late.context_exact) == (12, 3, True)
    assert shared.pool.num_free == 16 - 4 - 1
    shared.pool.check_integrity([late.blocks, early.blocks])
    assert late.adopt(12) == 0


def test_adopting_in_the_middle_keeps_what_is_ours() -> None:
    shared = cache()
    late = shared.acquire(chain(range(14)))
    late.extend(14)
    early = computed(shared, chain(range(14)), exact=False)
    late.commit_prefilled(4)
    assert late.blocks[0] is not early.blocks[0]
    assert late.adopt(4) == 8
    assert late.blocks[1:3] == early.blocks[1:3]
    assert not late.context_exact
    shared.pool.check_integrity([late.blocks, early.blocks])


def test_adopting_waits_until_all_before_is_committed() -> None:
    shared = cache()
    late = shared.acquire(chain(range(14)))
    late.extend(14)
    computed(shared, chain(range(14)))
    assert late.adopt(4) == 0


def forged_lease(shared: PrefixCache) -> tuple[Lease, Lease]:
    """The lease of a chain, and that of a second one which collides with its first block, and is alike after it."""
    real = chain([*range(12), 1])
    theirs = computed(shared, real)
    forgery = chain([9, 9, 9, 9, *range(4, 12), 1])
    forgery.block_hashes = list(real.block_hashes)
    ours = shared.acquire(forgery)
    ours.extend(13)
    return theirs, ours


def test_nothing_after_a_collision_is_shared() -> None:
    shared = cache()
    theirs, ours = forged_lease(shared)
    assert ours.hit_tokens == 0
    for stop in (4, 8, 12, 13):
        ours.commit_prefilled(stop)
        assert ours.adopt(stop // 4 * 4) == 0
    assert not {block.block_id for block in ours.blocks} & {block.block_id for block in theirs.blocks}
    assert {block.state for block in ours.blocks} == {BlockState.ALLOCATED}
    assert shared.pool.stats.duplicate_blocks == 0
    shared.pool.check_integrity([theirs.blocks, ours.blocks])
    ours.release()
    theirs.release()
    assert shared.pool.num_free == 16


def test_a_collision_is_counted_where_it_is_refused() -> None:
    shared = cache()
    _, ours = forged_lease(shared)
    assert shared.pool.stats.collisions == 1
    ours.commit_prefilled(12)
    ours.commit_prefilled(13)
    assert shared.pool.stats.collisions == 2

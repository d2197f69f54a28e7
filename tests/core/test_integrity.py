"""The conservation law's own check: it must find damage, or it proves nothing elsewhere."""

from collections.abc import Callable

import pytest

from emberkv.core.block import BlockState
from emberkv.core.block_pool import BlockPool
from emberkv.errors import IntegrityError
from tests.core.harness import chain, store

ABC = chain(range(12))  # three blocks of four


def lose_a_reference(pool: BlockPool) -> None:
    pool.blocks[0].ref_count = 0


def add_a_reference(pool: BlockPool) -> None:
    pool.blocks[0].ref_count = 2


def free_without_telling(pool: BlockPool) -> None:
    pool.blocks[0].state = BlockState.FREE
    pool.blocks[0].ref_count = 0


def change_a_hash(pool: BlockPool) -> None:
    pool.blocks[0].block_hash = b"x"


def drop_a_hash(pool: BlockPool) -> None:
    pool.blocks[0].block_hash = None


def claim_a_blank(pool: BlockPool) -> None:
    pool.blocks[5].ref_count = 1


def commit_a_blank(pool: BlockPool) -> None:
    pool.blocks[5].state = BlockState.COMMITTED


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_reference,
        add_a_reference,
        free_without_telling,
        change_a_hash,
        drop_a_hash,
        claim_a_blank,
        commit_a_blank,
    ],
)
def test_the_check_finds_what_is_wrong(damage: Callable[[BlockPool], None]) -> None:
    pool = BlockPool(6, 4)
    held = store(pool, ABC)
    pool.check_integrity([held])
    damage(pool)
    with pytest.raises(IntegrityError):
        pool.check_integrity([held])


def test_the_check_counts_holders() -> None:
    pool = BlockPool(6, 4)
    held = store(pool, ABC)
    with pytest.raises(IntegrityError, match="block 0: 1 refs, 0 held"):
        pool.check_integrity([held[1:]])
    with pytest.raises(IntegrityError, match="block 2: 1 refs, 2 held"):
        pool.check_integrity([held, held[2:]])

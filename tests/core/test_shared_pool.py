"""Tenants in one pool: floors hold against running floods, quotas bind, and no tenant starves."""

from random import Random

import pytest

from emberkv.core.hashing import PUBLIC_OWNER, TokenChain
from emberkv.core.policies.fair_shares import FairShares, Share
from emberkv.core.sequence import Sequence
from emberkv.errors import NoFreeBlocksError, PromptTooLongError
from tests.core.harness import Harness, root


def used(harness: Harness, owner: str) -> int:
    """Cached blocks on an owner's books."""
    assert isinstance(harness.pool.policy, FairShares)
    return int(harness.pool.policy.bytes_by_owner().get(owner, 0))


def prompt(number: int, blocks: int) -> list[int]:
    """Tokens that no other number's prompt begins with: whole blocks and one token more."""
    return [number] * (4 * blocks + 1)


def test_a_flood_of_running_requests_leaves_a_floor_alone() -> None:
    harness = Harness(num_blocks=16, max_running=8, shares={"quiet": Share(floor_bytes=6)})
    harness.add("warm", prompt(1, 6), salt=b"quiet")
    harness.finish()
    for number in range(20):
        harness.add(f"flood{number}", prompt(100 + number, 3), 8, salt=b"flood")
    harness.finish()
    again = harness.add("again", prompt(1, 6), salt=b"quiet")
    harness.finish()
    assert again.cached_tokens == 24
    assert harness.pool.stats.evicted_blocks > 20


def test_what_nobody_has_filled_is_everybodys() -> None:
    harness = Harness(num_blocks=16, shares={"quiet": Share(floor_bytes=8)})
    for number in range(2):
        harness.add(f"{number}", prompt(number, 7), salt=b"flood")
    harness.finish()
    assert used(harness, "flood") == 14


def test_an_owner_makes_room_for_itself_out_of_its_own_floor() -> None:
    harness = Harness(num_blocks=12, shares={"a": Share(floor_bytes=4), "b": Share(floor_bytes=4)})
    for number, owner in enumerate([b"a", b"b", b"a", b"a"]):
        harness.add(f"{number}", prompt(number, 3), salt=owner)
        harness.finish()
    assert used(harness, "b") == 3
    assert harness.add("b again", prompt(1, 3), salt=b"b").request_id == "b again"
    harness.finish()
    assert harness.scheduler.stats.hit_tokens == 12


def test_a_request_must_fit_beside_all_floors() -> None:
    harness = Harness(num_blocks=16, shares={"quiet": Share(floor_bytes=6)})
    with pytest.raises(PromptTooLongError, match="41 to generate are 81; the KV pool holds 40"):
        harness.add("long", range(40), 41)
    harness.add("fits", range(36), 4)
    harness.finish()


def test_blocks_that_a_floor_keeps_are_not_allocated_to_others() -> None:
    harness = Harness(num_blocks=8, shares={"quiet": Share(floor_bytes=3)})
    harness.add("warm", prompt(1, 4), salt=b"quiet")
    harness.finish()
    assert harness.pool.num_free == harness.pool.free_for("quiet") == 8
    assert harness.pool.free_for("flood") == 5
    with pytest.raises(NoFreeBlocksError, match="6 blocks asked for, 5 of 8 are free"):
        harness.pool.allocate(6, "flood")
    assert len(harness.pool.allocate(5, "flood")) == 5
    assert used(harness, "quiet") == 3


def test_a_quota_binds_when_the_request_is_done() -> None:
    harness = Harness(num_blocks=16, shares={"small": Share(quota_bytes=3)})
    harness.add("long", prompt(1, 8), salt=b"small")
    harness.finish()
    assert used(harness, "small") == 3
    again = harness.add("again", prompt(1, 8), salt=b"small")
    harness.finish()
    assert again.cached_tokens == 12  # the prompt's beginning is what was kept
    assert used(harness, "small") == 3


def test_public_blocks_are_on_books_of_their_own_and_shared() -> None:
    harness = Harness(num_blocks=16, shares={PUBLIC_OWNER: Share(floor_bytes=2)})
    tokens = prompt(1, 4)
    for name, salt in (("a", b"one"), ("b", b"two")):
        chain = TokenChain(root(4), tokens, 4, owner=name, salt=salt, public_blocks=2)
        sequence = Sequence(name, chain, 1)
        harness.scheduler.add(sequence)
        while sequence.finish_reason is None:
            plan = harness.scheduler.schedule()
            harness.scheduler.complete(plan, {chunk.sequence.request_id: 5 for chunk in plan.prefills})
    assert sequence.cached_tokens == 8
    assert [used(harness, owner) for owner in ("a", "b", PUBLIC_OWNER)] == [2, 2, 2]


@pytest.mark.parametrize("seed", range(60))
def test_random_traffic_of_three_tenants(seed: int) -> None:
    """`FloorsHold`, of which the pool's policy is one, looks at each eviction."""
    random = Random(seed)
    shares = {
        "a": Share(random.randrange(4)),
        "b": Share(random.randrange(3), random.randrange(3, 7)),
        "c": Share(0, random.choice([None, 2, 9])),
    }
    harness = Harness(
        num_blocks=random.randrange(10, 17),
        policy=random.choice(["lru", "lfu", "s3fifo", "greedy-dual"]),
        max_step_tokens=random.choice([4, 16, 40]),
        max_running=random.randrange(1, 7),
        shares=shares,
    )
    live: list[Sequence] = []
    for number in range(60):
        owner = random.choice("abccc")
        tokens = [random.randrange(2) for _ in range(random.randrange(1, 22))]
        new = min(random.randrange(1, 9), harness.scheduler.max_sequence_tokens - len(tokens))
        if new > 0:
            live.append(harness.add(f"{number}", tokens, new, salt=owner.encode()))
        for _ in range(random.choice([0, 0, 1, 3, 9])):
            harness.step()
            check_quotas(harness, live)
    harness.finish()
    check_quotas(harness, live)


def check_quotas(harness: Harness, sequences: list[Sequence]) -> None:
    """Above its quota, an owner has what it holds only."""
    owners = {block_hash: each.chain.owner(0) for each in sequences for block_hash in each.chain.block_hashes}
    for owner, share in (harness.shares or {}).items():
        if share.quota_bytes is not None and used(harness, owner) > share.quota_bytes:
            blocks = [harness.pool.lookup(block_hash) for block_hash, name in owners.items() if name == owner]
            assert all(block is None or block.ref_count for block in blocks)

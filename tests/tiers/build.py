"""Chains of records to store, and stacks to store them in."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from emberkv.core.hashing import TokenChain, encode_tokens, partial_hash, salted, token_array
from emberkv.core.loading import BlockRun
from emberkv.tiers.base import TierEntry
from emberkv.tiers.codec import BlockRecord, encode_record
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.partial import PartialPlace
from tests.waiting import DEADLINE

NAMESPACE = b"first model".ljust(32, b".")
OTHER = b"other model".ljust(32, b".")
BLOCK_SIZE = 4


def records(count: int, *, seed: int = 0, exact: bool = True, payload_bytes: int = 200) -> list[BlockRecord]:
    """A chain of blocks; each payload tells seed and position."""
    chain = TokenChain(NAMESPACE, [seed * 1000 + index for index in range(count * BLOCK_SIZE)], BLOCK_SIZE)
    return [
        BlockRecord(
            block_hash, chain.parent(index), chain.block_tokens(index), index, exact,
            f"{seed}/{index}/".encode().ljust(payload_bytes, b"."),
        )
        for index, block_hash in enumerate(chain.block_hashes)
    ]  # fmt: skip


def inexact(record: BlockRecord) -> BlockRecord:
    return replace(record, exact=False, payload=bytes(record.payload).replace(b".", b"~"))


def entries(blocks: Sequence[BlockRecord], *, owner: str = "", namespace: bytes = NAMESPACE) -> list[TierEntry]:
    return [TierEntry(each.block_hash, owner, encode_record(each, namespace=namespace), each.exact) for each in blocks]


def checkpoint(after: BlockRecord, count: int = 3, *, salt: bytes = b"", payload_bytes: int = 200) -> OffloadedBlock:
    """A partial block behind a full one. salt: of a tenant, whose private part begins here."""
    parent = salted(after.block_hash, salt)
    tokens = encode_tokens(token_array(range(5000, 5000 + count)))
    payload = f"checkpoint {count}".encode().ljust(payload_bytes, b".")
    block_hash, position = partial_hash(parent, tokens), after.position + 1
    record = BlockRecord(block_hash, parent, tokens, position, exact=True, payload=payload, partial=True)
    return OffloadedBlock(record, partial=PartialPlace(parent, after.block_hash, count))


def entry_of(block: OffloadedBlock, *, namespace: bytes = NAMESPACE) -> TierEntry:
    """As a tier keeps it."""
    data = encode_record(block.record, namespace=namespace)
    return TierEntry(block.record.block_hash, block.owner, data, block.record.exact, block.partial)


def block_hashes(blocks: Sequence[BlockRecord]) -> list[bytes]:
    return [each.block_hash for each in blocks]


def fetched(
    stack: TierManager,
    blocks: Sequence[BlockRecord],
    runs: Sequence[BlockRun] | None = None,
    *,
    partial: PartialPlace | None = None,
) -> list[BlockRecord | None]:
    """The records of these blocks, by default of the runs that are found; what reading them led to has happened.
    partial: where the last one lies, if it is a partial block.
    """
    wanted = block_hashes(blocks)
    outcome: Future[list[BlockRecord | None]] = Future()
    stack.onboard(wanted, stack.find(wanted) if runs is None else runs, outcome.set_result, partial=partial)
    found = outcome.result(DEADLINE)
    assert stack.flush(DEADLINE)
    return found

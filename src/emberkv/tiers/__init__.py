"""Stores for blocks below the KV pool: host memory, a folder, and what else keeps the interface `Tier`.

Tiers store opaque bytes by block hash; nothing here knows a tensor library.

>>> from concurrent.futures import Future
>>> from emberkv.core.hashing import TokenChain
>>> from emberkv.tiers import BlockRecord, MemoryTier, OffloadedBlock, TierManager
>>> chain = TokenChain(b"root of a model's block hashes".ljust(32), range(32), block_size=16)
>>> parents, tokens = [chain.parent(0), chain.parent(1)], [chain.block_tokens(0), chain.block_tokens(1)]
>>> first, second = chain.block_hashes
>>> blocks = [
...     BlockRecord(first, parents[0], tokens[0], position=0, exact=True, payload=b"keys and values"),
...     BlockRecord(second, parents[1], tokens[1], position=1, exact=True, payload=b"more of them"),
... ]
>>> tiers = TierManager([MemoryTier(2**20)], namespace=b"dtypes, kernels", queue_bytes=2**20)
>>> tiers.offload([OffloadedBlock(block) for block in blocks])
>>> tiers.flush(timeout=60)
True
>>> runs = tiers.find([first, second])
>>> [(run.tier, run.count) for run in runs]
[('ram', 2)]
>>> records = Future()
>>> onboarding = tiers.onboard([first, second], runs, records.set_result)
>>> [bytes(record.payload) for record in records.result(timeout=60)]
[b'keys and values', b'more of them']
>>> tiers.close(timeout=60)
True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emberkv.tiers.base import RemovalResult, StoreResult, Tier, TierEntry
    from emberkv.tiers.byte_cache import InMemoryKVCacheManager
    from emberkv.tiers.codec import BlockRecord, decode_record, encode_record, verified_record
    from emberkv.tiers.disk.tier import DiskTier
    from emberkv.tiers.kinds import TIER_KINDS, TierSpec
    from emberkv.tiers.manager import OffloadedBlock, TierManager
    from emberkv.tiers.memory import MemoryTier
    from emberkv.tiers.partial import PartialPlace
    from emberkv.tiers.stats import StackStats, TierStats

__all__ = [
    "TIER_KINDS",
    "BlockRecord",
    "DiskTier",
    "InMemoryKVCacheManager",
    "MemoryTier",
    "OffloadedBlock",
    "PartialPlace",
    "RemovalResult",
    "StackStats",
    "StoreResult",
    "Tier",
    "TierEntry",
    "TierManager",
    "TierSpec",
    "TierStats",
    "decode_record",
    "encode_record",
    "verified_record",
]

_MODULES = {
    "base": ("RemovalResult", "StoreResult", "Tier", "TierEntry"),
    "byte_cache": ("InMemoryKVCacheManager",),
    "codec": ("BlockRecord", "decode_record", "encode_record", "verified_record"),
    "disk.tier": ("DiskTier",),
    "kinds": ("TIER_KINDS", "TierSpec"),
    "manager": ("OffloadedBlock", "TierManager"),
    "memory": ("MemoryTier",),
    "partial": ("PartialPlace",),
    "stats": ("StackStats", "TierStats"),
}
_ON_DEMAND = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ON_DEMAND[name]), name)

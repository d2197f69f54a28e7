"""Counters of one pool and its scheduler: plain totals since the start, read by metrics and reports alike."""

from dataclasses import dataclass


@dataclass(slots=True)
class CacheStats:
    """Tokens unless the name says otherwise."""

    query_tokens: int = 0  # prompt tokens of admitted sequences
    hit_tokens: int = 0  # of these, found in the pool
    late_hit_tokens: int = 0  # of the hits, committed by another sequence after this one was admitted
    prefill_tokens: int = 0
    decode_tokens: int = 0
    committed_blocks: int = 0
    duplicate_blocks: int = 0  # computed twice at the same time; one copy was freed
    replaced_blocks: int = 0  # an exact copy took the place of an inexact one
    evicted_blocks: int = 0
    collisions: int = 0  # equal identity, different tokens: refused
    preemptions: int = 0

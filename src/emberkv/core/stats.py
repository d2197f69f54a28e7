"""Counters of one pool and its scheduler: plain totals since the start, read by metrics and reports alike."""

from collections import Counter
from dataclasses import dataclass, field

from emberkv.core.loading import LoadChoice


@dataclass(slots=True)
class SchedulerStats:
    """Tokens unless the name says otherwise."""

    query_tokens: int = 0  # prompt tokens of admitted sequences that were looked up
    bypass_tokens: int = 0  # and of those that were not, because logits at each position are wanted
    hit_tokens: int = 0  # of these, found in the pool
    late_hit_tokens: int = 0  # of the hits, committed by another sequence after this one was admitted
    prefill_tokens: int = 0
    decode_tokens: int = 0
    committed_blocks: int = 0
    duplicate_blocks: int = 0  # computed twice at the same time; one copy was freed
    replaced_blocks: int = 0  # an exact copy took the place of an inexact one
    branch_checkpoints: int = 0  # blocks kept as they were where a prompt left what is cached
    speculative_checkpoints: int = 0  # blocks kept without a prompt that parted there
    speculative_used: int = 0  # of these, gone on from, or wanted since for another reason
    speculative_unused: int = 0  # of these, found no more before that
    checkpoint_hits: int = 0  # sequences that went on from a partial block which is copied whole
    loaded_checkpoints: int = 0  # such blocks that came from a lower tier
    unloaded_checkpoints: int = 0  # such blocks that a load was to bring, and that are not in the pool at its end
    evicted_blocks: int = 0
    collisions: int = 0  # equal block hash, different tokens: refused
    preemptions: int = 0
    tier_hit_tokens: Counter[str] = field(default_factory=Counter)  # of the hits, brought up by a load, by tier
    load_choices: Counter[LoadChoice] = field(default_factory=Counter)  # one for each admission that looked below
    load_probes: int = 0  # loads begun to measure again, though computing was expected to be cheaper
    loaded_blocks: int = 0
    unloaded_blocks: int = 0  # a load was to bring them, and did not
    exported_blocks: int = 0
    imported_blocks: int = 0
    refused_imports: Counter[str] = field(default_factory=Counter)  # records, by what was wrong with them
    exported_checkpoints: int = 0  # partial blocks
    imported_checkpoints: int = 0

    @property
    def checkpoints(self) -> dict[str, int]:
        """What happened how often. The speculative ones that are neither used nor unused are still cached."""
        return {
            "left_where_prompts_part": self.branch_checkpoints,
            "left_speculatively": self.speculative_checkpoints,
            "speculative_used": self.speculative_used,
            "speculative_unused": self.speculative_unused,
            "hits": self.checkpoint_hits,
            "loaded": self.loaded_checkpoints,
            "not_loaded": self.unloaded_checkpoints,
            "exported": self.exported_checkpoints,
            "imported": self.imported_checkpoints,
        }

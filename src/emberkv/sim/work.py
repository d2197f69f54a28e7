"""The job sheet: what a step computes, in numbers, and what it spends its time on."""

from dataclasses import dataclass, fields
from typing import NamedTuple


class Chunk(NamedTuple):
    """Tokens ``[start, stop)`` of one sequence, computed in one step. samples: its next token is wanted, too."""

    start: int
    stop: int
    samples: bool


class Work(NamedTuple):
    """A step in numbers: ``sequences`` decode a token each, their lengths' sum is ``context``; and what it prefills."""

    sequences: int
    context: int
    chunks: tuple[Chunk, ...] = ()


@dataclass(slots=True)
class StepTerms:
    """Seconds of a step by what they are spent on; the step takes their sum."""

    gemm: float = 0.0
    elementwise: float = 0.0
    decode_attention: float = 0.0
    prefill_attention: float = 0.0
    logits: float = 0.0
    all_reduce: float = 0.0
    layer_overhead: float = 0.0
    sequence_overhead: float = 0.0
    token_overhead: float = 0.0
    step_overhead: float = 0.0

    @property
    def total(self) -> float:
        kernels = self.gemm + self.elementwise + self.decode_attention + self.prefill_attention + self.logits
        overheads = self.layer_overhead + self.sequence_overhead + self.token_overhead + self.step_overhead
        return kernels + self.all_reduce + overheads

    def as_dict(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

"""Executes planned steps with PyTorch: which forward passes, on which tokens, over which blocks."""

from collections.abc import Sequence as Batch
from dataclasses import dataclass

import torch
from torch import Tensor

from emberkv.core.hashing import Identity, root_identity
from emberkv.core.scheduler import PrefillChunk, StepPlan
from emberkv.core.sequence import Sequence
from emberkv.engine.decode_step import DecodeStep
from emberkv.engine.kv_pool import KVPool
from emberkv.engine.loader import LoadedModel
from emberkv.engine.packed_linear import let_go_of_checkpoint, pack_linears, rows_are_independent
from emberkv.engine.paged_attention import AttentionStep, PackedStep, attention_step
from emberkv.engine.prefill_step import PrefillStep
from emberkv.engine.steady_activation import steady_activations
from emberkv.errors import UnsupportedModelError

KV_LAYOUT = "layers-kv-tokens-heads-dim.1"
TILE_TOKENS = 32
"""Smaller tiles round hits down by less, but their attention is slower; see docs/benchmarks.md."""

_SELF_CHECK_TOKENS = 96
_SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True, slots=True)
class StepResult:
    """logits: ``[len(sequences), vocab]``, the next-token scores of each sequence that has all its tokens computed."""

    sequences: list[Sequence]
    logits: Tensor


@dataclass(frozen=True, slots=True)
class _Work:
    """Tokens to compute together. keep: the rows whose logits are wanted."""

    step: AttentionStep
    tokens: list[int]
    positions: list[int]
    keep: list[int]


class TorchEngine:
    """A loaded model over a paged KV pool. Not thread-safe: one loop drives it.

    cache_bytes: size of the KV pool. prefill_chunk: most tokens of one prefill pass. tile: tokens whose attention is
    computed together, a divisor of prefill_chunk.

    Prefill is *tile-invariant*: tokens ``[k * tile, (k + 1) * tile)`` get the same KV state, to the last bit, in
    whatever chunk they are computed. Attention is, by its cut at absolute positions; whether the linear layers are
    depends on the machine's libraries, so it is tried. Where it is not, `alignment`, to which hits are rounded down, is
    the chunk instead of the tile.
    """

    def __init__(
        self, loaded: LoadedModel, *, cache_bytes: int, block_size: int, prefill_chunk: int, tile: int = TILE_TOKENS
    ) -> None:
        self.loaded = loaded
        self.prefill_chunk = prefill_chunk
        self.tile = tile if prefill_chunk % tile == 0 and tile % block_size == 0 else prefill_chunk
        self._model = loaded.model
        self._device = loaded.device
        self.pool = KVPool.of_bytes(loaded.geometry, loaded.dtype, cache_bytes, block_size, loaded.device)
        self._expected = self._plain_logits()
        pack_linears(self._model)
        if self._device.type == "cpu":
            steady_activations(self._model)
            let_go_of_checkpoint(self._model)
        self._tile_invariant = self._is_tile_invariant()
        if not self._tile_invariant:
            self.tile = prefill_chunk
        self.alignment = self.tile

    def root(self, salt: bytes) -> Identity:
        """The root of the block identities of every prompt under ``salt``."""
        return root_identity(
            fingerprint=self.loaded.fingerprint,
            dtype=str(self.loaded.dtype).removeprefix("torch."),
            layout=f"{KV_LAYOUT};tile={self.tile}",
            block_size=self.pool.block_size,
            salt=salt,
        )

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult | None:
        """Compute the plan's tokens into the pool. None when no sequence is ready for its next token.

        Where rows do not influence one another's bits, all goes through the model in one pass.
        """
        works = [self._decode_work(plan.decodes)] if plan.decodes else []
        works += [self._prefill_work(chunk) for chunk in plan.prefills]
        passes = [works] if self._tile_invariant else [[work] for work in works]
        logits = [self._forward(some) for some in passes]
        ready = plan.decodes + [chunk.sequence for chunk in plan.prefills if chunk.samples]
        return StepResult(ready, torch.cat(logits)) if ready else None

    def _prefill_work(self, chunk: PrefillChunk) -> _Work:
        chain = chunk.sequence.chain
        slots = [block.slot for block in chunk.sequence.held.blocks]
        tokens = chain.slice(chunk.start, chunk.stop)
        step = PrefillStep(self.pool, slots, chunk.start, len(tokens), tile=self.tile)
        keep = [len(tokens) - 1] if chunk.samples else []
        return _Work(step, tokens, list(range(chunk.start, chunk.stop)), keep)

    def _decode_work(self, sequences: Batch[Sequence]) -> _Work:
        lengths = [len(sequence.chain) for sequence in sequences]
        tables = [[block.slot for block in sequence.held.blocks] for sequence in sequences]
        return _Work(
            DecodeStep(self.pool, tables, lengths),
            [sequence.chain[-1] for sequence in sequences],
            [length - 1 for length in lengths],
            list(range(len(sequences))),
        )

    def prefill(self, tokens: list[int], start: int, slots: list[int], *, sample: bool) -> Tensor:
        """Compute ``tokens`` at positions from ``start`` on; ``[1, vocab]`` of the last one, or ``[0, vocab]``."""
        step = PrefillStep(self.pool, slots, start, len(tokens), tile=self.tile)
        keep = [len(tokens) - 1] if sample else []
        return self._forward([_Work(step, tokens, list(range(start, start + len(tokens))), keep)])

    def decode(self, tokens: list[int], lengths: list[int], tables: list[list[int]]) -> Tensor:
        """Compute each sequence's last token (its length counts it); ``[len(tokens), vocab]``."""
        step = DecodeStep(self.pool, tables, lengths)
        return self._forward([_Work(step, tokens, [length - 1 for length in lengths], list(range(len(tokens))))])

    def _forward(self, works: list[_Work]) -> Tensor:
        """One pass over all works' tokens; the logits to keep, in order."""
        tokens: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        for work in works:
            keep += [len(tokens) + row for row in work.keep]
            tokens += work.tokens
            positions += work.positions
        padding = rounded_rows(len(tokens)) - len(tokens)
        alone = len(works) == 1 and not padding
        step = works[0].step if alone else PackedStep([(len(work.tokens), work.step) for work in works])
        arguments = {
            "input_ids": torch.tensor([tokens + [0] * padding], device=self._device),
            "position_ids": torch.tensor([positions + [0] * padding], device=self._device),
            "use_cache": False,
        }
        with attention_step(step):
            if not keep:
                # Without logits to keep, the output layer is left out: for a large vocabulary it is costly.
                self._model.base_model(**arguments)
                return torch.empty((0, self.loaded.geometry.vocab_size), dtype=self.loaded.dtype, device=self._device)
            kept = torch.tensor(keep, dtype=torch.int64, device=self._device)
            logits: Tensor = self._model(**arguments, logits_to_keep=kept).logits[0]
            return logits

    def _is_tile_invariant(self) -> bool:
        """Whether prefill proves tile-invariant here. Uses the pool's first blocks.

        Experts are ruled out without a trial: the number of rows that each one gets depends on the text.
        """
        experts = any(parameter.ndim > 2 for parameter in self._model.parameters())
        if self.tile == self.prefill_chunk or experts or not rows_are_independent(self._model):
            return False
        # Odd numbers of rows are what kernels treat in their own way, and a single row most of all.
        return all(self._same_in_pieces(self.prefill_chunk + tail) for tail in (1, self.tile // 2 + 1))

    @torch.inference_mode()
    def _same_in_pieces(self, length: int) -> bool:
        """Whether tokens cut after a chunk and after a tile get the same KV state and the same last logits."""
        blocks = -(-length // self.pool.block_size)
        if 2 * blocks > self.pool.num_blocks or length > self.loaded.context_length:
            return False
        tokens = self._made_up_tokens(length)
        logits = []
        for cut, first in (self.prefill_chunk, 0), (self.tile, blocks):
            slots = list(range(first, first + blocks))
            self.prefill(tokens[:cut], 0, slots, sample=False)
            logits.append(self.prefill(tokens[cut:], cut, slots, sample=True))
        return torch.equal(*logits) and torch.equal(*torch.split(self.pool.storage[: 2 * blocks], blocks))

    @torch.inference_mode()
    def _plain_logits(self) -> Tensor:
        """``[tokens, vocab]``: transformers' own eager forward over made-up tokens, before its layers are replaced."""
        capacity = self.pool.num_blocks * self.pool.block_size
        tokens = self._made_up_tokens(min(_SELF_CHECK_TOKENS, capacity, self.loaded.context_length))
        implementation = self._model.config._attn_implementation
        self._model.set_attn_implementation("eager")
        try:
            logits: Tensor = self._model(input_ids=torch.tensor([tokens], device=self._device), use_cache=False).logits
        finally:
            self._model.set_attn_implementation(implementation)
        return logits[0]

    @torch.inference_mode()
    def check_against_plain_forward(self) -> None:
        """Compare prefill and decode through the pool with transformers' own eager forward, on made-up tokens.

        Raises UnsupportedModelError when they differ by more than rounding: the model does something to its state
        that the paged attention does not reproduce, and would be served wrong. Uses the pool's first blocks.
        """
        length = self._expected.shape[0]
        tokens = self._made_up_tokens(length)
        slots = list(range(-(-length // self.pool.block_size)))
        cut = max(self.tile, length // 2 // self.tile * self.tile)
        if length < cut + 2:
            paged, at = [self.prefill(tokens, 0, slots, sample=True)], [length - 1]
        else:
            paged = [self.prefill(tokens[:cut], 0, slots, sample=True)]
            paged.append(self.prefill(tokens[cut:-1], cut, slots, sample=True))
            paged.append(self.decode(tokens[-1:], [length], [slots]))
            at = [cut - 1, length - 2, length - 1]
        ours, theirs = torch.cat(paged).float(), self._expected[at].float()
        error = (ours - theirs).norm() / theirs.norm()
        if not error <= _SELF_CHECK_TOLERANCE[self.loaded.dtype]:
            raise UnsupportedModelError(
                f"{self.loaded.name}: logits through the paged KV pool differ from the model's own by {error:.2%}; "
                f"{type(self._model).__name__} cannot be served"
            )

    def _made_up_tokens(self, count: int) -> list[int]:
        return [(7 * i * i + 3) % self.loaded.geometry.vocab_size for i in range(count)]


def rounded_rows(rows: int) -> int:
    """Up to a power of two, or a multiple of 16. oneDNN keeps more than half a megabyte for each number it has met."""
    return -(-rows // 16) * 16 if rows > 8 else 1 << (rows - 1).bit_length()

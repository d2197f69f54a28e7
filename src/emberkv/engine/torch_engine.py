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
from emberkv.engine.packed_linear import pack_linears
from emberkv.engine.paged_attention import AttentionStep, attention_step
from emberkv.engine.prefill_step import PrefillStep
from emberkv.engine.steady_activation import steady_activations
from emberkv.errors import UnsupportedModelError

KV_LAYOUT = "layers-kv-tokens-heads-dim.1"
TILE_TOKENS = 32
"""Smaller tiles round hits down by less, but their attention is slower; see docs/benchmarks.md."""

_SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True, slots=True)
class StepResult:
    """logits: ``[len(sequences), vocab]``, the next-token scores of each sequence that has all its tokens computed."""

    sequences: list[Sequence]
    logits: Tensor


class TorchEngine:
    """A loaded model over a paged KV pool. Not thread-safe: one loop drives it.

    cache_bytes: size of the KV pool. prefill_chunk: most tokens of one prefill pass. tile: tokens whose attention is
    computed together, a divisor of prefill_chunk.

    Prefill is *tile-invariant*: tokens ``[k * tile, (k + 1) * tile)`` get the same KV state, to the last bit, in
    whatever chunk they are computed. Attention is, by its cut at absolute positions; whether the linear layers are
    depends on the machine's libraries, so `alignment` is found by trying.
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
        pack_linears(self._model)
        if self._device.type == "cpu":
            steady_activations(self._model)
        self.alignment = self._find_alignment()
        if self.alignment != self.tile:
            self.tile = prefill_chunk

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
        """Compute the plan's tokens into the pool. None when no sequence is ready for its next token."""
        sequences: list[Sequence] = []
        logits: list[Tensor] = []
        if plan.decodes:
            sequences += plan.decodes
            logits.append(self._decode(plan.decodes))
        for chunk in plan.prefills:
            scores = self._prefill(chunk)
            if chunk.samples:
                sequences.append(chunk.sequence)
                logits.append(scores)
        if not sequences:
            return None
        return StepResult(sequences, torch.cat(logits) if len(logits) > 1 else logits[0])

    def _prefill(self, chunk: PrefillChunk) -> Tensor:
        chain = chunk.sequence.chain
        slots = [block.slot for block in chunk.sequence.held.blocks]
        return self.prefill(chain.slice(chunk.start, chunk.stop), chunk.start, slots, sample=chunk.samples)

    def _decode(self, sequences: Batch[Sequence]) -> Tensor:
        lengths = [len(sequence.chain) for sequence in sequences]
        tokens = [sequence.chain[-1] for sequence in sequences]
        tables = [[block.slot for block in sequence.held.blocks] for sequence in sequences]
        return self.decode(tokens, lengths, tables)

    def prefill(self, tokens: list[int], start: int, slots: list[int], *, sample: bool) -> Tensor:
        """Compute ``tokens`` at positions from ``start`` on; ``[1, vocab]`` of the last one, or ``[0, vocab]``."""
        step = PrefillStep(self.pool, slots, start, len(tokens), tile=self.tile)
        keep = [len(tokens) - 1] if sample else []
        return self._forward(step, tokens, list(range(start, start + len(tokens))), keep)

    def decode(self, tokens: list[int], lengths: list[int], tables: list[list[int]]) -> Tensor:
        """Compute each sequence's last token (its length counts it); ``[len(tokens), vocab]``."""
        step = DecodeStep(self.pool, tables, lengths)
        return self._forward(step, tokens, [length - 1 for length in lengths], list(range(len(tokens))))

    def _forward(self, step: AttentionStep, tokens: list[int], positions: list[int], keep: list[int]) -> Tensor:
        with attention_step(step):
            output = self._model(
                input_ids=torch.tensor([tokens], device=self._device),
                position_ids=torch.tensor([positions], device=self._device),
                use_cache=False,
                logits_to_keep=torch.tensor(keep, dtype=torch.int64, device=self._device),
            )
        logits: Tensor = output.logits[0]
        return logits

    def _find_alignment(self) -> int:
        """The tile if prefill proves tile-invariant here, else the chunk. Uses the pool's first blocks.

        Experts are ruled out without a trial: the number of rows that each one gets depends on the text.
        """
        experts = any(parameter.ndim > 2 for parameter in self._model.parameters())
        if self.tile == self.prefill_chunk or experts:
            return self.prefill_chunk
        # Odd numbers of rows are what kernels treat in their own way, and a single row most of all.
        same = all(self._same_in_pieces(self.prefill_chunk + tail) for tail in (1, self.tile // 2 + 1))
        return self.tile if same else self.prefill_chunk

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
        return torch.equal(*logits) and torch.equal(*self.pool.storage[: 2 * blocks].split(blocks))

    @torch.inference_mode()
    def check_against_plain_forward(self) -> None:
        """Compare prefill and decode through the pool with transformers' own eager forward, on made-up tokens.

        Raises UnsupportedModelError when they differ by more than rounding: the model does something to its state
        that the paged attention does not reproduce, and would be served wrong. Uses the pool's first blocks.
        """
        length = min(2 * self.prefill_chunk + 2, self.pool.num_blocks * self.pool.block_size)
        length = min(length, self.loaded.context_length, 96)
        tokens = self._made_up_tokens(length)
        slots = list(range(-(-length // self.pool.block_size)))
        cut = max(self.pool.block_size, length // 2 // self.pool.block_size * self.pool.block_size)
        paged = [self.prefill(tokens[:cut], 0, slots, sample=True)]
        if length > cut + 1:
            paged.append(self.prefill(tokens[cut:-1], cut, slots, sample=True))
            paged.append(self.decode(tokens[-1:], [length], [slots]))
        at = [cut - 1, length - 2, length - 1][: len(paged)]
        implementation = self._model.config._attn_implementation
        self._model.set_attn_implementation("eager")
        try:
            plain = self._model(input_ids=torch.tensor([tokens], device=self._device), use_cache=False).logits[0, at]
        finally:
            self._model.set_attn_implementation(implementation)
        ours, theirs = torch.cat(paged).float(), plain.float()
        error = (ours - theirs).norm() / theirs.norm()
        if not error <= _SELF_CHECK_TOLERANCE[self.loaded.dtype]:
            raise UnsupportedModelError(
                f"{self.loaded.name}: logits through the paged KV pool differ from the model's own by {error:.2%}; "
                f"{type(self._model).__name__} cannot be served"
            )

    def _made_up_tokens(self, count: int) -> list[int]:
        return [(7 * i * i + 3) % self.loaded.geometry.vocab_size for i in range(count)]

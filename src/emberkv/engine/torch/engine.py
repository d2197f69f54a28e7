"""Executes planned steps with PyTorch: which forward passes, on which tokens, over which blocks."""

from collections import abc
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from emberkv.core.scheduler import PrefillChunk, StepPlan
from emberkv.core.sequence import Sequence
from emberkv.engine.executor import NOT_NUMBERS, PromptLogprobs, SamplingState, StepOutput
from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import (
    ATTENTION_NAME,
    AttentionBackend,
    PassedPositions,
    Run,
    attention_step,
)
from emberkv.engine.torch.attention.torch_attention import TorchAttention
from emberkv.engine.torch.layers import (
    BatchInvariantGates,
    PackedLinear,
    pack_linears,
    release_checkpoint,
    wrap_activations,
    wrap_rotations,
)
from emberkv.engine.torch.model.attention_interface import use_interface
from emberkv.engine.torch.model.latent import use_latents
from emberkv.engine.torch.model.loader import LoadedModel
from emberkv.engine.torch.native.attention import NativeAttention, NativeStep
from emberkv.engine.torch.native.decoder import NativeDecoder, find_decoder
from emberkv.engine.torch.native.experts import replace_experts
from emberkv.engine.torch.native.kernels import Kernels, can_compute
from emberkv.engine.torch.native.layers import replace_latents, replace_layers
from emberkv.engine.torch.native.recurrence import replace_recurrences
from emberkv.engine.torch.recurrence import use_recurrent_state
from emberkv.engine.torch.sampling import Sampler, SamplingFailure, prompt_logprobs
from emberkv.engine.torch.self_check import (
    Findings,
    check_against_plain_forward,
    decoder_agrees,
    is_batch_invariant,
    is_tile_invariant,
    plain_logits,
)
from emberkv.engine.torch.state_step import StateStep, state_step
from emberkv.errors import UnsupportedModelError

TILE_TOKENS = 32
"""Smaller tiles round hits down by less, but their attention is slower; see docs/benchmarks.md."""


@dataclass(frozen=True, slots=True)
class PromptLogits:
    """logits: ``[tokens, vocab]``, at the positions of a prompt from ``start`` on, each for the token that follows."""

    sequence: Sequence
    start: int
    logits: Tensor


@dataclass(frozen=True, slots=True)
class StepLogits:
    """logits: ``[len(sequences), vocab]``, the next-token scores of each sequence that has all its tokens computed.

    prompts: of sequences that want the logits of their prompts, those that the step has computed.
    """

    sequences: list[Sequence]
    logits: Tensor
    prompts: list[PromptLogits] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Work:
    """A run to compute. tokens: as many as the run has. samples: whether the last one's logits are wanted.

    whole: whether all of their logits are.
    """

    run: Run
    tokens: abc.Sequence[int]
    samples: bool
    whole: bool = False

    @property
    def kept(self) -> int:
        """Rows of logits that the run gives."""
        return self.run.count if self.whole else int(self.samples)


class TorchEngine:
    """A loaded model over a paged KV pool: the `Executor` of PyTorch. Not thread-safe: one loop drives it.

    cache_bytes: size of the KV pool. prefill_chunk: most tokens of one prefill pass; unless the engine is
    batch-invariant, it is raised to whole blocks. kernels: compute attention and most layers on CPU; None leaves them
    to torch. tile: tokens whose attention torch computes together, a divisor of prefill_chunk; the kernels need none.
    sampler: chooses the tokens. progress: called with a short line at the start of each stage. known: what a self-check
    of the same engine has found before; without it the engine makes one.

    Prefill is *tile-invariant*: tokens ``[k * alignment, (k + 1) * alignment)`` get the same KV state, to the last bit,
    in whatever chunk they are computed; a hit's full blocks end at a multiple of ``alignment``. It is a block with the
    kernels, by which no row influences another. With torch it is a tile, as attention is cut at absolute positions,
    where the machine's libraries compute the linear layers so. Both are tried; where it fails, it is the chunk.
    Where it holds, all of a step is *one pass*.
    It is *batch-invariant* if decode steps give a token's state the same bits as well, and so does a piece that begins
    within a block, which with the kernels they do.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        cache_bytes: int,
        block_size: int,
        prefill_chunk: int,
        kernels: Kernels | None = None,
        tile: int = TILE_TOKENS,
        sampler: Sampler | None = None,
        progress: Callable[[str], None] = lambda _: None,
        known: Findings | None = None,
    ) -> None:
        if loaded.dtypes.kv not in (loaded.dtypes.activations, torch.int8):
            raise UnsupportedModelError(
                f"{loaded.name} has {loaded.dtypes}; KV must be of the activations' type, or int8"
            )
        self.loaded = loaded
        self._progress = progress
        self.prefill_chunk = prefill_chunk
        self._model = loaded.model
        self._device = loaded.device
        progress("allocating the KV pool")
        self.pool = KVPool.of_bytes(
            loaded.geometry, loaded.dtypes.kv, cache_bytes, block_size, loaded.device, loaded.dtypes.activations
        )
        self._expected: Tensor | None = None
        if known is None:
            progress("self-check 1 of 4: the model's own logits")
            self._expected = plain_logits(loaded, self.pool.num_blocks * block_size)
        progress("arranging the weights")
        use_interface(self._model, ATTENTION_NAME)
        use_latents(self._model)
        use_recurrent_state(self._model, self.pool)
        self.kernels = kernels if kernels is not None and can_compute(loaded, block_size) else None
        self.pool.packed = self.kernels is not None
        self._sampler = sampler if sampler is not None else Sampler(self.kernels)
        self._replace_layers()
        self._asks_cache = PassedPositions.wanted_by(self._model)
        self._functions = BatchInvariantGates() if BatchInvariantGates.wanted_by(self._model) else nullcontext()
        self._packed = any(isinstance(module, PackedLinear) for module in self._model.modules())
        self.alignment = self._wanted_alignment(tile)
        self._attention = self._make_attention()
        self.decoder: NativeDecoder | None = None
        self.decoder = self._find_decoder(known)
        self.one_pass = self._find_one_pass(known)
        if not self.one_pass:
            self.alignment = self.prefill_chunk = max(self.prefill_chunk, block_size)
            self._attention = self._make_attention()
        self.batch_invariant = self._find_batch_invariance(known)
        if not self.batch_invariant:
            self.prefill_chunk = max(self.prefill_chunk, self.alignment)

    def _replace_layers(self) -> None:
        """Have the kernels compute the layers, or torch in such a way that no row's result depends on another row."""
        if self.kernels is not None:
            replace_latents(self._model, self.kernels)
            replace_experts(self._model, self.kernels)
            replace_recurrences(self._model, self.kernels)
            replace_layers(self._model, self.kernels)
        pack_linears(self._model)
        if self._device.type == "cpu":
            wrap_activations(self._model)
            wrap_rotations(self._model)
            release_checkpoint(self._model)

    def _wanted_alignment(self, tile: int) -> int:
        """The unit to try. A chunk that is neither whole blocks nor, with the kernels, a part of one, becomes so."""
        block, native = self.pool.block_size, self.kernels is not None
        if self.prefill_chunk % block and not (native and block % self.prefill_chunk == 0):
            self.prefill_chunk = -(-self.prefill_chunk // block) * block
        if native:
            return block
        return tile if self.prefill_chunk % tile == 0 and tile % block == 0 else self.prefill_chunk

    @property
    def _base(self) -> torch.nn.Module:
        """The model without its output layer."""
        model = self._model
        base: torch.nn.Module = model.model if model.base_model is model else model.base_model
        return base

    def _make_attention(self) -> AttentionBackend:
        if self.kernels is not None:
            return NativeAttention(self.pool, self.kernels)
        return TorchAttention(self.pool, self.alignment)

    def _find_decoder(self, known: Findings | None) -> NativeDecoder | None:
        """What computes a pass in one call, if it gives the bits that the model's modules give."""
        if self.kernels is None or (known is not None and not known.decoder):
            return None
        decoder = find_decoder(self._model, self.pool, self.kernels)
        if decoder is None or known is not None:
            return decoder
        return decoder if decoder_agrees(self, decoder) else None

    def _find_one_pass(self, known: Findings | None) -> bool:
        if known is not None:
            return known.one_pass
        self._progress("self-check 2 of 4: prefill whole and in pieces")
        return is_tile_invariant(self)

    def _find_batch_invariance(self, known: Findings | None) -> bool:
        if known is not None:
            return known.batch_invariant
        self._progress("self-check 3 of 4: decode against prefill")
        return self.kernels is not None and self.one_pass and is_batch_invariant(self)

    def execute(self, plan: StepPlan, sampling: Mapping[str, SamplingState]) -> StepOutput:
        """See `Executor.execute`."""
        logits = self.forward(plan)
        return StepOutput() if logits is None else self._sample(logits, sampling)

    def _sample(self, scores: StepLogits, sampling: Mapping[str, SamplingState]) -> StepOutput:
        ids = [sequence.request_id for sequence in scores.sequences]
        results = self._sampler.sample(scores.logits, [sampling[request_id] for request_id in ids])
        output = StepOutput()
        for request_id, each in zip(ids, results, strict=True):
            if isinstance(each, SamplingFailure):
                output.failed[request_id] = each.reason
            else:
                output.tokens[request_id] = each
        for prompt in scores.prompts:
            request_id = prompt.sequence.request_id
            found = _prompt_logprobs(prompt, sampling[request_id].params.prompt_logprobs or 0)
            if found is None:
                output.failed[request_id] = NOT_NUMBERS
                output.tokens.pop(request_id, None)
            else:
                output.prompt_logprobs.append(found)
        return output

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> StepLogits | None:
        """Compute the plan's tokens into the pool. None when no sequence is ready for its next token.

        Where rows do not influence one another's bits, all goes through the model in one pass.
        """
        copies = plan.copies
        self.pool.copy_blocks([copy.source.block_id for copy in copies], [copy.target.block_id for copy in copies])
        decodes = [_decode_work(sequence) for sequence in plan.decodes]
        chunks = _in_one_piece(plan.prefills) if self.one_pass else plan.prefills
        prefills = [_prefill_work(chunk) for chunk in chunks]
        passes = [decodes + prefills] if self.one_pass else [decodes, *([work] for work in prefills)]
        logits = [self._forward(works) for works in passes if works]
        sequences = plan.decodes + [chunk.sequence for chunk in chunks]
        return _result(list(zip(sequences, decodes + prefills, strict=True)), torch.cat(logits)) if logits else None

    def prefill(self, tokens: list[int], start: int, block_ids: list[int], *, sample: bool) -> Tensor:
        """Compute ``tokens`` at positions from ``start`` on; ``[1, vocab]`` of the last one, or ``[0, vocab]``."""
        return self._forward([_Work(Run(block_ids, start, len(tokens)), tokens, sample)])

    def decode(self, tokens: list[int], lengths: list[int], block_tables: list[list[int]]) -> Tensor:
        """Compute each sequence's last token (its length counts it); ``[len(tokens), vocab]``."""
        given = zip(tokens, lengths, block_tables, strict=True)
        return self._forward([_Work(Run(table, n - 1, 1, decode=True), [token], True) for token, n, table in given])

    def _forward(self, works: list[_Work]) -> Tensor:
        """One pass over all works' tokens; the logits to keep, in order."""
        tokens: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        for work in works:
            tokens += work.tokens
            positions += range(work.run.start, work.run.stop)
            keep += range(len(tokens) - work.kept, len(tokens))
        step = self._attention.step([work.run for work in works], keep)
        if self.decoder is not None and isinstance(step, NativeStep):
            return self.decoder.forward(step, tokens)
        padding = rounded_rows(len(tokens)) - len(tokens) if self._packed else 0
        position_ids = torch.tensor([positions + [0] * padding], device=self._device)
        arguments: dict[str, object] = {
            "input_ids": torch.tensor([tokens + [0] * padding], device=self._device),
            "position_ids": position_ids,
            "use_cache": False,
        }
        if self._asks_cache:
            arguments["past_key_values"] = PassedPositions(position_ids)
        with attention_step(step), self._states(works), self._functions:
            if not keep:
                # Without logits to keep, the output layer is left out: for a large vocabulary it is costly.
                self._base(**arguments)
                return torch.empty(
                    (0, self.loaded.geometry.vocab_size), dtype=self.loaded.dtypes.activations, device=self._device
                )
            kept = torch.tensor(keep, dtype=torch.int64, device=self._device)
            logits: Tensor = self._model(**arguments, logits_to_keep=kept).logits[0]
            return logits

    def _states(self, works: list[_Work]) -> AbstractContextManager[None]:
        if not self.loaded.geometry.states:
            return nullcontext()
        return state_step(StateStep(self.pool, [work.run for work in works]))

    @property
    def hits_within_blocks(self) -> bool:
        """See `Executor`: the state of convolutions and recurrent layers is there after a block's last computed token
        alone.
        """
        return not self.loaded.geometry.states

    @property
    def backend(self) -> str:
        return "torch" if self.kernels is None else "native"

    @property
    def description(self) -> str:
        if self.kernels is None:
            return "torch"
        reuse = "decoded KV is exact" if self.batch_invariant else "decoded KV is not exact"
        return f"C++, vectors of {self.kernels.lanes}; {reuse}"

    @property
    def findings(self) -> Findings:
        return Findings(self.one_pass, self.batch_invariant, self.decoder is not None)

    def check_against_plain_forward(self) -> None:
        """Nothing where a self-check was passed before, or this has passed. Uses the pool's first blocks.

        Raises UnsupportedModelError: see `self_check.check_against_plain_forward`.
        """
        if self._expected is None:
            return
        self._progress("self-check 4 of 4: logits through the KV pool")
        check_against_plain_forward(self, self._expected)
        self._expected = None  # of a large vocabulary it takes some 30 MB


def _result(computed: list[tuple[Sequence, _Work]], logits: Tensor) -> StepLogits | None:
    """logits: the rows that the works keep, in order."""
    ready: list[Sequence] = []
    rows: list[int] = []
    prompts: list[PromptLogits] = []
    stop = 0
    for sequence, work in computed:
        start, stop = stop, stop + work.kept
        if work.samples:
            ready.append(sequence)
            rows.append(stop - 1)
        if work.whole:
            prompts.append(PromptLogits(sequence, work.run.start, logits[start:stop]))
    if not stop:
        return None
    return StepLogits(ready, logits[rows] if prompts else logits, prompts)


def _prompt_logprobs(computed: PromptLogits, alternatives: int) -> PromptLogprobs | None:
    """Of the prompt's tokens that the computed positions predict; None where the logits are not numbers."""
    sequence, first = computed.sequence, computed.start + 1
    stop = min(first + computed.logits.shape[0], sequence.prompt_tokens)
    tokens = sequence.chain.slice(first, max(first, stop))
    found = prompt_logprobs(computed.logits[: len(tokens)], tokens, alternatives)
    return None if found is None else PromptLogprobs(sequence.request_id, first, found)


def _in_one_piece(chunks: Iterable[PrefillChunk]) -> list[PrefillChunk]:
    """Those of one sequence that follow one another, as one."""
    joined: list[PrefillChunk] = []
    for chunk in chunks:
        if joined and joined[-1].sequence is chunk.sequence and joined[-1].stop == chunk.start:
            joined[-1] = PrefillChunk(chunk.sequence, joined[-1].start, chunk.stop)
        else:
            joined.append(chunk)
    return joined


def _prefill_work(chunk: PrefillChunk) -> _Work:
    sequence = chunk.sequence
    run = Run([block.block_id for block in sequence.held.blocks], chunk.start, chunk.stop - chunk.start)
    tokens = sequence.chain.slice(chunk.start, chunk.stop)
    return _Work(run, tokens, chunk.samples, whole=sequence.wants_prompt_logits)


def _decode_work(sequence: Sequence) -> _Work:
    run = Run([block.block_id for block in sequence.held.blocks], len(sequence.chain) - 1, 1, decode=True)
    return _Work(run, [sequence.chain[-1]], True)


def rounded_rows(rows: int) -> int:
    """Up to a power of two, or a multiple of 16. oneDNN keeps more than half a megabyte for each number it has met."""
    return -(-rows // 16) * 16 if rows > 8 else 1 << (rows - 1).bit_length()

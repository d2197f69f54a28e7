"""What an engine tries out on its model at the start: which cuts of a prompt change no bit, and whether the logits
through the KV pool are the model's own.

The trials compute made-up tokens into the pool's first blocks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.layers import rows_are_independent
from emberkv.engine.torch.model.attention_interface import calls_interface
from emberkv.engine.torch.model.loader import LoadedModel
from emberkv.engine.torch.native.decoder import NativeDecoder
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.quantization.layers import quantized_weights
from emberkv.errors import UnsupportedModelError

_PLAIN_TOKENS = 96
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
_QUANTISED_TOLERANCE = 0.15
"""With KV in 8 bits: twice the largest of what was measured. In float32 and bfloat16, random models of four dense
architectures, each with four sets of weights, were off by 0.04 to 3.0%, and those of two mixtures by 0.14 to 7.2%, as a
rounded value may send a token to other experts. With the state of two layers in one place they were off by 25 to 115%.
"""
_DECODED_TOKENS = 3
_LAST_POSITION = 1 << 15  # of the trials; what a model does differently from some position on begins before it


@dataclass(frozen=True, slots=True)
class Findings:
    """What the trials of a self-check that was passed have found.

    one_pass, batch_invariant: see `TorchEngine`. decoder: a `NativeDecoder` gives the bits of the model's modules.
    """

    one_pass: bool
    batch_invariant: bool
    decoder: bool


def tokens_that_count(prefill_chunk: int, block_size: int) -> int:
    """So many tokens of a KV pool are enough for all trials; with fewer of them, some are not made."""
    return max(_PLAIN_TOKENS, 8 * prefill_chunk, 4 * block_size)


class PagedForward(Protocol):
    """What is tried: forward passes over the pool. `TorchEngine` has them."""

    loaded: LoadedModel
    pool: KVPool
    kernels: Kernels | None
    prefill_chunk: int
    alignment: int
    decoder: NativeDecoder | None

    def prefill(self, tokens: list[int], start: int, block_ids: list[int], *, sample: bool) -> Tensor: ...

    def decode(self, tokens: list[int], lengths: list[int], block_tables: list[list[int]]) -> Tensor: ...


def is_tile_invariant(engine: PagedForward) -> bool:
    """Whether prefill gives each ``alignment`` tokens the same bits in whatever chunks it computes them.

    Torch's own experts are ruled out without a trial: the number of rows that each one gets depends on the text.
    """
    whole_chunks = engine.alignment == engine.prefill_chunk and engine.kernels is None
    model = engine.loaded.model
    if whole_chunks or quantized_weights(model) or not rows_are_independent(model):
        return False
    # Odd numbers of rows are what kernels treat in their own way, and a single row most of all.
    unit = _unit(engine)
    cuts = {engine.prefill_chunk, unit}
    tails = (1, unit // 2 + 1)
    return all(_same_in_pieces(engine, engine.prefill_chunk + tail, cuts) for tail in tails)


def is_batch_invariant(engine: PagedForward) -> bool:
    """Whether decode steps, and chunks that begin within a block or behind a whole one, give tokens the same bits as
    whole prefills do.
    """
    unit = _unit(engine)
    within = {unit // 2 + 1, unit + 1}
    return (
        _decodes_as_it_prefills(engine) and _same_in_pieces(engine, unit + 3, within) and _states_cross_blocks(engine)
    )


def _unit(engine: PagedForward) -> int:
    """Tokens that are to get the same bits in whatever chunks. A chunk may be less than a block (`TorchEngine`)."""
    return min(engine.alignment, engine.prefill_chunk)


@torch.inference_mode()
def _same_in_pieces(engine: PagedForward, length: int, cuts: Iterable[int]) -> bool:
    """Whether tokens cut in two, at each of ``cuts``, get the KV state and the last logits that they get whole."""
    blocks = _blocks_for_two(engine, length)
    if blocks is None:
        return False
    first, second = blocks
    tokens = _made_up_tokens(engine.loaded, length)
    expected = engine.prefill(tokens, 0, first, sample=True)
    for cut in cuts:
        engine.pool.clear(second)
        engine.prefill(tokens[:cut], 0, second, sample=False)
        logits = engine.prefill(tokens[cut:], cut, second, sample=True)
        if not (torch.equal(logits, expected) and _same_blocks(engine, first, second)):
            return False
    return True


@torch.inference_mode()
def _states_cross_blocks(engine: PagedForward) -> bool:
    """Whether states of fixed size go on into the next block: cut before, at and behind the end of a block, tokens get
    the KV state and the logits that they get whole.

    Where a unit is a block, the other trials have done this. A block that has grown is long, so the cuts share one
    prefill up to the block's last token. Only the first computes that token: the block then holds the state behind it.
    """
    size = engine.pool.block_size
    length = size + 3
    if not engine.loaded.geometry.states or _unit(engine) == size or length > engine.loaded.context_length:
        return True
    blocks = _blocks_for_two(engine, length)
    if blocks is None:
        return False
    first, second = blocks
    tokens = _made_up_tokens(engine.loaded, length)
    expected = engine.prefill(tokens, 0, first, sample=True)
    engine.prefill(tokens[: size - 1], 0, second, sample=False)
    for pieces in ([size - 1, length], [size, length], [size, size + 1, length]):
        engine.pool.clear(second[1:])
        for start, stop in pairwise(pieces):
            logits = engine.prefill(tokens[start:stop], start, second, sample=True)
        if not (torch.equal(logits, expected) and _same_blocks(engine, first, second)):
            return False
    return True


@torch.inference_mode()
def _decodes_as_it_prefills(engine: PagedForward) -> bool:
    """Whether decode steps give a text's last tokens the KV state and the logits that prefill gives them."""
    length = _unit(engine) + _DECODED_TOKENS
    blocks = _blocks_for_two(engine, length)
    if blocks is None:
        return False
    first, second = blocks
    tokens = _made_up_tokens(engine.loaded, length)
    expected = engine.prefill(tokens, 0, first, sample=True)
    engine.prefill(tokens[:-_DECODED_TOKENS], 0, second, sample=False)
    for stop in range(length - _DECODED_TOKENS, length):
        logits = engine.decode([tokens[stop]], [stop + 1], [second])
    return torch.equal(logits, expected) and _same_blocks(engine, first, second)


@torch.inference_mode()
def decoder_agrees(engine: PagedForward, decoder: NativeDecoder) -> bool:
    """Whether passes by ``decoder`` give logits and KV state the bits that the model's modules give them.

    Tried as they are and with larger values, as some models clamp what is large; at the first positions and at the last
    ones, as some scale their queries by position. Leaves the engine without a decoder.
    """
    for factor in (1.0, 1000.0):
        with decoder.larger_norms(factor):
            engine.decoder = decoder
            ours = _some_passes(engine)
            engine.decoder = None
            theirs = _some_passes(engine)
        if ours is None or theirs is None or not all(map(torch.equal, ours, theirs)):
            return False
    decoder.drop_positions()
    return True


def _some_passes(engine: PagedForward) -> list[Tensor] | None:
    """Logits and blocks of a prefill, and of a step that decodes its sequence and another, at the first positions and
    at the last ones; None in too small a pool.
    """
    length = engine.pool.block_size + 3
    blocks = _blocks_for_two(engine, length + 1)
    if blocks is None:
        return None
    first, second = blocks
    tokens = _made_up_tokens(engine.loaded, length + 2)
    prefilled = engine.prefill(tokens[:length], 0, first, sample=True)
    decoded = engine.decode(tokens[length:], [length + 1, 1], [first, second])
    last = _passes_at_the_last_positions(engine, first[0], (first[-1], second[-1]))
    return [prefilled, decoded, *last, engine.pool.blocks[first + second]]


def _passes_at_the_last_positions(engine: PagedForward, filled: int, free: tuple[int, int]) -> list[Tensor]:
    """Logits of a prefill of two tokens, and of a step that decodes behind them and half as far in another sequence.

    filled: a block whose keys and values precede them, over and over, so that long sequences need no more blocks.
    """
    stop = min(engine.loaded.context_length, _LAST_POSITION)
    lengths = [stop, stop // 2]
    tables = [
        [filled] * ((length - 1) // engine.pool.block_size) + [block]
        for length, block in zip(lengths, free, strict=True)
    ]
    tokens = _made_up_tokens(engine.loaded, 4)
    prefilled = engine.prefill(tokens[:2], stop - 3, tables[0], sample=True)
    return [prefilled, engine.decode(tokens[2:], lengths, tables)]


def _blocks_for_two(engine: PagedForward, length: int) -> tuple[list[int], list[int]] | None:
    """Cleared blocks for two sequences of ``length`` tokens; None where pool or context are too small."""
    count = -(-length // engine.pool.block_size)
    if 2 * count > engine.pool.num_blocks or length > engine.loaded.context_length:
        return None
    engine.pool.clear(list(range(2 * count)))
    return list(range(count)), list(range(count, 2 * count))


def _same_blocks(engine: PagedForward, first: list[int], second: list[int]) -> bool:
    blocks = engine.pool.blocks.view(torch.uint8)  # half of a value in fp32 may be no number as a bf16
    return torch.equal(blocks[first], blocks[second])


@torch.inference_mode()
def plain_logits(loaded: LoadedModel, pool_tokens: int) -> Tensor:
    """``[tokens, vocab]``: transformers' own eager forward over made-up tokens, no more than ``pool_tokens``.

    Call it before the engine replaces any of the model's layers.
    """
    model = loaded.model
    tokens = _made_up_tokens(loaded, min(_PLAIN_TOKENS, pool_tokens, loaded.context_length))
    if calls_interface(model.config):
        model.set_attn_implementation("eager")
    logits: Tensor = model(input_ids=torch.tensor([tokens], device=loaded.device), use_cache=False).logits
    return logits[0]


@torch.inference_mode()
def check_against_plain_forward(engine: PagedForward, expected: Tensor) -> None:
    """Compare prefill and decode through the pool with ``expected``, what `plain_logits` gave.

    Raises UnsupportedModelError when they differ by more than rounding: the model does something to its state that the
    paged attention does not reproduce, and would be served wrong.
    """
    length = expected.shape[0]
    tokens = _made_up_tokens(engine.loaded, length)
    block_ids = list(range(-(-length // engine.pool.block_size)))
    unit = engine.alignment if engine.kernels is None else min(_unit(engine), _PLAIN_TOKENS // 3)
    cut = max(unit, length // 2 // unit * unit)
    if length < cut + 2:
        paged, at = [engine.prefill(tokens, 0, block_ids, sample=True)], [length - 1]
    else:
        paged = [engine.prefill(tokens[:cut], 0, block_ids, sample=True)]
        paged.append(engine.prefill(tokens[cut:-1], cut, block_ids, sample=True))
        paged.append(engine.decode(tokens[-1:], [length], [block_ids]))
        at = [cut - 1, length - 2, length - 1]
    ours, theirs = torch.cat(paged).float(), expected[at].float()
    error = (ours - theirs).norm() / theirs.norm()
    quantised = engine.pool.dtype is torch.int8
    if not error <= (_QUANTISED_TOLERANCE if quantised else _TOLERANCE[engine.loaded.dtypes.activations]):
        raise UnsupportedModelError(
            f"{engine.loaded.name}: logits through the paged KV pool differ from the model's own by {error:.2%}; "
            f"{type(engine.loaded.model).__name__} cannot be served"
        )


def _made_up_tokens(loaded: LoadedModel, count: int) -> list[int]:
    return [(7 * i * i + 3) % loaded.geometry.vocab_size for i in range(count)]

"""KV blocks of a model in memory, computed by the engine that serves, under the block hashes that serving uses."""

import copy
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from emberkv.core.hashing import TokenChain, root_hash
from emberkv.defaults import DEFAULT_BLOCK_SIZE, DEFAULT_PREFILL_CHUNK, machine_cache_folder
from emberkv.engine.tokenization.hf_tokenizer import HFTokenizer
from emberkv.engine.tokenization.tokenizer import Tokenizer, shared_prefix
from emberkv.engine.torch.engine import TILE_TOKENS, TorchEngine
from emberkv.engine.torch.model.fingerprint import model_fingerprint
from emberkv.engine.torch.model.inspection import inspect_geometry
from emberkv.engine.torch.model.loader import LoadedModel, ModelDtypes
from emberkv.engine.torch.namespace import namespace_of
from emberkv.engine.torch.native.kernels import find_kernels
from emberkv.errors import PromptTooLongError, RequestError, UnsupportedModelError
from emberkv.tiers.codec import BlockRecord, encode_record

InTime = Callable[[], bool]
"""Whether the caller still waits for it."""


class StoreBlock(Protocol):
    """Stores the bytes of a block under a key. prefix_tokens: the tokens up to and with the block."""

    def __call__(self, key: str, value: bytes, prefix_tokens: int | None = None) -> None: ...


def store_prefix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | Tokenizer,
    system_prompt: str,
    store: StoreBlock,
    *,
    in_time: InTime,
) -> bool:
    """Store each full block of what all requests with ``system_prompt`` begin with; whether all are stored.

    in_time: asked before each step of the preparation, each prefill chunk and each block.

    Raises EmberError when the model cannot be served, the prompt does not fit or is shorter than a block, and what
    ``store`` raises.
    """
    if not in_time():
        return False
    tokens = shared_prefix(_as_ours(tokenizer), system_prompt)
    if len(tokens) < DEFAULT_BLOCK_SIZE:
        raise RequestError(
            f"requests with this system prompt have {len(tokens)} tokens in common, fewer than a block of "
            f"{DEFAULT_BLOCK_SIZE}: there is nothing to store"
        )
    fingerprint = model_fingerprint(model)
    if not in_time():
        return False
    engine = private_engine(model, fingerprint, len(tokens))
    token_chain = TokenChain(root_hash(fingerprint, engine.pool.block_size), tokens, engine.pool.block_size)
    namespace = namespace_of(engine, token_chain.root).digest()
    whole = len(token_chain.block_hashes) * engine.pool.block_size
    for start in range(0, whole, engine.prefill_chunk):
        if not in_time():
            return False
        for record in _compute(engine, token_chain, start, min(start + engine.prefill_chunk, whole)):
            if not in_time():
                return False
            value = encode_record(record, namespace=namespace)
            store(record.block_hash.hex(), value, prefix_tokens=(record.position + 1) * engine.pool.block_size)
    return True


def private_engine(model: PreTrainedModel, fingerprint: str, prompt_tokens: int) -> TorchEngine:
    """An engine with a server's default settings over a copy of ``model``, with room for one prompt.

    Raises PromptTooLongError, and UnsupportedModelError as serving does.
    """
    geometry = inspect_geometry(model.config)
    if prompt_tokens > geometry.context_length:
        raise PromptTooLongError(
            f"the prompt has {prompt_tokens} tokens; the model's context holds {geometry.context_length}"
        )
    loaded = LoadedModel(
        model=structural_copy(model),
        tokenizer=cast(HFTokenizer, None),  # the engine works on token ids
        name=type(model).__name__,
        folder=Path(),
        dtypes=ModelDtypes.all_of(model.dtype),
        device=model.device,
        eos_token_ids=frozenset(),
        fingerprint=fingerprint,
        geometry=geometry,
    )
    block_size, chunk = DEFAULT_BLOCK_SIZE, DEFAULT_PREFILL_CHUNK
    for_trial = 2 * -(-(chunk + TILE_TOKENS) // block_size)  # the engine computes something twice to find its alignment
    blocks = max(for_trial, -(-prompt_tokens // block_size))
    cache_bytes = blocks * geometry.block_bytes(loaded.dtypes.kv, block_size)
    kernels = find_kernels("auto", loaded, block_size, machine_cache_folder())
    engine = TorchEngine(loaded, cache_bytes=cache_bytes, block_size=block_size, prefill_chunk=chunk, kernels=kernels)
    engine.check_against_plain_forward()
    return engine


def structural_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, not copied, in modules and settings of their own, which an engine may rebuild.

    Raises UnsupportedModelError for what is no model of transformers' own, is on several devices, or was changed by
    hooks or replaced methods: these would come along and still refer to the original.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"model is a {type(model).__name__}; it must be a transformers PreTrainedModel")
    if len({tensor.device for tensor in _tensors(model)}) > 1:
        raise UnsupportedModelError("the model is on several devices; it must be on one")
    for name, module in model.named_modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedModelError(f"{name or 'the model'} has hooks or a forward of its own; remove them first")
    memo: dict[int, object] = {id(each): nn.Parameter(each.detach(), False) for each in model.parameters()}
    memo |= {id(each): each.detach() for each in model.buffers()}
    copied: PreTrainedModel = copy.deepcopy(model, memo)
    copied.train(False)
    return copied


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return chain(model.parameters(), model.buffers())


def _as_ours(tokenizer: PreTrainedTokenizerFast | Tokenizer) -> Tokenizer:
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return HFTokenizer(copy.deepcopy(tokenizer))  # which changes its settings
    if hasattr(tokenizer, "render_chat"):
        return tokenizer
    raise UnsupportedModelError(
        f"tokenizer is a {type(tokenizer).__name__}; it must be a fast tokenizer, of the tokenizers library"
    )


def _compute(engine: TorchEngine, token_chain: TokenChain, start: int, stop: int) -> Iterator[BlockRecord]:
    """Prefill tokens ``[start, stop)``, whose predecessors are computed, into the pool's first blocks."""
    size = engine.pool.block_size
    block_ids = list(range(len(token_chain.block_hashes)))
    with torch.inference_mode():
        engine.prefill(token_chain.slice(start, stop), start, block_ids, sample=False)
    for position in range(start // size, stop // size):
        yield BlockRecord(
            block_hash=token_chain.block_hashes[position],
            parent=token_chain.parent(position),
            tokens=token_chain.block_tokens(position),
            position=position,
            exact=(position + 1) * size <= stop - stop % engine.alignment,
            payload=engine.pool.read(position),
        )

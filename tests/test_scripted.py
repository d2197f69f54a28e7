"""The executors that tests script: what they say, and that they notice KV state that is not that of its tokens."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from emberkv.core.hashing import root_hash
from emberkv.core.sequence import FinishReason
from emberkv.engine.assembly import AssembledEngine, EngineConfig, assemble_around
from emberkv.engine.executor import Executor
from emberkv.engine.request import GenerationRequest, ModelLimits, SamplingParams
from emberkv.engine.torch.assembly import checked_executor
from emberkv.engine.torch.attention.paged_attention import ATTENTION_NAME
from emberkv.engine.torch.model.loader import load_model
from tests.conftest import CheckpointFactory
from tests.engine.loop_harness import Inbox
from tests.engine.tiny_executor import TinyExecutor
from tests.models import VOCAB_SIZE
from tests.scripted import ChainExecutor, ScriptedExecutor

BLOCK = 32
END = 1
PROMPT = tuple(range(2, 100))
SAID = (7, 7, 9, END)
CONFIG = EngineConfig(1 << 20, BLOCK, prefill_chunk=BLOCK)


def ask(engine: AssembledEngine, request_id: str) -> Inbox:
    inbox = Inbox()
    engine.loop.submit(GenerationRequest(request_id, PROMPT, SamplingParams(max_tokens=10)), inbox)
    inbox.wait()
    return inbox


@pytest.fixture
def engine_over() -> Iterator[Callable[[Executor], AssembledEngine]]:
    engines = []

    def start(executor: Executor) -> AssembledEngine:
        limits = ModelLimits(200, VOCAB_SIZE, frozenset({END}))
        scripted = ScriptedExecutor(executor, lambda prompt: {PROMPT: SAID}[tuple(prompt)])
        engine = assemble_around(scripted, CONFIG, limits=limits, root=root_hash("any", BLOCK), namespace=bytes(32))
        engines.append(engine)
        engine.loop.start()
        return engine

    yield start
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("kind", ["tiny", "chain", "torch"])
def test_the_script_says_what_any_executor_answers_and_the_cache_is_real(
    kind: str, checkpoint: CheckpointFactory, engine_over: Callable[[Executor], AssembledEngine]
) -> None:
    executor: Executor
    if kind == "torch":
        executor = checked_executor(load_model(str(checkpoint("qwen3")), attn_implementation=ATTENTION_NAME), CONFIG)
    else:
        made = {"tiny": TinyExecutor, "chain": ChainExecutor}[kind]
        executor = made(num_blocks=16, block_size=BLOCK, vocab=VOCAB_SIZE)
    engine = engine_over(executor)
    first, second = (ask(engine, name) for name in "ab")
    for inbox in (first, second):
        assert (tuple(inbox.tokens), inbox.reason) == (SAID[:-1], FinishReason.STOP)
    usage = second.outputs[-1].usage
    assert usage is not None
    assert usage.cached_tokens >= len(PROMPT) // BLOCK * BLOCK


def test_kv_state_that_is_not_that_of_its_tokens_is_noticed(
    engine_over: Callable[[Executor], AssembledEngine],
) -> None:
    executor = ChainExecutor(num_blocks=16, block_size=BLOCK, vocab=VOCAB_SIZE)
    engine = engine_over(executor)
    assert ask(engine, "a").reason is FinishReason.STOP
    executor.pool.words ^= np.uint64(1)
    assert ask(engine, "b").reason is FinishReason.ERROR

"""Keys and values of generated sequences, read from the pool of an engine in NumPy."""

import asyncio
from collections.abc import Iterator

import pytest

from emberkv.core.hashing import root_hash
from emberkv.engine.assembly import AssembledEngine, EngineConfig, assemble_around
from emberkv.engine.commands import Remove
from emberkv.engine.request import GenerationRequest, ModelLimits, SamplingParams
from emberkv.errors import RequestError
from emberkv.serving.generated_sequences import GeneratedSequences
from emberkv.serving.kv_tensors import StoredLayer
from tests.engine.loop_harness import Inbox
from tests.engine.tiny_executor import TinyExecutor
from tests.waiting import DEADLINE

BLOCK = 4
PROMPT = [*range(3, 33)]


@pytest.fixture
def engine() -> Iterator[AssembledEngine]:
    config = EngineConfig(cache_bytes=2**20, block_size=BLOCK, prefill_chunk=8)
    executor = TinyExecutor(num_blocks=40, block_size=BLOCK)
    limits = ModelLimits(100, 50, frozenset())
    made = assemble_around(executor, config, limits=limits, root=root_hash("tiny", BLOCK), namespace=b"n" * 32)
    made.loop.start()
    yield made
    made.close(DEADLINE)


def generate(
    engine: AssembledEngine,
    generated: GeneratedSequences,
    prompt: list[int],
    seq_id: str,
    tenant: str = "",
    **params: int,
) -> list[int]:
    inbox = Inbox()
    sampling = SamplingParams(max_tokens=6, temperature=0.0, **params)  # type: ignore[arg-type]  # parameters by name
    request = GenerationRequest(f"of {seq_id}", prompt, sampling, tenant.encode(), tenant=tenant, seq_id=seq_id)
    generated.over(engine.loop).submit(request, inbox)
    inbox.wait()
    return inbox.tokens


def read(
    engine: AssembledEngine, generated: GeneratedSequences, seq_id: str, tenant: str = "", layer: int = 0
) -> StoredLayer | None:
    return asyncio.run(generated.read((tenant, seq_id), layer, engine))


def test_all_tokens_but_the_last_have_rows(engine: AssembledEngine) -> None:
    generated = GeneratedSequences()
    answer = generate(engine, generated, PROMPT, "a")
    found = read(engine, generated, "a")
    assert found is not None
    assert found.seq_len == len(PROMPT) + 5
    generate(engine, generated, [*PROMPT, *answer], "goes on")
    longer = read(engine, generated, "goes on")
    assert longer is not None
    assert longer.seq_len == len(PROMPT) + 11
    assert longer.v.data.startswith(found.v.data)


def test_a_token_that_ends_the_text_counts_as_the_last(engine: AssembledEngine) -> None:
    generated = GeneratedSequences()
    answer = generate(engine, generated, PROMPT, "whole")
    inbox = Inbox()
    params = SamplingParams(max_tokens=6, temperature=0.0, stop_token_ids=(answer[2],))
    generated.over(engine.loop).submit(GenerationRequest("b", PROMPT, params, seq_id="ended"), inbox)
    inbox.wait()
    found = read(engine, generated, "ended")
    assert found is not None
    assert found.seq_len == len(PROMPT) + len(inbox.tokens) == len(PROMPT) + answer.index(answer[2])


def test_sequences_are_their_tenants(engine: AssembledEngine) -> None:
    generated = GeneratedSequences()
    generate(engine, generated, PROMPT, "a", tenant="ann")
    assert read(engine, generated, "a", tenant="ann") is not None
    assert read(engine, generated, "a", tenant="bob") is None


def test_what_has_left_the_pool_is_not_found(engine: AssembledEngine) -> None:
    generated = GeneratedSequences()
    generate(engine, generated, PROMPT, "a")
    engine.loop.execute(Remove(None)).result(DEADLINE)
    assert read(engine, generated, "a") is None


def test_layers_that_the_model_has_not_are_not_found(engine: AssembledEngine) -> None:
    generated = GeneratedSequences()
    generate(engine, generated, PROMPT, "a")
    assert read(engine, generated, "a", layer=1) is None


def test_the_sequences_used_least_recently_are_forgotten(engine: AssembledEngine) -> None:
    generated = GeneratedSequences(max_tokens=120)
    for name in ("a", "b", "c"):
        generate(engine, generated, [*PROMPT, ord(name) - 60], name)
    assert read(engine, generated, "a") is not None
    generate(engine, generated, [*PROMPT, 1], "d")
    assert [read(engine, generated, name) is not None for name in "abcd"] == [True, False, True, True]
    generated.forget(("", "a"))
    assert read(engine, generated, "a") is None
    generated.clear()
    assert read(engine, generated, "d") is None


def test_a_refused_request_leaves_nothing(engine: AssembledEngine) -> None:
    generated = GeneratedSequences()
    with pytest.raises(RequestError, match="not in the vocabulary"):
        generate(engine, generated, [*PROMPT, 1000], "a")
    assert read(engine, generated, "a") is None

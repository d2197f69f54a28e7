"""Keys and values of generated sequences, read from the pool of an engine in NumPy."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from emberkv.core.hashing import root_hash
from emberkv.engine.assembly import AssembledEngine, EngineConfig, assemble_around
from emberkv.engine.commands import Remove
from emberkv.engine.request import GenerationRequest, ModelLimits, SamplingParams, TokenOutput
from emberkv.errors import DuplicateRequestError, RequestError
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.generate_api import worker_routers
from emberkv.serving.generated_sequences import GeneratedSequences
from emberkv.serving.kv_tensors import KVTensorStore, StoredLayer
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.tensors import deserialize_tensor, serialize_tensor
from tests.engine.loop_harness import Inbox
from tests.engine.tiny_executor import WORDS, TinyExecutor
from tests.serving.fakes import ByteTokenizer
from tests.serving.harness import MODEL, Client
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


def test_no_more_sequences_are_remembered_than_allowed(engine: AssembledEngine) -> None:
    generated = GeneratedSequences(max_sequences=2)
    for name in ("a", "b", "c"):
        generate(engine, generated, PROMPT, name)
    assert [bool(generated.request_id(("", name))) for name in "abc"] == [False, True, True]


def test_tokens_of_answers_count_towards_the_bound(engine: AssembledEngine) -> None:
    generated = GeneratedSequences(max_tokens=len(PROMPT) * 2 + 10)
    for name in ("a", "b"):
        generate(engine, generated, PROMPT, name)
    assert [bool(generated.request_id(("", name))) for name in "ab"] == [False, True]


def test_rows_are_counted_without_being_read(engine: AssembledEngine) -> None:
    generated = GeneratedSequences()
    generate(engine, generated, PROMPT, "a")

    def length(name: str, layer: int = 0) -> int:
        return asyncio.run(generated.length(("", name), layer, engine))

    found = read(engine, generated, "a")
    assert found is not None
    assert (length("a"), length("a", 1), length("b")) == (found.seq_len, 0, 0)


def test_those_that_keep_copies_learn_of_each_generation(engine: AssembledEngine) -> None:
    generated, begun = GeneratedSequences(), []
    generated.on_begin.append(lambda sequence, request_id: begun.append((sequence, request_id)))
    generate(engine, generated, PROMPT, "a", tenant="ann")
    assert begun == [(("ann", "a"), "of a")]


LETTERS = "".join(map(chr, range(97, 127)))


@pytest.fixture
def worker() -> Iterator[Client]:
    """A worker's routes by sequence over the cache of an engine whose tokens are bytes."""
    executor = TinyExecutor(num_blocks=40, block_size=BLOCK, vocab=257)
    config = EngineConfig(cache_bytes=2**20, block_size=BLOCK, prefill_chunk=8)
    limits = ModelLimits(100, 257, frozenset())
    made = assemble_around(executor, config, limits=limits, root=root_hash("tiny", BLOCK), namespace=b"n" * 32)
    made.loop.start()
    lifecycle = Lifecycle()
    lifecycle.loaded(ServedModel((MODEL,), 0, made.loop, ByteTokenizer(), assembled=made))
    store = KVTensorStore(max_bytes=2**20, max_entries=10)
    yield Client(create_app(lifecycle, ServingSettings(), routers=worker_routers(store, "w")))
    made.close(DEADLINE)


def named(row: int | None = None) -> dict[str, Any]:
    """A request about the sequence; with a row to append, which has that number everywhere."""
    tensors = {} if row is None else {name: serialize_tensor(np.full((1, WORDS, 1), row)) for name in ("k", "v")}
    return {"seq_id": "s", "layer": 0, **tensors}


def rows_of(worker: Client) -> NDArray[np.int64]:
    answer = worker.post("/kv/get", json=named())
    assert answer.status_code == 200, answer.text
    found: NDArray[np.int64] = deserialize_tensor(answer.json()["k"], library="numpy")
    return found


def generate_letters(worker: Client, prompt: str) -> None:
    body = {"seq_id": "s", "prompt": prompt, "max_tokens": 3, "temperature": 0.0}
    assert worker.post("/generate", json=body).status_code == 200


def test_appends_that_come_together_behind_generated_rows_are_all_kept(worker: Client) -> None:
    generate_letters(worker, LETTERS)
    computed = rows_of(worker)

    async def append_all() -> list[int]:
        transport = httpx.ASGITransport(worker.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://w") as client:
            answers = [client.post("/kv/append", json=named(row)) for row in range(4)]
            return [each.json()["seq_len"] for each in await asyncio.gather(*answers)]

    assert sorted(asyncio.run(append_all())) == [len(computed) + 1 + row for row in range(4)]
    found = rows_of(worker)
    assert np.array_equal(found[: len(computed)], computed)
    assert sorted(found[len(computed) :, 0, 0]) == [0, 1, 2, 3]


def test_a_sequence_that_is_generated_anew_has_no_rows_of_the_text_before(worker: Client) -> None:
    generate_letters(worker, LETTERS)
    worker.post("/kv/append", json=named(0))
    before = rows_of(worker)
    generate_letters(worker, LETTERS[::-1])
    found = rows_of(worker)
    assert len(found) == len(before) - 1
    assert not np.array_equal(found[1], before[1]), "behind the token that begins a text"
    assert worker.get("/kv/s/0/length").json()["seq_len"] == len(found)


def test_an_append_that_is_refused_stores_nothing(worker: Client) -> None:
    generate_letters(worker, LETTERS)
    wrong = {name: serialize_tensor(np.zeros((1, 2, 2))) for name in ("k", "v")}
    assert worker.post("/kv/append", json={**named(), **wrong}).status_code == 400
    assert worker.get("/stats").json()["kv_cache"]["entries"] == 0


def test_a_refused_request_leaves_nothing(engine: AssembledEngine) -> None:
    generated = GeneratedSequences()
    with pytest.raises(RequestError, match="not in the vocabulary"):
        generate(engine, generated, [*PROMPT, 1000], "a")
    assert read(engine, generated, "a") is None


def test_a_refused_request_leaves_what_was_generated_before(engine: AssembledEngine) -> None:
    generated = GeneratedSequences()
    generate(engine, generated, PROMPT, "a")
    before = read(engine, generated, "a")
    with pytest.raises(RequestError, match="not in the vocabulary"):
        generate(engine, generated, [*PROMPT, 1000], "a")
    assert before is not None
    assert read(engine, generated, "a") == before


def test_a_duplicate_request_leaves_the_sequence_that_is_being_generated(engine: AssembledEngine) -> None:
    generated = GeneratedSequences()
    remembering = generated.over(engine.loop)
    request = GenerationRequest("x", PROMPT, SamplingParams(max_tokens=6, temperature=0.0), seq_id="a")
    refused: list[DuplicateRequestError] = []

    def ask_again(_: TokenOutput) -> None:
        if refused:
            return
        try:
            remembering.submit(replace(request, prompt_token_ids=PROMPT[:3]), Inbox())
        except DuplicateRequestError as error:
            refused.append(error)

    inbox = Inbox(ask_again)
    remembering.submit(request, inbox)
    inbox.wait()
    assert len(refused) == 1
    found = read(engine, generated, "a")
    assert found is not None
    assert found.seq_len == len(PROMPT) + 5

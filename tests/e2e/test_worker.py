"""A worker as a gateway sees it: a server process with the demonstration model, asked by its internal routes."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from emberkv.cluster import wire
from emberkv.cluster.block_index import BlockIndex
from emberkv.cluster.feed import FeedReader, NeedChunk, ReplicaBlocks
from emberkv.cluster.worker_client import WorkerClient
from emberkv.core.feed import EventBatch, FeedMessage
from emberkv.core.hashing import PublicPrefixes, TokenChain
from emberkv.core.sequence import FinishReason
from emberkv.engine.commands import (
    CachedTokens,
    ExportBlocks,
    FindCached,
    ImportBlocks,
    LookUp,
    Remove,
    Retain,
    Statistics,
    Unretain,
)
from emberkv.engine.request import GenerationRequest, SamplingParams, TokenOutput
from emberkv.errors import PromptTooLongError, RequestError, WorkerUnreachableError
from emberkv.serving.errors import UnauthorizedError
from tests.e2e.process import Server, serving
from tests.waiting import DEADLINE

T = TypeVar("T")
SECRET = "a secret that only the cluster has"
PROMPT = [5 + 7 * n % 200 for n in range(300)]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("worker")
    (folder / "secret").write_text(SECRET)
    (folder / "secret").chmod(0o600)
    options = ["--cluster-secret-file", str(folder / "secret"), "--worker-id", "w1", "--ram-tier", "64MiB"]
    with serving(folder, "--cache-ram", "64MiB", *options) as server:
        yield server


def asked(worker: Server, question: Callable[[WorkerClient], Coroutine[Any, Any, T]], secret: str = SECRET) -> T:
    async def ask() -> T:
        async with asyncio.timeout(DEADLINE), WorkerClient(worker.url, secret) as client:
            return await question(client)

    return asyncio.run(ask())


async def answer(client: WorkerClient, request: GenerationRequest) -> list[TokenOutput]:
    async with aclosing(client.generate(request)) as outputs:
        return [output async for output in outputs]


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    end = time.monotonic() + DEADLINE
    while not await condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.02)


def params(new: int, **values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=new, ignore_eos=True, **values)


def test_an_answer_that_is_cut_goes_on_with_the_same_tokens_and_logprobs(worker: Server) -> None:
    chosen = params(24, temperature=1.0, seed=3, frequency_penalty=0.5, logprobs=2)

    async def question(client: WorkerClient) -> None:
        whole = await answer(client, GenerationRequest("whole", PROMPT, chosen))
        assert whole[-1].finish_reason is FinishReason.LENGTH
        begun = tokens(whole)[:10]
        rest = await answer(client, GenerationRequest("rest", [*PROMPT, *begun], chosen, answered=10))
        assert tokens(whole) == begun + tokens(rest)
        scores = [each for output in whole for each in output.logprobs]
        assert scores[10:] == [each for output in rest for each in output.logprobs]
        usage = rest[0].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.cached_tokens) == (310, 309)

    asked(worker, question)


def test_a_connection_that_is_dropped_aborts_its_request(worker: Server) -> None:
    async def question(client: WorkerClient) -> None:
        room = (await client.worker()).context_length - len(PROMPT)
        async with aclosing(client.generate(GenerationRequest("dropped", PROMPT, params(room)))) as outputs:
            async for output in outputs:
                if output.token_ids:
                    break
            assert (await client.load()).running == 1

        async def is_idle() -> bool:
            return (await client.load()).running == 0

        await until(is_idle)

    asked(worker, question)


def test_what_is_wrong_with_a_request_is_the_error_that_it_was(worker: Server) -> None:
    async def question(client: WorkerClient) -> None:
        with pytest.raises(RequestError, match=r"token id 999999 is not in the vocabulary"):
            await answer(client, GenerationRequest("a", [999_999], params(1)))
        with pytest.raises(PromptTooLongError, match=r"to generate are 1000300; "):
            await answer(client, GenerationRequest("b", PROMPT, params(1_000_000)))
        with pytest.raises(RequestError, match="answered is 5; "):
            await answer(client, GenerationRequest("c", PROMPT, params(5), answered=5))

    asked(worker, question)


def test_without_the_secret_nothing_is_told(worker: Server) -> None:
    routes = [("GET", each) for each in ("worker", "tokenizer", "events", "snapshot", "stored", "load")]
    for method, route in [*routes, *(("POST", each) for each in ("channel", "command", "explain", "operate"))]:
        for headers in ({}, {"authorization": "Bearer another"}, {"authorization": "Basic " + SECRET}):
            response = httpx.request(method, f"{worker.url}{wire.PREFIX}/{route}", headers=headers, timeout=DEADLINE)
            assert response.status_code == 401, route
    with pytest.raises(UnauthorizedError, match="refuses the cluster's secret"):
        asked(worker, lambda client: client.worker(), secret="another")
    secret = {"authorization": f"Bearer {SECRET}"}
    assert httpx.get(f"{worker.url}/v1/cache", headers=secret, timeout=DEADLINE).status_code == 200  # loopback alone


def test_another_version_and_what_is_no_worker_are_named(worker: Server) -> None:
    headers = {"authorization": f"Bearer {SECRET}", "accept": "application/vnd.emberkv.v99+msgpack"}
    response = httpx.get(f"{worker.url}{wire.PREFIX}/worker", headers=headers, timeout=DEADLINE)
    assert response.status_code == 400
    assert wire.MEDIA_TYPE in wire.decode(response.content, wire.Failure).message

    async def elsewhere() -> None:
        async with WorkerClient("http://127.0.0.1:9", SECRET) as client:
            await client.load()

    with pytest.raises(WorkerUnreachableError, match=r"127\.0\.0\.1:9 cannot be reached"):
        asyncio.run(elsewhere())


def test_a_body_that_is_no_request_is_refused(worker: Server) -> None:
    headers = {"authorization": f"Bearer {SECRET}"}
    for route in ("command", "explain", "operate"):
        response = httpx.post(f"{worker.url}{wire.PREFIX}/{route}", headers=headers, content=b"\xc1", timeout=DEADLINE)
        assert response.status_code == 400
        assert wire.decode(response.content, wire.Failure).kind == "WireError"


def test_the_worker_says_what_it_serves(worker: Server) -> None:
    async def question(client: WorkerClient) -> None:
        found = await client.worker()
        assert (found.worker_id, found.names, found.block_size) == ("w1", ("emberkv-demo",), 16)
        assert found.max_prompt_tokens == found.context_length - 1
        files = await client.tokenizer()
        assert files is not None
        assert files.etag == found.tokenizer
        assert "tokenizer.json" in files.files
        assert await client.tokenizer(files.etag) is None

    asked(worker, question)


def test_events_and_snapshots_give_the_blocks_that_the_worker_has(worker: Server) -> None:
    prompt = [9 + 11 * n % 150 for n in range(160)]

    async def question(client: WorkerClient) -> None:
        description = await client.worker()
        index = BlockIndex()
        reader = FeedReader(ReplicaBlocks(index, 0))

        async def follow(messages: AsyncGenerator[FeedMessage | wire.LoadReport, None], last: int) -> wire.LoadReport:
            async for message in messages:
                if isinstance(message, wire.LoadReport):
                    if reader.exact and reader.sequence >= last:
                        return message
                    continue
                reader.take(message)
                while isinstance(need := reader.need(), NeedChunk):
                    reader.take(await client.snapshot(need.cursor, limit=3))
            raise AssertionError("the stream has ended")

        async with aclosing(client.events(0)) as messages:
            await follow(messages, 0)
            await answer(client, GenerationRequest("events", prompt, params(1)))
            after = await follow(messages, (await client.load()).sequence)
        assert after.epoch == description.epoch
        assert after.prefill_rate
        assert after.block_bytes
        public = PublicPrefixes([wire.decode_prompt(each) for each in description.public_prefixes], 16)
        chain = TokenChain(description.root, prompt, 16, public_blocks=public.blocks_of(prompt))
        assert index.matches(chain.block_hashes, 1)[0]["pool"] == 10

    asked(worker, question)


def test_a_reader_that_asks_for_events_of_another_epoch_is_told_that_they_are_lost(worker: Server) -> None:
    async def question(client: WorkerClient) -> None:
        async with aclosing(client.events(10**9)) as messages:
            async for message in messages:
                assert not isinstance(message, (EventBatch, wire.LoadReport))
                return

    asked(worker, question)


def test_an_explanation_is_the_one_of_the_admin_routes(worker: Server) -> None:
    prompt = [3 + 13 * n % 140 for n in range(100)]

    async def question(client: WorkerClient) -> None:
        await answer(client, GenerationRequest("explained", prompt, params(1)))
        explained = await client.explain([*prompt[:90], 7])
        assert explained["hit_tokens"] == 90
        assert explained["divergence"] is None

    asked(worker, question)


def test_a_server_without_a_secret_has_no_internal_routes(tmp_path: Path) -> None:
    with serving(tmp_path, "--cache-ram", "32MiB") as server:
        for route in ("worker", "load", "events"):
            headers = {"authorization": f"Bearer {SECRET}"}
            response = httpx.get(f"{server.url}{wire.PREFIX}/{route}", headers=headers, timeout=DEADLINE)
            assert response.status_code == 404


def test_bad_numbers_are_named(worker: Server) -> None:
    headers = {"authorization": f"Bearer {SECRET}"}
    for query in ("after=-1", "after=x", "after=٣", f"after={10**30}"):
        response = httpx.get(f"{worker.url}{wire.PREFIX}/events?{query}", headers=headers, timeout=DEADLINE)
        assert response.status_code == 400
        assert "after is" in wire.decode(response.content, wire.Failure).message


def test_commands_are_carried_out_and_answered_as_in_one_process(worker: Server) -> None:
    prompt = [8 + 17 * n % 130 for n in range(100)]

    async def question(client: WorkerClient) -> None:
        description = await client.worker()
        await answer(client, GenerationRequest("commands", prompt, params(1)))
        chain = TokenChain(description.root, [*prompt, 3], 16)
        assert await client.execute(CachedTokens(chain)) == 100
        found = await client.execute(LookUp(chain))
        assert (found.outcome.hit, found.hit_unit) == ({"pool": 100}, description.hit_unit)
        assert await client.execute(FindCached([*chain.block_hashes, bytes(32)])) == [True] * 6 + [False]
        statistics = await client.execute(Statistics())
        assert statistics.counters.query_tokens >= 100
        assert statistics.total == (await client.load()).total_blocks
        assert await client.execute(Retain(chain.block_hashes[:2], 5.0)) == 2
        await client.execute(Unretain(chain.block_hashes[:2]))
        removed = await client.execute(Remove(chain.block_hashes))
        assert removed.pool == 6
        assert removed.tiers["ram"].result().kept == 0
        assert await client.execute(FindCached(chain.block_hashes)) == [False] * 6
        with pytest.raises(RequestError, match="of another model"):
            await client.execute(LookUp(TokenChain(bytes(32), prompt, 16)))

    asked(worker, question)


def test_a_session_that_moves_is_warm_and_answers_the_same(worker: Server, tmp_path: Path) -> None:
    prompt, chosen = [4 + 19 * n % 170 for n in range(200)], params(9, logprobs=1, temperature=0.0)
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret").chmod(0o600)

    async def question(one: WorkerClient, other: WorkerClient) -> None:
        first = await answer(one, GenerationRequest("one", prompt, chosen))
        chain = TokenChain((await one.worker()).root, [*prompt, *tokens(first)], 16)
        records = await one.execute(ExportBlocks(chain.block_hashes))
        sound = [record for record in records if record is not None]
        assert len(sound) == len(chain.block_hashes) == 13
        damaged = [sound[0], sound[1][:-1] + bytes([sound[1][-1] ^ 1]), *sound[2:]]
        refused = await other.execute(ImportBlocks(chain, damaged))
        assert (refused.imported, sum(refused.refused.values())) == (1, 1)
        taken = await other.execute(ImportBlocks(chain, sound))
        assert (taken.cached, taken.imported) == (1, 12)
        again = await answer(other, GenerationRequest("two", prompt, chosen))
        usage = again[0].usage
        assert usage is not None
        assert usage.cached_tokens == 199
        assert [output.logprobs for output in again] == [output.logprobs for output in first]

    async def both(url: str) -> None:
        async with asyncio.timeout(DEADLINE), WorkerClient(worker.url, SECRET) as one, WorkerClient(url, SECRET) as two:
            await question(one, two)

    options = ["--cluster-secret-file", str(tmp_path / "secret"), "--cache-ram", "32MiB"]
    with serving(tmp_path, *options) as other:
        asyncio.run(both(other.url))

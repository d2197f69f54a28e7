"""How a gateway asks a worker: over which connections, and what it hears of one that hangs, dies or is none."""

import asyncio
import contextlib
from array import array
from contextlib import aclosing

import pytest

from emberkv.cluster import wire
from emberkv.cluster.worker_client import Deadlines, WorkerClient
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import GenerationRequest, SamplingParams, TokenOutput
from emberkv.errors import EmberError, WireError, WorkerLostError, WorkerTimeoutError
from emberkv.serving.errors import TooManyRequestsError
from tests.waiting import on_a_loop


@on_a_loop
async def test_requests_share_a_connection_and_come_over_another_one_once_it_has_ended() -> None:
    connections = 0
    last = wire.encode_outcome(TokenOutput("", (7,), finish_reason=FinishReason.LENGTH))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers the first two requests, and closes the connection with two more."""
        nonlocal connections
        connections += 1
        received = b""
        while received.count(b"submit") < 2:
            received += await reader.read(1000)
        writer.write(HEAD + chunk(wire.frame(wire.encode_outcomes([(0, last), (1, last)]))))
        while received.count(b"submit") < 4:
            received += await reader.read(1000)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def ask() -> list[int]:
        return [token async for output in client.generate(REQUEST) for token in output.token_ids]

    async with server, WorkerClient(f"http://127.0.0.1:{port}", "secret") as client:
        for _ in range(2):
            assert await asyncio.gather(ask(), ask()) == [[7], [7]]
            lost = await asyncio.gather(ask(), ask(), return_exceptions=True)
            assert [type(each) for each in lost] == [WorkerLostError, WorkerLostError]
    assert connections == 2


TOKEN = wire.frame(wire.encode_outcomes([(0, wire.encode_outcome(TokenOutput("a", token_ids=(7,))))]))
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
REQUEST = GenerationRequest("a", [1, 2], SamplingParams())


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def answers(*sent: bytes, hangs: bool, silence: float) -> tuple[list[int], EmberError]:
    """The tokens that come, and the error that ends them, of a worker that sends so much and then hangs or goes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for data in sent:
            writer.write(data)
        await writer.drain()
        if hangs:
            await reader.read()  # until the client is gone
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    deadlines = Deadlines(answer=silence, silence=silence)
    tokens: list[int] = []

    async def collect(client: WorkerClient) -> None:
        async with aclosing(client.generate(REQUEST)) as outputs:
            async for output in outputs:
                tokens.extend(output.token_ids)

    async with server, WorkerClient(f"http://{host}:{port}", "secret", deadlines=deadlines) as client:
        with pytest.raises(EmberError) as raised:
            await collect(client)
    return tokens, raised.value


@pytest.mark.parametrize(
    ("sent", "tokens"), [((), []), ((HEAD,), []), ((HEAD, chunk(TOKEN), chunk(wire.HEARTBEAT)), [7])]
)
def test_a_worker_that_hangs_is_found_by_its_silence(sent: tuple[bytes, ...], tokens: list[int]) -> None:
    found = asyncio.run(answers(*sent, hangs=True, silence=1.0))
    assert (found[0], type(found[1])) == (tokens, WorkerTimeoutError)


@pytest.mark.parametrize(
    ("sent", "tokens", "error"),
    [
        ((), [], WorkerLostError),
        ((HEAD, chunk(TOKEN)), [7], WorkerLostError),
        ((HEAD, chunk(TOKEN), b"0\r\n\r\n"), [7], WorkerLostError),
        ((HEAD, chunk(TOKEN + TOKEN[:3]), b"0\r\n\r\n"), [7], WorkerLostError),
        ((HEAD, chunk(wire.frame(b"\xc1"))), [], WorkerLostError),
        ((HEAD, chunk(wire.frame(wire.encode_outcomes([(0, b"\x07")])))), [], WireError),
        ((b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",), [], WireError),
        ((b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n",), [], WorkerLostError),
    ],
)
def test_an_answer_that_ends_too_soon_is_an_error_and_never_a_short_answer(
    sent: tuple[bytes, ...], tokens: list[int], error: type[EmberError]
) -> None:
    found = asyncio.run(answers(*sent, hangs=False, silence=60.0))
    assert (found[0], type(found[1])) == (tokens, error)


def test_a_refusal_keeps_its_class_and_when_to_come_back() -> None:
    refused = wire.encode(wire.Failure("TooManyRequestsError", "full", None, 2.5))
    head = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\n\r\n" % len(refused)
    _, error = asyncio.run(answers(head, refused, hangs=False, silence=60.0))
    assert isinstance(error, TooManyRequestsError)
    assert (str(error), error.retry_after) == ("full", 2.5)


@on_a_loop
async def test_closing_ends_requests_under_way_even_before_the_connection_is_made() -> None:
    client = WorkerClient("http://127.0.0.1:9", "secret")
    asking = asyncio.create_task(anext(client.generate(REQUEST)))
    await asyncio.sleep(0)  # the connection's task is made, and has not run yet
    await client.close()
    with pytest.raises(WorkerLostError):
        await asking
    with pytest.raises(WorkerLostError, match="are closed"):
        await anext(client.generate(REQUEST))


@on_a_loop
async def test_a_worker_that_sends_signs_of_life_and_reads_nothing_is_found() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(chunk(wire.HEARTBEAT))
                await writer.drain()
                await asyncio.sleep(0.05)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1000)
    port = server.sockets[0].getsockname()[1]
    large = GenerationRequest("a", array("i", bytes(64 << 20)), SamplingParams())
    deadlines = Deadlines(answer=1.0, silence=60.0)
    async with server, WorkerClient(f"http://127.0.0.1:{port}", "secret", deadlines=deadlines) as client:
        with pytest.raises(WorkerTimeoutError, match="took nothing of what it was sent for 1 s"):
            await anext(client.generate(large))

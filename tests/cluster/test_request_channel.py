"""Requests and outputs over one connection: which belong together, and what of them ends with what."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
from starlette.types import Message

from emberkv.cluster import wire
from emberkv.cluster.request_channel import RequestChannel
from emberkv.cluster.worker_api import worker_routes
from emberkv.cluster.worker_channel import ChannelResponse, RequestChannels
from emberkv.cluster.worker_client import WorkerClient
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import GenerationRequest, OutputListener, PrefillProgress, SamplingParams, TokenOutput
from emberkv.errors import RequestError, WireError, WorkerLostError
from emberkv.serving.app import ServingSettings
from emberkv.serving.lifecycle import Lifecycle, ServedModel, ServerPhase
from emberkv.serving.server import ConnectionLimits
from tests.serving.fakes import ByteTokenizer, FakeEngine
from tests.serving.harness import serving
from tests.waiting import on_a_loop, until


class Engine:
    """Gives the outputs that a test gives it."""

    def __init__(self) -> None:
        self.listeners: dict[str, OutputListener] = {}
        self.aborted: list[str] = []
        self.refusal: Exception | None = None

    context_length = 1000
    max_prompt_tokens = 990

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.listeners[request.request_id] = listener

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def progress(self, request_id: str) -> PrefillProgress | None:
        return PrefillProgress(1, 2)

    def say(self, request_id: str, *tokens: int, ends: bool = False) -> None:
        self.listeners[request_id](TokenOutput(request_id, tokens, finish_reason=FinishReason.LENGTH if ends else None))


class Gateway:
    """The other side of a channel, at the ASGI interface."""

    def __init__(self) -> None:
        self.messages: list[list[tuple[int, tuple[int, ...] | str]]] = []
        self.ends: list[bool] = []
        self.heartbeats = 0
        self._sent: asyncio.Queue[Message] = asyncio.Queue()
        self._frames = wire.FrameReader()

    def submit(self, number: int, request_id: str) -> None:
        request = GenerationRequest(request_id, [1, 2], SamplingParams(max_tokens=9))
        self.send(wire.Submit(number, wire.encode_request(request)))

    def send(self, message: wire.Submit | wire.Abort) -> None:
        self.send_bytes(wire.frame(wire.encode(message)))

    def send_bytes(self, data: bytes) -> None:
        self._sent.put_nowait({"type": "http.request", "body": data, "more_body": True})

    def hang_up(self) -> None:
        self._sent.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> Message:
        return await self._sent.get()

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            return
        self.ends.append(not message["more_body"])
        self.heartbeats += message["body"] == wire.HEARTBEAT
        for data in self._frames.feed(message["body"]):
            self.messages.append(
                [(number, _shown(wire.decode_outcome(each, "r"))) for number, each in wire.decode_outcomes(data)]
            )

    @property
    def outputs(self) -> list[tuple[int, tuple[int, ...] | str]]:
        return [each for together in self.messages for each in together]


def _shown(outcome: TokenOutput | wire.Failure | PrefillProgress) -> tuple[int, ...] | str:
    if isinstance(outcome, TokenOutput):
        return outcome.token_ids
    return outcome.kind if isinstance(outcome, wire.Failure) else "progress"


class Worker:
    def __init__(self, max_requests: int = 10, **limits: int) -> None:
        self.engine = Engine()
        self.lifecycle = Lifecycle()
        self.lifecycle.loaded(ServedModel(("m",), 0, FakeEngine(), ByteTokenizer()))
        self.channels = RequestChannels(self.lifecycle, lambda: self.engine, max_requests, **limits)

    @asynccontextmanager
    async def channel(self, *request_ids: str) -> AsyncIterator[Gateway]:
        """request_ids: of requests that are submitted, with the numbers from 0."""
        gateway = Gateway()
        answering = asyncio.create_task(ChannelResponse(self.channels)({}, gateway.receive, gateway.take))
        for number, request_id in enumerate(request_ids):
            gateway.submit(number, request_id)
        await self.submitted(*request_ids)
        yield gateway
        gateway.hang_up()
        await answering

    async def submitted(self, *request_ids: str) -> None:
        await until(lambda: all(each in self.engine.listeners for each in request_ids))

    @property
    def requests(self) -> dict[str, float]:
        found = {
            sample.labels.get("outcome", sample.name): sample.value
            for metric in self.channels.collect()
            for sample in metric.samples
        }
        return {name: count for name, count in found.items() if count}


@on_a_loop
async def test_the_outputs_of_a_step_are_one_message_and_have_their_requests_numbers() -> None:
    worker = Worker()
    async with worker.channel("a", "b") as gateway:
        worker.engine.say("a", 5)
        worker.engine.say("b", 6)
        await until(lambda: gateway.outputs)
        worker.engine.say("b", 7, ends=True)
        worker.engine.say("a", 8, 9, ends=True)
        await until(lambda: len(gateway.messages) == 2)
        assert gateway.messages == [[(0, (5,)), (1, (6,))], [(1, (7,)), (0, (8, 9))]]
        await until(lambda: worker.lifecycle.tracked == 0)
        assert worker.requests == {"finished": 2, "emberkv_channels": 1}
    assert worker.requests == {"finished": 2}
    assert worker.engine.aborted == []


@on_a_loop
async def test_an_abort_ends_its_request_alone_and_the_end_of_the_connection_all() -> None:
    worker = Worker()
    async with worker.channel("a", "b", "c") as gateway:
        gateway.send(wire.Abort(1))
        await until(lambda: worker.engine.aborted)
        worker.engine.say("b", 1, ends=True)  # as an engine does behind an abort
        worker.engine.say("a", 2)
        await until(lambda: gateway.outputs)
        assert gateway.outputs == [(0, (2,))]
        assert worker.engine.aborted == ["b"]
        gateway.hang_up()
        await until(lambda: worker.lifecycle.tracked == 0)
    assert worker.engine.aborted == ["b", "a", "c"]
    assert worker.requests == {"aborted": 3}


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [(RequestError("no"), "RequestError"), (ZeroDivisionError(), "GenerationFailedError")],
    ids=["refused", "unforeseen"],
)
@on_a_loop
async def test_what_is_wrong_with_a_request_ends_that_one_alone(refusal: Exception, kind: str) -> None:
    worker = Worker(max_requests=2)
    async with worker.channel("a") as gateway:
        worker.engine.refusal = refusal
        gateway.submit(1, "b")
        gateway.send(wire.Submit(2, b"\xc1"))
        await until(lambda: len(gateway.outputs) == 2)
        worker.engine.refusal = None
        gateway.submit(3, "d")
        gateway.submit(4, "e")
        await until(lambda: len(gateway.outputs) == 3)
        worker.engine.say("a", 5)
        await until(lambda: len(gateway.outputs) == 4)
        assert gateway.outputs == [(1, kind), (2, "WireError"), (4, "TooManyRequestsError"), (0, (5,))]
        assert worker.requests == {"refused": 3, "emberkv_channels": 1}


@pytest.mark.parametrize("data", [wire.frame(b"\xc1"), b"\xff" * 4, wire.frame(wire.encode(wire.Abort(0))[:-1])])
@on_a_loop
async def test_bytes_that_are_no_message_end_the_channel(data: bytes) -> None:
    worker = Worker()
    async with worker.channel("a") as gateway:
        gateway.send_bytes(data)
        await until(lambda: gateway.ends[-1:] == [True])
        assert gateway.outputs == [(0, "WireError")]
    assert worker.engine.aborted == ["a"]


@on_a_loop
async def test_two_requests_of_one_number_end_the_channel() -> None:
    worker = Worker()
    async with worker.channel() as gateway:
        gateway.submit(0, "a")
        gateway.submit(0, "b")
        await until(lambda: gateway.ends[-1:] == [True])
    assert (worker.engine.aborted, [*worker.engine.listeners]) == (["a"], ["a"])


@on_a_loop
async def test_progress_is_sent_of_a_prompt_that_is_computed_while_others_answer() -> None:
    worker = Worker()
    async with worker.channel("a", "b") as gateway:

        async def one_more_token() -> None:
            worker.engine.say("a", 5)

        worker.engine.say("a", 5)
        await until(lambda: (1, "progress") in gateway.outputs, one_more_token)
        assert (0, "progress") not in gateway.outputs


@on_a_loop
async def test_a_server_that_ends_interrupts_what_it_cannot_finish_and_ends_the_channel() -> None:
    worker = Worker()
    async with worker.channel("a") as gateway:
        await worker.lifecycle.drain(0)
        await until(lambda: gateway.ends[-1:] == [True])
        assert gateway.outputs == [(0, "EngineStoppedError")]
    assert worker.engine.aborted == ["a"]


@on_a_loop
async def test_outputs_that_are_too_large_together_are_sent_apart_and_one_that_is_too_large_alone_ends() -> None:
    worker = Worker(output_bytes=1_000_000)
    async with worker.channel("a", "b", "c", "d") as gateway:
        for request_id, size in (("a", 150_000), ("b", 250_000), ("c", 100_000), ("d", 1)):
            worker.engine.say(request_id, *([100_000] * size))  # of five bytes each
        await until(lambda: len(gateway.outputs) == 4)
        sizes = [[(number, len(each)) for number, each in together] for together in gateway.messages]
        assert sizes == [[(0, 150_000), (1, len("RequestError")), (2, 100_000)], [(3, 1)]]
        await until(lambda: worker.lifecycle.tracked == 3)
        assert worker.engine.aborted == ["b"]


@on_a_loop
async def test_an_output_that_cannot_be_written_ends_its_request_alone() -> None:
    worker = Worker()
    async with worker.channel("a", "b") as gateway:
        worker.engine.listeners["a"](TokenOutput("a", error="\udcff", finish_reason=FinishReason.ERROR))
        worker.engine.say("b", 5)
        await until(lambda: len(gateway.outputs) == 2)
        assert gateway.outputs == [(0, "GenerationFailedError"), (1, (5,))]
        await until(lambda: worker.requests == {"aborted": 1, "emberkv_channels": 1})


@on_a_loop
async def test_what_the_engine_refuses_later_counts_as_refused() -> None:
    worker = Worker()
    async with worker.channel("a") as gateway:
        refused = TokenOutput("a", finish_reason=FinishReason.ERROR, refusal=RequestError("no"))
        worker.engine.listeners["a"](refused)
        await until(lambda: worker.requests == {"refused": 1, "emberkv_channels": 1})
        assert gateway.outputs == [(0, "RequestError")]


@on_a_loop
async def test_an_idle_channel_has_signs_of_life_and_a_draining_worker_takes_no_request() -> None:
    worker = Worker()
    async with worker.channel() as gateway:
        await until(lambda: gateway.heartbeats)
        gateway.submit(0, "a")
        await worker.submitted("a")
        draining = asyncio.create_task(worker.lifecycle.drain(60))
        await until(lambda: worker.lifecycle.phase is ServerPhase.DRAINING)
        gateway.submit(1, "b")
        await until(lambda: gateway.outputs)
        assert gateway.outputs == [(1, "NotReadyError")]
        worker.engine.say("a", 5, ends=True)
        await draining
        assert gateway.outputs == [(1, "NotReadyError"), (0, (5,))]


REQUEST = GenerationRequest("a", [1, 2], SamplingParams(max_tokens=4))


def message(*outcomes: tuple[int, TokenOutput]) -> bytes:
    return wire.encode_outcomes([(number, wire.encode_outcome(each)) for number, each in outcomes])


@on_a_loop
async def test_each_request_gets_its_own_outcomes_and_then_the_error_of_the_connection() -> None:
    channel = RequestChannel(time.monotonic)
    taken: dict[str, list[object]] = {"a": [], "b": []}

    async def ask(request_id: str) -> None:
        request = GenerationRequest(request_id, [1, 2], SamplingParams(max_tokens=4))
        async for outcome in channel.outcomes(request):
            assert isinstance(outcome, TokenOutput)
            taken[request_id] += [outcome.request_id, *outcome.token_ids]

    asking = [asyncio.create_task(ask(each)) for each in taken]
    await asyncio.sleep(0)
    last = TokenOutput("", (8,), finish_reason=FinishReason.LENGTH)
    channel.receive(message((1, TokenOutput("", (7,))), (0, TokenOutput("", (6,))), (9, last)))
    channel.receive(message((1, last)))
    channel.end(WorkerLostError("it is gone"))
    first, second = await asyncio.gather(*asking, return_exceptions=True)
    assert (second, taken) == (None, {"a": ["a", 6], "b": ["b", 7, "b", 8]})
    assert isinstance(first, WorkerLostError)
    with pytest.raises(WireError):
        channel.receive(b"\xc1")


@on_a_loop
async def test_an_answer_that_is_given_up_is_aborted_and_one_that_has_ended_is_not() -> None:
    channel = RequestChannel(time.monotonic)
    sent, frames = channel.frames(), wire.FrameReader()
    assert await anext(sent) == wire.HEARTBEAT  # so that the request's headers are sent
    finished, given_up = channel.outcomes(REQUEST), channel.outcomes(REQUEST)
    async with aclosing(finished), aclosing(given_up):
        asking = [asyncio.create_task(anext(each)) for each in (finished, given_up)]
        await asyncio.sleep(0)
        submits = [wire.decode_channel(each) for each in frames.feed(await anext(sent))]
        assert [(type(each), each.number) for each in submits] == [(wire.Submit, 0), (wire.Submit, 1)]
        end = TokenOutput("", (8,), finish_reason=FinishReason.LENGTH)
        channel.receive(message((0, end), (1, TokenOutput("", (7,)))))
        await asyncio.gather(*asking)
    assert [wire.decode_channel(each) for each in frames.feed(await anext(sent))] == [wire.Abort(1)]


@on_a_loop
async def test_a_gateway_that_has_nothing_to_send_sends_a_heartbeat_now_and_then() -> None:
    sent = RequestChannel(time.monotonic, idle_seconds=0.01).frames()
    assert [await anext(sent) for _ in range(3)] == [wire.HEARTBEAT] * 3


@on_a_loop
async def test_a_request_that_is_given_up_before_it_is_sent_is_not_sent() -> None:
    channel = RequestChannel(time.monotonic)
    sent, frames = channel.frames(), wire.FrameReader()
    await anext(sent)
    asking = [asyncio.create_task(anext(channel.outcomes(REQUEST))) for _ in range(2)]
    await asyncio.sleep(0)
    asking[0].cancel()
    await asyncio.wait(asking[:1])
    submits = [wire.decode_channel(each) for each in frames.feed(await anext(sent))]
    assert [(type(each), each.number) for each in submits] == [(wire.Submit, 1)]
    asking[1].cancel()


@on_a_loop
async def test_a_channel_lasts_longer_than_a_body_may_take_and_serves_all_requests() -> None:
    limits = ConnectionLimits(head_seconds=0.2, body_seconds=0.2, body_bytes_per_second=10**9, close_seconds=0.2)
    engine, lifecycle, loop = FakeEngine(), Lifecycle(), asyncio.get_running_loop()
    lifecycle.loaded(ServedModel(("m",), 0, engine, ByteTokenizer()))
    routes = worker_routes("w", "secret")
    settings = ServingSettings(max_body_bytes=300)
    with serving(lifecycle, settings, limits=limits, routers=[routes]) as server:
        async with WorkerClient(server.url, "secret") as client:
            began, asked = loop.time(), 0

            async def ask() -> None:
                nonlocal asked
                request = GenerationRequest(f"r{asked}", [1, 2], SamplingParams(max_tokens=4))
                tokens = [token async for output in client.generate(request) for token in output.token_ids]
                assert bytes(tokens) == b"Hell"
                asked += 1

            await ask()
            await until(lambda: loop.time() - began > 1.5, ask)
            connections = set(server.server_state.connections)
            await ask()
            assert connections == set(server.server_state.connections)
            assert len(connections) == 1
    engine.stop()
    assert len(engine.submitted) == asked > 5  # together, more bytes than a body may have

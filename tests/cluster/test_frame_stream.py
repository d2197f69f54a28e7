"""A worker's answer as frames over HTTP: what comes together is one message, and the last one ends the response."""

import asyncio

from starlette.types import Message

from emberkv.cluster.wire import FrameReader, decode_output
from emberkv.cluster.worker_api import FrameStream, Generation
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import GenerationRequest, OutputListener, SamplingParams, TokenOutput
from emberkv.serving.answers.answer_stream import OutputQueue
from tests.serving.fakes import FakeEngine


class OneRequest(FakeEngine):
    """An engine that gives the outputs which a test gives it."""

    def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
        self.listener = listener


async def sent() -> list[Message]:
    engine, messages, two_more = OneRequest(), [], asyncio.Event()
    request = GenerationRequest("r", [1, 2], SamplingParams(max_tokens=3))
    generation = Generation(engine, request, OutputQueue(asyncio.get_running_loop()))
    stream = FrameStream(generation.frames(), generation.close, lambda: generation.is_over)

    async def send(message: Message) -> None:
        messages.append(message)
        if message.get("body"):
            two_more.set()

    answering = asyncio.create_task(stream({}, asyncio.Event().wait, send))
    engine.listener(TokenOutput("r", (5,)))
    await two_more.wait()
    engine.listener(TokenOutput("r", (6,)))
    engine.listener(TokenOutput("r", (7,), finish_reason=FinishReason.LENGTH))
    await answering
    return messages


def test_frames_that_come_together_are_one_message_and_the_last_ends_the_response() -> None:
    start, *bodies = asyncio.run(sent())
    assert start["type"] == "http.response.start"
    assert [message["more_body"] for message in bodies] == [True, False]
    reader = FrameReader()
    outputs = [[decode_output(each, "r") for each in reader.feed(message["body"])] for message in bodies]
    assert [[output.token_ids for output in together] for together in outputs] == [[(5,)], [(6,), (7,)]]

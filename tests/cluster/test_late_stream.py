"""A late stream's response is sent, whatever happens at the same time."""

import asyncio

import pytest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from emberkv.cluster.foreign.late_stream import LateStream
from emberkv.serving.event_stream import StreamTimes


class Holding(Response):
    """A response that holds something until it is sent."""

    is_released = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.is_released = True


@pytest.mark.parametrize("turns", range(8))
def test_a_response_that_is_made_while_the_client_goes_releases_what_it_holds(turns: int) -> None:
    made: list[Holding] = []

    async def begin() -> Response:
        for _ in range(4):
            await asyncio.sleep(0)
        made.append(Holding())
        return made[0]

    async def receive() -> Message:
        for _ in range(turns):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    stream = LateStream(begin, "messages", StreamTimes(headers=60.0, ping=60.0), lambda: None)
    asyncio.run(stream({"type": "http"}, receive, send))
    assert all(each.is_released for each in made)

"""A scripted server that speaks OpenAI's streaming protocol inside the test's process, on a clock of its own."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from emberkv.bench.client import Target, TimedAnswer, ask
from emberkv.bench.runner import BenchWorkload, RequestRecord, run_workload

FAKE = Target("fake")

Event = tuple[float, Any]
"""Seconds that pass before an event, then its data: JSON, or a line as it is."""


class FakeClock:
    """Time that passes only when a test sets it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def piece(text: str, *, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}


def finish(reason: str = "length") -> dict[str, Any]:
    return {"choices": [{"delta": {}, "finish_reason": reason}]}


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return {"choices": [], "usage": counts}


PLAIN: Sequence[Event] = (
    (0.0, {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}),
    (0.5, piece("one")),
    (0.125, piece(" two")),
    (0.125, finish()),
    (0.0, usage(20, 2)),
    (0.25, "[DONE]"),
)


class _Stream(httpx.AsyncByteStream):
    def __init__(self, server: "FakeServer", events: Sequence[Event]) -> None:
        self._server, self._events = server, events

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self._server.in_flight += 1
        self._server.most_in_flight = max(self._server.most_in_flight, self._server.in_flight)
        await self._server.gate()
        for seconds, data in self._events:
            self._server.clock.now += seconds
            yield f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()

    async def aclose(self) -> None:
        self._server.in_flight -= 1


async def _open() -> None:
    return None


@dataclass
class FakeServer:
    """Answers every request by ``script``, from the request's body to the answer's events or an error response."""

    script: Callable[[dict[str, Any]], Sequence[Event] | httpx.Response] = lambda body: PLAIN
    gate: Callable[[], Awaitable[Any]] = _open
    clock: FakeClock = field(default_factory=FakeClock)
    paths: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    def _handle(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "fake"}, {"id": "other"}]})
        body = json.loads(request.content)
        self.paths.append(request.url.path)
        self.bodies.append(body)
        answer = self.script(body)
        if isinstance(answer, httpx.Response):
            return answer
        return httpx.Response(200, stream=_Stream(self, answer))

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url="http://fake", transport=httpx.MockTransport(self._handle))

    async def ask(self, target: Target = FAKE) -> TimedAnswer:
        async with self.client() as client:
            question = BenchWorkload().question(0, 0)
            return await ask(client, target, [question], max_tokens=4, clock=self.clock)

    async def run(self, workload: BenchWorkload, target: Target = FAKE) -> list[RequestRecord]:
        async with self.client() as client:
            return await run_workload(client, target, workload, self.clock)

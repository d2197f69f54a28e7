"""A worker's end of request channels: over one connection, the requests of a gateway come in and their outputs go out.

The outputs of a step are one message, however many requests they belong to.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from emberkv.cluster import wire
from emberkv.engine.request import Engine, GenerationRequest, TokenOutput
from emberkv.errors import EmberError, RequestError, WireError
from emberkv.serving.answers.answer_stream import OutputQueue
from emberkv.serving.errors import GenerationFailedError, TooManyRequestsError, failure_of
from emberkv.serving.lifecycle import Lifecycle

_log = logging.getLogger(__name__)

MAX_REQUESTS = 1024
"""More at once are refused, so that a gateway sends them elsewhere."""

MAX_OUTPUT_BYTES = wire.MAX_MESSAGE_BYTES - 64
FRAME_BYTES = 1 << 20
"""Outputs that are larger together go in several messages."""


Post = Callable[[TokenOutput | wire.Failure], None]
"""Takes an output of a request, or what ends it early."""


class RequestChannels(Collector):
    """The channels of all gateways, and the metrics of their requests. Belongs to the event loop.

    max_requests: of all channels at once; more are refused. output_bytes: the largest output that is sent.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        engine: Callable[[], Engine],
        max_requests: int,
        *,
        output_bytes: int = MAX_OUTPUT_BYTES,
    ) -> None:
        self.lifecycle = lifecycle
        self.output_bytes = output_bytes
        self._engine = engine
        self._max_requests = max_requests
        self._open: set[ChannelResponse] = set()
        self._running: set[Generation] = set()
        self._outcomes = dict.fromkeys(("finished", "aborted", "refused"), 0)
        self._outputs: OutputQueue | None = None

    def add(self, channel: "ChannelResponse") -> None:
        self._open.add(channel)

    def remove(self, channel: "ChannelResponse") -> None:
        self._open.discard(channel)

    def submit(self, request: GenerationRequest, post: Post) -> "Generation":
        """Raises what the request is refused by."""
        self.lifecycle.check_accepting()
        if len(self._running) >= self._max_requests:
            raise TooManyRequestsError(
                f"{len(self._running)} requests are in flight at this worker, and no more are taken", retry_after=1.0
            )
        loop = asyncio.get_running_loop()
        if self._outputs is None or self._outputs.loop is not loop:
            self._outputs = OutputQueue(loop)
        generation = Generation(self._engine(), request, self._outputs, post)
        self._running.add(generation)
        self.lifecycle.track(generation)
        return generation

    def count_refused(self) -> None:
        self._outcomes["refused"] += 1

    def forget(self, generation: "Generation") -> None:
        """Its last message has been sent, or its gateway does not want it any more."""
        generation.close()
        self._outcomes[generation.outcome] += 1
        self._running.discard(generation)
        self.lifecycle.untrack(generation)

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("emberkv_channels", "Connections over which gateways send requests.", len(self._open))
        counter = CounterMetricFamily(
            "emberkv_channel_requests", "Requests that gateways have sent, by how they ended.", labels=["outcome"]
        )
        for outcome, requests in self._outcomes.items():
            counter.add_metric([outcome], requests)
        yield counter


class Generation:
    """One request at the engine. It aborts what is unfinished when it is closed.

    Raises what ``engine.submit`` raises. has_output: whether an output has come. has_ended: whether nothing more comes.
    outcome: what it counts as among the metrics.
    """

    def __init__(self, engine: Engine, request: GenerationRequest, outputs: OutputQueue, post: Post) -> None:
        self._engine = engine
        self._request_id = request.request_id
        self._post = post
        self.has_output = False
        self.has_ended = False
        self.outcome = "aborted"
        engine.submit(request, partial(outputs.post, self._deliver))

    def _deliver(self, output: TokenOutput) -> None:
        self.has_output = True
        if self.has_ended:
            return
        if output.finish_reason is not None:
            self.has_ended = True
            self.outcome = "finished" if output.refusal is None else "refused"
        self._post(output if output.refusal is None else failure_message(output.refusal))

    def interrupt(self, error: EmberError) -> None:
        """End the answer early; a gateway resumes it at another worker."""
        if not self.has_ended:
            self.close()
            self._post(failure_message(error))

    def progress(self) -> wire.Progress | None:
        """How far the prompt is computed, until the first output."""
        progress = None if self.has_output else self._engine.progress(self._request_id)
        return None if progress is None else wire.Progress(progress.computed_tokens, progress.prompt_tokens)

    def fail(self) -> None:
        """An output cannot be sent."""
        self.close()
        self.outcome = "aborted"

    def close(self) -> None:
        if not self.has_ended:
            self.has_ended = True
            self._engine.abort(self._request_id)


class _Encoded(NamedTuple):
    """An outcome of a request. is_last: whether it ends the request."""

    number: int
    data: bytes
    is_last: bool


class ChannelResponse(Response):
    """Lasts until the gateway closes the connection, which aborts what is unfinished, or the server has ended all
    answers. It reads the request's body meanwhile.
    """

    media_type = wire.MEDIA_TYPE

    def __init__(self, channels: RequestChannels) -> None:
        # not Response.__init__, which would give the stream the length of an empty body
        self._channels = channels
        self._generations: dict[int, Generation] = {}
        self._outcomes: list[_Encoded] = []
        self._has_news = asyncio.Event()
        self._is_over = False
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._channels.add(self)
        reading = asyncio.create_task(self._receive_all(receive))
        draining = asyncio.create_task(self._channels.lifecycle.drained.wait())
        for each in (reading, draining):
            each.add_done_callback(self._end)
        try:
            await self._send_all(send)
        finally:
            reading.cancel()
            draining.cancel()
            for generation in self._generations.values():
                self._channels.forget(generation)
            self._channels.remove(self)
        if reading.done() and not reading.cancelled():
            reading.result()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _end(self, _: "asyncio.Task[object]") -> None:
        self._is_over = True
        self._has_news.set()

    async def _receive_all(self, receive: Receive) -> None:
        """Until the gateway is gone, or sends what is no message, after which nothing of it can be understood."""
        frames = wire.FrameReader()
        while (message := await receive())["type"] == "http.request":
            try:
                for data in frames.feed(message.get("body", b"")):
                    self._receive(wire.decode_channel(data))
            except WireError as error:
                _log.warning("a gateway's channel is closed: %s", error)
                for generation in self._generations.values():
                    generation.interrupt(error)
                return
            if not message.get("more_body", False):
                return

    def _receive(self, message: wire.Submit | wire.Abort) -> None:
        number = message.number
        if isinstance(message, wire.Abort):
            if (generation := self._generations.pop(number, None)) is not None:
                self._channels.forget(generation)
            return
        if number in self._generations:
            raise WireError(f"two requests have the number {number}; each needs one of its own")
        try:
            request = wire.decode_request(message.request)
            self._generations[number] = self._channels.submit(request, partial(self._post, number))
        except EmberError as error:
            self._refuse(number, error)
        except Exception:  # noqa: BLE001 - of this request alone: the channel's others go on
            _log.exception("a request of a gateway cannot be submitted")
            self._refuse(number, GenerationFailedError("the worker failed"))

    def _refuse(self, number: int, error: EmberError) -> None:
        self._channels.count_refused()
        self._post(number, failure_message(error))

    def _post(self, number: int, outcome: TokenOutput | wire.Failure) -> None:
        """Have an outcome sent. One that cannot be sent ends its request instead."""
        try:
            data = self._encoded(outcome)
        except EmberError as error:
            if (generation := self._generations.get(number)) is not None:
                generation.fail()
            outcome = failure_message(error)
            data = wire.encode_outcome(outcome)
        is_last = isinstance(outcome, wire.Failure) or outcome.finish_reason is not None
        self._outcomes.append(_Encoded(number, data, is_last))
        self._has_news.set()

    def _encoded(self, outcome: TokenOutput | wire.Failure) -> bytes:
        """Raises RequestError for an outcome that is too large, GenerationFailedError where it cannot be written."""
        try:
            data = wire.encode_outcome(outcome)
        except Exception as error:
            _log.exception("an output cannot be sent")
            raise GenerationFailedError("the worker failed") from error
        if len(data) > (most := self._channels.output_bytes):
            raise RequestError(
                f"an output of the answer takes {len(data):,} bytes, of which at most {most:,} are sent; ask for fewer "
                "log-probabilities"
            )
        return data

    async def _send_all(self, send: Send) -> None:
        """What has come since the last message, together, and a sign of life as often as gateways expect it."""
        loop = asyncio.get_running_loop()
        due = loop.time() + wire.HEARTBEAT_SECONDS
        while True:
            self._has_news.clear()
            if self._outcomes:
                outcomes, self._outcomes = self._outcomes, []
                await self._send(send, _frames(outcomes))
                self._forget_last(outcomes)
            elif self._is_over:
                return
            elif loop.time() >= due:
                due = loop.time() + wire.HEARTBEAT_SECONDS
                await self._send(send, self._sign_of_life())
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await self._has_news.wait()

    @staticmethod
    async def _send(send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})

    def _forget_last(self, sent: Sequence[_Encoded]) -> None:
        for number, _, is_last in sent:
            if is_last and (generation := self._generations.pop(number, None)) is not None:
                self._channels.forget(generation)

    def _sign_of_life(self) -> bytes:
        """How far the prompts are computed whose answers have not begun, if there are any."""
        computed = [(number, progress) for number, each in self._generations.items() if (progress := each.progress())]
        if not computed:
            return wire.HEARTBEAT
        return _frames([_Encoded(number, wire.encode_outcome(each), is_last=False) for number, each in computed])


def _frames(outcomes: Sequence[_Encoded]) -> bytes:
    """One frame, or several of which each but the last has at least `FRAME_BYTES`."""
    frames: list[bytes] = []
    start = held = 0
    for end, outcome in enumerate(outcomes, 1):
        held += len(outcome.data)
        if held >= FRAME_BYTES or end == len(outcomes):
            together = [(each.number, each.data) for each in outcomes[start:end]]
            frames.append(wire.frame(wire.encode_outcomes(together)))
            start, held = end, 0
    return b"".join(frames)


def failure_message(error: EmberError) -> wire.Failure:
    """The error as a gateway raises it again."""
    shown = failure_of(error)
    after = shown.headers.get("retry-after")
    param = error.param if isinstance(error, RequestError) else None
    return wire.Failure(type(error).__name__, str(error), param, float(after) if after is not None else None)

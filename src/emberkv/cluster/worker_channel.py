"""A worker's end of request channels: over one connection, the requests of a gateway come in and their outputs go out.

The outputs of a step are one message, however many requests they belong to.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

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


Outcome = TokenOutput | wire.Failure | wire.Progress
Post = Callable[[TokenOutput | wire.Failure], None]
"""Takes an output of a request, or what ends it early."""


class RequestChannels(Collector):
    """The channels of all gateways, and the metrics of their requests. Belongs to the event loop.

    max_requests: of all channels at once; more are refused. message_bytes: the largest message that is sent.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        engine: Callable[[], Engine],
        max_requests: int,
        *,
        message_bytes: int = wire.MAX_MESSAGE_BYTES,
    ) -> None:
        self.lifecycle = lifecycle
        self.message_bytes = message_bytes
        self._engine = engine
        self._max_requests = max_requests
        self._open: set[ChannelResponse] = set()
        self._running: set[Generation] = set()
        self._outcomes = dict.fromkeys(("finished", "aborted", "refused"), 0)
        self._outputs: OutputQueue | None = None

    def opened(self, channel: "ChannelResponse") -> None:
        self._open.add(channel)

    def closed(self, channel: "ChannelResponse") -> None:
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

    def refused(self) -> None:
        self._outcomes["refused"] += 1

    def ended(self, generation: "Generation") -> None:
        """Its last message has been sent, or its gateway does not want it any more."""
        generation.close()
        self._outcomes["finished" if generation.is_finished else "aborted"] += 1
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
    is_finished: whether the last output has come.
    """

    def __init__(self, engine: Engine, request: GenerationRequest, outputs: OutputQueue, post: Post) -> None:
        self._engine = engine
        self._request_id = request.request_id
        self._post = post
        self.has_output = False
        self.has_ended = False
        self.is_finished = False
        engine.submit(request, partial(outputs.post, self._deliver))

    def _deliver(self, output: TokenOutput) -> None:
        self.has_output = True
        if self.has_ended:
            return
        self.is_finished = self.has_ended = output.finish_reason is not None
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

    def close(self) -> None:
        if not self.has_ended:
            self.has_ended = True
            self._engine.abort(self._request_id)


class ChannelResponse(Response):
    """Lasts until the gateway closes the connection, which aborts what is unfinished, or the server has ended all
    answers. It reads the request's body meanwhile.
    """

    media_type = wire.MEDIA_TYPE

    def __init__(self, channels: RequestChannels) -> None:
        # not Response.__init__, which would give the stream the length of an empty body
        self._channels = channels
        self._generations: dict[int, Generation] = {}
        self._messages: list[tuple[int, Outcome]] = []
        self._has_news = asyncio.Event()
        self._is_over = False
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._channels.opened(self)
        reading = asyncio.create_task(self._take_requests(receive))
        draining = asyncio.create_task(self._channels.lifecycle.drained.wait())
        for each in (reading, draining):
            each.add_done_callback(self._end)
        try:
            await self._send_outputs(send)
        finally:
            reading.cancel()
            draining.cancel()
            for generation in self._generations.values():
                self._channels.ended(generation)
            self._channels.closed(self)
        if reading.done() and not reading.cancelled():
            reading.result()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _end(self, _: "asyncio.Task[object]") -> None:
        self._is_over = True
        self._has_news.set()

    async def _take_requests(self, receive: Receive) -> None:
        """Until the gateway is gone, or sends what is no message, after which nothing of it can be understood."""
        frames = wire.FrameReader()
        while (message := await receive())["type"] == "http.request":
            try:
                for data in frames.feed(message.get("body", b"")):
                    self._take(wire.decode_channel(data))
            except WireError as error:
                _log.warning("a gateway's channel is closed: %s", error)
                return
            if not message.get("more_body", False):
                return

    def _take(self, message: wire.Submit | wire.Abort) -> None:
        if isinstance(message, wire.Abort):
            if (generation := self._generations.pop(message.number, None)) is not None:
                self._channels.ended(generation)
            return
        if message.number in self._generations:
            raise WireError(f"two requests have the number {message.number}; each needs one of its own")
        try:
            self._generations[message.number] = self._channels.submit(
                wire.decode_request(message.request), partial(self._post, message.number)
            )
        except EmberError as error:
            self._refuse(message.number, error)
        except Exception:  # noqa: BLE001 - of this request alone: the channel's others go on
            _log.exception("a request of a gateway cannot be submitted")
            self._refuse(message.number, GenerationFailedError("the worker failed"))

    def _refuse(self, number: int, error: EmberError) -> None:
        self._channels.refused()
        self._post(number, failure_message(error))

    def _post(self, number: int, message: TokenOutput | wire.Failure) -> None:
        self._messages.append((number, message))
        self._has_news.set()

    async def _send_outputs(self, send: Send) -> None:
        """What has come since the last message, together, and a sign of life as often as gateways expect it."""
        loop = asyncio.get_running_loop()
        due = loop.time() + wire.HEARTBEAT_SECONDS
        while True:
            self._has_news.clear()
            if self._messages:
                messages, self._messages = self._messages, []
                await self._send(send, self._frames(messages))
                self._forget_ended(messages)
            elif self._is_over:
                return
            elif loop.time() >= due:
                due = loop.time() + wire.HEARTBEAT_SECONDS
                await self._send(send, self._sign_of_life())
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await self._has_news.wait()

    def _frames(self, messages: Sequence[tuple[int, Outcome]]) -> bytes:
        """One frame, or several where it would be too large. An output that is too large alone ends its request."""
        data, most = wire.encode_outputs(messages), self._channels.message_bytes
        if len(data) <= most:
            return wire.frame(data)
        if len(messages) > 1:
            middle = len(messages) // 2
            return self._frames(messages[:middle]) + self._frames(messages[middle:])
        number = messages[0][0]
        if (generation := self._generations.get(number)) is not None:
            generation.close()
        refused = RequestError(
            f"an output of the answer takes {len(data):,} bytes, of which at most {most:,} are sent; ask for fewer "
            "log-probabilities"
        )
        return wire.frame(wire.encode_outputs([(number, failure_message(refused))]))

    @staticmethod
    async def _send(send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})

    def _forget_ended(self, sent: Sequence[tuple[int, object]]) -> None:
        for number, _ in sent:
            generation = self._generations.get(number)
            if generation is not None and generation.has_ended:
                del self._generations[number]
                self._channels.ended(generation)

    def _sign_of_life(self) -> bytes:
        """How far the prompts are computed whose answers have not begun, if there are any."""
        found = [(number, progress) for number, each in self._generations.items() if (progress := each.progress())]
        return wire.frame(wire.encode_outputs(found)) if found else wire.HEARTBEAT


def failure_message(error: EmberError) -> wire.Failure:
    """The error as a gateway raises it again."""
    shown = failure_of(error)
    after = shown.headers.get("retry-after")
    param = error.param if isinstance(error, RequestError) else None
    return wire.Failure(type(error).__name__, str(error), param, float(after) if after is not None else None)

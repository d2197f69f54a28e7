"""Subscribes to a server's KV events over ZeroMQ, and requests replays of missing ones."""

import asyncio
import logging
from collections.abc import Callable

import zmq
import zmq.asyncio

from emberkv.cluster.foreign.kv_events import KvSequence, decode_batch
from emberkv.errors import WireError

_log = logging.getLogger(__name__)

END = (-1).to_bytes(8, "big", signed=True)
"""The sequence number of the message that ends a replay."""

QUIET_SECONDS = 5.0
"""Seconds without an event after which a replay is requested, in case any was missed."""

REPLAY_SECONDS = 5.0
"""Seconds that a replay may take from one message to the next."""

INVALID_EVENTS = "it published an invalid batch of events"
FAILED = "the subscription to its events failed, and some may not have been applied; the log of the gateway says why"

MAX_BYTES = 64 << 20
"""The size limit of a message. A larger one closes the connection."""


class KvSubscriber:
    """Subscribes to one server.

    events: the endpoint of its PUB socket. replay: the endpoint of its ROUTER socket; None if it has none, and then
    only events that are published while the gateway is connected are known. sequence: gets the batches.
    """

    def __init__(self, events: str, replay: str | None, sequence: KvSequence) -> None:
        self._events = events
        self._replay = replay
        self._sequence = sequence

    async def run(self) -> None:
        """Receive events until cancelled. Raises ZMQError."""
        with zmq.asyncio.Context() as context:
            context.setsockopt(zmq.LINGER, 0)
            with context.socket(zmq.SUB) as live:
                live.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
                live.setsockopt(zmq.RCVHWM, 100_000)
                live.subscribe(b"")
                live.connect(self._events)
                await self._ask_again(context)
                while True:
                    await self._listen(live)
                    await self._ask_again(context)

    async def _listen(self, live: zmq.asyncio.Socket) -> None:
        """Receive events until one is missing, or none has arrived for `QUIET_SECONDS`."""
        while await live.poll(int(QUIET_SECONDS * 1000)):
            self._take(await live.recv_multipart(), self._sequence.live)
            if self._sequence.missing_from is not None:
                return

    def failed(self) -> None:
        """Record that batches may not have been applied."""
        self._sequence.blocks.fault = FAILED

    async def _ask_again(self, context: zmq.asyncio.Context) -> None:
        """Request a replay from the next expected batch on, and give up the batches that it does not bring."""
        if self._replay is not None:
            with context.socket(zmq.DEALER) as asking:
                asking.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
                asking.connect(self._replay)
                await asking.send_multipart([b"", self._sequence.next.to_bytes(8, "big")])
                while await asking.poll(int(REPLAY_SECONDS * 1000)):
                    frames = await asking.recv_multipart()
                    if frames[-2:-1] == [END]:
                        break
                    self._take(frames, self._sequence.replayed)
        self._sequence.give_up()

    def _take(self, frames: list[bytes], take: Callable[..., None]) -> None:
        """Decode one message and pass it to ``take``. frames: a topic, a number of eight bytes, and a batch."""
        try:
            if len(frames) != 3 or len(frames[1]) != 8:
                raise WireError(f"{len(frames)} frames; a topic, a number of eight bytes and a batch are expected")
            events = decode_batch(frames[2])
        except WireError as error:
            if self._sequence.blocks.fault != INVALID_EVENTS:  # logged once, as all batches may be invalid
                _log.warning("%s published an invalid batch of events: %s", self._events, error)
            self._sequence.blocks.fault = INVALID_EVENTS
            return
        take(int.from_bytes(frames[1], "big"), events)


async def follow(subscriber: KvSubscriber, pause: float = QUIET_SECONDS) -> None:
    """Run the subscriber, and restart it ``pause`` seconds after an error.

    After an error that is not ZeroMQ's, the index counts as degraded.
    """
    while True:
        try:
            await subscriber.run()
        except zmq.ZMQError as error:
            _log.warning("the subscription to KV events failed and is restarted: %s", error)
        except Exception:  # noqa: BLE001 - logged; a subscription that ends would leave the index exact and out of date
            _log.exception("the subscription to KV events failed and is restarted")
            subscriber.failed()
        await asyncio.sleep(pause)

"""Listens to a server's KV events over ZeroMQ, and asks for those again that were missed."""

import asyncio
import logging
from collections.abc import Callable

import zmq
import zmq.asyncio

from emberkv.cluster.foreign.kv_events import KvSequence, decode_batch
from emberkv.errors import WireError

_log = logging.getLogger(__name__)

END = (-1).to_bytes(8, "big", signed=True)
"""The number of the message that ends a replay."""

QUIET_SECONDS = 5.0
"""After so long without an event, it is asked for whether any was missed."""

REPLAY_SECONDS = 5.0
"""How long a replay may take from one message to the next."""

NOT_UNDERSTOOD = "it published what is not understood"

MAX_BYTES = 64 << 20
"""Of a message; larger ones end the connection."""


class KvSubscriber:
    """Follows one server. events: the endpoint of its PUB socket. replay: of its ROUTER socket; None: it has none, and
    then only what is published while the gateway listens is known.
    """

    def __init__(self, events: str, replay: str | None, sequence: KvSequence) -> None:
        self._events = events
        self._replay = replay
        self._sequence = sequence

    async def run(self) -> None:
        """Until it is cancelled."""
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
        """Take in events until one is missing, or none has come for a while."""
        while await live.poll(int(QUIET_SECONDS * 1000)):
            self._take(await live.recv_multipart(), self._sequence.live)
            if self._sequence.missing_from is not None:
                return

    async def _ask_again(self, context: zmq.asyncio.Context) -> None:
        """Have what may be missing sent again; what does not come then is lost."""
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
        """frames: a topic or nothing, a number of eight bytes, and a batch."""
        try:
            if len(frames) != 3 or len(frames[1]) != 8:
                raise WireError(f"{len(frames)} frames; a topic, a number of eight bytes and a batch are expected")
            events = decode_batch(frames[2])
        except WireError as error:
            if self._sequence.blocks.fault != NOT_UNDERSTOOD:  # logged once, as each batch may be like it
                _log.warning("%s published what is not understood: %s", self._events, error)
            self._sequence.blocks.fault = NOT_UNDERSTOOD
            return
        take(int.from_bytes(frames[1], "big"), events)


async def follow(subscriber: KvSubscriber) -> None:
    """Run it, again after a fault of ZeroMQ."""
    while True:
        try:
            await subscriber.run()
        except zmq.ZMQError as error:
            _log.warning("KV events cannot be followed, which is tried again: %s", error)
            await asyncio.sleep(QUIET_SECONDS)

"""vLLM's KV events: a gateway knows what the server has cached, or knows that it does not."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.cluster.foreign.kv_events import Cleared, KvBlocks, KvSequence, Removed, Stored, decode_batch
from emberkv.cluster.foreign.subscriber import END, FAILED, KvSubscriber, follow
from emberkv.core.events import POOL, AllBlocksCleared, BlockRemoved, BlockStored, Event
from emberkv.core.hashing import TokenChain, root_hash
from emberkv.errors import WireError
from tests.waiting import on_a_loop, until

ROOT = root_hash("m", 2)


class ArrayStored(msgspec.Struct, array_like=True, omit_defaults=True, tag="BlockStored"):
    """As vLLM defines it, in the older of its two forms."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None


class ObjectStored(msgspec.Struct, omit_defaults=True, tag="BlockStored"):
    """The newer form."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None


class ArrayRemoved(msgspec.Struct, array_like=True, omit_defaults=True, tag="BlockRemoved"):
    block_hashes: list[int | bytes]
    medium: str | None


class ArrayCleared(msgspec.Struct, array_like=True, tag="AllBlocksCleared"):
    pass


class ArrayBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class ObjectBatch(msgspec.Struct, omit_defaults=True):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


def batch(*events: Any) -> bytes:
    return msgspec.msgpack.encode(ArrayBatch(1.5, list(events), 0))


def stored(
    hashes: Sequence[int | bytes], parent: int | bytes | None, tokens: Sequence[int], size: int = 2, medium: str = "GPU"
) -> ArrayStored:
    return ArrayStored(list(hashes), parent, list(tokens), size, None, medium)


class Known:
    """The blocks that a feed tells of, by tier."""

    def __init__(self) -> None:
        self.by_tier: dict[str, set[bytes]] = {}

    def publish(self, events: Sequence[Event]) -> None:
        for event in events:
            held = self.by_tier.setdefault(event.tier, set())
            match event:
                case BlockStored():
                    held |= set(event.block_hashes)
                    assert len(event.tokens) == len(event.block_hashes)
                case BlockRemoved():
                    held -= set(event.block_hashes)
                case AllBlocksCleared():
                    held.clear()

    def has(self, *tokens: int, tier: str = POOL) -> bool:
        return set(TokenChain(ROOT, tokens, 2).block_hashes) <= self.by_tier.get(tier, set())

    @property
    def count(self) -> int:
        return sum(map(len, self.by_tier.values()))


def feed() -> tuple[KvSequence, Known]:
    known = Known()
    return KvSequence(KvBlocks(ROOT, 2, known.publish)), known


def test_the_bytes_of_a_batch() -> None:
    array = bytes.fromhex("93cb3ff80000000000009197ab426c6f636b53746f7265649107c092050602c0a347505500")
    (event,) = decode_batch(array)
    assert isinstance(event, Stored)
    assert (event.block_hashes, event.parent, list(event.tokens), event.block_size) == ([7], None, [5, 6], 2)
    assert array == msgspec.msgpack.encode(ArrayBatch(1.5, [stored([7], None, [5, 6])], 0))
    batch = ObjectBatch(1.5, [ObjectStored([b"\x01" * 32], b"\x02" * 32, [5, 6], 2, medium="CPU")])
    (event,) = decode_batch(msgspec.msgpack.encode(batch))
    assert isinstance(event, Stored)
    assert (event.block_hashes, event.parent, event.tier) == ([b"\x01" * 32], b"\x02" * 32, "ram")
    gone = decode_batch(msgspec.msgpack.encode(ArrayBatch(1.5, [ArrayRemoved([7], "GPU"), ArrayCleared()])))
    assert gone == [Removed([7]), Cleared()]


@pytest.mark.parametrize("payload", [b"", b"\xc1", msgspec.msgpack.encode([1.5]), msgspec.msgpack.encode({"ts": 1})])
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError, match="an invalid batch of KV events"):
        decode_batch(payload)


@pytest.mark.parametrize(
    "field",
    [
        {"block_hashes": 5}, {"block_hashes": [[1]]}, {"parent_block_hash": [1]}, {"token_ids": [2**40, 1]},
        {"block_size": "2"}, {"block_size": 0},
    ],
)  # fmt: skip
def test_an_event_of_another_form_is_refused(field: dict[str, Any]) -> None:
    event = {"block_hashes": [1], "parent_block_hash": None, "token_ids": [1, 2], "block_size": 2}
    payload = msgspec.msgpack.encode({"ts": 1.0, "events": [{"type": "BlockStored", **event, **field}]})
    with pytest.raises(WireError, match="an invalid batch of KV events"):
        decode_batch(payload)


def test_blocks_are_known_by_their_tokens_whatever_the_servers_hashes_are() -> None:
    feed_, known = feed()
    feed_.live(0, decode_batch(batch(stored([901, 902], None, [1, 2, 3, 4]))))
    feed_.live(1, decode_batch(batch(stored([77], 902, [5, 6]))))
    assert known.has(1, 2, 3, 4, 5, 6)
    feed_.live(2, decode_batch(batch(ArrayRemoved([902], "GPU"))))
    assert (known.has(1, 2), known.count) == (True, 2)
    assert feed_.fault == ""


def test_a_block_of_the_server_may_be_several_of_the_gateways() -> None:
    feed_, known = feed()
    feed_.live(0, decode_batch(batch(stored([1], None, [1, 2, 3, 4], size=4), stored([2], 1, [5, 6, 7, 8], size=4))))
    assert known.has(1, 2, 3, 4, 5, 6, 7, 8)
    feed_.live(1, decode_batch(batch(stored([9], None, [1, 2, 3], size=3))))
    assert not feed_.has_heard
    assert "EMBERKV_BLOCK_SIZE=3" in feed_.fault


def test_copies_of_a_block_are_counted() -> None:
    feed_, known = feed()
    for number in range(2):
        feed_.live(number, decode_batch(batch(stored([1], None, [1, 2]))))
    feed_.live(2, decode_batch(batch(ArrayRemoved([1], "GPU"))))
    assert known.has(1, 2)
    feed_.live(3, decode_batch(batch(ArrayRemoved([1], "GPU"))))
    assert not known.has(1, 2)


def test_blocks_of_adapters_and_images_are_passed_over_with_those_behind_them() -> None:
    feed_, known = feed()
    adapter = ArrayStored([1], None, [1, 2], 2, 5, "GPU")
    image = ObjectStored([3], None, [1, 2], 2, extra_keys=[("image",)])
    feed_.live(0, decode_batch(batch(adapter, stored([2], 1, [3, 4]), image, stored([4], 3, [3, 4]))))
    assert (known.count, feed_.fault) == (0, "")


def test_a_tier_below_the_gpu_is_told_apart() -> None:
    feed_, known = feed()
    feed_.live(0, decode_batch(batch(stored([1], None, [1, 2]), stored([1], None, [1, 2], medium="CPU"))))
    feed_.live(1, decode_batch(batch(ArrayRemoved([1], "GPU"))))
    assert known.has(1, 2, tier="ram")
    assert not known.has(1, 2)


def test_what_is_lost_is_said_until_all_is_cleared() -> None:
    feed_, known = feed()
    feed_.live(0, decode_batch(batch(stored([1], None, [1, 2]))))
    feed_.live(3, decode_batch(batch(stored([2], 1, [3, 4]))))
    assert (feed_.missing_from, known.count) == (1, 1)
    feed_.give_up()
    assert "events 1 to 2 are lost" in feed_.fault
    assert known.has(1, 2, 3, 4)
    feed_.live(4, decode_batch(batch(ArrayCleared())))
    assert (feed_.fault, known.count) == ("", 0)


def test_a_server_that_has_started_anew_has_nothing() -> None:
    feed_, known = feed()
    for number in range(3):
        feed_.live(number, decode_batch(batch(stored([number], number - 1 if number else None, [number, 1]))))
    feed_.live(0, decode_batch(batch(stored([50], None, [8, 9]))))
    assert known.has(8, 9)
    assert (known.count, feed_.fault) == (1, "")


def test_a_batch_that_a_replay_has_brought_before_is_no_new_start() -> None:
    batches = [decode_batch(batch(stored([each], each - 1 if each else None, [each, 1]))) for each in range(6)]
    feed_, known = feed()
    feed_.live(0, batches[0])
    feed_.live(2, batches[2])
    assert feed_.missing_from == 1
    for number in range(1, 5):  # 3 and 4 were published, too, and wait to be received
        feed_.replayed(number, batches[number])
    for number in range(3, 6):
        feed_.live(number, batches[number])
        assert (feed_.missing_from, feed_.fault) == (None, "")
    assert known.has(*(token for each in range(6) for token in (each, 1)))
    feed_.live(4, decode_batch(batch(ArrayCleared())))
    assert known.count == 0, "a number that was published before is of a new server"


class Pool:
    """A server's cache of chains over two tokens, which says what it does as vLLM does."""

    def __init__(self) -> None:
        self.copies: dict[tuple[int, ...], int] = {}
        self.batches: list[bytes] = []

    def do(self, verb: str, number: int) -> None:
        chain = tuple(int(digit) for digit in f"{number:06b}")[: 2 * (1 + number % 3)]
        names = [hash(chain[:end]) & 0xFFFF for end in range(2, len(chain) + 1, 2)]
        match verb:
            case "store":
                self.batches.append(batch(stored(names, None, chain)))
                for end in range(2, len(chain) + 1, 2):
                    self.copies[chain[:end]] = self.copies.get(chain[:end], 0) + 1
            case "evict" if self.copies:
                gone = sorted(self.copies, key=lambda each: (-len(each), each))[number % len(self.copies)]
                self.copies[gone] -= 1
                self.copies = {each: count for each, count in self.copies.items() if count}
                self.batches.append(batch(ArrayRemoved([hash(gone) & 0xFFFF], "GPU")))
            case "clear":
                self.copies.clear()
                self.batches.append(batch(ArrayCleared()))

    @property
    def hashes(self) -> set[bytes]:
        return {TokenChain(ROOT, each, 2).block_hashes[-1] for each in self.copies}


STEPS = st.tuples(st.sampled_from(["store", "store", "store", "evict", "evict", "clear"]), st.integers(0, 63))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(STEPS, st.booleans()), max_size=30), st.booleans())
def test_without_a_fault_the_blocks_are_the_servers(steps: list[tuple[tuple[str, int], bool]], replays: bool) -> None:
    pool, (feed_, known) = Pool(), feed()
    for (verb, number), is_lost in steps:
        before = len(pool.batches)
        pool.do(verb, number)
        if len(pool.batches) == before or is_lost:
            continue
        feed_.live(before, decode_batch(pool.batches[before]))
        if feed_.missing_from is not None:
            for missing in range(feed_.missing_from, len(pool.batches) if replays else 0):
                feed_.replayed(missing, decode_batch(pool.batches[missing]))
            feed_.give_up()
        assert feed_.missing_from is None
        if not feed_.fault:
            assert known.by_tier.get(POOL, set()) == pool.hashes
        assert not (replays and feed_.fault)


class Publisher:
    """A server's sockets: it publishes batches, and sends the last ones again. silent: it publishes nothing."""

    def __init__(self, context: zmq.asyncio.Context, *, kept: int = 100) -> None:
        self.batches: list[bytes] = []
        self._kept = kept
        self._live = context.socket(zmq.PUB)
        self._replay = context.socket(zmq.ROUTER)
        self.endpoint = f"tcp://127.0.0.1:{self._live.bind_to_random_port('tcp://127.0.0.1')}"
        self.replay_endpoint = f"tcp://127.0.0.1:{self._replay.bind_to_random_port('tcp://127.0.0.1')}"
        self._server = asyncio.create_task(self._serve())

    async def publish(self, *events: Any, is_lost: bool = False) -> None:
        number = len(self.batches)
        self.batches.append(batch(*events))
        if not is_lost:
            await self._live.send_multipart([b"kv", number.to_bytes(8, "big"), self.batches[number]])

    async def _serve(self) -> None:
        while True:
            client, empty, start = await self._replay.recv_multipart()
            first = max(int.from_bytes(start, "big"), len(self.batches) - self._kept)
            for number in range(first, len(self.batches)):
                await self._replay.send_multipart([client, empty, number.to_bytes(8, "big"), self.batches[number]])
            await self._replay.send_multipart([client, empty, END, b""])

    async def close(self) -> None:
        self._server.cancel()
        await asyncio.gather(self._server, return_exceptions=True)
        self._live.close(0)
        self._replay.close(0)


@on_a_loop
async def test_a_subscriber_knows_what_was_published_before_it_and_what_it_missed() -> None:
    with zmq.asyncio.Context() as context:
        server = Publisher(context)
        await server.publish(stored([1], None, [1, 2]))
        feed_, known = feed()
        follower = asyncio.create_task(KvSubscriber(server.endpoint, server.replay_endpoint, feed_).run())
        await until(lambda: known.has(1, 2))
        await server.publish(stored([2], 1, [3, 4]), is_lost=True)
        count = 0

        async def more() -> None:  # until the subscription stands, what is published is lost, too
            nonlocal count
            count += 1
            await server.publish(stored([100 + count], None, [9, count]))

        await until(lambda: known.has(1, 2, 3, 4), more)
        assert feed_.fault == ""
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)
        await server.close()


class Failing(KvSubscriber):
    """Fails once, in a way that is not ZeroMQ's."""

    runs = 0

    async def run(self) -> None:
        self.runs += 1
        if self.runs == 1:
            raise RuntimeError("an unforeseen event")
        await asyncio.Event().wait()


@on_a_loop
async def test_a_subscription_that_fails_is_restarted_and_its_blocks_are_not_exact_any_more() -> None:
    sequence, _ = feed()
    subscriber = Failing("tcp://127.0.0.1:1", None, sequence)
    task = asyncio.create_task(follow(subscriber, pause=0.0))
    await until(lambda: subscriber.runs == 2)
    assert sequence.fault == FAILED
    task.cancel()


@on_a_loop
async def test_a_subscriber_that_cannot_get_what_it_missed_says_so() -> None:
    with zmq.asyncio.Context() as context:
        server = Publisher(context, kept=1)
        await server.publish(stored([1], None, [1, 2]))
        await server.publish(stored([2], None, [3, 4]))
        feed_, known = feed()
        follower = asyncio.create_task(KvSubscriber(server.endpoint, server.replay_endpoint, feed_).run())
        await until(lambda: "events 0 to 0 are lost" in feed_.fault)
        assert (known.has(3, 4), known.has(1, 2)) == (True, False)

        async def clear() -> None:
            await server.publish(ArrayCleared())

        await until(lambda: not feed_.fault, clear)
        assert known.count == 0
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)
        await server.close()

"""Between the pool's bytes and the tiers below: what was committed goes down, what was asked for comes up verified.

All methods but `find` and `stats` belong to the engine's thread; nothing here waits for a disk.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from emberkv.core.block import Block
from emberkv.core.hashing import Identity
from emberkv.core.promotion import Load, LowerTiers, Run
from emberkv.core.rates import Rate
from emberkv.tiers.codec import BlockRecord
from emberkv.tiers.fetch import Fetch, Records
from emberkv.tiers.stack import Offer, TierStack
from emberkv.tiers.stats import Troubles

_log = logging.getLogger(__name__)


class BlockBytes(Protocol):
    """Where blocks' bytes are; `KVPool` is one."""

    @property
    def block_bytes(self) -> int: ...

    def read_blocks(self, slots: Sequence[int]) -> list[memoryview]: ...

    def write_block(self, slot: int, content: bytes | memoryview) -> None: ...


@dataclass(slots=True, eq=False)
class _Flight:
    """A load on its way. deadline: by the clock; None: it may take as long as it does."""

    load: Load
    fetch: Fetch
    deadline: float | None


class TierLink:
    """The `LowerTiers` of a scheduler, over a stack of tiers.

    step_tokens: how many prompt tokens a step computes when there is nothing else to do. exact: only blocks that are
    bit-equal to a cold prefill's go down. clock: seconds. news: called, on any thread, when `has_news` may be True.

    trouble: what went wrong with blocks on their way, by kind: ``tokens`` of another chain under the identity asked
    for, a ``size`` that no block has, ``patience`` at its end, and failures to copy, by their type.
    """

    def __init__(
        self,
        stack: TierStack,
        blocks: BlockBytes,
        *,
        step_tokens: int,
        exact: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stack = stack
        self.news: Callable[[], None] = lambda: None
        self._troubles = Troubles(_log, "blocks between the pool and the tiers")
        self._blocks = blocks
        self._step_tokens = step_tokens
        self._exact = exact
        self._clock = clock
        self._prefill = Rate()
        self._flights: dict[Load, _Flight] = {}
        self._fetched: deque[tuple[Load, Records]] = deque()

    def find(self, identities: Sequence[Identity], *, exact: bool) -> list[Run]:
        return self.stack.find(identities, exact=exact)

    @property
    def peeking(self) -> LowerTiers:
        """The same, for questions that are no request's: what they find is not counted."""
        return _Peeking(self)

    def recompute_seconds(self, tokens: int) -> float | None:
        """As many whole steps as that takes, and the rest."""
        steps, rest = divmod(tokens, self._step_tokens)
        whole, partial = self._prefill.seconds_for(self._step_tokens), self._prefill.seconds_for(rest)
        if whole is None or partial is None:
            return None
        return steps * whole + (partial if rest else 0.0)

    def computed(self, tokens: int, seconds: float) -> None:
        """A step with a prompt in it computed so many tokens."""
        self._prefill.observe(tokens, max(0.0, seconds))

    def used(self, identities: Sequence[Identity]) -> None:
        """These were hit in the pool: they are as recent below."""
        if identities:
            self.stack.touch(identities)

    def copy_down(self, blocks: Sequence[Block]) -> None:
        """Offer these to the tiers; their bytes are copied here and now, and all else is done elsewhere."""
        wanted = [block for block in blocks if block.exact or not self._exact]
        if not wanted:
            return
        try:
            contents = self._blocks.read_blocks([block.slot for block in wanted])
        except (MemoryError, RuntimeError) as error:  # torch has no memory for it: the blocks stay where they are
            self._count(type(error).__name__, len(wanted))
            return
        self.stack.offer([_offer(block, content) for block, content in zip(wanted, contents, strict=True)])

    def begin(self, load: Load) -> None:
        """Have a load's blocks read."""

        def done(records: Records) -> None:
            self._fetched.append((load, records))
            self.news()

        deadline = None if load.patience is None else self._clock() + load.patience
        self._flights[load] = _Flight(load, self.stack.fetch(list(load.identities), load.runs, done), deadline)

    @property
    def trouble(self) -> Counter[str]:
        return self._troubles.counts

    @property
    def has_news(self) -> bool:
        left = self.seconds_left
        return bool(self._fetched) or (left is not None and left <= 0)

    @property
    def seconds_left(self) -> float | None:
        """Until the patience with a load ends; None when there is no such time."""
        deadlines = [flight.deadline for flight in self._flights.values() if flight.deadline is not None]
        return min(deadlines) - self._clock() if deadlines else None

    def ended(self) -> list[tuple[Load, list[bool]]]:
        """The loads that have ended since the last call, whose bytes are in their slots now as far as they came.

        The flags are for `Scheduler.loaded`. A load that has taken as long as computing would have ends here, with what
        has come by then.
        """
        results = []
        while self._fetched:
            load, records = self._fetched.popleft()
            if self._flights.pop(load, None) is not None:
                results.append((load, self._place(load, records)))
        now = self._clock()
        for flight in list(self._flights.values()):
            if flight.deadline is not None and flight.deadline <= now:
                del self._flights[flight.load]
                flight.fetch.cancel()
                self._count("patience", 1)
                results.append((flight.load, self._place(flight.load, list(flight.fetch.records))))
        return results

    def _place(self, load: Load, records: Records) -> list[bool]:
        """Write the leading records that are what the chain wants; whether each is exact."""
        exact = []
        for index, (block, record) in enumerate(zip(load.blocks, records, strict=False)):
            if record is None or not self._is_wanted(load, load.start + index, record):
                break
            try:
                self._blocks.write_block(block.slot, record.payload)
            except (MemoryError, RuntimeError) as error:  # as in copy_down: what is not there is computed
                self._count(type(error).__name__, 1)
                break
            exact.append(record.exact)
        return exact

    def _is_wanted(self, load: Load, position: int, record: BlockRecord) -> bool:
        chain = load.chain
        found = (record.identity, record.parent, record.position, record.tokens)
        if found != (chain.identities[position], chain.parent(position), position, chain.block_tokens(position)):
            self._count("tokens", 1)
        elif len(record.payload) != self._blocks.block_bytes:
            self._count("size", 1)
        else:
            return True
        return False

    def _count(self, kind: str, blocks: int) -> None:
        self._troubles.count(kind, times=blocks)


class _Peeking:
    """`TierLink` for whoever only asks."""

    def __init__(self, link: TierLink) -> None:
        self._link = link

    def find(self, identities: Sequence[Identity], *, exact: bool) -> list[Run]:
        return self._link.stack.peek(identities, exact=exact)

    def recompute_seconds(self, tokens: int) -> float | None:
        return self._link.recompute_seconds(tokens)


def _offer(block: Block, content: memoryview) -> Offer:
    assert block.identity is not None
    record = BlockRecord(block.identity, block.parent, block.tokens, block.position, block.exact, content)
    return Offer(record, block.owner)

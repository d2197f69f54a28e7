"""Lower tiers as models without bytes: what they hold and evict, and how long transfers take in virtual time.

They are looked into, measured and chosen from by the code that serves; only the transfers are modelled. A tier moves
one thing at a time in each direction, in the order asked for.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from emberkv.core.hashing import BlockHash, Chain
from emberkv.core.loading import BlockRun, LatencyModel, Load, LookupStatus, StoredPartial
from emberkv.core.policies.eviction import EntryCost, EvictionPolicy
from emberkv.sim.timing import NANOSECONDS, nanoseconds
from emberkv.tiers.manager import find_runs
from emberkv.tiers.stats import TierMeter

QUEUE_SECONDS = 1.0
"""Longest that a block waits to be written down; later ones are skipped meanwhile, as the server's queue is bounded."""


@dataclass(slots=True)
class Channel:
    """One direction of a tier. bandwidth: bytes a second. latency: seconds that each transfer takes besides.

    free_at: nanoseconds, the end of the last transfer that was accepted.

    >>> read = Channel(bandwidth=1e9, latency=0.5)
    >>> read.transfer(now=0, size=10**9), read.transfer(now=0, size=0)
    ((0, 1500000000), (1500000000, 2000000000))
    """

    bandwidth: float
    latency: float
    free_at: int = 0

    def duration(self, size: int) -> int:
        return nanoseconds(self.latency + size / self.bandwidth)

    def transfer(self, now: int, size: int) -> tuple[int, int]:
        """Take the next turn: when it begins, and when it ends."""
        begins = max(now, self.free_at)
        self.free_at = begins + self.duration(size)
        return begins, self.free_at


def _unfollowed(block_hash: BlockHash) -> None:
    """No router's index follows the tier."""


class ModelledTier:
    """A tier of ``capacity`` blocks, ordered by an eviction policy. keeps: whether its content outlives a lost replica.

    on_stored, on_removed: called with each block that the tier stores or no longer has, for a router's index.

    >>> from emberkv.core.policies.eviction import make_policy
    >>> read, write = Channel(1e9, 0.0), Channel(1e9, 0.0)
    >>> ram = ModelledTier("ram", 100, 4096, make_policy("lru"), read=read, write=write)
    >>> ram.offload(b"first block", True, now=0)
    >>> ram.apply_writes(now=NANOSECONDS)
    >>> ram.lookup([b"first block", b"second block"]), ram.stored_bytes
    (1, 4096)
    """

    def __init__(
        self,
        name: str,
        capacity: int,
        block_bytes: int,
        policy: EvictionPolicy[BlockHash],
        *,
        read: Channel,
        write: Channel,
        keeps: bool = False,
    ) -> None:
        self.name = name
        self.keeps = keeps
        self.meter = TierMeter()
        self.read, self.write = read, write
        self.block_bytes = block_bytes
        self.evictions = self.skipped = 0
        self.on_stored: Callable[[BlockHash], None] = _unfollowed
        self.on_removed: Callable[[BlockHash], None] = _unfollowed
        self._capacity = capacity
        self._policy = policy
        self._exact: dict[BlockHash, bool] = {}
        self._arriving: deque[tuple[int, BlockHash, bool]] = deque()

    @property
    def stored_bytes(self) -> int:
        return len(self._exact) * self.block_bytes

    def lookup(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        """How many leading block hashes the tier has; with ``exact``, only blocks that are bit-equal to a cold prefill
        count."""
        for index, block_hash in enumerate(block_hashes):
            known = self._exact.get(block_hash)
            if known is None or (exact and not known):
                return index
        return len(block_hashes)

    def is_exact(self, block_hash: BlockHash) -> bool:
        """Whether a block that the tier has is bit-equal to a cold prefill."""
        return self._exact[block_hash]

    def offload(self, block_hash: BlockHash, exact: bool, now: int) -> None:
        """Queue a block for writing, unless the tier has it. A look-up finds it from the time on at which it is
        written.

        A block is skipped while the queue is `QUEUE_SECONDS` long. now: nanoseconds.
        """
        self.apply_writes(now)
        if self.lookup((block_hash,), exact=exact):
            return
        if self.write.free_at - now > QUEUE_SECONDS * NANOSECONDS:
            self.skipped += 1
            return
        _, ends = self.write.transfer(now, self.block_bytes)
        self._arriving.append((ends, block_hash, exact))

    def apply_writes(self, now: int) -> None:
        """Store the blocks that are written by ``now``."""
        while self._arriving and self._arriving[0][0] <= now:
            _, block_hash, exact = self._arriving.popleft()
            self._store(block_hash, exact)

    def touch(self, block_hashes: Sequence[BlockHash]) -> None:
        """Mark these blocks as used, the first one as the most recent."""
        self._policy.access([each for each in reversed(block_hashes) if each in self._exact])

    def publish_all(self) -> None:
        """Call `on_stored` with each block that the tier has, for an index that has lost them."""
        for block_hash in self._exact:
            self.on_stored(block_hash)

    def clear(self) -> None:
        for block_hash in self._exact:
            self._policy.discard(block_hash)
            self.on_removed(block_hash)
        self._exact.clear()
        self._arriving.clear()

    def _store(self, block_hash: BlockHash, exact: bool) -> None:
        if block_hash in self._exact:
            self._exact[block_hash] |= exact
            return
        if not self._capacity:
            self.skipped += 1
            return
        if len(self._exact) == self._capacity:
            evicted = self._policy.evict()
            del self._exact[evicted]
            self.on_removed(evicted)
            self.evictions += 1
        self._exact[block_hash] = exact
        self.on_stored(block_hash)
        self._policy.admit(block_hash, EntryCost(self.block_bytes))
        self._policy.release((block_hash,))


@dataclass(slots=True, eq=False)
class Transfer:
    """A load that has begun: when it ends or is given up, and for each block that has come by then, whether it is
    exact.

    scheduled: whether its end is in the event queue.

    >>> from emberkv.sim.cache_only import ReferenceChain
    >>> load = Load(ReferenceChain(b"root", [b"a", b"b"], 16), 0, [], [], break_even_seconds=None)
    >>> sum(Transfer(load, ends=5_000, exact=[True, False]).exact)
    1
    """

    load: Load
    ends: int
    exact: list[bool]
    scheduled: bool = False


@dataclass(slots=True)
class ModelledTiers:
    """The lower tiers of one replica, fastest first, as its scheduler's `LowerTiers`.

    now: nanoseconds; the caller sets it before the scheduler asks.

    >>> tiers = ModelledTiers([])
    >>> tiers.find([b"block"], exact=True), tiers.recompute_seconds(100)
    ([], None)
    >>> tiers.prefilled(tokens=1000, duration=2 * NANOSECONDS)
    >>> tiers.recompute_seconds(100)
    0.2
    """

    tiers: Sequence[ModelledTier]
    now: int = 0
    _prefill: LatencyModel = field(default_factory=LatencyModel)

    def find(self, block_hashes: Sequence[BlockHash], *, exact: bool) -> list[BlockRun]:
        for tier in self.tiers:
            tier.apply_writes(self.now)
        return find_runs(self.tiers, [tier.meter for tier in self.tiers], block_hashes, exact=exact)

    def status(self, block_hash: BlockHash, *, exact: bool) -> LookupStatus:
        """A modelled tier answers every look-up at once, so `find` has found what is there."""
        return LookupStatus.MISS

    def find_partial(self, chain: Chain, position: int, least: int, most: int) -> StoredPartial | None:
        """No simulated model has checkpoints."""
        return None

    def recompute_seconds(self, tokens: int) -> float | None:
        return self._prefill.seconds_for(tokens)

    def prefilled(self, tokens: int, duration: int) -> None:
        """Record that a step computed ``tokens`` prompt tokens in ``duration`` nanoseconds."""
        self._prefill.observe(tokens, duration / NANOSECONDS)

    def offload(self, block_hash: BlockHash, exact: bool) -> None:
        for tier in self.tiers:
            tier.offload(block_hash, exact, self.now)

    def touch(self, block_hashes: Sequence[BlockHash]) -> None:
        for tier in self.tiers:
            tier.touch(block_hashes)

    def onboard(self, load: Load) -> Transfer:
        """Read the runs of a load one after the other; give up when computing would have been as fast."""
        deadline = None if load.break_even_seconds is None else self.now + nanoseconds(load.break_even_seconds)
        by_name = {tier.name: tier for tier in self.tiers}
        at, first, came = self.now, 0, list[bool]()
        for run in load.runs:
            tier = by_name[run.tier]
            block_hashes = load.block_hashes[first : first + run.count]
            begins, ends = tier.read.transfer(at, run.count * tier.block_bytes)
            tier.meter.onboarded(run.count, run.count * tier.block_bytes, (ends - begins) / NANOSECONDS)
            whole = run.count if deadline is None else _arrived(begins, ends, run.count, deadline)
            came += [tier.is_exact(block_hash) for block_hash in block_hashes[:whole]]
            self._promote(tier, block_hashes[:whole])
            at, first = ends, first + run.count
            if whole < run.count:
                break
        return Transfer(load, at if deadline is None else min(at, deadline), came)

    def _promote(self, source: ModelledTier, block_hashes: Sequence[BlockHash]) -> None:
        """Copy blocks that come from a slower tier into the faster ones."""
        source.touch(block_hashes)
        for tier in self.tiers[: list(self.tiers).index(source)]:
            for block_hash in block_hashes:
                tier.offload(block_hash, source.is_exact(block_hash), self.now)

    def clear(self) -> None:
        """Drop the content that does not outlive a lost replica."""
        for tier in self.tiers:
            if not tier.keeps:
                tier.clear()
        self._prefill = LatencyModel()


def _arrived(begins: int, ends: int, count: int, deadline: int) -> int:
    """How many of ``count`` blocks that arrive evenly between two times have arrived by ``deadline``."""
    if deadline >= ends:
        return count
    return max(0, count * (deadline - begins) // max(1, ends - begins))

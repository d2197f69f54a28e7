"""Load or recompute: whether reading blocks from a lower tier beats computing them. Pure decisions over measured times.

The scheduler asks when it admits a sequence; a driver reads the bytes, off the engine's thread, and reports when they
are in the pool.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from emberkv.core.block import Block, MatchEnd
from emberkv.core.hashing import PUBLIC_OWNER, BlockHash, Chain, partial_siblings_hash
from emberkv.errors import ConfigError


class LatencyModel:
    """How long an amount of work takes, learned from what such work took before.

    Time as a fixed latency plus a time per unit, fitted by least squares to recent work.

    The weight of an observation halves with every ``half_life`` later ones (exponentially weighted moments), so that
    the fit follows a machine whose speed changes. Amounts and times are in any units, the same throughout.
    """

    def __init__(self, half_life: float = 32.0) -> None:
        if half_life <= 0:
            raise ConfigError(f"half_life is {half_life}; it must be positive")
        self._decay = 0.5 ** (1.0 / half_life)
        self._weight = 0.0
        self._mean_amount = 0.0
        self._mean_seconds = 0.0
        self._variance = 0.0
        self._covariance = 0.0

    def observe(self, amount: float, seconds: float) -> None:
        """``amount`` of work took ``seconds``. Raises ConfigError for an amount not above 0 or a time below 0."""
        if not (amount > 0 and seconds >= 0):
            raise ConfigError(f"{amount} of work in {seconds} seconds; use an amount above 0 and a time of at least 0")
        self._weight = self._weight * self._decay + 1.0
        share = 1.0 / self._weight
        more, longer = amount - self._mean_amount, seconds - self._mean_seconds
        self._mean_amount += share * more
        self._mean_seconds += share * longer
        self._variance = (1.0 - share) * (self._variance + share * more * more)
        self._covariance = (1.0 - share) * (self._covariance + share * more * longer)

    def seconds_for(self, amount: float) -> float | None:
        """Expected time of ``amount`` of work; None before any was observed.

        Neither latency nor time per unit is taken to be negative: noise that says so is fitted by the other alone.
        """
        if not self._weight:
            return None
        through_origin = self._mean_seconds / self._mean_amount
        spread = self._variance > 1e-12 * self._mean_amount**2
        per_unit = max(0.0, self._covariance / self._variance) if spread else through_origin
        per_unit = min(per_unit, through_origin)
        latency = self._mean_seconds - per_unit * self._mean_amount
        return latency + per_unit * amount


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Consecutive blocks that one tier has.

    count: blocks, at least 1. seconds: expected time to load them; None before any was measured.
    """

    tier: str
    count: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class StoredPartial:
    """A partial block that a tier has, all of whose tokens are the next ones of a prompt. count: its tokens. seconds:
    expected time to load it; None before any was measured. public: it is a public prefix's, and the prompt becomes
    private with this block.
    """

    tier: str
    block_hash: BlockHash
    count: int
    seconds: float | None
    public: bool = False


class LookupStatus(Enum):
    """What the tiers know of a block without I/O."""

    HIT = "hit"
    MISS = "miss"
    PENDING = "pending"  # a tier knows only after I/O


class LowerTiers(Protocol):
    """The tiers below the pool. The engine's thread calls these at each admission: memory only, never I/O."""

    def find(self, block_hashes: Sequence[BlockHash], *, exact: bool) -> list[BlockRun]:
        """The longest consecutive run from the first block hash on, each block from the fastest tier that has it.

        exact: only blocks that are bit-equal to a cold prefill's.
        """
        ...

    def status(self, block_hash: BlockHash, *, exact: bool) -> LookupStatus:
        """Of the first block that `find` did not find: a MISS, or PENDING where a `PendingLookup` may yet find it."""
        ...

    def find_partial(self, chain: Chain, position: int, least: int, most: int) -> StoredPartial | None:
        """The longest partial block that holds the first tokens of block ``position`` of ``chain``, from ``least`` to
        ``most`` of them; from the fastest tier that has it. All are exact. Where the chain becomes private there, a
        public prefix's count, too. As for `find`, what the tiers know without I/O.
        """
        ...

    def recompute_seconds(self, tokens: int) -> float | None:
        """Expected time to compute that many tokens; None before it was measured."""
        ...


class LoadChoice(Enum):
    """What an admission decided about the blocks that the pool lacked."""

    LOAD = "load"
    SHARED = "shared"  # a load in flight brings them already
    RECOMPUTE_CHEAPER = "recompute_cheaper"  # loading was expected to take as long as computing, or longer
    ALIGNMENT = "alignment"  # too few to fill what hits are rounded down to
    ABSENT = "absent"  # no tier has the next one


def total_seconds(runs: Sequence[BlockRun]) -> float | None:
    """Expected time of all of them, one after another; None where part of it is not known."""
    total = 0.0
    for run in runs:
        if run.seconds is None:
            return None
        total += run.seconds
    return total


@dataclass(slots=True, eq=False)
class Load:
    """Blocks ``[start, stop)`` of ``chain`` on their way up, PENDING and held by the load itself.

    runs: where the full blocks come from. break_even_seconds: until waiting has taken as long as computing would have;
    None: not known. partial: one more block, behind these, that is not full: the last of ``blocks``.
    keep_when_extended: of that one, see `Block`; set when it is read. arrived: of the full blocks, from the first,
    those that became visible; partial_arrived: whether that one did; took: seconds from the start. These are set when
    the load has ended.
    """

    chain: Chain
    start: int
    runs: list[BlockRun]
    blocks: list[Block]
    break_even_seconds: float | None
    partial: StoredPartial | None = None
    keep_when_extended: bool = False
    arrived: int = 0
    partial_arrived: bool = False
    took: float = 0.0

    @property
    def num_full(self) -> int:
        return len(self.blocks) - (self.partial is not None)

    @property
    def stop(self) -> int:
        return self.start + self.num_full

    @property
    def end(self) -> int:
        """Behind the last block that arrived."""
        return self.start + self.arrived

    @property
    def all_runs(self) -> list[BlockRun]:
        """Where all ``blocks`` come from."""
        partial = self.partial
        return self.runs if partial is None else [*self.runs, BlockRun(partial.tier, 1, partial.seconds)]

    @property
    def seconds(self) -> float | None:
        """Expected time of the whole; None where part of it is not known."""
        return total_seconds(self.all_runs)

    @property
    def block_hashes(self) -> Sequence[BlockHash]:
        """Of all ``blocks``."""
        full = self.chain.block_hashes[self.start : self.stop]
        return full if self.partial is None else [*full, self.partial.block_hash]

    @property
    def partial_parent(self) -> BlockHash:
        """Of the partial block, if there is one."""
        is_public = self.partial is not None and self.partial.public
        return self.chain.unsalted_parent(self.stop) if is_public else self.chain.parent(self.stop)

    def checkpoint_end(self, chain: Chain) -> int:
        """Of the tokens of ``chain``, how many come before the end of the partial block, where a hit may end there; 0
        where it may not, or there is no partial block.
        """
        if self.partial is None:
            return 0
        first, theirs, at = self.stop * chain.block_size, self.chain, self.stop
        end = first + self.partial.count
        if end >= len(chain) or chain.encoded_slice(first, end) != theirs.encoded_slice(first, end):
            return 0
        is_public = self.partial.public or theirs.owner(at) == PUBLIC_OWNER
        parents = (chain.parent(at), chain.unsalted_parent(at)) if is_public else (chain.parent(at),)
        return end if self.partial_parent in parents else 0

    def partial_is_removed_with(self, block_hashes: Container[BlockHash]) -> bool:
        """Whether a removal of these blocks takes the partial one along: its own hash aside."""
        if self.partial is None:
            return False
        previous = self.chain.unsalted_parent(self.stop)
        return previous in block_hashes or partial_siblings_hash(self.partial_parent) in block_hashes

    def tiers(self, start: int, stop: int) -> dict[str, int]:
        """How many of the blocks of ``[start, stop)`` that arrived came from which tier."""
        counts: dict[str, int] = {}
        first = self.start
        for run in self.runs:
            end = min(first + run.count, self.end, stop)
            if (count := end - max(first, start)) > 0:
                counts[run.tier] = counts.get(run.tier, 0) + count
            first += run.count
        return counts


@dataclass(slots=True, eq=False)
class PendingLookup:
    """Blocks ``[start, stop)`` of ``chain``; a tier can only tell after I/O whether it has the first one.

    exact: only blocks that are bit-equal to a cold prefill's count. break_even_seconds: until waiting has taken as long
    as computing the blocks would; None: not known.
    """

    chain: Chain
    start: int
    stop: int
    exact: bool
    break_even_seconds: float | None

    @property
    def block_hashes(self) -> Sequence[BlockHash]:
        return self.chain.block_hashes[self.start : self.stop]


@dataclass(frozen=True, slots=True)
class LoadWait:
    """A sequence's part in a load: the load's blocks up to ``stop`` are the sequence's too. checkpoint_end: as
    `Load.checkpoint_end`, of the sequence's chain.
    """

    load: Load
    stop: int
    choice: LoadChoice
    checkpoint_end: int


class Admission(NamedTuple):
    """Where a prompt's tokens came from when its sequence was first admitted, and why the rest had to be computed.

    What the fields leave of the prompt is in no tier. ``pool_tokens`` does not grow by what others commit later.
    """

    pool_tokens: int
    tier_tokens: Mapping[str, int]
    end: MatchEnd  # of the search in the pool
    recompute_cheaper_tokens: int = 0  # a tier has them
    load_failed_tokens: int = 0  # a load was to bring them
    alignment_tokens: int = 0  # found, and rounded away
    partial_tokens: int = 0  # of the last block, unless it is full and not the prompt's end, those that were not reused


@dataclass(frozen=True, slots=True)
class LoadDecision:
    """A decision. runs: what to load; empty unless ``choice`` is LOAD.

    declined: blocks that a hit could use, but computing them is cheaper. rounded: blocks that no hit could use.
    checkpoint_end: of the prompt's tokens, how many come before the end of a checkpoint behind ``runs`` that a hit
    could use, but computing is cheaper; 0: there is none.
    """

    choice: LoadChoice
    runs: list[BlockRun] = field(default_factory=list)
    declined: int = 0
    rounded: int = 0
    checkpoint_end: int = 0


NOTHING_BELOW = LoadDecision(LoadChoice.ABSENT)


def choose(
    runs: Sequence[BlockRun],
    useful: Callable[[int], int],
    recompute_seconds: Callable[[int], float | None],
) -> LoadDecision:
    """Load the longest prefix of ``runs`` that is expected to come sooner than it could be computed.

    useful: of so many blocks, how many from the first a hit can use; computing is saved for these. Where a time has not
    been measured yet, loading is chosen, which measures it.
    """
    found = sum(run.count for run in runs)
    if not found:
        return NOTHING_BELOW
    if not useful(found):
        return LoadDecision(LoadChoice.ALIGNMENT, rounded=found)
    kept = list(runs)
    while kept:
        wanted = useful(sum(run.count for run in kept))
        if wanted:
            trimmed = trim(kept, wanted)
            loading, computing = total_seconds(trimmed), recompute_seconds(wanted)
            if loading is None or computing is None or loading < computing:
                return LoadDecision(LoadChoice.LOAD, trimmed, useful(found) - wanted)
        kept.pop()
    return LoadDecision(LoadChoice.RECOMPUTE_CHEAPER, declined=useful(found))


def trim(runs: Sequence[BlockRun], count: int) -> list[BlockRun]:
    """The first ``count`` blocks of ``runs``, the last one's time in proportion."""
    trimmed = []
    for run in runs:
        taken = min(run.count, count)
        if not taken:
            break
        seconds = None if run.seconds is None else run.seconds * taken / run.count
        trimmed.append(BlockRun(run.tier, taken, seconds))
        count -= taken
    return trimmed

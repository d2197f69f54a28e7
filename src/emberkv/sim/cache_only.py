"""Replay without time: each request is admitted whole and ends before the next one arrives.

Hits follow from capacity, policy and order alone. As published figures of traces count, a prompt's partial last block
is a block like the others, found by every prompt that ends with it; a pool that serves shares full blocks only.
"""

from collections.abc import Callable, Sequence
from random import Random

from emberkv.cluster.feed import RoutedReplicas
from emberkv.cluster.policies import ReplicaState
from emberkv.cluster.routing import Recorder, RoutingRequest
from emberkv.core.hashing import BlockHash
from emberkv.core.stats import SchedulerStats
from emberkv.sim.build import Machine, cache_of, root_of, routers_of
from emberkv.sim.config import SimulationConfig
from emberkv.sim.outcome import RequestOutcome, Sessions, Status, cache_event
from emberkv.sim.simulator import PROGRESS_EVERY, Progress, SimulationEnd
from emberkv.sim.timing import nanoseconds
from emberkv.workload.request import Request, content_hashes
from emberkv.workload.source import ASSUMED, Source, unroll


class ReferenceChain:
    """A chain of block hashes alone, each standing for its block's tokens, and one token more, which is always
    computed.

    >>> chain = ReferenceChain(b"root", [b"a", b"b"], block_size=16)
    >>> len(chain), chain.parent(1), chain.block_tokens(1)
    (33, b'a', b'b')
    """

    __slots__ = ("block_hashes", "block_size", "root")

    def __init__(self, root: BlockHash, block_hashes: Sequence[BlockHash], block_size: int) -> None:
        self.root = root
        self.block_hashes = block_hashes
        self.block_size = block_size

    def __len__(self) -> int:
        return len(self.block_hashes) * self.block_size + 1

    def __getitem__(self, position: int) -> int:
        return 0

    def slice(self, start: int, stop: int) -> list[int]:
        return [0] * (stop - start)

    def block_tokens(self, index: int) -> bytes:
        return self.block_hashes[index]

    def encoded_slice(self, start: int, stop: int) -> bytes:
        """A block is all or nothing here: what stands for it cannot be cut."""
        return self.block_hashes[start // self.block_size]

    def common_tokens(self, start: int, stop: int, encoded: bytes) -> int:
        return stop - start if encoded == self.encoded_slice(start, stop) else 0

    def parent(self, index: int) -> BlockHash:
        return self.block_hashes[index - 1] if index else self.root

    def unsalted_parent(self, index: int) -> BlockHash:
        return self.parent(index)

    def owner(self, index: int) -> str:
        return ""

    def append(self, token: int) -> None:
        """Nothing is generated."""


class Replay:
    """Pools behind a router. A replica's load is what it has computed so far: prompt tokens not found, and answers.

    record: takes routing decisions.

    >>> from emberkv.sim.build import machine_of
    >>> config = SimulationConfig(cache_only=True, kv_blocks=1000)
    >>> replay = Replay(config, machine_of(config, block_size=16))
    >>> [len(stats) for stats in replay.stats]
    [1]
    """

    def __init__(self, config: SimulationConfig, machine: Machine, record: Recorder | None = None) -> None:
        self._size = machine.block_size
        (router,), events_kept = routers_of(config, Random(f"{config.seed}/simulation"), record)
        self._caches = [cache_of(config, machine, tails=False, events_kept=events_kept) for _ in range(config.replicas)]
        self._states = [ReplicaState() for _ in self._caches]
        self._routed = RoutedReplicas(router, self._states)
        self._root_of = root_of(config, self._size)
        self._sessions = Sessions()
        self._stop_at = config.stop_at

    @property
    def stats(self) -> list[list[SchedulerStats]]:
        return [[cache.pool.stats] for cache in self._caches]

    def run(self, source: Source, emit: Callable[[RequestOutcome], None], progress: Progress) -> SimulationEnd:
        """Raises WorkloadError when the source does. Follow-ups come as if answers took the time that is `ASSUMED`."""
        now = 0.0
        try:
            requests = unroll(source, first_token=ASSUMED.first_token, per_token=ASSUMED.per_token)
            for done, request in enumerate(requests, 1):
                if self._stop_at is not None and request.arrival_time > self._stop_at:
                    break
                now = request.arrival_time
                emit(self.admit(request))
                if done % PROGRESS_EVERY == 0:
                    progress(done, now)
        except KeyboardInterrupt:
            return SimulationEnd(now, interrupted=True)
        return SimulationEnd(now, interrupted=False)

    def admit(self, request: Request) -> RequestOutcome:
        """Find what is cached of a prompt, keep the prompt, and what is known of its answer."""
        size = self._size
        root = self._root_of(request)
        references = request.block_references(root, size)
        blocks = references[: request.prompt_tokens // size]
        turn = self._sessions.turn_of(request, blocks)
        asked = ReferenceChain(root, references, size)
        decision = self._routed.decide(
            RoutingRequest(asked, request.prompt_tokens, request.session_id, request.arrival_time)
        )
        assert decision is not None, "no replica is ever lost here"
        replica = decision.replica
        hits = self._pass(replica, asked)
        arrival = nanoseconds(request.arrival_time)
        if hits is None or not request.prompt_tokens:
            return RequestOutcome(request, Status.REJECTED, arrival, turn=turn, replica=replica)
        self._keep_answer(replica, request, root, blocks)
        cached = min(hits * size, request.prompt_tokens)
        self._states[replica].load += request.prompt_tokens - cached + request.output_tokens
        self._routed.publish(replica, self._caches[replica].pool)
        return RequestOutcome(
            request, Status.COMPLETED, arrival, output_tokens=request.output_tokens, turn=turn,
            event=cache_event(turn, request.prompt_tokens, cached), cached_tokens=cached,
            prefilled_tokens=request.prompt_tokens - cached, replica=replica,
        )  # fmt: skip

    def _pass(self, replica: int, chain: ReferenceChain) -> int | None:
        """A whole lease: match, allocate, commit, release. Returns the blocks found; None if they never all fit."""
        cache = self._caches[replica]
        tokens = len(chain.block_hashes) * self._size
        if len(chain.block_hashes) > cache.pool.num_blocks:
            return None
        lease = cache.acquire(chain)
        hits = len(lease.blocks)
        lease.extend(tokens)
        lease.commit_prefilled(tokens)
        lease.release()
        return hits

    def _keep_answer(self, replica: int, request: Request, root: BlockHash, blocks: list[BlockHash]) -> None:
        """blocks: the hashes of the prompt's full blocks."""
        size, known = self._size, len(request.content) // self._size
        answer_is_known = known > len(blocks)
        if not answer_is_known and not request.session_id:
            return
        total = request.prompt_tokens + request.output_tokens
        start, stop = len(blocks) * size, total - total % size
        parent = blocks[-1] if blocks else root
        blocks = blocks + content_hashes(parent, request.full_content(), start, stop, size)
        self._sessions.completed(request, blocks, total)
        if answer_is_known:
            self._pass(replica, ReferenceChain(root, blocks[:known], size))

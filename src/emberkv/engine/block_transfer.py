"""Cached blocks as bytes, from one engine to another: the records that tiers store, with all their checks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from emberkv.core.block import Block, BlockState
from emberkv.core.checkpoints import CheckpointKind
from emberkv.core.hashing import TOKEN_BYTES, BlockHash, Chain, partial_hash
from emberkv.core.prefix_cache import PrefixCache
from emberkv.engine.executor import KVStorage
from emberkv.engine.tier_link import TierLink, record_of
from emberkv.errors import BlockError, ForeignBlockError, RequestError
from emberkv.tensors import TensorBytes
from emberkv.tiers.codec import BlockRecord, decode_record, encode_record
from emberkv.tiers.onboarding import Records
from emberkv.tiers.partial import PartialPlace

MAX_BYTES = 8 << 20
"""Of KV state that one call copies, so that no step waits long for it. At least one block."""


@dataclass(frozen=True, slots=True)
class ImportedBlocks:
    """taken: how many of the records were looked at; the caller sends the others again, with the same chain.

    imported: full blocks that the pool has got. cached: full blocks that it had. refused: records that are damaged, or
    not the chain's, by what is wrong with them; no record behind one is taken. checkpoints: partial blocks that it has
    got.
    """

    taken: int
    imported: int
    cached: int
    refused: Mapping[str, int] = field(default_factory=dict)
    checkpoints: int = 0


@dataclass(frozen=True, slots=True)
class CachedRows:
    """A layer's keys and values of a chain's tokens, ``[tokens, kv_heads, head_dim]`` each, from the one that was asked
    for on.
    """

    keys: TensorBytes
    values: TensorBytes


_NO_ROWS = TensorBytes("uint8", (0,), b"")


class BlockTransfer:
    """Reads blocks out of a pool and its tiers, and commits others into the pool. Belongs to the engine's thread.

    namespace: of the engine's bytes; a record of another one is refused. lower: the tiers from which blocks that the
    pool lacks are exported. max_bytes: see `MAX_BYTES`.
    """

    def __init__(
        self,
        cache: PrefixCache,
        storage: KVStorage,
        namespace: bytes,
        *,
        lower: TierLink | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._cache = cache
        self._pool = cache.pool
        self._storage = storage
        self._namespace = namespace
        self._lower = lower
        self._max_blocks = max(1, max_bytes // storage.block_bytes)
        self._page_blocks = max(1, max_bytes // storage.layer_bytes)

    def export(self, block_hashes: Sequence[BlockHash]) -> "Future[list[bytes | None]]":
        """The records of the first of these blocks, as many as `MAX_BYTES` allows, from the pool or a tier.

        None for each block that neither has, and for those of a tier behind one that none has. Raises MemoryError when
        there is no memory for the copies. Where a tier is read, the answer comes in `TierLink.completed`.
        """
        wanted = block_hashes[: self._max_blocks]
        exported = self._of_pool(wanted)
        answer: Future[list[bytes | None]] = Future()
        missing = [each for each in wanted if each not in exported]

        def finish(records: Records) -> None:
            try:
                exported.update((each.block_hash, self._encoded(each)) for each in records if each is not None)
            except MemoryError as error:
                answer.set_exception(error)
                return
            self._pool.stats.exported_blocks += len(exported)
            answer.set_result([exported.get(each) for each in wanted])

        if missing and self._lower is not None:
            self._lower.read(missing).add_done_callback(lambda read: finish(read.result()))
        else:
            finish([])
        return answer

    def export_checkpoint(self, chain: Chain, position: int) -> "Future[bytes | None]":
        """The record of the longest partial block behind the first ``position`` blocks of ``chain`` from which a longer
        prompt that begins with ``chain`` goes on, from the pool or a tier; None where neither has one.

        The record is of a block of this chain, though a public prefix may have left it. Raises RequestError for a
        position behind the last full block, and otherwise as `export` does.
        """
        if position > len(chain.block_hashes):
            raise RequestError(
                f"position is {position}; the chain has {len(chain.block_hashes)} full blocks", param="position"
            )
        answer: Future[bytes | None] = Future()

        def finish(records: Records) -> None:
            try:
                record = records[0] if records else None
                if record is None:
                    record = self._checkpoint_of_pool(chain, position)
                encoded = None if record is None else self._encoded(_as_next_of(chain, position, record))
            except MemoryError as error:
                answer.set_exception(error)
                return
            self._pool.stats.exported_checkpoints += encoded is not None
            answer.set_result(encoded)

        known = self._partial_child(chain, position)
        least = 1 if known is None else known.num_tokens + 1
        most = min(self._pool.block_size - 1, len(chain) - position * self._pool.block_size)
        lower = self._lower if least <= most else None
        found = None if lower is None else lower.find_partial(chain, position, least, most)
        if lower is None or found is None:
            finish([])
        else:
            public_parent = chain.unsalted_parent(position)
            parent = public_parent if found.public else chain.parent(position)
            read = lower.read([found.block_hash], partial=PartialPlace(parent, public_parent, found.count))
            read.add_done_callback(lambda read: finish(read.result()))
        return answer

    def _partial_child(self, chain: Chain, position: int) -> Block | None:
        """The longest partial block of the pool that is the next one of ``chain``."""
        found = self._cache.longest_child(chain, position, to_end=True)
        return found[0] if found is not None and found[0].partial and found[0].num_tokens == found[1] else None

    def _checkpoint_of_pool(self, chain: Chain, position: int) -> BlockRecord | None:
        block = self._partial_child(chain, position)
        if block is None:
            return None
        record = record_of(block, self._storage.read_beginning(block.block_id, block.num_tokens))
        return replace(record, keep_when_extended=False) if self._pool.speculative.is_unused(block) else record

    def read_rows(self, chain: Chain, layer: int, start: int) -> CachedRows:
        """Keys and values of the tokens from ``start`` on that the pool has, of as many blocks as `MAX_BYTES` allows.

        None where it lacks the next token. Blocks before ``start`` are not looked at, so all pages of a long chain
        take the same time.

        Raises UnknownLayerError for a layer that the model has not, RequestError for one without attention.
        """
        size = self._pool.block_size
        first = start // size
        stop = min(first + self._page_blocks, len(chain.block_hashes))
        blocks = list(self._pool.match(chain, start=first, stop=stop, exact_only=self._cache.exact).blocks)
        tokens = len(blocks) * size
        if len(blocks) < self._page_blocks:
            child = self._cache.longest_child(chain, first + len(blocks), to_end=True)
            if child is not None:
                blocks.append(child[0])
                tokens += child[1]
        if tokens <= start - first * size:
            return CachedRows(_NO_ROWS, _NO_ROWS)
        keys, values = self._storage.read_layer([block.block_id for block in blocks], layer)
        rows = slice(start - first * size, tokens)
        return CachedRows(_rows(keys, rows), _rows(values, rows))

    def count_rows(self, chain: Chain, layer: int) -> int:
        """How many tokens have the keys and values that `read_rows` would give, over all pages. Raises as it does."""
        self._storage.read_layer([], layer)
        blocks = self._pool.match(chain, stop=len(chain.block_hashes), exact_only=self._cache.exact).blocks
        child = self._cache.longest_child(chain, len(blocks), to_end=True)
        return len(blocks) * self._pool.block_size + (0 if child is None else child[1])

    def take(self, chain: Chain, records: Sequence[bytes]) -> ImportedBlocks:
        """Commit consecutive blocks of ``chain``, in order, behind those that the pool has, as far as it has room.

        A record counts only if its checksum, namespace, hash, parent, tokens and size are the chain's. That of a
        partial block is the last one that is taken.
        """
        if not self._cache.enabled:
            return ImportedBlocks(len(records), 0, 0)
        cached = self._pool.match(chain, stop=len(chain.block_hashes), exact_only=self._cache.exact).blocks
        sound, taken, refused = self._verified(chain, records, len(cached))
        self._pool.pin(cached)
        imported, checkpoints = self._commit(chain, sound, cached)
        self._pool.stats.imported_blocks += imported
        self._pool.stats.imported_checkpoints += checkpoints
        self._pool.stats.refused_imports.update(refused)
        return ImportedBlocks(taken, imported, len(cached), refused, checkpoints)

    def _of_pool(self, block_hashes: Sequence[BlockHash]) -> dict[BlockHash, bytes]:
        """The records of those that are full blocks of the pool."""
        found = [block for each in block_hashes if (block := self._pool.lookup(each)) is not None and not block.partial]
        contents = self._storage.read_blocks([block.block_id for block in found])
        records = [record_of(block, content) for block, content in zip(found, contents, strict=True)]
        return {record.block_hash: self._encoded(record) for record in records}

    def _encoded(self, record: BlockRecord) -> bytes:
        return encode_record(record, namespace=self._namespace)

    def _verified(
        self, chain: Chain, records: Sequence[bytes], position: int
    ) -> tuple[list[BlockRecord], int, Counter[str]]:
        """The records of the blocks from ``position`` on, how many were looked at, and what is wrong with the next."""
        sound: list[BlockRecord] = []
        for taken, data in enumerate(records):
            if len(sound) == self._max_blocks:
                return sound, taken, Counter()
            try:
                record = self._verified_record(chain, data, position + len(sound))
            except BlockError as error:
                return sound, taken + 1, Counter({error.fault: 1})
            if record.position == position + len(sound):
                sound.append(record)
                if record.partial:
                    return sound, taken + 1, Counter()
        return sound, len(records), Counter()

    def _verified_record(self, chain: Chain, data: bytes, furthest: int) -> BlockRecord:
        """Raises BlockError unless it is the record of a block of ``chain``, at ``furthest`` or before."""
        record = decode_record(data, namespace=self._namespace)
        at = record.position
        if at > furthest or at >= len(chain.block_hashes) + record.partial:
            raise ForeignBlockError(f"block {at} of a chain; block {furthest} is the next one", fault="position")
        if record.partial and not self._cache.reuses_partial_blocks:
            raise ForeignBlockError("a partial block, which this engine does not go on from", fault="kind")
        if (record.block_hash, record.parent, record.tokens) != _expected(chain, record):
            raise ForeignBlockError("a block of another chain", fault="tokens")
        if len(record.payload) != self._storage.block_bytes:
            raise ForeignBlockError(f"{len(record.payload)} bytes of KV state", fault="size")
        if (self._cache.exact or record.partial) and not record.exact:
            raise ForeignBlockError("not bit-equal to a cold prefill's", fault="exactness")
        return record

    def _commit(self, chain: Chain, records: Sequence[BlockRecord], cached: list[Block]) -> tuple[int, int]:
        """Write and commit records behind ``cached``, which is pinned and freed in the end; how many full and partial
        blocks are found now.
        """
        if not records:
            self._pool.free(cached)
            return 0, 0
        owner = chain.owner(records[-1].position)
        blocks = self._pool.allocate(min(len(records), self._pool.free_for(owner)), owner)
        count = checkpoints = 0
        try:
            for record, block in zip(records, list(blocks), strict=False):
                self._storage.write_block(block.block_id, record.payload)
                if record.partial:
                    checkpoints += self._commit_partial(block, chain, record)
                    break
                blocks[count] = self._pool.commit(block, chain, record.position, exact=record.exact)
                if blocks[count].state is not BlockState.COMMITTED:  # the hash is another chain's already
                    break
                count += 1
        finally:
            self._pool.free([*cached, *blocks])
        return count, checkpoints

    def _commit_partial(self, block: Block, chain: Chain, record: BlockRecord) -> bool:
        kind = CheckpointKind.BRANCH if record.keep_when_extended else None
        return self._pool.commit_partial(block, chain, record.position, len(record.tokens) // TOKEN_BYTES, kind)


def _as_next_of(chain: Chain, position: int, record: BlockRecord) -> BlockRecord:
    """A record of a partial block that holds the first tokens of block ``position`` of ``chain``, as one of that."""
    parent = chain.parent(position)
    return replace(record, parent=parent, block_hash=partial_hash(parent, record.tokens))


def _expected(chain: Chain, record: BlockRecord) -> tuple[BlockHash, BlockHash, bytes] | None:
    """Hash, parent and tokens of the block of ``chain`` that a record is to be of; None where there is none."""
    at, parent = record.position, chain.parent(record.position)
    if not record.partial:
        return chain.block_hashes[at], parent, chain.block_tokens(at)
    first, count = at * chain.block_size, len(record.tokens) // TOKEN_BYTES
    if not 0 < count < chain.block_size or first + count > len(chain):
        return None
    tokens = chain.encoded_slice(first, first + count)
    return partial_hash(parent, tokens), parent, tokens


def _rows(tensor: TensorBytes, rows: slice) -> TensorBytes:
    width = len(tensor.data) // tensor.shape[0]
    data = tensor.data[rows.start * width : rows.stop * width]
    return TensorBytes(tensor.dtype, (rows.stop - rows.start, *tensor.shape[1:]), data)

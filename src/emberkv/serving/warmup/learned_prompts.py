"""What use has taught: the prefixes worth most are written beside the disk tier, for the next start to warm."""

import logging
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from emberkv.core.analytics.popularity import PrefixPopularity, full_tokens
from emberkv.core.hashing import BlockHash, Chain, decode_tokens
from emberkv.errors import EmberError, PrefixFileError
from emberkv.serving.metrics.request_metrics import Clock
from emberkv.serving.warmup.prefix_file import FILE_NAMES, prefix_file, read_prefixes, write_prefixes
from emberkv.serving.warmup.warm_prompt import WarmPrompt
from emberkv.tiers.base import Removed
from emberkv.whole_file import remove_leftovers

SAVE_SECONDS = 300.0
MAX_PREFIXES = 1000
LEAST_SCORE = 0.1
"""What one reuse counts for after a little more than three days."""

_log = logging.getLogger(__name__)


class LearnedPrompts:
    """Counts reuse, and keeps the result in a file. For any number of threads.

    folder: where the file goes. namespace: the model's, by which its prefixes are told from others'. chain: a prompt's
    blocks as its tenant's requests name them; raises EmberError for an unknown tenant. clock: seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        namespace: bytes,
        chain: Callable[[WarmPrompt], Chain],
        *,
        popularity: PrefixPopularity | None = None,
        save_seconds: float = SAVE_SECONDS,
        clock: Clock = time.time,
    ) -> None:
        remove_leftovers(folder, FILE_NAMES)
        self._path = prefix_file(folder, namespace)
        self._namespace = namespace
        self._chain = chain
        self._popularity = popularity if popularity is not None else PrefixPopularity()
        self._save_seconds = save_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = False
        self._saved_at = clock()
        self._restoring = threading.Lock()
        self._restored: list[tuple[WarmPrompt, Chain]] | None = None

    def used(self, chain: Chain, hit_tokens: int) -> None:
        """A request has reused the first ``hit_tokens`` of ``chain``."""
        if hit_tokens:
            with self._lock:
                self._popularity.used(chain, hit_tokens, self._clock())
                self._changed = True

    def restore(self) -> list[WarmPrompt]:
        """The prompts in the file, the best first, which are counted on from there. An unusable file is passed over.

        Left out are prefixes whose block hash is another now: those of tenants that have gone, or have another salt;
        and what `forget` has named. Further calls return the same.
        """
        with self._restoring:
            if self._restored is None:
                self._restored = self._read()
            return [prompt for prompt, _ in self._restored]

    def _read(self) -> list[tuple[WarmPrompt, Chain]]:
        try:
            prefixes, saved_at = read_prefixes(self._path, namespace=self._namespace)
        except PrefixFileError as error:
            _log.warning("learned prompts are not restored: %s", error)
            return []
        found, chains = [], []
        for prefix, tokens in zip(prefixes, full_tokens(prefixes), strict=True):
            prompt = WarmPrompt(decode_tokens(tokens), prefix.owner)
            chain = self._chain_of(prompt, prefix.block_hash)
            chains.append(chain)
            if chain is not None:
                found.append((prompt, chain))
        with self._lock:
            self._popularity.restore(prefixes, chains, saved_at)
        return found

    def forget(self, block_hashes: Collection[BlockHash] | None) -> Removed:
        """Drop the prefixes with these blocks, all for None, here and in the file."""
        self.restore()
        with self._restoring:
            self._restored = [
                (prompt, chain)
                for prompt, chain in self._restored or ()
                if block_hashes is not None and not any(each in block_hashes for each in chain.block_hashes)
            ]
        with self._lock:
            count = self._popularity.forget(block_hashes)
            self._changed = self._changed or count > 0 or block_hashes is None
        failure = self.save()
        return Removed(0, count, failure) if failure else Removed(count)

    def save_when_due(self) -> float:
        """Save if it is time to; the seconds until it will be again."""
        due_in = self._saved_at + self._save_seconds - self._clock()
        if due_in > 0:
            return due_in
        self.save()
        return self._save_seconds

    def save(self) -> str:
        """Write the file, unless nothing is new, or delete it where there is nothing to write. A failure is logged, as
        the server's work does not depend on it, and returned; "" otherwise.
        """
        now = self._clock()
        self._saved_at = now
        with self._lock:
            if not self._changed:
                return ""
            best = self._popularity.best(now, least_score=LEAST_SCORE)[:MAX_PREFIXES]
            self._changed = False
        try:
            if best:
                write_prefixes(self._path, best, namespace=self._namespace, saved_at=now)
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("learned prompts are not saved: %s: %s", self._path, error.strerror)
            self._changed = True  # so that they are the next time
            return error.strerror or type(error).__name__
        return ""

    def _chain_of(self, prompt: WarmPrompt, block_hash: BlockHash) -> Chain | None:
        try:
            chain = self._chain(prompt)
        except EmberError:  # a tenant that has gone
            return None
        return chain if chain.block_hashes and chain.block_hashes[-1] == block_hash else None

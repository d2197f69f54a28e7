"""The core alone, without an engine: hash, match, pin, allocate, commit and free a long prompt.

    python -m benchmarks.core [--policy lru] [--repeats 7] [--out PREFIX]

Exits with 1 when a target is missed.
"""

import random
import sys
import time
from array import array

from benchmarks import arguments, report
from benchmarks.figures import Comparison, Figure, Row

from emberkv.core.block_pool import BlockPool
from emberkv.core.hashing import TokenChain, root_hash
from emberkv.core.policies.eviction import POLICY_NAMES, make_policy
from emberkv.core.prefix_cache import PrefixCache

BLOCK_SIZE = 16
CHUNK = 256
VOCABULARY = 50_000
LENGTHS = (32 * 1024, 64 * 1024, 128 * 1024, 256 * 1024)
TARGETS_MS = {"hot": 15.0, "cold, blank pool": 40.0, "cold, full pool": 40.0}
TARGET_LENGTH = 128 * 1024
ROOT = root_hash("none", BLOCK_SIZE)


def pass_through(cache: PrefixCache, tokens: "array[int]") -> tuple[float, int]:
    """A prompt's whole way through the core: milliseconds, and how many of its tokens were found."""
    begin = time.perf_counter()
    chain = TokenChain(ROOT, tokens, BLOCK_SIZE)
    lease = cache.acquire(chain)
    lease.extend(len(chain))
    for stop in range(lease.hit_tokens + CHUNK, len(chain) + 1, CHUNK):
        lease.commit_prefilled(stop)
    lease.release()
    return 1e3 * (time.perf_counter() - begin), lease.hit_tokens


def one_round(policy: str, length: int, rng: random.Random) -> dict[str, float]:
    """Milliseconds of each case, in a pool that the prompt just fills."""
    first, second = (array("i", rng.choices(range(VOCABULARY), k=length)) for _ in range(2))
    pool = BlockPool(length // BLOCK_SIZE, BLOCK_SIZE, policy=make_policy(policy))
    cache = PrefixCache(pool, alignment=CHUNK)
    runs = {
        "cold, blank pool": pass_through(cache, first),
        "hot": pass_through(cache, first),
        "cold, full pool": pass_through(cache, second),
    }
    assert {case: found for case, (_, found) in runs.items()} == {
        "cold, blank pool": 0,
        "hot": length - CHUNK,
        "cold, full pool": 0,
    }
    pool.check_integrity([])
    return {case: elapsed for case, (elapsed, _) in runs.items()}


def measure(policy: str, repeats: int, rng: random.Random) -> list[Row]:
    """Milliseconds of each case and length, and how the time grows with the length."""
    rounds = {length: [one_round(policy, length, rng) for _ in range(repeats)] for length in LENGTHS}
    rows: list[Row] = []
    for case, target in TARGETS_MS.items():
        times = {length: [each[case] for each in rounds[length]] for length in LENGTHS}
        for length, values in times.items():
            bound = target if length == TARGET_LENGTH else None
            rows.append(Figure(f"{case}, {length:,} tokens", "ms", values, bound))
        shortest, longest = (
            [1e6 * value / length for value in times[length]] for length in (min(LENGTHS), max(LENGTHS))
        )
        name = f"{case}, time a token"
        rows.append(Comparison(name, "ns", f"{max(LENGTHS):,}", longest, f"{min(LENGTHS):,}", shortest))
    return rows


def main() -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("--policy", choices=POLICY_NAMES, default="lru")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    about = report.about("benchmarks.core", __doc__, policy=given.policy, repeats=given.repeats, seed=given.seed)
    return report.publish(measure(given.policy, given.repeats, random.Random(given.seed)), about, given.out)


if __name__ == "__main__":
    sys.exit(main())

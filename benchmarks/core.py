"""The core alone, without an engine: hash, match, pin, allocate, commit and free a long prompt.

    python -m benchmarks.core [--policy lru] [--repeats 7] [--json FILE]

Milliseconds are medians over repeats. Exits with 1 when a target is missed.
"""

import argparse
import json
import random
import statistics
import sys
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import lib

from emberkv.core.block_pool import BlockPool
from emberkv.core.eviction import POLICY_NAMES, make_policy
from emberkv.core.hashing import TokenChain, root_identity
from emberkv.core.prefix_cache import PrefixCache

BLOCK_SIZE = 16
CHUNK = 256
VOCABULARY = 50_000
LENGTHS = (32 * 1024, 64 * 1024, 128 * 1024, 256 * 1024)
TARGETS_MS = {"hot": 15.0, "cold, blank pool": 40.0, "cold, full pool": 40.0}
TARGET_LENGTH = 128 * 1024
ROOT = root_identity(fingerprint="none", dtype="none", layout="none", block_size=BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class Timing:
    """One case at one length, in tokens; target: milliseconds, where there is one."""

    case: str
    tokens: int
    median_ms: float
    lowest_ms: float
    highest_ms: float
    target_ms: float | None

    @property
    def met(self) -> bool:
        return self.target_ms is None or self.median_ms <= self.target_ms

    def row(self) -> str:
        target = "" if self.target_ms is None else f"<= {self.target_ms:g} ({'met' if self.met else 'missed'})"
        spread = f"{self.median_ms:.1f} ({self.lowest_ms:.1f} to {self.highest_ms:.1f})"
        return f"| {self.case} | {self.tokens} | {spread} | {1e6 * self.median_ms / self.tokens:.0f} | {target} |"


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


def measure(policy: str, length: int, repeats: int, rng: random.Random) -> list[Timing]:
    rounds = [one_round(policy, length, rng) for _ in range(repeats)]
    timings = []
    for case, target in TARGETS_MS.items():
        values = [each[case] for each in rounds]
        bound = target if length == TARGET_LENGTH else None
        timings.append(Timing(case, length, statistics.median(values), min(values), max(values), bound))
    return timings


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the core on long prompts.")
    parser.add_argument("--policy", choices=POLICY_NAMES, default="lru")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    about = {"machine": lib.machine(), "policy": options.policy, "repeats": options.repeats, "seed": options.seed}
    rng = random.Random(options.seed)
    timings = [timing for length in LENGTHS for timing in measure(options.policy, length, options.repeats, rng)]
    print(json.dumps(about, indent=1))
    print("\n| case | tokens | ms: median (lowest to highest) | ns a token | target |\n|---|---|---|---|---|")
    print("\n".join(timing.row() for timing in sorted(timings, key=lambda each: (each.case, each.tokens))))
    if options.json:
        result = about | {"timings": [asdict(timing) | {"met": timing.met} for timing in timings]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(timing.met for timing in timings) else 1


if __name__ == "__main__":
    sys.exit(main())

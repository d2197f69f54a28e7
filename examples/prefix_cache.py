"""The core alone, without a model: two prompts with the same beginning share its blocks.

python examples/prefix_cache.py
"""

from emberkv.core.block_pool import BlockPool
from emberkv.core.hashing import TokenChain, root_hash
from emberkv.core.prefix_cache import PrefixCache

BLOCK_SIZE = 16
pool = BlockPool(num_blocks=256, block_size=BLOCK_SIZE)
cache = PrefixCache(pool, alignment=BLOCK_SIZE, batch_invariant=True)  # hits end at any token


def serve(prompt: list[int]) -> int:
    """Compute what is not cached of a prompt; returns how many of its tokens were."""
    chain = TokenChain(root_hash("a model's fingerprint", BLOCK_SIZE), prompt, BLOCK_SIZE)
    lease = cache.acquire(chain)  # matches the longest cached prefix and pins its blocks
    lease.extend(len(prompt))  # allocates blocks for the rest
    # Here an engine computes the KV state of prompt[lease.hit_tokens:] into lease.blocks.
    lease.commit_prefilled(len(prompt))  # full blocks are visible under their hashes from now on
    lease.release()  # free, and still cached until their places are needed
    return lease.hit_tokens


system = list(range(1000))
for question in ([1], [2, 3], [4] * 100):
    print(f"{serve(system + question):4} of {len(system + question)} tokens cached")

"""Defaults that a server and an engine without one have in common."""

from pathlib import Path

DEFAULT_BLOCK_SIZE = 16
"""Tokens in a block of the KV cache."""

DEFAULT_PREFILL_CHUNK = 128
"""The smallest chunk that reached 90% of the best prefill rate where it was measured; see docs/benchmarks.md."""


def machine_cache_folder() -> Path:
    """The user's folder for compiled kernels, which only this machine's processor can use."""
    return Path("~/.cache/emberkv").expanduser()


def state_folder() -> Path:
    """The user's folder for what emberkv remembers of the clusters that it has started."""
    return Path("~/.local/state/emberkv").expanduser()

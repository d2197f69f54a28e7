"""emberkv keeps the attention state of every prompt warm, and proves that what it reuses is right."""

from emberkv.tiers.byte_cache import InMemoryKVCacheManager

__all__ = ["InMemoryKVCacheManager", "__version__"]

__version__ = "0.1.0"

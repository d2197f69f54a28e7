"""What the byte cache takes as a key and as a value."""

from emberkv.errors import EntryError, EntryTypeError

MAX_KEY_BYTES = 10 * 1024
"""In UTF-8."""


def key_size_of(key: str) -> int:
    """Bytes of ``key`` in UTF-8. Raises EntryError and EntryTypeError as `InMemoryKVCacheManager.set` says."""
    if not key:
        raise EntryError(f"key is {key!r}; it cannot be None or empty")
    if not isinstance(key, str):
        raise EntryTypeError(f"key is of type {type(key).__name__}; it must be str")
    try:
        size = len(key) if key.isascii() else len(key.encode())
    except UnicodeEncodeError as error:
        raise EntryError(f"key has a lone surrogate at {error.start}; it must be Unicode text") from error
    if size > MAX_KEY_BYTES:
        raise EntryError(f"key of {size:,} UTF-8 bytes exceeds maximum of {MAX_KEY_BYTES:,} (10KB)")
    return size


def check_value(value: bytes) -> None:
    """Raises EntryError and EntryTypeError as `InMemoryKVCacheManager.set` says."""
    if value is None:
        raise EntryError("value is None; it must be bytes, of which none are fine")
    if not isinstance(value, bytes):
        raise EntryTypeError(f"value is of type {type(value).__name__}; it must be bytes")

"""The ring: keys and members on one circle, so that a member that comes or goes moves only its own share of the keys.

Consistent hashing (Karger et al., STOC 1997) with several points a member, which even out the shares.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from hashlib import sha256

from emberkv.errors import ConfigError

POINTS = 256
"""Places of a member by default; shares then differ by some 6%."""


def _place(name: bytes) -> int:
    return int.from_bytes(sha256(b"emberkv-ring-1" + name).digest()[:8], "big")


class HashRing:
    """Members by name; a key belongs to the first member after its place, and then to the others in turn.

    points: places a member has. Raises ConfigError for no members, or a name that comes twice.

    >>> ring = HashRing(["x", "y", "z"])
    >>> list(ring.order(b"a session")) == list(HashRing(["x", "y", "z"]).order(b"a session"))
    True
    >>> sorted(ring.order(b"a session"))
    [0, 1, 2]
    """

    def __init__(self, members: Sequence[str], *, points: int = POINTS) -> None:
        if not members or len(set(members)) < len(members) or points < 1:
            raise ConfigError(f"a ring of {len(members)} members with {points} points each; names must differ")
        placed = sorted(
            (_place(f"{point}/{name}".encode()), index) for index, name in enumerate(members) for point in range(points)
        )
        self._places = [place for place, _ in placed]
        self._owners = [index for _, index in placed]
        self._size = len(members)

    def order(self, key: bytes) -> Iterator[int]:
        """All members by their index, beginning with the one that ``key`` belongs to."""
        first = bisect_right(self._places, _place(b"key/" + key))
        seen: set[int] = set()
        for step in range(len(self._owners)):
            owner = self._owners[(first + step) % len(self._owners)]
            if owner not in seen:
                seen.add(owner)
                yield owner
                if len(seen) == self._size:
                    return

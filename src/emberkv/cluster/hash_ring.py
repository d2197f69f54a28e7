"""Consistent hashing with virtual nodes: a member that joins or leaves moves only its own share of the keys.

Karger et al., STOC 1997. Members are placed by their names, so every process that knows the names has the same ring.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from hashlib import sha256

from emberkv.errors import ConfigError

VIRTUAL_NODES = 256
"""Places of a member on the ring; the members' shares then differ by about 6% (standard deviation)."""


def _place(name: bytes) -> int:
    return int.from_bytes(sha256(b"emberkv-ring-1" + name).digest()[:8], "big")


class HashRing:
    """Members by name, each with a number of the caller's. A key belongs to the first member after its place on the
    ring, and then to the others in turn.

    names: the first members, numbered from 0. virtual_nodes: places of each member. Raises ConfigError for a name that
    comes twice, and for fewer than 1 virtual node.

    >>> ring = HashRing(["x", "y", "z"])
    >>> list(ring.order(b"a session")) == list(HashRing(["x", "y", "z"]).order(b"a session"))
    True
    >>> sorted(ring.order(b"a session"))
    [0, 1, 2]
    """

    def __init__(self, names: Sequence[str] = (), *, virtual_nodes: int = VIRTUAL_NODES) -> None:
        if virtual_nodes < 1:
            raise ConfigError(f"virtual_nodes is {virtual_nodes}; it must be at least 1")
        self._virtual_nodes = virtual_nodes
        self._members: dict[str, int] = {}
        self._placed: list[tuple[int, int]] = []  # virtual nodes: places with the numbers of their members
        self._places: list[int] = []
        self._owners: list[int] = []
        for number, name in enumerate(names):
            self.join(name, number)

    def __len__(self) -> int:
        return len(self._members)

    def join(self, name: str, number: int) -> None:
        """Add a member. Raises ConfigError where one of that name or number is on the ring."""
        if name in self._members or number in self._members.values():
            raise ConfigError(f"a member named {name!r} with number {number}; both must differ from all others'")
        self._members[name] = number
        self._placed += [(_place(f"{node}/{name}".encode()), number) for node in range(self._virtual_nodes)]
        self._places = []

    def leave(self, name: str) -> None:
        """Take a member off; its keys go to the members that are next for them."""
        number = self._members.pop(name)
        self._placed = [each for each in self._placed if each[1] != number]
        self._places = []

    def order(self, key: bytes) -> Iterator[int]:
        """The numbers of all members, beginning with the one that ``key`` belongs to."""
        if not self._places:
            self._sort()
        first = bisect_right(self._places, _place(b"key/" + key))
        owners, size = self._owners, len(self._members)
        seen: set[int] = set()
        for step in range(len(owners)):
            owner = owners[(first + step) % len(owners)]
            if owner not in seen:
                seen.add(owner)
                yield owner
                if len(seen) == size:
                    return

    def _sort(self) -> None:
        """Put the virtual nodes in order, once after members have joined or left."""
        self._placed.sort()
        self._places = [place for place, _ in self._placed]
        self._owners = [number for _, number in self._placed]

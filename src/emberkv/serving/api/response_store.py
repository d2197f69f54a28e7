"""Stored responses, which clients retrieve or continue by ``previous_response_id``, bounded for each tenant."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from emberkv.serving.api.validation import Json


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the conversation up to its end.

    response: the JSON that was sent. conversation: the input items, including those of earlier responses, followed by
    the output items. input_items: how many of them are input. size: bytes of everything as JSON.
    """

    response: Mapping[str, Any]
    conversation: Sequence[Json]
    input_items: int
    size: int


@dataclass(slots=True)
class _Tenant:
    """ids: of the tenant's responses, the least recently used first. size: bytes of all of them."""

    ids: OrderedDict[str, None] = field(default_factory=OrderedDict)
    size: int = 0


class ResponseStore:
    """The responses that were used last, until they have not been used for ``seconds``.

    most, most_bytes: bounds of each tenant's. total_bytes: of all tenants' together. Each response counts with the size
    of its whole conversation, although conversations share items. Methods may be called from any thread. clock:
    monotonic seconds.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        most: int = 1000,
        most_bytes: int = 64 * 2**20,
        total_bytes: int = 512 * 2**20,
        seconds: float = 24 * 3600.0,
    ) -> None:
        self._clock = clock
        self._most = most
        self._most_bytes = min(most_bytes, total_bytes)
        self._total_bytes = total_bytes
        self._seconds = seconds
        self._size = 0
        self._stored: OrderedDict[tuple[str, str], tuple[StoredResponse, float]] = OrderedDict()
        """By tenant and id, the least recently used first, with the time of the last use."""
        self._tenants: dict[str, _Tenant] = {}
        self._changing = Lock()

    def put(self, tenant: str, response_id: str, stored: StoredResponse) -> None:
        """Store a response, and evict the least recently used ones until the bounds hold.

        A response that is larger than a tenant's bound is not stored and evicts nothing.
        """
        if stored.size > self._most_bytes:
            return
        with self._changing:
            self._expire()
            self._remove(tenant, response_id)
            own = self._tenants.setdefault(tenant, _Tenant())
            own.ids[response_id] = None
            self._stored[tenant, response_id] = stored, self._clock()
            own.size += stored.size
            self._size += stored.size
            while len(own.ids) > self._most or own.size > self._most_bytes:
                self._remove(tenant, next(iter(own.ids)))
            while self._size > self._total_bytes:
                self._remove(*next(iter(self._stored)))

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """The response, which becomes the most recently used one, or None if it is not stored."""
        with self._changing:
            self._expire()
            found = self._stored.get((tenant, response_id))
            if found is None:
                return None
            self._stored[tenant, response_id] = found[0], self._clock()
            self._stored.move_to_end((tenant, response_id))
            self._tenants[tenant].ids.move_to_end(response_id)
            return found[0]

    def delete(self, tenant: str, response_id: str) -> bool:
        """Delete a response. Returns whether it was stored."""
        with self._changing:
            return self._remove(tenant, response_id)

    def _remove(self, tenant: str, response_id: str) -> bool:
        found = self._stored.pop((tenant, response_id), None)
        if found is None:
            return False
        own = self._tenants[tenant]
        del own.ids[response_id]
        own.size -= found[0].size
        self._size -= found[0].size
        if not own.ids:
            del self._tenants[tenant]
        return True

    def _expire(self) -> None:
        before = self._clock() - self._seconds
        while self._stored:
            key, (_, used) = next(iter(self._stored.items()))
            if used >= before:
                break
            self._remove(*key)

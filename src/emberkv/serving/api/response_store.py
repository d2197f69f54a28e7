"""Stored responses, which clients retrieve or continue by ``previous_response_id``, bounded for each tenant."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from emberkv.serving.api.validation import Json


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the conversation up to its end.

    response: the JSON that was sent. conversation: the input items, including those of earlier responses, followed by
    the output items. input_items: how many of them are input. size: bytes of everything as JSON. stored: when, in
    monotonic seconds.
    """

    response: Mapping[str, Any]
    conversation: Sequence[Json]
    input_items: int
    size: int
    stored: float


class ResponseStore:
    """The last responses of each tenant: at most ``most`` of them, of ``most_bytes`` together, for ``seconds``.

    Each response counts with the size of its whole conversation, although conversations share items. Methods may be
    called from any thread. clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        most: int = 1000,
        most_bytes: int = 64 * 2**20,
        seconds: float = 24 * 3600.0,
    ) -> None:
        self._clock = clock
        self._most = most
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._tenants: dict[str, OrderedDict[str, StoredResponse]] = {}
        self._changing = Lock()

    def put(self, tenant: str, response_id: str, stored: StoredResponse) -> None:
        """Store a response, and evict the least recently used ones until the bounds hold.

        A response that is larger than ``most_bytes`` is not stored and evicts nothing.
        """
        if stored.size > self._most_bytes:
            return
        with self._changing:
            kept = self._tenants.setdefault(tenant, OrderedDict())
            kept[response_id] = stored
            self._expire(kept)
            size = sum(each.size for each in kept.values())
            while kept and (len(kept) > self._most or size > self._most_bytes):
                size -= kept.popitem(last=False)[1].size

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """The response, which becomes the most recently used one, or None if it is not stored."""
        with self._changing:
            kept = self._tenants.get(tenant, OrderedDict())
            self._expire(kept)
            found = kept.get(response_id)
            if found is not None:
                kept.move_to_end(response_id)
            return found

    def delete(self, tenant: str, response_id: str) -> bool:
        """Delete a response. Returns whether it was stored."""
        with self._changing:
            return self._tenants.get(tenant, OrderedDict()).pop(response_id, None) is not None

    def _expire(self, kept: OrderedDict[str, StoredResponse]) -> None:
        before = self._clock() - self._seconds
        for response_id in [each for each, stored in kept.items() if stored.stored < before]:
            del kept[response_id]

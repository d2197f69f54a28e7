"""An HTTP request beside its prompts: who asks, under which id, in which session; and the last of them, by id."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from emberkv.serving.tenancy.tenants import Tenant

MAX_REMEMBERED = 2000


@dataclass(frozen=True, slots=True)
class Asked:
    """request_id: also its response's. http_id: of the HTTP request, as in ``X-Request-Id``. api: the metrics' label.

    arrived: when it came, by the app's clock. canonical: how many lines or tools each rule changed.
    """

    request_id: str
    api: str
    tenant: Tenant
    arrived: float
    session: str = ""
    canonical: Mapping[str, int] = field(default_factory=dict)
    http_id: str = ""

    def answer_id(self, index: int) -> str:
        """The engine's name for one of its answers."""
        return f"{self.request_id}.{index}" if index else self.request_id


class RecentlyAsked:
    """The last ``limit`` requests."""

    def __init__(self, limit: int = MAX_REMEMBERED) -> None:
        self._limit = limit
        self._asked: OrderedDict[str, Asked] = OrderedDict()

    def add(self, asked: Asked) -> None:
        self._asked[asked.request_id] = asked
        if len(self._asked) > self._limit:
            self._asked.popitem(last=False)

    def get(self, request_id: str) -> Asked | None:
        return self._asked.get(request_id)

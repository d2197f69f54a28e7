"""What the engine's thread tells of its cache, step by step, to whoever watches."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emberkv.core.events import EventLog, NumberedEvent
from emberkv.core.sequence import Sequence as Prompt

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheNews:
    """What a step changed.

    time: seconds since 1970. admitted: who was admitted for the first time; their ``admission`` and ``cached_tokens``
    are set, and they belong to the engine's thread. events: of the pool, in order; those that admissions caused are
    among them. missed: events before these are lost, so that only the pool's snapshot tells what is cached.
    """

    time: float
    admitted: Sequence[Prompt]
    events: Sequence[NumberedEvent]
    missed: bool = False


CacheObserver = Callable[[CacheNews], None]
"""Called on the engine's thread, after a step is planned and after it is done, where there is news; it must return at
once. Of a request's admission it is told before the request's first output, and before what the request commits.
"""


class NewsDesk:
    """Gathers news and tells it. admitted: who was admitted for the first time since the last telling."""

    def __init__(self, events: EventLog, wall_clock: Callable[[], float]) -> None:
        self.admitted: list[Prompt] = []
        self._events = events
        self._wall_clock = wall_clock
        self._observers: tuple[CacheObserver, ...] = ()
        self._changing = threading.Lock()  # of the observers, which any thread may add to
        self._told = events.last_sequence

    def add(self, observer: CacheObserver) -> None:
        """From any thread."""
        with self._changing:
            self._observers = (*self._observers, observer)

    def tell(self) -> None:
        """An observer that raises is not told again."""
        admitted, self.admitted = self.admitted, []
        events = self._events.since(self._told) if self._observers else ()
        self._told = self._events.last_sequence
        if not (admitted or events or events is None):
            return
        news = CacheNews(self._wall_clock(), admitted, events or (), missed=events is None)
        for observer in self._observers:
            try:
                observer(news)
            except Exception:  # noqa: BLE001 - logged; answers do not depend on who watches
                _log.exception("an observer of the cache failed and is not told again: %s", _name(observer))
                with self._changing:
                    self._observers = tuple(each for each in self._observers if each is not observer)


def _name(observer: CacheObserver) -> str:
    """Of its function or method, or else of its class."""
    return f"{observer.__module__}.{getattr(observer, '__qualname__', type(observer).__qualname__)}"

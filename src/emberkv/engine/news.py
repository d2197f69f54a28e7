"""What the engine's thread tells of its cache, step by step, to whoever watches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emberkv.core.events import NumberedEvent
from emberkv.core.sequence import Sequence as Prompt


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

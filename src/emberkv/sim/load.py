"""Whether a set-up keeps up with the requests that arrive, judged by those that wait when arrivals end."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from emberkv.sim.outcome import Status
from emberkv.sim.rows import Row
from emberkv.sim.timing import NANOSECONDS
from emberkv.sim.words import count_words, rate_words, share_words

FEWEST_WAITING = 10
WAITING_SHARE = 0.1
"""The queue grows if at least so many requests, and such a share of them, wait when the last conversation begins, and
half as many again as waited in the middle."""


@dataclass(frozen=True, slots=True)
class Load:
    """Requests a second that arrived and that got their first token, from the first arrival to the beginning of the
    last conversation. waiting: requests without a first token at that time. grows: whether the queue grows without
    end; least_replicas: the fewest that could then serve what arrives, if each serves as many as here.
    """

    asked_per_second: float
    served_per_second: float
    waiting: int
    grows: bool
    least_replicas: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def words(self) -> str:
        """One sentence."""
        rates = f"{rate_words(self.served_per_second)} of {rate_words(self.asked_per_second)} requests a second"
        if not self.grows:
            return f"This set-up serves what arrives, {rate_words(self.asked_per_second)} requests a second."
        least = f"{count_words(self.least_replicas, 'replica is', 'replicas are')} the least"
        return f"This set-up serves {rates}: the queue grows without end; {least}."


def load_of(rows: Iterable[Row], replicas: int) -> Load | None:
    """None where all requests arrive at once, or none could be served. Follow-ups wait for answers, so the time that
    counts ends with the last request that begins a conversation.
    """
    served = [row for row in rows if row.status is not Status.REJECTED]
    begun = [row.arrival for row in served if not row.conversational]
    if not begun or max(begun) == min(begun):
        return None
    first, last = min(begun), max(begun)
    arrived = [row for row in served if row.arrival <= last]
    waiting = [_waiting(arrived, at) for at in ((first + last) // 2, last)]
    seconds = (last - first) / NANOSECONDS
    started = len(arrived) - waiting[1]
    grows = waiting[1] >= max(FEWEST_WAITING, WAITING_SHARE * len(arrived), 1.5 * waiting[0])
    needed = ceil(replicas * len(arrived) / started) if started else 0
    least = max(needed, replicas + 1) if grows else replicas
    return Load(len(arrived) / seconds, started / seconds, waiting[1], grows, least)


def _waiting(rows: Iterable[Row], at: int) -> int:
    return sum(row.arrival <= at and (row.first_token is None or row.first_token > at) for row in rows)


def rejected_words(rejected: int, total: int) -> str:
    return (
        f"{count_words(rejected, 'request')} of {total:,} ({share_words(rejected / total)}) can never be served: their "
        "prompt and answer do not fit the KV memory of a replica."
    )

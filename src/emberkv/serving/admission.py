"""Which requests are accepted: a bound of what is in flight, and each tenant's own limits of rate and concurrency."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from emberkv.serving.errors import RateLimitedError, TooManyRequestsError

SECONDS_PER_MINUTE = 60.0


class ConcurrencyLimit:
    """Bounds the answers that are made or wait at the same time. most: of all tenants together; None: they are not
    bounded here.

    When there are as many, a tenant with less than its share is still served, so that one tenant's flood does not shut
    out the others. So there may be twice as many in all, at most. weights: of all tenants, by which ``most`` is shared
    out; without them, those that have answers in flight have equal shares.
    """

    def __init__(self, most: int | None, weights: Mapping[str, float] | None = None) -> None:
        self.most = most
        self._weights = weights or {}
        self._total_weight = sum(self._weights.values())
        self._by_tenant: Counter[str] = Counter()

    def enter(self, tenant: str, answers: int) -> None:
        """Raises TooManyRequestsError where there are too many; then none is counted."""
        if not self._has_room(tenant, answers):
            total = self._by_tenant.total()
            raise TooManyRequestsError(f"{total} answers are in flight, and no more are taken; send it again later")
        self._by_tenant[tenant] += answers

    def _has_room(self, tenant: str, answers: int) -> bool:
        total = self._by_tenant.total()
        if self.most is None or not total or total + answers <= self.most:
            return True
        if self._weights:
            share = self.most * self._weights.get(tenant, 0.0) / self._total_weight
        else:
            share = self.most // len({*self._by_tenant, tenant})
        return self._by_tenant[tenant] + answers - 1 < share

    def leave(self, tenant: str, answers: int) -> None:
        self._by_tenant[tenant] -= answers
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]


@dataclass(frozen=True, slots=True)
class RateLimits:
    """What one tenant may use; None: as much as there is. tokens_per_minute: of prompts, cached or not, and of answers.
    concurrency: answers at the same time.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrency: int | None = None

    def part(self, count: int) -> "RateLimits":
        """What each of ``count`` processes enforces, so that together they enforce no more than the whole; of
        concurrency, each allows at least one answer.

        >>> RateLimits(600, None, 5).part(2)
        RateLimits(requests_per_minute=300.0, tokens_per_minute=None, concurrency=2)
        """
        return RateLimits(
            self.requests_per_minute and self.requests_per_minute / count,
            self.tokens_per_minute and self.tokens_per_minute / count,
            self.concurrency and max(1, self.concurrency // count),
        )


class TokenBucket:
    """What is left of an allowance of ``per_minute``, which is refilled continuously up to one minute's allowance.

    More than is left may be taken; the level is negative then, and nothing is left until it was refilled to 1.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_second = per_minute / SECONDS_PER_MINUTE
        self._capacity = max(1.0, per_minute)
        self._level = self._capacity
        self._at = now

    def seconds_until_any(self, now: float) -> float:
        """Until at least 1 is left; 0 if it is now."""
        self._refill(now)
        return max(0.0, (1.0 - self._level) / self._per_second)

    def take(self, amount: float, now: float) -> None:
        self._refill(now)
        self._level -= amount

    def _refill(self, now: float) -> None:
        self._level = min(self._capacity, self._level + (now - self._at) * self._per_second)
        self._at = now


class _Tenant:
    def __init__(self, limits: RateLimits, now: float) -> None:
        self.concurrency = limits.concurrency
        self.in_flight = 0
        self.rates = {
            name: (per_minute, TokenBucket(per_minute, now))
            for name, per_minute in (("requests", limits.requests_per_minute), ("tokens", limits.tokens_per_minute))
            if per_minute is not None
        }


class TenantLimits:
    """Enforces the limits of tenants, by name; a tenant that is not in ``limits`` has none. It belongs to one event
    loop.

    A request counts once it is accepted. Its prompt is counted then, and its answer at its end, because its length is
    not known before: a tenant may exceed its tokens by what is in flight, and waits for so much longer after that.

    clock: monotonic seconds. on_refused: called with the tenant and "requests", "tokens" or "concurrency".
    """

    def __init__(
        self,
        limits: Mapping[str, RateLimits],
        clock: Callable[[], float],
        on_refused: Callable[[str, str], None] = lambda tenant, limit: None,
    ) -> None:
        self._clock = clock
        self._on_refused = on_refused
        self._tenants = {name: _Tenant(each, clock()) for name, each in limits.items() if each != RateLimits()}

    def enter(self, tenant: str, answers: int = 1) -> None:
        """Accept one request for so many answers. Raises RateLimitedError if a limit is reached; then it does not
        count.
        """
        found = self._tenants.get(tenant)
        if found is None:
            return
        now = self._clock()
        for name, (per_minute, bucket) in found.rates.items():
            if (seconds := bucket.seconds_until_any(now)) > 0:
                self._on_refused(tenant, name)
                text = f"the limit of {per_minute:g} {name} per minute is reached; send it again in {seconds:.1f} s"
                raise RateLimitedError(text, kind=name, retry_after=seconds)
        most = found.concurrency
        if most is not None and found.in_flight and found.in_flight + answers > most:
            self._on_refused(tenant, "concurrency")
            text = f"the limit of {most} answers at once is reached; send it again when one of them has ended"
            raise RateLimitedError(text, kind="requests", retry_after=1.0)
        found.in_flight += answers
        if "requests" in found.rates:
            found.rates["requests"][1].take(1, now)

    def count(self, tenant: str, tokens: int) -> None:
        """Count tokens of an accepted request's prompts or answers."""
        found = self._tenants.get(tenant)
        if found is not None and "tokens" in found.rates:
            found.rates["tokens"][1].take(tokens, self._clock())

    def leave(self, tenant: str, answers: int = 1) -> None:
        """An accepted request has ended."""
        found = self._tenants.get(tenant)
        if found is not None:
            found.in_flight -= answers

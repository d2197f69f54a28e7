"""Measured rates: how long an amount of work takes, learned from what such work took before."""

from emberkv.errors import ConfigError


class LatencyModel:
    """Time as a fixed latency plus a time per unit, fitted by least squares to recent work.

    The weight of an observation halves with every ``half_life`` later ones (exponentially weighted moments), so that
    the fit follows a machine whose speed changes. Amounts and times are in any units, the same throughout.
    """

    def __init__(self, half_life: float = 32.0) -> None:
        if half_life <= 0:
            raise ConfigError(f"half_life is {half_life}; it must be positive")
        self._decay = 0.5 ** (1.0 / half_life)
        self._weight = 0.0
        self._mean_amount = 0.0
        self._mean_seconds = 0.0
        self._variance = 0.0
        self._covariance = 0.0

    def observe(self, amount: float, seconds: float) -> None:
        """``amount`` of work took ``seconds``. Raises ConfigError for an amount not above 0 or a time below 0."""
        if not (amount > 0 and seconds >= 0):
            raise ConfigError(f"{amount} of work in {seconds} seconds; use an amount above 0 and a time of at least 0")
        self._weight = self._weight * self._decay + 1.0
        share = 1.0 / self._weight
        more, longer = amount - self._mean_amount, seconds - self._mean_seconds
        self._mean_amount += share * more
        self._mean_seconds += share * longer
        self._variance = (1.0 - share) * (self._variance + share * more * more)
        self._covariance = (1.0 - share) * (self._covariance + share * more * longer)

    def seconds_for(self, amount: float) -> float | None:
        """Expected time of ``amount`` of work; None before any was observed.

        Neither latency nor time per unit is taken to be negative: noise that says so is fitted by the other alone.
        """
        if not self._weight:
            return None
        through_origin = self._mean_seconds / self._mean_amount
        spread = self._variance > 1e-12 * self._mean_amount**2
        per_unit = max(0.0, self._covariance / self._variance) if spread else through_origin
        per_unit = min(per_unit, through_origin)
        latency = self._mean_seconds - per_unit * self._mean_amount
        return latency + per_unit * amount

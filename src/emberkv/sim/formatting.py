"""Formats sizes, times, shares and rates as text."""

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_size(size: int) -> str:
    """Bytes in the largest unit of which there is at least one, to three digits: 1.5 TiB, 55.4 GiB, 768 MiB."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.{0 if value >= 100 or value == int(value) else 1}f} {UNITS[unit]}"


def format_seconds(seconds: float) -> str:
    """Seconds in the unit that reads best, to three digits: 2.6 us, 45.6 ms, 12.3 s, 38 min, 5.2 h."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:,.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:,.0f} min"
    if seconds >= 99.95:
        return f"{seconds:.0f} s"
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= 0.9995 * factor:
            return f"{seconds / factor:,.3g} {unit}"
    return f"{seconds * 1e6:,.3g} us" if seconds else "0 s"


def format_share(share: float) -> str:
    """A share as percent; one that is not quite 0 or 1 is never shown as 0% or 100%."""
    if 0 < share < 0.0005:
        return "under 0.1%"
    if 0.9995 <= share < 1:
        return "over 99.9%"
    return f"{share:.1%}"


def format_rate(per_second: float) -> str:
    """A number of requests or tokens a second: 1,530, 3.4, 0.0521."""
    return f"{per_second:,.0f}" if per_second >= 1000 else f"{per_second:,.3g}"


def format_count(count: int, one: str, many: str | None = None) -> str:
    """``1 replica``, ``3 replicas``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def format_tier(tier: str) -> str:
    return tier.upper() if tier == "ram" else tier

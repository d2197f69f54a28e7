"""How many users and how much context fit into a machine's memory: from a model's bytes alone, without a workload."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import floor

from emberkv.errors import ConfigError

_MULTIPLES = {"k": 1_000, "m": 1_000_000, "ki": 1024, "mi": 1024**2}


def parse_tokens(text: str, option: str) -> int:
    """A number of tokens, with or without a multiple: "200000", "200k", "128Ki", "1M".

    option: what gave it, for the error. Raises ConfigError.

    >>> parse_tokens("200k", "--context"), parse_tokens("128Ki", "--context")
    (200000, 131072)
    """
    digits = text.strip().lower().rstrip("kmi")
    multiple = _MULTIPLES.get(text.strip().lower().removeprefix(digits), None if text.strip()[len(digits) :] else 1)
    try:
        tokens = floor(float(digits.replace(",", "").replace("_", "")) * (multiple or 0))
    except (ValueError, OverflowError):
        tokens = 0
    if multiple is None or tokens < 1:
        raise ConfigError(f"{option} is {text!r}; use a number of tokens such as 32768, 200k or 128Ki")
    return tokens


@dataclass(frozen=True, slots=True)
class Precision:
    """A choice of number types, with what the model takes in them.

    weights, kv: the types' names. weight_bytes: of all weights. kv_bytes_per_token: of one token's keys and values over
    all layers. options: of `emberkv serve`, that choose it; None: it is not served here.
    """

    weights: str
    kv: str
    weight_bytes: int
    kv_bytes_per_token: int
    options: str | None = ""


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked for: ``users`` at the same time, each with ``context`` tokens, of which the first ``shared`` are
    the same for all (a system prompt with its tools), so that their KV state is kept once.
    """

    context: int
    users: int = 1
    shared: int = 0

    def __post_init__(self) -> None:
        if self.shared > self.context:
            raise ConfigError(
                f"--shared is {self.shared:,} tokens; --context has {self.context:,}, so use at most that"
            )

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are in the pool.

        >>> Demand(context=200_000, users=5, shared=20_000).tokens
        920000
        """
        return self.shared + self.users * (self.context - self.shared)


@dataclass(frozen=True, slots=True)
class Fit:
    """What a precision makes of a demand in ``memory`` bytes.

    users: how many fit at the context asked for. context: the longest one that fits for the users asked for.
    """

    precision: Precision
    kv_bytes: int
    total_bytes: int
    fits: bool
    users: int
    context: int


def fit(precision: Precision, demand: Demand, memory: int, longest: int = 0) -> Fit:
    """Compute what fits beside the weights in ``memory`` bytes. longest: the model's own context; 0: unknown.

    >>> eight_bits = Precision("int8", "bfloat16", weight_bytes=8 * 2**30, kv_bytes_per_token=2**17)
    >>> found = fit(eight_bits, Demand(context=32_768, users=4), memory=32 * 2**30)
    >>> found.fits, found.users, found.context
    (True, 6, 49152)
    """
    kv_bytes = demand.tokens * precision.kv_bytes_per_token
    total = precision.weight_bytes + kv_bytes
    tokens = max(0, memory - precision.weight_bytes) // max(1, precision.kv_bytes_per_token)
    own = demand.context - demand.shared
    users = max(0, tokens - demand.shared) // own if own else 0
    context = demand.shared + (tokens - demand.shared) // demand.users if tokens > demand.shared else tokens
    if own == 0 and tokens >= demand.shared:
        users = demand.users
    return Fit(precision, kv_bytes, total, total <= memory, users, min(context, longest) if longest else context)


def fits(precisions: Iterable[Precision], demand: Demand, memory: int, longest: int = 0) -> list[Fit]:
    """`fit` for each precision, in the order given: from the most precise to the smallest."""
    return [fit(each, demand, memory, longest) for each in precisions]

"""Whether two samples differ: the share of pairs in order, and how often chance gives as much."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from random import Random


def auc(first: Sequence[float], second: Sequence[float]) -> float:
    """The probability that a value of ``second`` is above one of ``first``, ties counting half; 0.5 is no difference.

    The area under the ROC curve of a classifier by threshold, which is the Mann-Whitney U statistic over the number
    of pairs (Mann and Whitney, 1947).
    """
    ordered = sorted(first)
    below = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in second)
    return below / (2 * len(first) * len(second))


def p_value(first: Sequence[float], second: Sequence[float], random: Random, *, rounds: int = 2000) -> float:
    """How probable an `auc` as far from 0.5 is if both samples are of one kind: a permutation test, two-sided.

    It assumes no distribution and is right with ties, unlike the normal approximation (Fisher, 1935).
    """
    pooled = [*first, *second]
    observed = abs(auc(first, second) - 0.5)
    as_far = 0
    for _ in range(rounds):
        random.shuffle(pooled)
        as_far += abs(auc(pooled[: len(first)], pooled[len(first) :]) - 0.5) >= observed
    return (as_far + 1) / (rounds + 1)

"""Error bars of counted fractions."""

from __future__ import annotations

import math

_Z95 = 1.959963984540054


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % confidence interval of a fraction (Wilson, JASA 1927).

    >>> low, high = wilson_interval(500, 1000)
    >>> round(low, 3), round(high, 3)
    (0.469, 0.531)

    Raises:
        ValueError: unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"expected 0 <= successes <= n and n > 0, got {successes} of {n}")
    fraction = successes / n
    scale = 1 + _Z95**2 / n
    centre = (fraction + _Z95**2 / (2 * n)) / scale
    spread = _Z95 / scale * math.sqrt(fraction * (1 - fraction) / n + _Z95**2 / (4 * n**2))
    low = 0.0 if successes == 0 else centre - spread
    high = 1.0 if successes == n else centre + spread
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: do two classifiers err equally often on the same images?

    Under that hypothesis each image on which just one of them is right is so with a fair coin (McNemar,
    Psychometrika 1947, with the binomial distribution itself in place of the normal one).

    Args:
        only_first: images on which only the first is right.
        only_second: images on which only the second is right.

    >>> mcnemar(5, 5), round(mcnemar(1, 9), 4)
    (1.0, 0.0215)

    Raises:
        ValueError: negative counts.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"expected counts of 0 or more, got {only_first} and {only_second}")
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return float(min(1.0, 2 * tail / 2**n))


def paired_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies on the same ``n`` images, first minus second, as fractions.

    The adjusted Wald interval of Bonett and Price (Journal of Educational and Behavioral Statistics 2012): one is added
    to each discordant count, so that agreement on all images does not give an interval of width 0.

    Raises:
        ValueError: counts that do not fit into ``n``.
    """
    if min(only_first, only_second) < 0 or only_first + only_second > n or n == 0:
        raise ValueError(f"expected counts of 0 or more, together at most n > 0, got {only_first}, {only_second}, {n}")
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    spread = _Z95 * math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    return first - second - spread, first - second + spread


def chance_doubt(accuracy: float, classes: int) -> str:
    """What a reader must ask where a network that should be trained is hardly better than chance; else nothing.

    Args:
        accuracy: clean accuracy.
        classes: K; chance is 1/K.
    """
    if accuracy >= min(1.5 / classes, 1 / classes + 0.1):
        return ""
    return (
        f"the clean accuracy is hardly above chance ({1 / classes:.1%} for {classes} classes): does this network take "
        "pixels in [0, 1], and are its classes in the order of the data's?"
    )

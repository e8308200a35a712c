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

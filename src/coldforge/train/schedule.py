"""Learning rate and eps as functions of the training step: pure, so that a resumed run continues exactly."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int, total: int, *, peak: float, warmup: float, schedule: Literal["cosine", "linear", "constant"]
) -> float:
    """Learning rate of step ``step`` (from 0) of ``total``: a linear rise over the first ``warmup`` part, then a fall
    to 0 (slow start, fast decay: Jeddi et al., arXiv 2012.13628).
    """
    position = (step + 0.5) / total
    if position < warmup:
        return peak * position / warmup
    rest = (position - warmup) / (1 - warmup)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * rest)) / 2
    return peak * (1 - rest) if schedule == "linear" else peak


def ramped_eps(step: int, total: int, *, eps: float, ramp: float) -> float:
    """eps of the inner attack at ``step``: a linear rise over the first ``ramp`` part of training, then ``eps``.

    Full eps from the first step on harms networks that start non-robust (arXiv 2509.23325).
    """
    position = (step + 1) / total
    return eps if position >= ramp else eps * position / ramp


def bits_now(step: int, total: int, *, final: int, ramp: float, first: int = 8) -> int:
    """Bits at ``step`` of a network that ends with ``final``: from ``first`` on, one less at a time, over the first
    ``ramp`` part of training. A network coarser than the one before starts close to it.

    >>> [bits_now(step, 10, final=4, ramp=0.5) for step in range(6)]
    [8, 8, 7, 6, 5, 4]
    >>> bits_now(9, 10, final=2, ramp=0.99)  # the last step is that of the network that is kept
    2
    """
    position = step / total
    if final >= first or position >= ramp or step + 1 >= total:
        return final
    return first - int((first - final) * position / ramp)

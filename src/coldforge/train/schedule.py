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

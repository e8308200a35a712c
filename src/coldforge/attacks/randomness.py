"""Random numbers that belong to one image: a function of (key, counter, lane), whatever its neighbours draw.

Counter-based, as in Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011, with the mixer of SplitMix64
(Steele, Lea, Flood, OOPSLA 2014). One call serves a whole tile of images that are at different steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def uniforms(keys: Tensor, counters: Tensor, lanes: int) -> Tensor:
    """Uniform numbers in [0, 1).

    Args:
        keys: one key an image, int64 (T,).
        counters: how often each was asked before, int64 (T,).
        lanes: numbers wanted for each.

    Returns:
        float32 (T, lanes), multiples of 2^-24.
    """
    lane = torch.arange(1, lanes + 1)
    state = _mix(_mix(keys) + counters * _GOLDEN)[:, None] + lane[None] * _GOLDEN
    return ((_mix(state) >> 40) & 0xFFFFFF).to(torch.float32) / 2**24


def signs(uniform: Tensor) -> Tensor:
    """-1 or 1 with equal chances, from uniform numbers."""
    return torch.where(uniform < 0.5, -1.0, 1.0)


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64, whose products wrap and whose shifts are made logical."""
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * _MIX1
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return state ^ ((state >> 31) & 0x1FFFFFFFF)

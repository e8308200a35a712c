"""Normalization as the first layer of a network, so that everything outside it speaks pixels in [0, 1]."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coldforge.errors import ModelError


class Normalize(nn.Module):
    """``(inputs - mean) / std`` per channel, for inputs (N, C, H, W) in [0, 1].

    Args:
        mean: per channel, in units of [0, 1].
        std: per channel, above 0, in units of [0, 1].

    Raises:
        ModelError: where the two differ in length, or a value is not finite, or a ``std`` is not above 0.
    """

    mean: Tensor
    """``float32`` (1, C, 1, 1)."""
    std: Tensor
    """``float32`` (1, C, 1, 1)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean:
            raise ModelError(
                f"normalization: expected one mean and one std per channel, got {len(mean)} means and {len(std)} stds"
            )
        if not all(math.isfinite(value) for value in (*mean, *std)) or min(std) <= 0:
            raise ModelError(
                f"normalization: expected finite means and stds above 0, got mean {list(mean)}, std {list(std)}; "
                "a channel that never changes has a std of 0 and says nothing"
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(1, -1, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to (N, C, H, W)."""
        return (inputs - self.mean) / self.std

    def extra_repr(self) -> str:
        """The values, for ``repr``."""
        mean, std = (", ".join(f"{v:.4g}" for v in buffer.flatten().tolist()) for buffer in (self.mean, self.std))
        return f"mean=({mean}), std=({std})"


def normalized(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
    """``network`` behind its normalization: a Sequential with the children ``normalize`` and ``network``.

    The network is not copied.
    """
    return nn.Sequential(OrderedDict[str, nn.Module](normalize=Normalize(mean, std), network=network))

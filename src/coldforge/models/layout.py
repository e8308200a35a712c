"""Memory layout: what CPU convolution kernels like best."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def channels_last(network: nn.Module) -> nn.Module:
    """Put the weights of ``network`` into channels-last layout, in place; values stay the same bits."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Inside, torch computes with so many threads; after, with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

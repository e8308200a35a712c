"""What a network costs on paper: parameters, multiply-adds, bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coldforge.errors import UsageError


def count_params(module: nn.Module) -> int:
    """Number of parameters, trainable and frozen, each once; buffers (BatchNorm statistics, masks) are none."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, image_shape: Sequence[int]) -> int:
    """Multiply-adds (1 MAC = one multiply and one add) of one image in eval mode.

    Counted at torch's dispatcher, so whatever the forward pass really computes with convolutions and matrix products
    is seen, at its real (pruned) shape; element-wise work such as BatchNorm and ReLU is not a MAC. The module is not
    touched: a copy of it runs.

    Args:
        module: a network that maps (1, C, H, W) float32 to logits.
        image_shape: (C, H, W).

    Raises:
        UsageError: where ``image_shape`` is not three positive numbers.
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or any(size < 1 for size in shape):
        raise UsageError(f"image_shape: expected (channels, height, width), got {shape}")
    network = copy.deepcopy(module).eval()
    tensor = next((item for item in (*network.parameters(), *network.buffers()) if item.is_floating_point()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    image = torch.full((1, *shape), 0.5, device=device)
    with torch.no_grad(), _seen_attention(), FlopCounterMode(display=False) as counter:
        network(image)
    return int(counter.get_total_flops()) // 2  # the counter calls a multiply-add two operations


@contextmanager
def _seen_attention() -> Iterator[None]:
    """Attention as the matrix products it consists of: its fused kernels are not counted."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def packed_bytes(tensors: Iterable[tuple[int, int]]) -> int:
    """Bytes of tensors stored back to back at their bit width, each tensor padded to a whole byte.

    Args:
        tensors: pairs (number of elements, bits of each); scales and biases are listed like any other tensor.

    >>> packed_bytes([(9, 4), (1, 32)])
    9
    """
    total = 0
    for numel, bits in tensors:
        if numel < 0 or bits < 1:
            raise UsageError(f"expected (elements >= 0, bits >= 1), got ({numel}, {bits})")
        total += -(-numel * bits // 8)
    return total

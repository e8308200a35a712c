"""Copies of a network that compute the same faster, for attacks to search on. What they find is verified elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.compress import QuantizedLayer, fold_batchnorm
from coldforge.errors import TraceError
from coldforge.models import channels_last

Precision = Literal["exact", "fp32", "bf16"]
"""How attacks search: on the network as it is; on a copy with BatchNorm folded; on that copy in bfloat16. Every success
on a copy is verified on the network itself in float32."""


def fast_copy(network: nn.Module, precision: Precision) -> nn.Module:
    """A copy that computes the same faster, to search on: BatchNorm folded where it can be, channels-last, and in
    bfloat16 if asked for.
    """
    try:
        has_norm = any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in network.modules())
        copied: nn.Module = fold_batchnorm(network) if has_norm else copy.deepcopy(network)
    except TraceError:
        copied = copy.deepcopy(network)
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    copied = channels_last(copied).eval()
    for layer in copied.modules():
        if isinstance(layer, nn.Conv2d | QuantizedLayer) and _reads_one_channel(layer):
            layer.forward = partial(_convolve, layer)
    return _Bfloat16(copied) if precision == "bf16" else copied


class _Bfloat16(nn.Module):
    """A network in bfloat16, its last linear layer in float32: steps of a loss are smaller than bfloat16 can tell."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        last = [m for m in network.modules() if _is_linear(m)][-1:]
        for layer in last:
            layer.forward = partial(_in_float32, layer.forward)

    def forward(self, images: Tensor) -> Tensor:
        """As the network."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits: Tensor = self.network(images)
        return logits.float()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, QuantizedLayer) and not module.is_conv)


def _in_float32(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return forward(inputs.float())


# --- the first convolution of grayscale images


class _GrayConvolution(torch.autograd.Function):
    """A convolution of stride 1 over one channel. Its gradient by the image is a product of matrices and a sum of
    shifted images: an eighth of an attack's time goes into the usual form of it, in which one channel fills no vector.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        result = F.conv2d(x, weight, bias, padding=padding)
        ctx.save_for_backward(weight)
        ctx.padding, ctx.size, ctx.kind = padding, x.shape, x.dtype
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weight,) = grads, ctx.saved_tensors
        count, outputs, rows, columns = grad.shape
        across, down = weight.shape[3], weight.shape[2]
        taps = weight.reshape(outputs, down * across).to(grad.dtype)
        parts = (grad.permute(0, 2, 3, 1).reshape(-1, outputs) @ taps).view(count, rows, columns, down * across)
        total = torch.zeros(count, rows + down - 1, columns + across - 1, dtype=torch.float32)
        for tap in range(down * across):
            i, j = divmod(tap, across)
            total[:, i : i + rows, j : j + columns] += parts[..., tap]
        above, left = ctx.padding
        image = total[:, above : above + ctx.size[2], left : left + ctx.size[3]]
        return image[:, None].to(ctx.kind), None, None, None


def _reads_one_channel(layer: nn.Conv2d | QuantizedLayer) -> bool:
    """Whether :class:`_GrayConvolution` is what this layer computes."""
    if isinstance(layer, QuantizedLayer) and not layer.is_conv:
        return False
    simple = (layer.stride, layer.dilation, layer.groups) == ((1, 1), (1, 1), 1)
    zeros = getattr(layer, "padding_mode", "zeros") == "zeros" and not isinstance(layer.padding, str)
    return simple and zeros and layer.weight.shape[1] == 1


def _convolve(layer: nn.Conv2d | QuantizedLayer, x: Tensor) -> Tensor:
    weight, bias = layer.rounded() if isinstance(layer, QuantizedLayer) else (layer.weight, layer.bias)
    result: Tensor = _GrayConvolution.apply(x, weight, bias, layer.padding)  # type: ignore[no-untyped-call]
    return result

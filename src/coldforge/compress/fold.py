"""BatchNorm behind quantized layers stays while a network is trained through its rounding, and is folded afterwards."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from coldforge.compress.fakequant import SMALLEST_STEP, QuantizedLayer
from coldforge.compress.graph import fold_into, followed, scale_and_shift

_LARGEST_BIAS = 2**23
"""In steps of the accumulator, which has 32 bits; and float32 holds no larger integers exactly."""
_LARGEST_WITHOUT_ZERO = 2**29
"""The same where weights have no code of 0: those of a channel that BatchNorm shuts stay at least a step, which must
then be next to nothing beside the bias."""


def round_shifts(network: fx.GraphModule) -> None:
    """Let BatchNorm behind quantized layers add what it will add as part of them, rounded as it will be; in place.

    In training, too, so that the network learns with it; there from the statistics that evaluation would use.
    """
    modules = dict(network.named_modules())
    for before, node in followed(network):
        layer, norm = modules[before.target], modules[node.target]
        if isinstance(layer, QuantizedLayer):
            norm.follows = [layer]  # in a list: a reference, not a child
            norm.register_forward_hook(_round_shift)


def fold_quantized(network: nn.Module) -> nn.Module:
    """A copy whose BatchNorm is part of the quantized layer before it: the same integers with other steps.

    Where BatchNorm multiplies a channel by s, its weights are on a grid whose step is the old one times |s|, and their
    codes change their sign with s; what it adds becomes the bias, which is on the accumulator's grid. This is why a
    network can keep its BatchNorm while it is trained through its rounding. In evaluation mode the copy computes the
    same. A network that is not quantized is returned as it is.

    Args:
        network: result of :func:`quantize` with ``keep_batchnorm``, perhaps trained since.
    """
    if not isinstance(network, fx.GraphModule):
        return network
    network = copy.deepcopy(network).eval()
    fold_into(network, _scaled)
    return network


@torch.no_grad()
def _scaled(layer: nn.Module, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module | None:
    if not isinstance(layer, QuantizedLayer):
        return None
    scale, step, bias = _affine(layer, norm)
    old = layer.weight_step.clamp_min(SMALLEST_STEP).view(-1, *[1] * (layer.weight.ndim - 1))
    scaled = layer.weight / old
    codes = layer.nearest_codes(scaled)
    borders = layer.nearest_codes(-scaled) != -codes  # such as 0 of one bit, whose code is 1 whatever its sign
    layer.weight.copy_(torch.where(borders, codes * old, layer.weight))
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.weight_step.copy_(step)
    layer.bias.copy_(bias)
    layer.bias.requires_grad_()
    return layer


def _affine(layer: QuantizedLayer, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
    """What BatchNorm, in evaluation mode, makes of a layer: scale of its weights, their step, bias; each ``(C,)``."""
    scale, shift = scale_and_shift(norm)
    bias = layer.quantized_bias() * scale + shift
    most = _LARGEST_BIAS if layer.has_zero else _LARGEST_WITHOUT_ZERO
    largest = layer.input_quantizer.step.clamp_min(SMALLEST_STEP) * most
    step = (layer.weight_step.clamp_min(SMALLEST_STEP) * scale.abs()).maximum(bias.abs() / largest)  # of shut channels
    return scale, step.clamp_min(SMALLEST_STEP), bias


@torch.no_grad()
def _round_shift(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """A hook of BatchNorm."""
    layer = norm.follows[0]  # type: ignore[index]
    assert isinstance(layer, QuantizedLayer)
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    _, step, bias = _affine(layer, norm)
    grid = step * layer.input_quantizer.step.clamp_min(SMALLEST_STEP)
    missing = torch.round(bias / grid) * grid - bias
    with torch.enable_grad():
        return output + missing.to(output.dtype).view(-1, *[1] * (output.ndim - 2))

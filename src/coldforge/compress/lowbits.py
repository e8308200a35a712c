"""Weights of one and two bits, whose codes leave no room for 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ODD_LIMIT = 4
"""Half a distance of codes beyond the outermost, 3."""


class _Binarize(torch.autograd.Function):
    """``step * sign(x)``, 1 where x is 0. The gradient passes straight through to x, and to the step as in LSQ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, grad_scale: float) -> Tensor:
        codes = sign_codes(x)
        ctx.grad_scale = grad_scale
        ctx.save_for_backward(codes, step)
        return codes * step.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        codes, step = ctx.saved_tensors
        total = (codes * grad).flatten(1).sum(1).float() * ctx.grad_scale
        return grad, total.view_as(step), None


class _RoundToOdd(torch.autograd.Function):
    """``step * code`` with the odd codes -3, -1, 1 and 3; gradients as in LSQ, clipped beyond -4 and 4."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, grad_scale: float) -> Tensor:
        scaled = x / step.to(x.dtype)
        codes = odd_codes(scaled)
        ctx.grad_scale = grad_scale
        ctx.save_for_backward(scaled, codes, step)
        return codes * step.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scaled, codes, step = ctx.saved_tensors
        inside = torch.where(scaled.abs() < _ODD_LIMIT, 1.0, 0.0).to(grad.dtype)
        slope = codes - scaled * inside
        total = (slope * grad).flatten(1).sum(1).float() * ctx.grad_scale
        return grad * inside, total.view_as(step), None


def binarize(x: Tensor, step: Tensor, *, grad_scale: float = 1.0) -> Tensor:
    """``step * sign(x)``: weights of one bit (Rastegari et al., *XNOR-Net*, ECCV 2016; here the step is learned).

    Args:
        x: weights, ``(C, ...)``.
        step: one for each row of x, broadcastable to it, positive.
        grad_scale: factor of the gradient of ``step``.
    """
    result: Tensor = _Binarize.apply(x, step, grad_scale)  # type: ignore[no-untyped-call]
    return result


def round_to_odd(x: Tensor, step: Tensor, *, grad_scale: float = 1.0) -> Tensor:
    """``step * code`` with the codes -3, -1, 1 and 3: weights of two bits that use all four of their values.

    A code of 0, with its counterpart missing, would leave three (ternary). Four equidistant levels around 0 are those
    of SAWB (Choi et al., *Accurate and Efficient 2-bit Quantized Neural Networks*, SysML 2019); here the step, half
    the distance of two levels, is learned as in LSQ.

    Args:
        x: weights, ``(C, ...)``.
        step: one for each row of x, broadcastable to it, positive.
        grad_scale: factor of the gradient of ``step``.
    """
    result: Tensor = _RoundToOdd.apply(x, step, grad_scale)  # type: ignore[no-untyped-call]
    return result


def sign_codes(scaled: Tensor) -> Tensor:
    """-1 below 0, otherwise 1; floating point like ``scaled``."""
    return torch.where(scaled < 0, -1.0, 1.0).to(scaled.dtype)


def odd_codes(scaled: Tensor) -> Tensor:
    """The nearest of -3, -1, 1 and 3; of two that are as near, the larger."""
    return torch.floor(scaled / 2).clamp_(-2, 1).mul_(2).add_(1)

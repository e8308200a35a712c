"""The arithmetic of fake quantization in one pass over memory: two small functions, compiled by torch.compile.

In plain PyTorch it takes several passes each way, each of which reads and writes a whole activation. The kernels
compute in float32 whatever the type of the activation, so the sum in a step's gradient is exact where that of bfloat16
is not.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from coldforge.provenance import cpp_compiler

_fused = False


@contextmanager
def fused(wanted: bool = True) -> Iterator[bool]:
    """Inside, the kernels are used, if they can be compiled here (some seconds, the first time on a machine).

    Yields:
        Whether they are used.
    """
    global _fused
    before = _fused
    _fused = wanted and _compiles()
    try:
        yield _fused
    finally:
        _fused = before


@functools.cache
def _compiles() -> bool:
    """Compile the kernels, for both types of activations."""
    if cpp_compiler() is None:
        return False
    step = torch.ones(())
    try:
        with torch.no_grad():
            for dtype in (torch.bfloat16, torch.float32):
                some = torch.linspace(-3, 3, 64, dtype=dtype)
                gradients(some, round_to_grid(some, step, 0.0, 2.0), step, 0.0, 2.0, -0.5, 2.5)
    except Exception as error:  # a compiler without headers, without OpenMP, without a folder to write to
        warnings.warn(f"fake quantization runs uncompiled, more slowly: {str(error).strip()[:200]}", stacklevel=2)
        return False
    return True


def is_fused() -> bool:
    """Whether the kernels are to be used now."""
    return _fused


def round_to_grid(x: Tensor, step: Tensor, low: float, high: float) -> Tensor:
    """``step * clamp(round(x / step), low, high)``, half to even, like ``x``.

    Args:
        x: any shape.
        step: shape ().
        low: smallest code less the code of 0.
        high: largest code less the code of 0.
    """
    with torch.no_grad():
        return _shaped(_compiled(_round)(_flat(x, x), step.detach(), *_borders(low, high)), x)


def gradients(
    grad: Tensor, x: Tensor, step: Tensor, low: float, high: float, first: float, last: float
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`round_to_grid`: by ``x``, straight through inside the range; by ``step``, as in LSQ.

    Args:
        grad: of the result.
        x: as given to it, like ``step``, ``low`` and ``high``.
        step: shape ().
        low: smallest code less the code of 0.
        high: largest code less the code of 0.
        first: ``x / step`` is inside the range above this, which may be less than ``low``,
        last: and below this.
    """
    with torch.no_grad():
        borders = _borders(low, high, first, last)
        grad_x, grad_step = _compiled(_gradients)(_flat(grad, x), _flat(x, x), step.detach(), *borders)
        return _shaped(grad_x, x), grad_step


@functools.cache
def _borders(*borders: float) -> tuple[Tensor, ...]:
    """As tensors: numbers would be compiled in, and torch gives up on a function after a few of them."""
    return tuple(map(torch.tensor, borders))


def _round(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (torch.round(x.float() / step).clamp(low, high) * step).to(x.dtype)


def _gradients(
    grad: Tensor, x: Tensor, step: Tensor, low: Tensor, high: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    scaled = x.float() / step
    inside = (scaled > first) & (scaled < last)
    codes = torch.round(scaled).clamp(low, high)
    slope = torch.where(inside, codes - scaled, codes)
    return torch.where(inside, grad, 0.0), (slope * grad.float()).sum()


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """All numbers in the order in which those of ``like`` lie in memory, so that one kernel serves all shapes.

    ``data`` forgets that it is a view: torch.compile would compile anew for each shape and stride of what it is a view
    of, and give up after eight of them. Whether a network is trained compiled must not depend on what came before it.
    """
    return (x.permute(0, 2, 3, 1).reshape(-1) if _is_channels_last(like) else x.reshape(-1)).data


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    if not _is_channels_last(like):
        return flat.view(like.shape)
    n, c, h, w = like.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)

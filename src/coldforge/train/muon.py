"""Muon: steps of SGD whose matrices are made orthogonal, so that every direction of a layer learns at the same pace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from the source below
_TINY = 1e-7
STRETCH = 0.1
"""Steps of quantizers move, in their logarithms, by this part of the learning rate."""
WIDE = 64
"""From this many rows and columns on, products of matrices in bfloat16 are faster where the processor knows it."""


def orthogonal(matrix: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nearly the orthogonal factor ``U V^T`` of ``matrix = U S V^T``, by Newton-Schulz iterations.

    Args:
        matrix: ``(R, C)``, of any size and scale.
        steps: iterations; after five, singular values that were within a factor of 100 lie between 0.6 and 1.3.
        dtype: of the iterations. They only have to bring singular values near 1, for which bfloat16 is enough, as in
            the source.

    Returns:
        ``(R, C)``, of the type of ``matrix``.

    Source: Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024,
    https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = (x / (x.norm() + _TINY)).to(dtype)
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


def macs_of_a_step(weights: Iterable[Tensor], *, steps: int = 5) -> int:
    """Multiply-adds with which a step of :class:`Muon` makes the gradients of what it turns orthogonal."""
    sides = [sorted((len(p), p[0].numel())) for p in weights]
    return sum(steps * (2 * short * short * long + short**3) for short, long in sides)


class Muon(torch.optim.SGD):
    """Muon for groups of weights that have ``"turns": True``, SGD for everything else but ``"stretches": True``.

    A step turns the weights of a layer, as a matrix ``(outputs, inputs)`` of whole filters, by the part ``lr`` of their
    norm, and keeps the norm: what follows a hidden layer (BatchNorm, or a scale learned elsewhere) does not need
    it, and steps relative to a norm that they let grow would grow with it. The source scales by the shape instead, and
    decays the weights; here weight decay counts for SGD alone.

    What stretches are positive numbers, the steps of quantizers: they move by factors, the logarithms of a tensor by
    ``STRETCH * lr`` in root mean square, as learned thresholds do in Jain et al., *Trained Quantization Thresholds*,
    MLSys 2020 (there by Adam). With plain SGD (LSQ) a small step next to a layer that turns is carried to either end of
    its range.

    Arguments as those of :class:`torch.optim.SGD`, and ``dtype``, in which matrices of at least ``WIDE`` rows and
    columns are made orthogonal.
    """

    def __init__(self, params: Any, *, dtype: torch.dtype = torch.float32, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Change the parameters. The gradient of what turns is used up, and None afterwards."""
        for group in self.param_groups:
            for weight in group["params"] if group.get("turns") else ():
                if weight.grad is not None:
                    self._turn(weight, lr=group["lr"], momentum=group["momentum"], nesterov=group["nesterov"])
            for size in group["params"] if group.get("stretches") else ():
                if size.grad is not None:
                    self._stretch(size, lr=group["lr"], momentum=group["momentum"])
        return super().step(closure)

    def _turn(self, weight: Tensor, *, lr: float, momentum: float, nesterov: bool) -> None:
        grad = weight.grad
        assert grad is not None
        average = self._average(weight, grad, momentum)
        direction = grad.add(average, alpha=momentum) if nesterov else average
        matrix = direction.flatten(1)
        turn = orthogonal(matrix, dtype=self._dtype if min(matrix.shape) >= WIDE else matrix.dtype).view_as(weight)
        norm = weight.norm()
        weight.sub_(turn * (lr * norm / (turn.norm() + _TINY)))
        weight.mul_(norm / (weight.norm() + _TINY))
        weight.grad = None  # SGD passes by what has no gradient

    def _stretch(self, size: Tensor, *, lr: float, momentum: float) -> None:
        assert size.grad is not None
        average = self._average(size, size.grad * size, momentum)  # the gradient by the logarithm
        largest = average.abs().amax().clamp_min(torch.finfo(average.dtype).tiny)
        direction = average / largest  # the squares of tiny gradients would be 0
        size.mul_(torch.exp(-STRETCH * lr * direction / (direction.square().mean().sqrt() + _TINY)))
        size.grad = None

    def _average(self, parameter: Tensor, grad: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum_buffer"].mul_(momentum).add_(grad)
        return average

"""BatchNorm over the whole batch, where each process holds a share of it.

With statistics of its share only, a process would train another network than one process with the whole batch does.
``torch.nn.SyncBatchNorm`` exists for accelerators only, so this is ours: each process sends count n, mean m and biased
variance v of its share, and from all of them follow, with N = sum n,

    mean = sum(n m) / N        var = sum(n (v + (m - mean)^2)) / N

(Chan, Golub, LeVeque 1979), which does not cancel as E[x^2] - E[x]^2 does. One message forward, one backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coldforge.errors import ModelError
from coldforge.train.world import World, answering


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient, because the loss is a sum over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        with answering():
            distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient.contiguous())


def _forward(self: _BatchNorm, x: Tensor) -> Tensor:
    if not self.training:
        return _BatchNorm.forward(self, x)
    with torch.autocast("cpu", enabled=False):
        values = x.float()
        dims = [dim for dim in range(x.ndim) if dim != 1]
        count = values.new_tensor([values.numel() / values.shape[1]])
        var, mean = torch.var_mean(values, dims, correction=0)
        rows = values.new_zeros(distributed.get_world_size(), 2 * len(mean) + 1)
        rows = rows.index_put((torch.tensor(distributed.get_rank()),), torch.cat([mean, var, count]))
        rows = _Sum.apply(rows)  # type: ignore[no-untyped-call]
        means, variances = rows[:, :-1].chunk(2, 1)
        counts = rows[:, -1:].detach()
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean) ** 2)).sum(0) / total
        _remember(self, mean.detach(), var.detach() * total / (total - 1))
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = (var + self.eps).rsqrt()
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        result: Tensor = (values * scale.view(shape) + shift.view(shape)).to(x.dtype)
        return result


@torch.no_grad()
def _remember(norm: _BatchNorm, mean: Tensor, unbiased: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked += 1
    momentum = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(unbiased, momentum)


_KINDS: dict[type, type] = {
    kind: type(f"Shared{kind.__name__}", (kind,), {"forward": _forward})
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}


@contextmanager
def whole_batch(network: nn.Module, world: World) -> Iterator[None]:
    """Inside, BatchNorm layers that train see the whole batch. For one process nothing changes.

    Raises:
        ModelError: a BatchNorm is of another kind than torch's own, so it is not known what it computes.
    """
    if world.size == 1:
        yield
        return
    norms = [(name, module) for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
    for name, norm in norms:
        if type(norm) not in _KINDS:
            raise ModelError(
                f"layer {name!r}: expected torch's own BatchNorm, or none, in a training on several processes, got "
                f"{type(norm).__name__}: its statistics would be those of a part of the batch. Train with devices = 1, "
                "or use nn.BatchNorm2d"
            )
    try:
        for _, norm in norms:
            norm.__class__ = _KINDS[type(norm)]
        yield
    finally:
        for _, norm in norms:
            norm.__class__ = type(norm).__mro__[1]

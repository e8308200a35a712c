"""What is done to weights besides the step of the optimizer: averaging, and adversarial perturbation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coldforge.compress import QuantizedLayer
from coldforge.train.world import World


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies outside the graph, by name."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


class Averaged:
    """An exponential moving average of everything a network learns, BatchNorm statistics and quantizer steps included.

    The decay is small at first, ``(1 + t) / (10 + t)`` after t steps, so that the start is forgotten (as TensorFlow's
    ``ExponentialMovingAverage`` has it).

    Args:
        network: what is averaged.
        decay: of the average, in one step.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._decay = decay
        self.state = copies(network.state_dict())

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move towards the weights of now; ``step`` counts from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        now = network.state_dict()
        floating = [name for name, tensor in now.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.state[name] for name in floating], [now[name] for name in floating], 1 - decay)
        for name, tensor in now.items():
            if not tensor.is_floating_point():
                self.state[name].copy_(tensor)


@contextmanager
def perturbed(network: nn.Module, gamma: float, world: World) -> Iterator[None]:
    """Inside, each layer's weights are moved by ``gamma`` times their norm along their gradient, summed over the
    processes of ``world``. The gradients are used up.

    Adversarial weight perturbation: Wu, Xia, Wang, NeurIPS 2020 (arXiv 2004.05884), eq. 10. Where weights are
    quantized, the rounded weights are moved, by a part of their own norm, not those behind the rounding, which could
    swallow the move or multiply it; their steps stay.
    Pruned channels are not there, so nothing can grow back. Statistics of BatchNorm do not count what is seen inside.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    layers = [module for module in network.modules() if isinstance(module, QuantizedLayer)]
    ours = {id(layer.weight): layer for layer in layers}
    graded = [(p, p.grad) for p in network.parameters() if p.grad is not None and p.ndim > 1]
    world.add_up([gradient for _, gradient in graded])
    network.zero_grad(set_to_none=True)
    moved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for weight, gradient in graded:
                computes = ours[id(weight)].quantized_weight() if id(weight) in ours else weight
                length = gamma * computes.norm() / gradient.norm().clamp_min(1e-12)
                offset = gradient * length
                if id(weight) in ours:
                    ours[id(weight)].offset = offset
                else:
                    moved.append((weight, weight.clone()))
                    weight.add_(offset)
        yield
    finally:
        with torch.no_grad():
            for tensor, before in [*moved, *statistics]:
                tensor.copy_(before)
        for layer in layers:
            layer.offset = None

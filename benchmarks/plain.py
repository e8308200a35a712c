"""Adversarial training and fake quantization as plain PyTorch has them: the peer that everybody writes first.

The training is that of the paper's code (arXiv 2403.09441), written anew and in pixel space: fp32, contiguous images,
and an attack that calls ``loss.backward()``, so that each of its steps computes the gradients of all weights, too.
Fake quantization is torch's own operators on a grid that stands still, as in torch.ao with frozen observers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.attacks import InnerAttack, ThreatModel
from coldforge.compress import ActivationQuantizer, QuantizedLayer
from coldforge.compress.graph import set_module


class PlainQuantizer(nn.Module):
    """An activation on the grid of one of our quantizers."""

    def __init__(self, ours: ActivationQuantizer) -> None:
        super().__init__()
        self.step, self.zero, self.qmax = float(ours.step.detach()), ours.zero, ours.qmax

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.step, self.zero, 0, self.qmax)


class PlainLayer(nn.Module):
    """A convolution or linear layer whose weight is on the grid of one of ours; the bias stays in float."""

    def __init__(self, ours: QuantizedLayer) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(tensor.detach().clone()) for tensor in (ours.weight, ours.bias))
        self.register_buffer("steps", ours.weight_step.detach().clone())
        self.register_buffer("zeros", torch.zeros(len(self.weight), dtype=torch.int32))
        self.qmax = ours.qmax
        self.geometry = (ours.stride, ours.padding, ours.dilation, ours.groups) if ours.is_conv else None

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.fake_quantize_per_channel_affine(self.weight, self.steps, self.zeros, 0, -self.qmax, self.qmax)
        return F.conv2d(x, weight, self.bias, *self.geometry) if self.geometry else F.linear(x, weight, self.bias)


def plain_quantized(twin: nn.Module) -> nn.Module:
    """A copy of a fake-quantized network of ours in which torch's own operators round, on the same grids."""
    network = copy.deepcopy(twin)
    for name, module in list(network.named_modules()):
        if isinstance(module, ActivationQuantizer):
            set_module(network, name, PlainQuantizer(module))
        elif isinstance(module, QuantizedLayer):
            set_module(network, name, PlainLayer(module))
    return network


def plain_attack(
    network: nn.Module, images: Tensor, labels: Tensor, attack: InnerAttack, threat_model: ThreatModel
) -> Tensor:
    """Adversarial images of one batch; the gradients that it leaves on the weights are to be thrown away."""
    eps, step_size = threat_model.eps, attack.pgd.step_size(threat_model)
    points = (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(attack.steps):
        points = points.detach().requires_grad_()
        F.cross_entropy(network(points), labels).backward()
        assert points.grad is not None
        moved = points.detach() + step_size * points.grad.sign()
        points = (images + (moved - images).clamp(-eps, eps)).clamp(0, 1)
    return points


def plain_train(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    attack: InnerAttack | None,
    threat_model: ThreatModel,
) -> None:
    """One step of the optimizer for each batch, on adversarial images where there is an ``attack``."""
    network.train()
    for images, labels in batches:
        shown = images if attack is None else plain_attack(network, images, labels, attack, threat_model)
        optimizer.zero_grad()
        F.cross_entropy(network(shown), labels).backward()
        optimizer.step()

"""How channels are ranked: one score for each output channel of a layer, high to keep.

L1 and L2 norms of the filters: Li et al., ICLR 2017. The scale of the BatchNorm behind a layer: Liu et al., *Network
slimming*, ICCV 2017 (here without its penalty). First-order Taylor: Molchanov et al., *Importance estimation for neural
network pruning*, CVPR 2019, eq. 8, for whole filters: the square of the sum of weight times gradient, averaged over
batches. Taken on adversarial images it ranks by what robust accuracy needs; HYDRA (Sehwag et al., NeurIPS 2020) and
HARP (Zhao and Wressnegger, ICLR 2023) learn scores on the same loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from coldforge.compress.dependency import is_filter_layer
from coldforge.compress.graph import trace
from coldforge.errors import ModelError

Importance = Callable[[nn.Module, str], Tensor]
"""Called with the dense network and the name of a layer; returns one score for each output channel, high to keep."""


def filters(layer: nn.Module, values: Tensor | None = None) -> Tensor:
    """The layer's weight, or ``values`` of its shape, as ``(output channels, the rest)``, in float64."""
    weight = layer.weight if values is None else values
    assert isinstance(weight, Tensor)
    turned = weight.detach().transpose(0, 1) if getattr(layer, "transposed", False) else weight.detach()
    return turned.flatten(1).double()


def norm(power: int) -> Importance:
    """Sum of the magnitudes of a filter's weights (1) or of their squares (2): scores of tied layers are added."""

    def score(model: nn.Module, name: str) -> Tensor:
        return filters(model.get_submodule(name)).abs().pow(power).sum(1)

    return score


def at_random(seed: int) -> Importance:
    """A control."""
    generator = torch.Generator().manual_seed(seed)

    def score(model: nn.Module, name: str) -> Tensor:
        return torch.rand(len(filters(model.get_submodule(name))), generator=generator)

    return score


def batchnorm_scale(model: nn.Module) -> Importance:
    """Magnitude of the factor by which the BatchNorm behind a layer multiplies each channel.

    Raises:
        ModelError: no layer has a BatchNorm behind it.
        TraceError: the network cannot be traced.
    """
    graph_module = trace(model)
    modules = dict(graph_module.named_modules())
    behind: dict[str, Tensor] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_module" or not isinstance(modules[str(node.target)], _BatchNorm):
            continue
        before = node.args[0]
        scale = modules[str(node.target)].weight
        if before.op == "call_module" and isinstance(scale, Tensor):
            behind[str(before.target)] = scale.detach().abs().double()
    if not behind:
        raise ModelError(
            'prune.importance = "batchnorm": expected a network with BatchNorm behind its layers, found none; take "l1"'
        )

    def score(model: nn.Module, name: str) -> Tensor:
        if name in behind:
            return behind[name]
        return torch.zeros(len(filters(model.get_submodule(name))), dtype=torch.float64)  # others of its group decide

    return score


def by_weights(model: nn.Module, kind: str, seed: int) -> Importance:
    """What the name of an importance means, as far as weights alone decide.

    Raises:
        ModelError: for those that need images.
    """
    if kind == "random":
        return at_random(seed)
    if kind == "batchnorm":
        return batchnorm_scale(model)
    if kind in ("l1", "l2"):
        return norm(1 if kind == "l1" else 2)
    raise ModelError(f"prune.importance = {kind!r} needs images: pass importance=taylor(model, batches)")


def taylor(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Importance:
    """How much the loss would change without a channel, to first order.

    Args:
        model: the dense network, in evaluation mode.
        batches: images ``(N, C, H, W)``, clean or adversarial, and labels ``(N,)``.
    """
    layers = {name: module for name, module in model.named_modules() if is_filter_layer(module)}
    weights = {name: layer.weight for name, layer in layers.items() if layer.weight.requires_grad}
    sums = {name: torch.zeros(len(filters(layers[name])), dtype=torch.float64) for name in weights}
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            if gradient is not None:
                sums[name] += filters(layers[name], weight.detach() * gradient).sum(1).square()

    def score(model: nn.Module, name: str) -> Tensor:
        return sums.get(name, torch.zeros(len(filters(model.get_submodule(name))), dtype=torch.float64))

    return score

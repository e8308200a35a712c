"""Who reads which value of a traced network: what must be on a grid before it is computed with."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from coldforge.models import Normalize

_TRANSPARENT_MODULES = (nn.Flatten, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d, nn.Identity)
_TRANSPARENT_FUNCTIONS = (torch.flatten, F.max_pool2d, F.dropout, torch.squeeze, torch.reshape)
_TRANSPARENT_METHODS = ("flatten", "view", "reshape", "contiguous", "squeeze")
_READS_MODULES = (nn.Conv2d, nn.Linear, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_READS_FUNCTIONS = (operator.add, operator.iadd, torch.add, torch.cat, torch.mean, F.avg_pool2d, F.adaptive_avg_pool2d)
_READS_METHODS = ("add", "add_", "mean")


def values_read(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The values that must be on a grid before ``node`` computes, traced back through what only moves them."""
    reads = (
        (node.op == "call_module" and isinstance(modules[str(node.target)], _READS_MODULES))
        or (node.op == "call_function" and node.target in _READS_FUNCTIONS)
        or (node.op == "call_method" and node.target in _READS_METHODS)
    )
    return [origin(value, modules) for value in node.all_input_nodes] if reads else []


def origin(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """What computed the value of ``node``, before what only moves values."""
    while (
        (node.op == "call_module" and isinstance(modules[str(node.target)], _TRANSPARENT_MODULES))
        or (node.op == "call_function" and node.target in _TRANSPARENT_FUNCTIONS)
        or (node.op == "call_method" and node.target in _TRANSPARENT_METHODS)
    ):
        node = node.all_input_nodes[0]
    return node


def is_image(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether this is the input image, normalized or not."""
    return node.op == "placeholder" or (
        node.op == "call_module" and isinstance(modules.get(str(node.target)), Normalize)
    )


def layers_of(network: fx.GraphModule) -> list[fx.Node]:
    """Every call of a convolution or linear layer, in order."""
    modules = dict(network.named_modules())
    return [
        node
        for node in network.graph.nodes
        if node.op == "call_module" and isinstance(modules[str(node.target)], nn.Conv2d | nn.Linear)
    ]


def trained_layers(network: fx.GraphModule) -> list[fx.Node]:
    """Those of :func:`layers_of` whose weights are trained."""
    weights = {node: network.get_submodule(str(node.target)).weight for node in layers_of(network)}
    return [node for node, weight in weights.items() if isinstance(weight, Tensor) and weight.requires_grad]

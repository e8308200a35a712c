"""The optimizer and what it is given: groups of parameters, quantizer steps, and the precision that Fabric sets up."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import nn

from coldforge.compress import ActivationQuantizer, QuantizedLayer
from coldforge.recipe import TrainSpec
from coldforge.train.muon import Muon


def make_fabric(precision: str):  # type: ignore[no-untyped-def]  # Fabric's generics say nothing here
    """Fabric on one CPU, in ``"bf16"`` (autocast) or ``"fp32"``."""
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if precision == "bf16" else "32-true")
        fabric.launch()
    return fabric


def make_optimizer(network: nn.Module, spec: TrainSpec) -> torch.optim.SGD:
    """SGD or Muon over everything that ``network`` learns."""
    kind = Muon if spec.optimizer == "muon" else torch.optim.SGD
    groups = _parameter_groups(network, spec.weight_decay, turned(network) if kind is Muon else [])
    return kind(groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov)


def turned(network: nn.Module) -> list[nn.Parameter]:
    """What Muon turns: the weights of convolutions and linear layers, but not of the last one that ``network`` names,
    whose rows are the classes and whose size is the scale of the logits. Weights that are computed from others (by a
    parametrization) are no parameters, and left to SGD.
    """
    layers = [part for part in network.modules() if isinstance(part, nn.Conv2d | nn.Linear | QuantizedLayer)]
    own = [
        parameter for layer in layers for name, parameter in layer.named_parameters(recurse=False) if name == "weight"
    ]
    return [weight for weight in dict.fromkeys(own) if weight.requires_grad][:-1]


def _parameter_groups(network: nn.Module, weight_decay: float, turning: list[nn.Parameter]) -> list[dict[str, object]]:
    """Weights (more than one dimension) decay; biases, normalization and quantizer steps do not."""
    apart = {id(weight) for weight in turning}
    rest = [parameter for parameter in network.parameters() if parameter.requires_grad and id(parameter) not in apart]
    groups: list[dict[str, object]] = [
        {"params": [parameter for parameter in rest if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in rest if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [*groups, {"params": turning, "weight_decay": 0.0, "turns": True}] if turning else groups


def quantizer_steps(network: nn.Module) -> dict[str, nn.Parameter]:
    """Learned step sizes by name. SGD can carry one past zero, where no gradient brings it back and its channel is
    dead.
    """
    steps = {}
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLayer):
            steps[f"{name}.weight_step"] = module.weight_step
        elif isinstance(module, ActivationQuantizer):
            steps[f"{name}.step"] = module.step
    return {name: step for name, step in steps.items() if step.requires_grad}

"""The optimizer and what it is given: groups of parameters, quantizer steps, and the precision that Fabric sets up."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor, nn

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


def make_optimizer(network: nn.Module, spec: TrainSpec, precision: str = "fp32") -> torch.optim.SGD:
    """SGD or Muon over everything that ``network`` learns; in ``"bf16"`` Muon makes large matrices orthogonal in it."""
    rates = {"lr": spec.lr, "momentum": spec.momentum, "nesterov": spec.nesterov}
    if spec.optimizer == "sgd":
        return torch.optim.SGD(_parameter_groups(network, spec.weight_decay, {}), **rates)  # type: ignore[arg-type]
    apart = {"turns": turned(network), "stretches": list(quantizer_steps(network).values())}
    groups = _parameter_groups(network, spec.weight_decay, apart)
    return Muon(groups, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, **rates)


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


def _parameter_groups(
    network: nn.Module, weight_decay: float, apart: dict[str, list[nn.Parameter]]
) -> list[dict[str, object]]:
    """Weights (more than one dimension) decay; biases, normalization and quantizer steps do not. What stands ``apart``
    gets groups of its own, which have its name set.
    """
    elsewhere = {id(parameter) for parameters in apart.values() for parameter in parameters}
    rest = [parameter for parameter in network.parameters() if parameter.requires_grad]
    rest = [parameter for parameter in rest if id(parameter) not in elsewhere]
    groups: list[dict[str, object]] = [
        {"params": [parameter for parameter in rest if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in rest if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    special = ({"params": parameters, "weight_decay": 0.0, name: True} for name, parameters in apart.items())
    return [*groups, *(group for group in special if group["params"])]


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


def filter_norms(network: nn.Module) -> dict[str, Tensor]:
    """Norm of each filter of each layer that is trained and has quantizer steps, ``(C,)``, by the name of these."""
    return {
        f"{name}.weight_step": part.weight.detach().flatten(1).norm(dim=1)
        for name, part in network.named_modules()
        if isinstance(part, QuantizedLayer) and part.weight.requires_grad
    }


@torch.no_grad()
def follow(network: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stretch the steps of filters as these have grown since :func:`filter_norms`; by how much, by name.

    Muon keeps the norm of a layer, not of its filters: some shrink a thousandfold. Steps that stayed behind would round
    them to a few codes, or to 0. Steps that are not learned follow, too: they stay what they were to their filters.
    """
    grown = {
        name: torch.where(before[name] > 0, norm / before[name], 1.0) for name, norm in filter_norms(network).items()
    }
    for name, factor in grown.items():
        network.get_parameter(name).mul_(factor)
    return grown

"""Networks whose speed is measured: dense, pruned in float, int8. Untrained: the time is that of any weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coldforge.compress import prune, quantize
from coldforge.models import model_source, normalized
from coldforge.recipe import PruneSpec, QuantizeSpec

SHAPES = {"cnn8": (1, 28, 28), "resnet20": (3, 32, 32), "resnet18": (3, 32, 32)}
CLASSES = 10


@dataclass(frozen=True)
class Untrained:
    """One architecture of the zoo on its way to int8."""

    dense: nn.Module
    parent: nn.Module
    """Pruned, float."""
    twin: nn.Module
    """Pruned, fake-quantized."""
    images: Tensor
    """(256, C, H, W), random; the first ones calibrated the twin."""
    achieved: float
    """Part of the channels that is gone."""


def untrained(name: str, ratio: float) -> Untrained:
    """One of :data:`SHAPES`, pruned and quantized to int8."""
    shape = SHAPES[name]
    source = model_source(f"zoo:{name}", image_shape=shape, num_classes=CLASSES)
    dense = normalized(source.build(0), (0.5,) * shape[0], (0.25,) * shape[0]).eval()
    images = torch.rand(256, *shape, generator=torch.Generator().manual_seed(0))
    parent, plan = prune(dense, PruneSpec(ratio=ratio), image_shape=shape)
    twin = quantize(parent, QuantizeSpec(calibration="minmax"), images)
    return Untrained(dense, parent, twin, images, plan.achieved)

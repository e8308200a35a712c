"""Ranks channels by the images that a network is trained on, clean or attacked."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from coldforge.attacks import ThreatModel, loss_direction, parse_inner, perturb
from coldforge.compress import taylor
from coldforge.compress.importance import Importance
from coldforge.data import ImageSet

_BATCH = 128
"""Images whose gradients are averaged before they are squared."""


def taylor_on(network: nn.Module, data: ImageSet, threat_model: ThreatModel | None, *, seed: int) -> Importance:
    """First-order Taylor importance (:func:`~coldforge.compress.importance.taylor`) on these images.

    Args:
        network: the network whose channels are ranked, in evaluation mode.
        data: training images.
        threat_model: the ball in which PGD-7 attacks them first, at full eps; None: they stay clean.
        seed: of the attack's starts.
    """
    inner = parse_inner("pgd-7")

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(data.pixels().split(_BATCH), data.labels.split(_BATCH), strict=True):
            if threat_model is not None:
                ascend = partial(loss_direction, labels=labels, loss="ce")
                images = perturb(network, images, ascend, threat_model, inner, torch.Generator().manual_seed(seed))
            yield images, labels

    return taylor(network, batches())

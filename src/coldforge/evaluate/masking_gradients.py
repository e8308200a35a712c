"""The part of the masking panel that looks at gradients: are they there, are they numbers, do they say something?

Sources: Athalye, Carlini, Wagner, *Obfuscated Gradients Give a False Sense of Security*, ICML 2018 (shattered,
vanishing and exploding gradients); Carlini et al., *On Evaluating Adversarial Robustness*, 2019; Pintor et al.,
*Indicators of Attack Failure*, NeurIPS 2022 (arXiv 2106.09947: unavailable gradients, unstable predictions).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.attacks import TILE, ThreatModel, margins
from coldforge.compress import Backward, attacking
from coldforge.evaluate.masking_checks import allowed, check, percent
from coldforge.records import MaskingCheckRecord

NEARBY_POINTS = 4
"""Points of the ball at which gradients are taken, an image: a share of n images is then known to 1 / (4 n)."""
NEIGHBOUR = 0.02
"""Distance, in units of eps, of the two points whose gradients are compared: one step of a PGD-100."""
ZERO_SHARE = 0.05
"""Images (or points) whose gradient may be 0. Honest: 0, also at logit gaps of 60; planted: 0.6 to 1."""
NAN_SHARE = 0.0
"""NaN has no honest cause; a few images are allowed for all the same (``allowed``)."""
SMALLEST_RATIO = 0.02
"""Gradients at the images, in units of those nearby (median of the ratio of norms). Honest: 0.7 to 1.1; planted: 0."""
LARGEST_RATIO = 1e6
"""A record holds no infinity."""
LEAST_AGREEMENT = 0.75
"""Cosine between the gradients at two neighbouring points (median). Honest: 0.94 (pruned int8 ResNet-20) to 1; planted:
0 to 0.6."""


def gradient_of(network: nn.Module, points: Tensor, labels: Tensor, *, loss: str) -> Tensor:
    """Gradient by the pixels, ``(N, C, H, W)``, of the loss as a naive user computes it.

    ``"ce"`` is plain cross-entropy, which underflows where logits are saturated; ``"margin"`` the largest other logit
    minus the true one. Tile by tile, so that the sum over images mixes nothing. A network in evaluation mode is
    expected.
    """
    found = []
    for part, truth in zip(points.split(TILE), labels.split(TILE), strict=True):
        with torch.enable_grad():
            inputs = part.detach().requires_grad_()
            logits = network(inputs)
            naive = F.cross_entropy(logits, truth, reduction="sum") if loss == "ce" else -margins(logits, truth).sum()
            (gradient,) = torch.autograd.grad(naive, inputs)
        found.append(gradient)
    return torch.cat(found)


def is_differentiable(network: nn.Module, images: Tensor) -> bool:
    """Whether logits depend on pixels in a way that autograd knows."""
    with torch.enable_grad():
        inputs = images[:1].detach().requires_grad_()
        logits = network(inputs)
        if not logits.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(logits.sum(), inputs, allow_unused=True)
    return gradient is not None


def gradient_checks(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    backwards: Sequence[Backward],
    generator: torch.Generator,
) -> list[MaskingCheckRecord]:
    """Zero, NaN, vanishing and shattered gradients.

    A quantized network is asked with each kind of gradient; an image has a gradient if one of them is not zero.
    """
    nearby = torch.cat([threat_model.random_start(images, generator) for _ in range(NEARBY_POINTS)])
    short = ThreatModel(threat_model.norm, NEIGHBOUR * threat_model.eps, threat_model.box)
    neighbours = short.random_start(nearby, generator)
    truth = labels.repeat(NEARBY_POINTS)

    def gradients(points: Tensor, truth: Tensor, loss: str) -> list[Tensor]:
        found = []
        for backward in backwards:
            with attacking(network, backward):
                found.append(gradient_of(network, points, truth, loss=loss).flatten(1))
        return found

    ce, margin = gradients(images, labels, "ce"), gradients(images, labels, "margin")
    around, beside = gradients(nearby, truth, "margin"), gradients(neighbours, truth, "margin")
    n, points = len(images), len(nearby)
    broken = [sum(float((~g.isfinite()).any(1).sum()) for g in group) for group in (ce, margin, around)]
    nan = max(broken[0] / n, broken[1] / n, broken[2] / points) / len(backwards)
    ratio = max(_ratio(at, near) for at, near in zip(margin, around, strict=True))
    agreement = max(_agreement(first, second) for first, second in zip(around, beside, strict=True))
    return [
        check(
            "nan_gradients",
            nan,
            allowed(n, NAN_SHARE),
            f"the gradient is a finite number at {_most(nan)} images and random points around them",
            f"the gradient is NaN or infinite at {percent(nan)} of the images or of random points around them, and an "
            "attack cannot move there",
            "find the operation that divides by zero or takes the root of zero, and give it a finite derivative",
        ),
        _zero_check("zero_gradients_ce", _zero(ce), n, "plain cross-entropy", RESCALE),
        _zero_check("zero_gradients_margin", _zero(margin), n, "the margin of the logits", BPDA),
        _zero_check("zero_gradients_nearby", _zero(around), n, "the margin at random points of the ball", BPDA),
        check(
            "gradients_at_images",
            ratio,
            SMALLEST_RATIO,
            f"gradients at the images are about as large as around them (ratio {ratio:.2g})",
            f"gradients at the images are {ratio:.1g} of those around them: something flattens the network exactly at "
            "the data",
            "start attacks from random points of the ball, several times, and do not trust FGSM from the image",
            at_least=True,
        ),
        check(
            "gradients_agree",
            agreement,
            LEAST_AGREEMENT,
            f"gradients of neighbouring points agree (cosine {agreement:.2f})",
            f"gradients of neighbouring points hardly agree (cosine {agreement:.2f}): each says little of where to go",
            "average the gradient over random points around the iterate (EOT), or differentiate a smooth stand-in for "
            "the layer that breaks it (BPDA)",
            at_least=True,
        ),
    ]


RESCALE = "rescale the logits (divide them by a constant), or take the margin or DLR loss, which do not saturate"
BPDA = "let gradients through the operation that stops them (BPDA: treat rounding and comparisons as the identity)"


def _zero_check(name: str, zero: float, n: int, loss: str, remedy: str) -> MaskingCheckRecord:
    return check(
        name,
        zero,
        allowed(n, ZERO_SHARE),
        f"the gradient of {loss} leads somewhere at {_most(zero)} images",
        f"the gradient of {loss} is zero at {percent(zero)} of the images: an attack that follows it does not move",
        remedy,
    )


def _zero(gradients: list[Tensor]) -> float:
    """Part of the rows that are all zero whatever the kind of gradient."""
    return float(torch.stack([(g == 0).all(1) for g in gradients]).all(0).double().mean())


def _ratio(at: Tensor, near: Tensor) -> float:
    """Median over images of the gradient's norm there, in units of the mean norm nearby; 1 where there is none."""
    here = at.nan_to_num().double().norm(dim=1)
    there = near.nan_to_num().double().norm(dim=1).view(NEARBY_POINTS, -1).mean(0)
    ratios = torch.where((here == 0) & (there == 0), 1.0, here / there.clamp_min(1e-300))
    return float(ratios.clamp_max(LARGEST_RATIO).median())


def _agreement(first: Tensor, second: Tensor) -> float:
    """Median cosine; 0 where a gradient is zero."""
    return float(
        torch.cosine_similarity(first.nan_to_num().double(), second.nan_to_num().double(), eps=1e-300).median()
    )


def _most(value: float) -> str:
    return "all" if value == 0 else f"all but {percent(value)} of the"

"""Inner attacks of adversarial training: cheap perturbations of one batch, no judging.

Sources: FGSM-RS, Wong, Rice, Kolter, *Fast is better than free*, ICLR 2020 (arXiv 2001.03994); N-FGSM, de Jorge et al.,
*Make some noise*, NeurIPS 2022 (arXiv 2202.01181); start from the perturbation of the epoch before: Jia et al.,
*Prior-guided adversarial initialization for fast adversarial training*, ECCV 2022 (arXiv 2207.08859), whose regularizer
is left out; PGD: Madry et al., ICLR 2018.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from coldforge.attacks.gradient import PGD
from coldforge.attacks.names import parse_attack
from coldforge.attacks.query import Classifier, query, untouched
from coldforge.attacks.threat import ThreatModel
from coldforge.errors import RecipeError, nearest
from coldforge.spec import Spec

INNER_FORMS = {
    "fgsm": "one step of eps from the image itself; easily overfitted",
    "fgsm-rs": "one step of 1.25 eps from a random point of the ball",
    "n-fgsm": "one step of eps from random noise of up to 2 eps around the image, which may leave the ball",
    "fgsm-reuse": "one step of 1.25 eps from where the last epoch's perturbation of the image ended; no augmentation",
    "pgd-K": "K steps of 2.5 eps / K from a random point, e.g. pgd-2, pgd-7",
    "pgd-K-paper": "K steps of 0.005 from the image itself, as in arXiv 2403.09441",
}
"""Valid forms of an inner attack's name, and what they mean."""
_NOISE = 2.0
"""Radius of N-FGSM's noise in units of eps."""


class InnerAttack(Spec):
    """How training images are made: the steps of a PGD, from a start of its own, without judging."""

    label: str
    """Name in the record."""
    pgd: PGD
    """Number and size of the steps."""
    start: Literal["image", "ball", "noise", "previous"]
    """"noise": up to 2 eps from the image; "previous": where the epoch before ended."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.pgd.steps

    def check(self, threat_model: ThreatModel) -> None:
        """Raise an AttackError where the steps cannot cross the ball."""
        self.pgd.check(threat_model)

    def stronger(self, times: int) -> InnerAttack:
        """What is used after this was overfitted so many times: PGD with as many steps more."""
        return parse_inner(f"pgd-{self.steps + times}") if times else self


def parse_inner(name: str) -> InnerAttack:
    """The inner attack of that name.

    Raises:
        RecipeError: lists the valid forms.
    """
    if name == "n-fgsm":
        return InnerAttack(label=name, pgd=PGD(label=name, steps=1, rel_step=1.0), start="noise")
    if name == "fgsm-reuse":
        return InnerAttack(label=name, pgd=PGD(label=name, steps=1, rel_step=1.25), start="previous")
    found = parse_attack(name) if re.fullmatch(r"fgsm(-rs)?|pgd-\d+(-paper)?", name) else None
    if not isinstance(found, PGD):
        raise RecipeError(f"unknown inner attack {name!r}; {nearest(name, INNER_FORMS)}")
    return InnerAttack(label=name, pgd=found, start="ball" if found.random_start else "image")


def perturb(
    model: Classifier,
    images: Tensor,
    direction: Callable[[Tensor], Tensor],
    threat_model: ThreatModel,
    attack: InnerAttack,
    generator: torch.Generator,
    previous: Tensor | None = None,
    *,
    share: slice = slice(None),
) -> Tensor:
    """The last iterate of ``attack`` on one batch.

    Args:
        model: classifier; put into evaluation mode meanwhile (pitfall: BatchNorm statistics must not see the search).
        images: ``(N, C, H, W)`` in [0, 1].
        direction: logits ``(N, K)`` to the gradient of the inner loss by them.
        threat_model: ball and box.
        attack: steps, step size and start.
        generator: source of the random start.
        previous: perturbations of the epoch before ``(N, C, H, W)``, for attacks that start there; None: there is none,
            and the start is random.
        share: the images to perturb. Starts are drawn for all N, so that those of an image do not depend on it;
            ``direction`` is that of the share.

    Returns:
        The share's images ``(n, C, H, W)``, detached; inside ball and box, but those of N-FGSM only inside the box.
    """
    noisy = attack.start == "noise"
    if noisy:
        wide = ThreatModel(threat_model.norm, _NOISE * threat_model.eps, box=False)
        points = wide.random_start(images, generator)
    elif attack.start == "image":
        points = images
    elif attack.start == "previous" and previous is not None:
        points = threat_model.project(images + previous, images)
    else:
        points = threat_model.random_start(images, generator)
    points, images = points[share], images[share]
    with untouched(model):
        for _ in range(attack.steps):
            _, gradient = query(model, points, direction)
            assert gradient is not None
            points = points + threat_model.step(gradient, attack.pgd.step_size(threat_model))
            if not noisy:
                points = threat_model.project(points, images)
    if noisy and threat_model.box:
        points = points.clamp(0.0, 1.0)
    return points.detach()

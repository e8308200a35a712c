"""FGSM and PGD.

Goodfellow et al., *Explaining and harnessing adversarial examples*, ICLR 2015; Madry et al., *Towards deep learning
models resistant to adversarial attacks*, ICLR 2018. Where we differ from common code: every iterate is judged, the last
one included; restarts keep "ever misclassified", never "highest loss"; the gradient does not underflow
(:func:`coldforge.attacks.base.loss_direction`).
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from coldforge.attacks.base import Attack, Classifier, Slots, query, untouched
from coldforge.attacks.threat import ThreatModel


class PGD(Attack):
    """Projected gradient ascent: ``steps`` steps of ``rel_step * eps`` each, projected onto ball and box.

    FGSM is the case of one full step from the image; FGSM-RS (Wong et al. 2020) that of one 1.25 eps step from a
    random point.
    """

    rel_step: float
    """Step size in units of eps."""
    label: str
    """Name in the record."""

    @property
    def name(self) -> str:
        """Name in the record, such as "pgd-20"."""
        return self.label

    @model_validator(mode="after")
    def _crosses_the_ball(self) -> Self:
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"{self.label}: expected at least 1 step and 1 restart, got {self.steps}, {self.restarts}")
        if self.steps > 1 and self.steps * self.rel_step < 2:
            raise ValueError(
                f"{self.label}: {self.steps} steps of {self.rel_step:g} eps cannot cross the ball (2 eps); "
                "take more or larger steps"
            )
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"{self.label}: restarts without random start would all be the same")
        return self

    def advance(self, slots: Slots, threat_model: ThreatModel) -> Tensor:
        """One step of steepest ascent."""
        return slots.points + threat_model.step(slots.gradient, self.rel_step * threat_model.eps)


def perturb(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    attack: PGD,
    generator: torch.Generator,
) -> Tensor:
    """The last iterate of ``attack`` on one batch, for training: no judging, no restarts, any precision.

    Args:
        model: classifier; put into evaluation mode meanwhile (pitfall: BatchNorm statistics must not see the search).
        images: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)``.
        threat_model: ball and box.
        attack: steps, step size, start and loss; one restart is made.
        generator: source of the random start.

    Returns:
        Adversarial images ``(N, C, H, W)``, detached.
    """
    points = threat_model.random_start(images, generator) if attack.random_start else images
    with untouched(model):
        for _ in range(attack.steps):
            _, gradient = query(model, points, labels, attack.loss)
            step = threat_model.step(gradient, attack.rel_step * threat_model.eps)
            points = threat_model.project(points + step, images)
    return points.detach()

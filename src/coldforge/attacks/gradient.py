"""FGSM and PGD.

Goodfellow et al., *Explaining and harnessing adversarial examples*, ICLR 2015; Madry et al., *Towards deep learning
models resistant to adversarial attacks*, ICLR 2018. Where we differ from common code: every iterate is judged, the last
one included; restarts keep "ever misclassified", never "highest loss"; the gradient does not underflow
(:func:`coldforge.attacks.query.loss_direction`).
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor

from coldforge.attacks.base import Attack, Slots
from coldforge.attacks.query import loss_direction
from coldforge.attacks.threat import ThreatModel
from coldforge.errors import AttackError


class PGD(Attack):
    """Projected gradient ascent: ``steps`` steps of ``rel_step * eps`` each, projected onto ball and box.

    FGSM is the case of one full step from the image; FGSM-RS (Wong et al. 2020) that of one 1.25 eps step from a
    random point.
    """

    rel_step: float = 0.0
    """Step size in units of eps."""
    abs_step: float = 0.0
    """Step size in pixel units, where it does not follow eps."""
    loss: Literal["ce", "margin"] = "ce"
    """What the steps increase: cross-entropy, or the largest other logit minus the true one."""
    label: str
    """Name in the record."""

    @property
    def name(self) -> str:
        """Name in the record, such as "pgd-20"."""
        return self.label

    @model_validator(mode="after")
    def _crosses_the_ball(self) -> Self:
        if bool(self.rel_step) == bool(self.abs_step):
            raise ValueError(f"{self.label}: expected a step size, either relative or absolute")
        if self.rel_step and self.steps > 1 and self.steps * self.rel_step < 2:
            raise ValueError(
                f"{self.label}: {self.steps} steps of {self.rel_step:g} eps cannot cross the ball (2 eps); "
                "take more or larger steps"
            )
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"{self.label}: restarts without random start would all be the same")
        return self

    def step_size(self, threat_model: ThreatModel) -> float:
        """Length of one step in pixel units.

        Raises:
            AttackError: absolute steps that cannot cross this ball.
        """
        if self.abs_step and self.steps * self.abs_step < 2 * threat_model.eps * (1 - 1e-9):
            raise AttackError(
                f"{self.label}: {self.steps} steps of {self.abs_step:g} cannot cross a ball of eps "
                f"{threat_model.eps:g}; "
                f"take at least {math.ceil(2 * threat_model.eps / self.abs_step)}"
            )
        return self.abs_step or self.rel_step * threat_model.eps

    def check(self, threat_model: ThreatModel) -> None:
        """Refuse steps that cannot cross the ball."""
        self.step_size(threat_model)

    def direction(self, logits: Tensor, slots: Slots) -> Tensor:
        """Gradient of the loss by the logits, up to scale."""
        return loss_direction(logits, slots.labels, self.loss)

    def advance(self, slots: Slots, threat_model: ThreatModel) -> Tensor:
        """One step of steepest ascent."""
        return slots.points + threat_model.step(slots.gradient, self.step_size(threat_model))

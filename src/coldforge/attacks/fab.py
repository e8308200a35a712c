"""FAB: walks along the decision boundary towards the image, to find the smallest perturbation.

Croce and Hein, *Minimally distorted adversarial examples with a fast adaptive boundary attack*, ICML 2020 (arXiv
1907.02044), algorithm 1, targeted form of AutoAttack, linf. Deviations: an image leaves as soon as a point inside the
ball is misclassified, since a smaller one would not change the verdict; every point is judged; the logits of a point
that is not adversarial serve its gradient too, so that such a step takes one forward pass (the published code: two),
and no gradient is computed after a projection, whose point is nearly always adversarial: the few images whose is not
are asked once more;
it is remembered how near points outside the ball came, so that a search in bfloat16 can be repeated in float32; where a
judge contradicts the network, the boundary is sought as far behind as he demands; the projection onto a hyperplane
inside the box is solved by Newton's method, not by sorting.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from coldforge.attacks.apgd import MOST_TARGETS, refuse_restarts, strongest_others
from coldforge.attacks.base import WITH_GRADIENT, Attack, Slots
from coldforge.attacks.query import Classifier, margins
from coldforge.attacks.threat import ThreatModel
from coldforge.errors import AttackError

ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9
"""Largest pull towards the image, overshoot of each projection, and step back from an adversarial point."""
_NEWTON_STEPS = 50


class FAB(Attack):
    """``steps`` projections onto the linearized boundary to each of the strongest other classes (FAB-T)."""

    version: ClassVar[int] = 3
    projects: ClassVar[bool] = False

    steps: int = 100
    random_start: bool = False
    n_targets: int = Field(default=MOST_TARGETS, ge=1)
    """Targets; at most the number of other classes."""

    @property
    def name(self) -> str:
        """Such as "fab-t" or "fab-t-20-3"."""
        standard = (self.steps, self.n_targets) == (100, MOST_TARGETS)
        return "fab-t" if standard else f"fab-t-{self.steps}-{self.n_targets}"

    @model_validator(mode="after")
    def _one_run_for_each_target(self) -> Self:
        refuse_restarts(self)
        return self

    def check(self, threat_model: ThreatModel) -> None:
        """Only linf, and only inside the box."""
        if threat_model.norm != "linf" or not threat_model.box:
            raise AttackError(
                f"{self.name}: expected linf perturbations inside the box [0, 1], got {threat_model.norm}"
                f"{'' if threat_model.box else ' without the box'}; take apgd-ce, apgd-t and square instead"
            )

    def runs(self, classes: int) -> int:
        """One for each target."""
        return min(self.n_targets, classes - 1)

    def passes(self, classes: int) -> float:
        """As of every attack; most steps ahead are followed by one back, which needs no gradient."""
        return self.runs(classes) * self.steps * (WITH_GRADIENT + 1)

    def targets(self, model: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """The strongest other classes, strongest first."""
        return strongest_others(model, images, labels, self.n_targets)

    def direction(self, logits: Tensor, slots: Slots) -> Tensor:
        """Of the wanted logit minus the true one; not scaled, because the distance to the boundary counts."""
        direction = torch.zeros_like(logits)
        direction.scatter_(1, slots.target.clamp_min(0)[:, None], 1.0)
        return direction.scatter_(1, slots.labels[:, None], -1.0)

    def advance(self, slots: Slots, threat_model: ThreatModel) -> Tensor:
        """Step back where the point is adversarial and was reached by a projection; else project once more."""
        memory = slots.memory
        if not memory:
            memory["projected"] = torch.zeros(len(slots.labels), dtype=torch.bool)
            memory["aim"] = torch.zeros(len(slots.labels))
        gap = -margins(slots.logits, slots.labels)
        memory["aim"][slots.step == 0] = 0.0
        memory["aim"] = torch.where(slots.refused, torch.maximum(memory["aim"], gap), memory["aim"])
        back = self._fresh(slots) & (gap > memory["aim"])
        slots.held = ~back & slots.blind
        ahead = ~back & ~slots.held
        slots.step[~ahead] -= 1  # not a step of its own: the base class adds one
        memory["projected"] = ahead
        clean, points = slots.clean, slots.points
        moved = torch.where(slots.held[:, None, None, None], points, clean + BETA * (points - clean))
        rows = ahead.nonzero()[:, 0]
        if len(rows):
            moved[rows] = _towards_boundary(slots, rows)
        return moved

    def wants_gradients(self, slots: Slots, busy: Tensor) -> bool:
        """Not where most points were just projected: nearly all of those are adversarial, and only step back."""
        return not slots.memory or 2 * int((self._fresh(slots) & busy).sum()) < int(busy.sum())

    def _fresh(self, slots: Slots) -> Tensor:
        """Which points were reached by a projection."""
        return slots.memory["projected"] & (slots.step > 0)


def _towards_boundary(slots: Slots, rows: Tensor) -> Tensor:
    clean, points = slots.clean[rows].flatten(1), slots.points[rows].flatten(1)
    weights = slots.gradient[rows].flatten(1).float()
    wanted, true = slots.target[rows].clamp_min(0)[:, None], slots.labels[rows][:, None]
    gap = (slots.logits[rows].gather(1, wanted) - slots.logits[rows].gather(1, true))[:, 0] - slots.memory["aim"][rows]
    # the hyperplane where the linearized gap is what is aimed at: gap + w (z - x) = 0
    from_point = project_linf(points, weights, -gap)
    from_clean = project_linf(clean, weights, -gap - (weights * (clean - points)).sum(1))
    near = from_point.abs().amax(1, keepdim=True).clamp_min(1e-8)
    far = from_clean.abs().amax(1, keepdim=True).clamp_min(1e-8)
    alpha = (near / (near + far)).clamp(0.0, ALPHA_MAX)
    mixed = (points + ETA * from_point) * (1 - alpha) + (clean + ETA * from_clean) * alpha
    return mixed.clamp(0.0, 1.0).view_as(slots.points[rows])


def project_linf(points: Tensor, weights: Tensor, rise: Tensor) -> Tensor:
    """The smallest linf step inside the box [0, 1] after which ``weights @ step = rise``.

    With the sign of ``rise`` on the weights, every pixel moves by ``min(size, room)`` along its weight's sign, where
    room is its distance to the box; what that reaches grows with ``size`` concavely and piecewise linearly, so Newton's
    method from 0 ends at the solution in finitely many steps.

    Args:
        points: ``(N, D)`` in [0, 1].
        weights: ``(N, D)``.
        rise: ``(N,)``.

    Returns:
        Steps ``(N, D)``; where no point of the box reaches the hyperplane, the step to the corner nearest to it.
    """
    sign = torch.where(rise < 0, -1.0, 1.0)[:, None]
    uphill = weights * sign
    room = torch.where(uphill > 0, 1 - points, points).masked_fill_(uphill == 0, 0.0)
    slope = uphill.abs()
    wanted = rise.abs()
    reachable = (slope * room).sum(1)
    size = torch.zeros_like(wanted)
    for _ in range(_NEWTON_STEPS):
        free = room > size[:, None]
        steep = (slope * free).sum(1)
        missing = wanted - (slope * torch.minimum(room, size[:, None])).sum(1)
        ahead = (missing > 1e-6 * wanted) & (steep > 0)
        if not bool(ahead.any()):
            break
        size = torch.where(ahead, size + missing / steep.clamp_min(1e-30), size)
    size = torch.where(reachable <= wanted, torch.inf, size)
    return uphill.sign() * torch.minimum(room, size[:, None])

"""APGD: projected gradient ascent that chooses its own step sizes.

Croce and Hein, *Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks*,
ICML 2020 (arXiv 2003.01690), algorithm 1. Deviations: cross-entropy is compared by a monotone form that does not
underflow for confident networks; increases of the loss are counted from the start on (the published code compares the
first step with zero); an image leaves at its first success; the start is uniform in the ball.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from coldforge.attacks.base import Attack, Slots
from coldforge.attacks.query import Classifier, loss_direction, predict
from coldforge.attacks.threat import ThreatModel

RHO = 0.75
"""A step size is halved where fewer than this part of the steps since the last checkpoint raised the loss."""
MOMENTUM = 0.25
"""Weight of the step before."""
MOST_TARGETS = 9


class APGD(Attack):
    """``steps`` steps that start at 2 eps and are halved at checkpoints where the loss no longer rises.

    With ``loss="ce"`` untargeted (APGD-CE). With ``loss="dlr"`` targeted (APGD-T): one run for each of the classes with
    the largest logits on the clean image, the true one left out, on the targeted difference-of-logits ratio; for fewer
    than 4 classes, where that is not defined, on the difference of the two logits.
    """

    steps: int = 100
    loss: Literal["ce", "dlr"] = "ce"
    """"ce": cross-entropy; "dlr": targeted difference of logits ratio."""
    n_targets: int = Field(default=MOST_TARGETS, ge=1)
    """Targets of APGD-T; at most the number of other classes."""

    @property
    def name(self) -> str:
        """Such as "apgd-ce" or "apgd-t-20-3"."""
        if self.loss == "ce":
            return "apgd-ce" if self.steps == 100 else f"apgd-ce-{self.steps}"
        standard = (self.steps, self.n_targets) == (100, MOST_TARGETS)
        return "apgd-t" if standard else f"apgd-t-{self.steps}-{self.n_targets}"

    @model_validator(mode="after")
    def _one_run_for_each_target(self) -> Self:
        if self.loss == "dlr":
            refuse_restarts(self)
        return self

    def runs(self, classes: int) -> int:
        """One for each target, for the targeted loss."""
        return self.restarts if self.loss == "ce" else min(self.n_targets, classes - 1)

    def targets(self, model: Classifier, images: Tensor, labels: Tensor) -> Tensor | None:
        """The strongest other classes, strongest first, for the targeted loss."""
        return None if self.loss == "ce" else strongest_others(model, images, labels, self.n_targets)

    def direction(self, logits: Tensor, slots: Slots) -> Tensor:
        """Gradient of the loss by the logits, up to scale."""
        if self.loss == "ce":
            return loss_direction(logits, slots.labels, "ce")
        return targeted_direction(logits, slots.labels, slots.target)

    def _loss(self, slots: Slots) -> Tensor:
        """``(T,)``, in float64: only compared."""
        logits = slots.logits.double()
        true = logits.gather(1, slots.labels[:, None])[:, 0]
        if self.loss == "ce":  # cross-entropy is softplus of this, which underflows
            return torch.logsumexp(logits.scatter(1, slots.labels[:, None], -torch.inf), 1) - true
        wanted = logits.gather(1, slots.target.clamp_min(0)[:, None])[:, 0]
        if logits.shape[1] < 4:
            return wanted - true
        first, _, third, fourth = logits.topk(4, 1).values.unbind(1)
        return (wanted - true) / (first - (third + fourth) / 2 + 1e-12)

    def advance(self, slots: Slots, threat_model: ThreatModel) -> Tensor:
        """One step of algorithm 1 for every slot; each is at a step of its own."""
        memory = slots.memory
        if not memory:
            for name in ("old", "best_points", "best_gradient"):
                memory[name] = torch.zeros_like(slots.points)
            for name in ("best", "previous", "best_at_check", "rises", "size", "halved"):
                memory[name] = torch.zeros(len(slots.labels), dtype=torch.float64)
        loss, first = self._loss(slots), slots.step == 0
        memory["rises"] += (loss > memory["previous"]).double()
        memory["previous"] = loss
        better = (first | (loss > memory["best"])).nonzero()[:, 0]
        memory["best"][better] = loss[better]
        memory["best_points"][better] = slots.points[better]
        memory["best_gradient"][better] = slots.gradient[better].to(memory["best_gradient"].dtype)
        begun = first.nonzero()[:, 0]
        if len(begun):
            memory["old"][begun] = slots.points[begun]
            memory["best_at_check"][begun] = loss[begun]
            memory["rises"][begun], memory["halved"][begun] = 0.0, 1.0
            memory["size"][begun] = 2.0 * threat_model.eps
        points, gradient = slots.points, slots.gradient
        window = self._windows()[slots.step.clamp_max(self.steps)]
        checked = window > 0
        if bool(checked.any()):
            stuck = (memory["halved"] == 0) & (memory["best"] <= memory["best_at_check"])
            halve = checked & ((memory["rises"] <= RHO * window) | stuck)
            memory["halved"] = torch.where(checked, halve.double(), memory["halved"])
            memory["best_at_check"] = torch.where(checked, memory["best"], memory["best_at_check"])
            memory["rises"] = torch.where(checked, 0.0, memory["rises"])
            memory["size"] = torch.where(halve, memory["size"] / 2, memory["size"])
            rows = halve.nonzero()[:, 0]
            if len(rows):
                points, gradient = points.clone(), gradient.clone()
                points[rows] = memory["best_points"][rows]
                gradient[rows] = memory["best_gradient"][rows].to(gradient.dtype)
        step = threat_model.step(gradient, memory["size"].float().view(-1, 1, 1, 1))
        ahead = threat_model.project(points + step, slots.clean)
        inertia = torch.where(first, 0.0, MOMENTUM).view(-1, 1, 1, 1)
        moved = torch.lerp(ahead, points, inertia) + inertia * (points - memory["old"])
        memory["old"] = points
        return moved

    def _windows(self) -> Tensor:
        """For each step, how many steps the checkpoint there looks back; 0: no checkpoint. ``(steps + 1,)``."""
        table = torch.zeros(self.steps + 1, dtype=torch.int64)
        window, at = max(int(0.22 * self.steps), 1), 0
        least, shrink = max(int(0.06 * self.steps), 1), max(int(0.03 * self.steps), 1)
        while at + window <= self.steps:
            at += window
            table[at] = window
            window = max(window - shrink, least)
        return table


def strongest_others(model: Classifier, images: Tensor, labels: Tensor, count: int) -> Tensor:
    """The ``count`` wrong classes with the largest logits, at most all, strongest first, ``(N, min(count, K - 1))``."""
    logits = predict(model, images).clamp_min(torch.finfo(torch.float32).min).scatter(1, labels[:, None], -torch.inf)
    return logits.argsort(dim=1, descending=True, stable=True)[:, : min(count, logits.shape[1] - 1)]


def refuse_restarts(attack: Attack) -> None:
    """Raise a ValueError unless there is one run for each target: more would not be made."""
    if attack.restarts > 1:
        raise ValueError(
            f"expected restarts = 1, got {attack.restarts}: a targeted attack makes one run for each target"
        )


def targeted_direction(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the targeted difference-of-logits ratio by the logits, times the square of its denominator.

    That is ``D (e_t - e_y) - (z_t - z_y) (e_1 - e_3 / 2 - e_4 / 2)`` with ``D = z_1 - (z_3 + z_4) / 2``, where 1, 3 and
    4 are ranks; for fewer than 4 classes only ``e_t - e_y``.
    """
    values = logits.float()
    direction = torch.zeros_like(values)
    wanted, true = targets.clamp_min(0)[:, None], labels[:, None]
    gap = values.gather(1, wanted) - values.gather(1, true)
    spread = torch.ones_like(gap)
    if logits.shape[1] >= 4:
        top, rank = values.topk(4, 1)
        spread = top[:, :1] - (top[:, 2:3] + top[:, 3:]) / 2 + 1e-12
        direction.scatter_(1, rank[:, :1], -gap)
        direction.scatter_add_(1, rank[:, 2:], gap.expand(-1, 2) / 2)
    direction.scatter_add_(1, wanted, spread)
    direction.scatter_add_(1, true, -spread)
    return (direction / direction.abs().amax(1, keepdim=True).clamp_min(1e-30)).to(logits.dtype)

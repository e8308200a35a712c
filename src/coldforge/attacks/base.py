"""What every attack shares: the queue, the tile, the ledger, and the promises to the caller.

An attack is a frozen spec and a callable. A subclass writes one hook, :meth:`Attack.advance`; the final ``__call__``
keeps the promises: only points inside the ball and the box count, every iterate counts, the network, its gradients and
the global random state are untouched, and an image's verdict depends neither on the batch it came in nor on its
neighbours. For the last one, networks are queried with a tile of the same size, or one that is answered alike
(:mod:`coldforge.attacks.tiles`): an image that is done leaves its slot at once and the next one takes it. Where none
waits, a later restart or target of one that is being attacked does (:mod:`coldforge.attacks.runs`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, final

import torch
from pydantic import model_validator
from torch import Tensor

from coldforge.attacks.query import TILE, Classifier, Judge, check_images, loss_direction, margins, query, untouched
from coldforge.attacks.runs import Runs
from coldforge.attacks.threat import TOLERANCE, ThreatModel
from coldforge.attacks.tiles import Tiles
from coldforge.spec import Spec, seed_of

WITH_GRADIENT = 3.0
"""Time of a pass that also gives gradients, in forward passes."""

_PROGRESS_PASSES = 8
_DOUBT = 0.01
"""A judge is also asked where the margin is the smallest of its run and smaller than this part of the range of the
logits."""


_NEARLY = 1.1
"""Of attacks whose points may leave the ball, margins count up to so many times eps: how near they came."""
_STEEPEST = 1e15
"""Stands for an infinite slope: its square is finite."""


@dataclass
class Slots:
    """The images being attacked now: one tile. Row i of every tensor belongs to the image in slot i."""

    clean: Tensor  # (T, C, H, W)
    labels: Tensor  # (T,)
    points: Tensor  # (T, C, H, W), where the network was just queried
    logits: Tensor  # (T, K) at points
    gradient: Tensor  # (T, C, H, W) at points; empty for attacks that use none
    step: Tensor  # (T,), steps already taken from the start
    run: Tensor  # (T,), which restart or target class
    target: Tensor  # (T,), the class that a targeted attack wants; -1 without
    key: Tensor  # (T,) int64, names the image's random numbers
    refused: Tensor  # (T,) bool: misclassified at points, but the judge is right there
    held: Tensor  # (T,) bool: points are those of the pass before, where a gradient was wanted and there was none
    blind: bool = False  # whether this pass gave no gradients
    memory: dict[str, Tensor] = field(default_factory=dict)  # what the attack remembers of each image, (T, ...)

    def take(self, rows: Tensor) -> None:
        """Keep only these slots, in this order."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor) and len(value):
                setattr(self, entry.name, value[rows])
        self.memory = {name: value[rows] for name, value in self.memory.items()}


@dataclass(frozen=True)
class AttackResult:
    """One attack on N images."""

    fooled: Tensor  # (N,) bool: misclassified at some iterate (by the judge too, if there is one)
    adversarial: Tensor  # (N, C, H, W): where it was fooled, else the last iterate (inside ball and box)
    last: Tensor  # (N, C, H, W): the last iterate, if it was asked for; else empty
    step: Tensor  # (N,) int64: step of the first success, -1 without
    restart: Tensor  # (N,) int64: restart (or target, from 0) of the first success, -1 without
    queries: Tensor  # (N,) int64: forward passes spent
    margin: Tensor  # (N,) float32: smallest margin seen inside ball and box; of FAB, also a little outside the ball
    finished: Tensor  # (N,) bool: fooled, or attacked to the end; False where it was stopped before
    disputed: Tensor  # (N,) bool: the network was wrong somewhere where the judge was right
    part: Tensor  # (N,) int64: for an ensemble, which of its attacks came first, -1 without


class Attack(Spec, ABC):
    """An attack with its settings. Call it; see :meth:`__call__`."""

    version: ClassVar[int] = 2
    """Raised when an attack of the same settings gives other results."""
    uses_gradients: ClassVar[bool] = True
    """False: only logits are asked for, so a deployed file can be attacked."""
    projects: ClassVar[bool] = True
    """False: points may leave the ball while searching; only those inside it count."""

    steps: int
    """Steps of one run."""
    restarts: int = 1
    """Independent runs; an image counts as fooled if one succeeds."""
    random_start: bool = True
    """Start at a random point of the ball instead of the image."""

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"expected at least 1 step and 1 restart, got {self.steps} and {self.restarts}")
        return self

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in the record."""

    @abstractmethod
    def advance(self, slots: Slots, threat_model: ThreatModel) -> Tensor:
        """The next points ``(T, C, H, W)`` to query. May keep things in ``slots.memory``, to be reset at step 0."""

    def check(self, threat_model: ThreatModel) -> None:
        """Refuse a threat model for which the attack is not defined, with an AttackError."""

    def direction(self, logits: Tensor, slots: Slots) -> Tensor:
        """Gradient of the loss by the logits ``(T, K)``; each row may be scaled at will."""
        return loss_direction(logits, slots.labels, "ce")

    def runs(self, classes: int) -> int:
        """How many runs are made on an image that stands."""
        return self.restarts

    def passes(self, classes: int) -> float:
        """Time of the attack on an image that stands, in forward passes."""
        return self.runs(classes) * (self.steps + 1) * (WITH_GRADIENT if self.uses_gradients else 1.0)

    def wants_gradients(self, slots: Slots, busy: Tensor) -> bool:
        """Whether the coming pass must give gradients. Where it gives none (``slots.blind``), ``advance`` leaves the
        images that need them where they are (``slots.held``); which pass they get them in must not change anything.
        """
        return True

    def targets(self, model: Classifier, images: Tensor, labels: Tensor) -> Tensor | None:
        """The class wanted in each run ``(N, runs)``; None: any wrong one."""
        return None

    def start(self, slots: Slots, rows: list[int], threat_model: ThreatModel) -> Tensor:
        """First points of the images in slots ``rows``."""
        clean = slots.clean[rows]
        if not self.random_start:
            return clean
        starts = [
            threat_model.random_start(image[None], torch.Generator().manual_seed(key))
            for image, key in zip(clean, slots.key[rows].tolist(), strict=True)
        ]
        return torch.cat(starts)

    def describe(self) -> dict[str, Any]:
        """Everything that defines the attack, for the record."""
        return {"attack": type(self).__name__, "version": self.version, **self.model_dump(mode="json")}

    @final
    def __call__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        threat_model: ThreatModel,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
        judge: Judge | None = None,
        keep_last: bool = False,
        on_progress: Callable[[float], None] | None = None,
        on_done: Callable[[AttackResult, list[int]], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> AttackResult:
        """Attack every image.

        Args:
            model: the classifier; a module is attacked in evaluation mode and left as it was. For an attack without
                gradients any callable will do, such as the ``logits`` of a deployed file's session.
            images: ``(N, C, H, W)`` float32 in [0, 1].
            labels: true labels ``(N,)``, int64.
            threat_model: ball and box.
            seed: seed of the random draws.
            indices: what the images are called, ``(N,)``; an image draws the same numbers wherever it stands. Default:
                their position.
            judge: who has the last word. With it, an image is fooled only when the judge is wrong, and the search
                goes on until then. The judge is asked where the model is wrong or nearly so, and about the very last
                point.
            keep_last: also run every image to its last iterate and return that.
            on_progress: called with the finished fraction.
            on_done: called with the result, as far as it is filled in, and the positions of images just finished.
            stop: asked before every pass; True leaves the images that are not finished as they are.

        Returns:
            The verdict for each image. Every adversarial image was checked: finite, inside ball and box.

        Raises:
            AttackError: images outside [0, 1], or a threat model for which the attack is not defined.
        """
        images = images.detach()
        check_images(images, labels)
        self.check(threat_model)
        count = len(images)
        names = torch.arange(count) if indices is None else indices
        result = empty_result(images, keep_last)
        if count == 0:
            return result
        with untouched(model):
            targets = self.targets(model, images, labels)
            runs = Runs(count, self.runs(0) if targets is None else targets.shape[1], all_of_them=keep_last)
            tiles = Tiles(model, images.shape[1:], gradients=self.uses_gradients)
            image = torch.full((TILE,), -1)  # which image is in each slot; -1: none
            slots = _empty_slots(images)
            passes, shown = 0, 0.0
            while True:
                if begun := self._fill(slots, image, runs):
                    at = image[begun]
                    for row, which in zip(begun, at.tolist(), strict=True):
                        slots.key[row] = seed_of(seed, self.name, int(names[which]), int(slots.run[row]))
                    slots.clean[begun], slots.labels[begun] = images[at], labels[at]
                    if targets is not None:
                        slots.target[begun] = targets[at, slots.run[begun]]
                    slots.points[begun] = self.start(slots, begun, threat_model)
                busy = image >= 0
                if not bool(busy.any()) or (stop is not None and stop()):
                    break
                if not bool(busy.all()):
                    to_come = (runs.runs - 1 - slots.run) * int(keep_last)
                    left = int((to_come * (self.steps + 1) + self.steps + 1 - slots.step)[busy].max())
                    size = tiles.next(len(image), int(busy.sum()), left)
                    if size < len(image):
                        rows = torch.cat([busy.nonzero()[:, 0], (~busy).nonzero()[:, 0]])[:size]
                        slots.take(rows)
                        image, busy = image[rows], busy[rows]
                slots.blind = not self.uses_gradients or (
                    not self.wants_gradients(slots, busy) and tiles.blind(len(image))
                )
                direction = None if slots.blind else (lambda logits: self.direction(logits, slots))
                slots.logits, gradient = query(model, slots.points, direction)
                if gradient is not None:  # one pixel without a slope must not stop the search in all others
                    slots.gradient = gradient.nan_to_num(nan=0.0, posinf=_STEEPEST, neginf=-_STEEPEST)
                over = self._judge(slots, image, runs, threat_model, result, judge, keep_last)
                finished = runs.leave(image[over].tolist())
                if len(finished):
                    result.finished[finished] = True
                    _settle(result, runs, finished)
                    if on_done is not None:
                        on_done(result, finished.tolist())
                image[over] = -1
                slots.held = torch.zeros_like(busy)
                moved = self.advance(slots, threat_model)
                slots.points = threat_model.project(moved, slots.clean) if self.projects else moved
                slots.step += 1
                passes += 1
                if on_progress is not None and passes % _PROGRESS_PASSES == 0:
                    shown = max(shown, self._progress(result, image, slots, runs))
                    on_progress(shown)
        stopped = (~result.finished).nonzero()[:, 0]
        _settle(result, runs, stopped)
        fooled = stopped[result.fooled[stopped] & (not keep_last)]  # only which run was the first is not known
        result.finished[fooled] = True
        if len(fooled) and on_done is not None:
            on_done(result, fooled.tolist())
        if on_progress is not None and bool(result.finished.all()):
            on_progress(1.0)
        return result

    @staticmethod
    def _fill(slots: Slots, image: Tensor, runs: Runs) -> list[int]:
        """Begin a run in every free slot, as long as there are any; the slots."""
        begun = []
        for row in (image < 0).nonzero()[:, 0].tolist():
            following = runs.next()
            if following is None:
                break
            image[row], slots.run[row] = following
            slots.step[row] = 0
            begun.append(row)
        slots.held[begun] = False
        return begun

    def _judge(
        self,
        slots: Slots,
        image: Tensor,
        runs: Runs,
        threat_model: ThreatModel,
        result: AttackResult,
        judge: Judge | None,
        keep_last: bool,
    ) -> Tensor:
        """Enter what this pass has shown into ``result`` and ``runs``; which slots' runs are over, ``(T,)``."""
        busy = image >= 0
        rows = busy.nonzero()[:, 0]
        at = image[rows], slots.run[rows]
        runs.queries[at] += (~slots.held[rows]).long()
        margin, inside = margins(slots.logits, slots.labels), torch.empty(0)
        if not self.projects:  # few points are inside the ball, and only those near it are looked at closely
            inside = self._near(slots, threat_model)
            runs.nearly[at] = torch.minimum(runs.nearly[at], torch.where(inside, margin, torch.inf)[rows])
            close = inside.nonzero()[:, 0]
            inside[close] = threat_model.contains(slots.points[close], slots.clean[close])
            margin = torch.where(inside, margin, torch.inf)
        lowest = torch.zeros_like(busy)
        lowest[rows] = margin[rows] < runs.margin[at]
        runs.margin[at] = torch.minimum(runs.margin[at], margin[rows])
        ended = busy & (slots.step >= self.steps)
        very_last = ended & (slots.run == runs.runs - 1)
        wrong = busy & (slots.logits.argmax(1) != slots.labels)
        slots.refused = torch.zeros_like(wrong)
        unsure = lowest & (margin < _DOUBT * (slots.logits.amax(1) - slots.logits.amin(1)))
        asked = (wrong if judge is None else wrong | very_last | unsure).nonzero()[:, 0]
        asked = asked[runs.open(image[asked], slots.run[asked])]
        if len(asked):
            allowed = threat_model.contains(slots.points[asked], slots.clean[asked]) if self.projects else inside[asked]
            asked = asked[allowed]
        if len(asked) and judge is not None:
            deceived = judge(slots.points[asked]) != slots.labels[asked]
            disputes = asked[~deceived & wrong[asked]]
            slots.refused[disputes] = True
            runs.disputed[image[disputes], slots.run[disputes]] = True
            asked = asked[deceived]
        for row in asked.tolist():
            which, run = int(image[row]), int(slots.run[row])
            if runs.succeed(which, run):
                result.fooled[which] = True
                result.adversarial[which] = slots.points[row]
                result.step[which], result.restart[which], result.part[which] = slots.step[row], run, 0
        if not keep_last:
            ended[asked] = True
        runs.ended[image[ended], slots.run[ended]] = True
        over = busy.clone()
        over[rows] = runs.over(*at)
        if keep_last:
            result.last[image[very_last]] = slots.points[very_last]
        standing = very_last & ~result.fooled[image]
        points = threat_model.project(slots.points[standing], slots.clean[standing])
        result.adversarial[image[standing]] = points
        return over

    @staticmethod
    def _near(slots: Slots, threat_model: ThreatModel) -> Tensor:
        """Which points are inside the ball or a little outside, ``(T,)`` bool."""
        within = max(_NEARLY * threat_model.eps, threat_model.eps + 2 * TOLERANCE)
        return threat_model.size(slots.points - slots.clean) <= within

    def _progress(self, result: AttackResult, image: Tensor, slots: Slots, runs: Runs) -> float:
        """Roughly, the finished part of the work."""
        busy = image >= 0
        parts = runs.ended.sum(1).float().index_add(0, image[busy], slots.step[busy] / (self.steps + 1))
        return float(torch.where(result.finished, 1.0, (parts / runs.runs).clamp_max(1.0)).mean())


def _settle(result: AttackResult, runs: Runs, images: Tensor) -> None:
    """Enter what the runs of these images have shown."""
    result.queries[images], result.margin[images], result.disputed[images] = runs.settled(images)


def empty_result(images: Tensor, keep_last: bool = False) -> AttackResult:
    """What is known before the first pass."""
    count = len(images)
    return AttackResult(
        fooled=torch.zeros(count, dtype=torch.bool),
        adversarial=images.clone(),
        last=images.clone() if keep_last else torch.empty(0),
        step=torch.full((count,), -1),
        restart=torch.full((count,), -1),
        queries=torch.zeros(count, dtype=torch.int64),
        margin=torch.full((count,), torch.inf),
        finished=torch.zeros(count, dtype=torch.bool),
        disputed=torch.zeros(count, dtype=torch.bool),
        part=torch.full((count,), -1),
    )


def _empty_slots(images: Tensor) -> Slots:
    def numbers(value: int) -> Tensor:
        return torch.full((TILE,), value, dtype=torch.int64)

    blank = torch.zeros(TILE, *images.shape[1:])
    return Slots(
        clean=blank.clone(),
        labels=numbers(0),
        points=blank.clone(),
        logits=torch.empty(0),
        gradient=torch.empty(0),
        step=numbers(0),
        run=numbers(0),
        target=numbers(-1),
        key=numbers(0),
        refused=torch.zeros(TILE, dtype=torch.bool),
        held=torch.zeros(TILE, dtype=torch.bool),
    )

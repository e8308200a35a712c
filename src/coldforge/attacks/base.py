"""What every attack shares: the queue, the tile, the ledger, and the promises to the caller.

An attack is a frozen spec and a callable. A subclass writes one hook, :meth:`Attack.advance`; the final ``__call__``
keeps the promises: only points inside the ball and the box count, every iterate counts, the network, its gradients and
the global random state are untouched, and an image's verdict depends neither on the batch it came in nor on its
neighbours. For the last one, networks are queried with a tile of the same size, or one that is answered alike
(:mod:`coldforge.attacks.tiles`): an image that is done leaves its slot at once and the next one of the queue takes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, final

import torch
from pydantic import model_validator
from torch import Tensor

from coldforge.attacks.query import TILE, Classifier, Judge, check_images, loss_direction, margins, query, untouched
from coldforge.attacks.threat import TOLERANCE, ThreatModel
from coldforge.attacks.tiles import Tiles
from coldforge.spec import Spec, seed_of

WITH_GRADIENT = 3.0
"""Time of a pass that also gives gradients, in forward passes."""

_PROGRESS_PASSES = 8
_DOUBT = 0.01
"""A judge is also asked where the margin is smaller than ever before and than this part of the range of the logits."""


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

    version: ClassVar[int] = 1
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
            runs = self.runs(0) if targets is None else targets.shape[1]
            waiting = deque((image, 0) for image in range(count))
            tiles = Tiles(model, images.shape[1:], gradients=self.uses_gradients)
            image = torch.full((TILE,), -1)  # which image is in each slot; -1: none
            slots = _empty_slots(images)
            passes, shown = 0, 0.0
            ran = torch.zeros(count)  # runs that ended without success
            nearly = torch.full((count,), torch.inf)  # smallest margin up to a little outside the ball
            while True:
                free = (image < 0).nonzero()[:, 0].tolist()[: len(waiting)]
                if free:
                    for row in free:
                        which, run = waiting.popleft()
                        image[row], slots.step[row], slots.run[row] = which, 0, run
                        slots.key[row] = seed_of(seed, self.name, int(names[which]), run)
                    slots.held[free] = False
                    at = image[free]
                    slots.clean[free], slots.labels[free] = images[at], labels[at]
                    if targets is not None:
                        slots.target[free] = targets[at, slots.run[free]]
                    slots.points[free] = self.start(slots, free, threat_model)
                busy = image >= 0
                if not bool(busy.any()) or (stop is not None and stop()):
                    break
                if not waiting:
                    left = int(((runs - slots.run) * (self.steps + 1) - slots.step)[busy].max())
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
                ended = busy & (slots.step >= self.steps)
                done = self._judge(slots, image, ended, runs, threat_model, result, judge, keep_last, nearly)
                ran[image[ended & ~done]] += 1
                for row in (ended & ~done).nonzero()[:, 0].tolist():
                    waiting.append((int(image[row]), int(slots.run[row]) + 1))
                finished = image[done].tolist()
                if finished and on_done is not None:
                    on_done(result, finished)
                image[done | ended] = -1
                slots.held = torch.zeros_like(busy)
                moved = self.advance(slots, threat_model)
                slots.points = threat_model.project(moved, slots.clean) if self.projects else moved
                slots.step += 1
                passes += 1
                if on_progress is not None and passes % _PROGRESS_PASSES == 0:
                    shown = max(shown, self._progress(result, image, slots, ran, runs))
                    on_progress(shown)
        if on_progress is not None and bool(result.finished.all()):
            on_progress(1.0)
        return result

    def _judge(
        self,
        slots: Slots,
        image: Tensor,
        ended: Tensor,
        runs: int,
        threat_model: ThreatModel,
        result: AttackResult,
        judge: Judge | None,
        keep_last: bool,
        nearly: Tensor,
    ) -> Tensor:
        """Enter what this pass has shown into ``result``; which slots hold images that are done, ``(T,)``."""
        busy = image >= 0
        rows = busy.nonzero()[:, 0]
        at = image[rows]
        result.queries[at] += (~slots.held[rows]).long()
        margin, inside = margins(slots.logits, slots.labels), torch.empty(0)
        if not self.projects:  # few points are inside the ball, and only those near it are looked at closely
            inside = self._near(slots, threat_model)
            nearly[at] = torch.minimum(nearly[at], torch.where(inside, margin, torch.inf)[rows])
            close = inside.nonzero()[:, 0]
            inside[close] = threat_model.contains(slots.points[close], slots.clean[close])
            margin = torch.where(inside, margin, torch.inf)
        lowest = busy & (margin < result.margin[image])
        result.margin[at] = torch.minimum(result.margin[at], margin[rows])
        very_last = ended & (slots.run == runs - 1)
        wrong = busy & (slots.logits.argmax(1) != slots.labels)
        slots.refused = torch.zeros_like(wrong)
        unsure = lowest & (margin < _DOUBT * (slots.logits.amax(1) - slots.logits.amin(1)))
        asked = (wrong if judge is None else wrong | very_last | unsure).nonzero()[:, 0]
        asked = asked[~result.fooled[image[asked]]]
        if len(asked):
            allowed = threat_model.contains(slots.points[asked], slots.clean[asked]) if self.projects else inside[asked]
            asked = asked[allowed]
        if len(asked) and judge is not None:
            deceived = judge(slots.points[asked]) != slots.labels[asked]
            disputes = asked[~deceived & wrong[asked]]
            slots.refused[disputes] = True
            result.disputed[image[disputes]] = True
            asked = asked[deceived]
        if len(asked):
            which = image[asked]
            result.fooled[which] = True
            result.adversarial[which] = slots.points[asked]
            result.step[which], result.restart[which] = slots.step[asked], slots.run[asked]
            result.part[which] = 0
        done = very_last if keep_last else very_last | (busy & result.fooled[image])
        result.finished[image[done]] = True
        over = done.nonzero()[:, 0]
        result.margin[image[over]] = torch.minimum(result.margin[image[over]], nearly[image[over]])
        if keep_last:
            result.last[image[over]] = slots.points[over]
        standing = over[~result.fooled[image[over]]]
        if len(standing):
            points = threat_model.project(slots.points[standing], slots.clean[standing])
            result.adversarial[image[standing]] = points
        return done

    @staticmethod
    def _near(slots: Slots, threat_model: ThreatModel) -> Tensor:
        """Which points are inside the ball or a little outside, ``(T,)`` bool."""
        within = max(_NEARLY * threat_model.eps, threat_model.eps + 2 * TOLERANCE)
        return threat_model.size(slots.points - slots.clean) <= within

    def _progress(self, result: AttackResult, image: Tensor, slots: Slots, ran: Tensor, runs: int) -> float:
        """Roughly, the finished part of the work."""
        parts = ran + torch.zeros_like(ran).index_add(0, image[image >= 0], slots.step[image >= 0] / (self.steps + 1))
        return float(torch.where(result.finished, 1.0, (parts / runs).clamp_max(1.0)).mean())


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

"""What every attack shares: the queue, the tile, the ledger, and the promises to the caller.

An attack is a frozen spec and a callable. A subclass writes one hook, :meth:`Attack.advance`; the final ``__call__``
keeps the promises: points stay inside the ball and the box, every iterate counts, the network, its gradients and the
global random state are untouched, and an image's verdict depends neither on the batch it came in nor on its
neighbours. For the last one, networks are always queried with a tile of the same size: an image that is done leaves
its slot at once and the next image of the queue takes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from coldforge.attacks.threat import ThreatModel
from coldforge.errors import AttackError
from coldforge.spec import Spec, spec_hash

TILE = 128
"""Images in one forward pass. Fixed, because kernels round differently for different shapes."""

Classifier = Callable[[Tensor], Tensor]
"""Images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``, differentiable."""

Judge = Callable[[Tensor], Tensor]
"""Images to labels ``(N,)``: a deployed file, asked whether it is fooled too."""


@contextmanager
def untouched(model: Classifier) -> Iterator[None]:
    """Inside, a network is in evaluation mode and its parameters need no gradient; after, every flag is as before."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    training = [module.training for module in modules]
    needed = [parameter.requires_grad for parameter in parameters]
    try:
        for module in modules:
            module.training = False
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for parameter, flag in zip(parameters, needed, strict=True):
            parameter.requires_grad_(flag)


def check_images(images: Tensor, labels: Tensor) -> None:
    """Raise an :class:`AttackError` unless these are images in [0, 1] with one label each."""
    if images.ndim != 4 or images.dtype != torch.float32:
        raise AttackError(f"expected float32 images (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise AttackError(f"expected {len(images)} int64 labels, got {labels.dtype} {tuple(labels.shape)}")
    if len(images) and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise AttackError(
            f"expected images inside [0, 1], found {float(images.min()):g} … {float(images.max()):g}; "
            "attacks work in pixel space: make the normalization a layer of the model"
        )


def predict(model: Classifier, images: Tensor) -> Tensor:
    """Logits ``(N, K)`` of ``images``, computed tile by tile in float32 without gradients."""
    outputs = []
    with untouched(model), torch.no_grad():
        for part in images.split(TILE):
            missing = TILE - len(part)
            tile = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part
            outputs.append(model(tile)[: len(part)].float())
    return torch.cat(outputs) if outputs else torch.empty(0, 0)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the true class minus the largest other, ``(N,)``; negative where misclassified."""
    true = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return true - others.amax(1)


def loss_direction(logits: Tensor, labels: Tensor, loss: Literal["ce", "margin"]) -> Tensor:
    """Gradient of each image's loss by its logits, scaled so that its largest entry is 1; ``(N, K)``.

    Steps use only the direction of the input gradient, so each image's loss may be scaled at will. The gradient of
    cross-entropy is the softmax minus the one-hot label; divided by one minus the probability of the true class it is
    the softmax of the *other* classes, and -1 at the true one. In this form it cannot underflow, whereas the usual one
    is 4e-18 at a logit gap of 40 and exactly 0 at one of 120: a common cause of overrated robustness.
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    if loss == "ce":
        direction = torch.softmax(others.float(), 1)
    else:
        direction = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, others.argmax(1, keepdim=True), 1.0)
    return direction.scatter_(1, labels[:, None], -1.0).to(logits.dtype)


def query(model: Classifier, points: Tensor, labels: Tensor, loss: Literal["ce", "margin"]) -> tuple[Tensor, Tensor]:
    """Logits ``(N, K)`` and the direction of the loss gradient ``(N, C, H, W)`` at ``points``; one forward pass."""
    with torch.enable_grad():
        inputs = points.detach().requires_grad_()
        logits = model(inputs)
        (gradient,) = torch.autograd.grad(logits, inputs, loss_direction(logits.detach(), labels, loss))
    return logits.detach().float(), gradient


@dataclass
class Slots:
    """The images being attacked now: one tile. Row i of every tensor belongs to the image in slot i."""

    clean: Tensor  # (T, C, H, W)
    labels: Tensor  # (T,)
    points: Tensor  # (T, C, H, W), where the network was just queried
    logits: Tensor  # (T, K) at points
    gradient: Tensor  # (T, C, H, W) at points
    step: Tensor  # (T,), steps already taken from the start


@dataclass(frozen=True)
class AttackResult:
    """One attack on N images."""

    fooled: Tensor  # (N,) bool: misclassified at some iterate (by the judge too, if there is one)
    adversarial: Tensor  # (N, C, H, W): where it was fooled, else the last iterate
    last: Tensor  # (N, C, H, W): the last iterate, if it was asked for; else empty
    step: Tensor  # (N,) int64: step of the first success, -1 without
    restart: Tensor  # (N,) int64: restart of the first success, -1 without
    queries: Tensor  # (N,) int64: forward passes spent
    margin: Tensor  # (N,) float32: smallest margin seen


class Attack(Spec, ABC):
    """An attack with its settings. Call it; see :meth:`__call__`."""

    steps: int
    """Gradient steps of one restart."""
    restarts: int = 1
    """Independent starts; an image counts as fooled if one succeeds."""
    random_start: bool = True
    """Start at a random point of the ball instead of the image."""
    loss: Literal["ce", "margin"] = "ce"
    """What the steps increase: cross-entropy, or the largest other logit minus the true one."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in the record."""

    @abstractmethod
    def advance(self, slots: Slots, threat_model: ThreatModel) -> Tensor:
        """The next points ``(T, C, H, W)`` to query; ``__call__`` projects them."""

    def _start(self, clean: Tensor, image: int, restart: int, seed: int, threat_model: ThreatModel) -> Tensor:
        """First point for one image, from a generator of its own."""
        if not self.random_start:
            return clean
        key = spec_hash(seed, self.name, image, restart)
        generator = torch.Generator().manual_seed(int(key[:15], 16))
        return threat_model.random_start(clean[None], generator)[0]

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
    ) -> AttackResult:
        """Attack every image.

        Args:
            model: the classifier; a module is attacked in evaluation mode and left as it was.
            images: ``(N, C, H, W)`` float32 in [0, 1].
            labels: true labels ``(N,)``, int64.
            threat_model: ball and box.
            seed: seed of the random starts.
            indices: what the images are called, ``(N,)``; an image draws the same start wherever it stands. Default:
                their position.
            judge: labels of a deployed file. With it, an image is fooled only when the judge is wrong, and the search
                goes on until then. The judge is asked where the model is wrong, and about the very last point.
            keep_last: also run every image to its last iterate and return that.
            on_progress: called with the finished fraction.

        Returns:
            The verdict for each image. Every adversarial image was checked: finite, inside ball and box.

        Raises:
            AttackError: images outside [0, 1], or a result that violates the threat model.
        """
        check_images(images, labels)
        count = len(images)
        names = torch.arange(count) if indices is None else indices
        fooled = torch.zeros(count, dtype=torch.bool)
        adversarial = images.clone()
        last = torch.empty_like(images) if keep_last else torch.empty(0)
        first_step, first_restart = torch.full((count,), -1), torch.full((count,), -1)
        queries, margin = torch.zeros(count, dtype=torch.int64), torch.full((count,), torch.inf)

        waiting = iter(range(count))
        image = torch.full((TILE,), -1)  # which image is in each slot; -1: none
        step, restart = torch.zeros(TILE, dtype=torch.int64), torch.zeros(TILE, dtype=torch.int64)
        clean, points = torch.zeros(TILE, *images.shape[1:]), torch.zeros(TILE, *images.shape[1:])
        truth = torch.zeros(TILE, dtype=torch.int64)

        def fill(slot: int, which: int, again: int) -> None:
            image[slot], step[slot], restart[slot] = which, 0, again
            clean[slot], truth[slot] = images[which], labels[which]
            points[slot] = self._start(images[which], int(names[which]), again, seed, threat_model)

        done = 0
        with untouched(model):
            for slot, which in zip(range(TILE), waiting, strict=False):
                fill(slot, which, 0)
            while bool((image >= 0).any()):
                logits, gradient = query(model, points, truth, self.loss)
                busy = image >= 0
                at = image[busy]
                queries[at] += 1
                margin[at] = torch.minimum(margin[at], margins(logits, truth)[busy])
                restart_over = busy & (step == self.steps)
                very_last = restart_over & (restart == self.restarts - 1)
                wrong = busy & (logits.argmax(1) != truth)
                if judge is not None:
                    asked = ((wrong | very_last) & ~fooled[image]).nonzero()[:, 0]
                    wrong = torch.zeros_like(wrong)
                    if len(asked):
                        wrong[asked] = judge(points[asked]) != truth[asked]
                for slot in (wrong & ~fooled[image]).nonzero()[:, 0].tolist():
                    which = int(image[slot])
                    fooled[which] = True
                    adversarial[which] = points[slot]
                    first_step[which], first_restart[which] = step[slot], restart[slot]
                finished = very_last if keep_last else very_last | (busy & fooled[image])
                for slot in finished.nonzero()[:, 0].tolist():
                    which = int(image[slot])
                    if keep_last:
                        last[which] = points[slot]
                    if not fooled[which]:
                        adversarial[which] = points[slot]

                moved = self.advance(Slots(clean, truth, points, logits, gradient, step), threat_model)
                points = threat_model.project(moved, clean)
                step += 1
                for slot in (restart_over & ~finished).nonzero()[:, 0].tolist():
                    fill(slot, int(image[slot]), int(restart[slot]) + 1)
                for slot in finished.nonzero()[:, 0].tolist():
                    image[slot] = -1
                    done += 1
                    following = next(waiting, None)
                    if following is not None:
                        fill(slot, following, 0)
                if on_progress is not None:
                    on_progress(done / count)
        threat_model.verify(adversarial, images)
        if keep_last:
            threat_model.verify(last, images)
        return AttackResult(fooled, adversarial, last, first_step, first_restart, queries, margin)

"""Watching a training: accuracy on the validation part after each epoch, and the signs of a collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from coldforge.attacks import InnerAttack, ThreatModel, parse_attack, predict
from coldforge.data import ImageSet
from coldforge.evaluate import Target, evaluate, summarize
from coldforge.recipe import TrainSpec
from coldforge.records import CurvePoint

MONITOR_IMAGES = 1000
MONITOR_ATTACK = "pgd-10"
ASKED_IMAGES = 250
ASKED_ATTACK = "square-30"
"""A short search without gradients, for a sign that they mislead. Smaller validation parts are not asked: there, single
images would decide."""
HONEST, MISLED = 0.01, 0.025
"""What it may break beyond the monitor attack: more than the first is taken off an epoch's score, more than the second
is said. Of the finished networks of docs/evidence.md, those that the masking panel calls ok lose 0.008 at most."""
WEAK_STEPS = 3
"""Inner attacks of at most so many steps are watched for catastrophic overfitting."""


class Collapse(Exception):
    """This attempt failed; the message says how."""


class NotFinite(Collapse):
    """The loss or a weight became NaN or infinite."""


class SameAnswer(Collapse):
    """The network answers the same, whatever it sees."""


class Overfitting(Collapse):
    """Catastrophic overfitting: the inner attack is too weak, whatever the learning rate."""


@dataclass(frozen=True)
class Watched:
    """Fractions of the images of the validation part that are watched."""

    clean_accuracy: float
    robust_accuracy: float = -1.0
    """Under PGD at full eps; -1 where it was not run."""
    beyond_gradients: float = -1.0
    """Of the first :data:`ASKED_IMAGES`: what PGD leaves and a short Square breaks; -1 where it was not run."""

    @property
    def score(self) -> float:
        """By which epochs are chosen: accuracy under PGD, without what Square breaks beyond an honest measure of it."""
        clean, robust = self.clean_accuracy, self.robust_accuracy
        return clean if robust < 0 else robust - max(self.beyond_gradients - HONEST, 0.0)


def monitor(network: nn.Module, validation: ImageSet, threat_model: ThreatModel, *, robust: bool) -> Watched:
    """Accuracy on the validation part, in fp32: clean, and, where ``robust``, under attack at full eps.

    Whatever the network answers it is watched: one that returns probabilities was refused before its training.
    """
    watched, target = validation.take(slice(0, MONITOR_IMAGES)), Target(network)
    attacks = [parse_attack(MONITOR_ATTACK)] if robust else []
    ledger = evaluate(target, watched, attacks, threat_model, transfer=False, refuse=False)
    result = summarize(ledger, watched.classes)
    if not robust:
        return Watched(result.clean_accuracy)
    under_pgd = result.robust_accuracy[MONITOR_ATTACK]
    if len(watched) < ASKED_IMAGES:
        return Watched(result.clean_accuracy, under_pgd)
    left = ledger.survived(MONITOR_ATTACK)[:ASKED_IMAGES].nonzero()[:, 0]
    broken = 0
    if len(left):
        square = [parse_attack(ASKED_ATTACK)]
        asked = evaluate(target, watched.take(left), square, threat_model, transfer=False, refuse=False)
        broken = int((asked.right & ~asked.survived(ASKED_ATTACK)).sum())
    return Watched(result.clean_accuracy, under_pgd, broken / ASKED_IMAGES)


def first_misled(curve: Sequence[CurvePoint]) -> str:
    """What a person must know after the last epoch of ``curve``, if it is the first whose gradients mislead."""
    beyond = [max(point.beyond_gradients, point.averaged_beyond_gradients) for point in curve]
    new = max(beyond[:-1], default=0.0) <= MISLED < beyond[-1]
    return f"after epoch {curve[-1].epoch} {_misleads(beyond[-1])}" if new else ""


def kept_misled(curve: Sequence[CurvePoint], chosen: str) -> str:
    """What the record must say of the weights that are kept, "epoch 3" or "epoch 3, averaged"; empty: nothing."""
    beyond = {f"epoch {point.epoch}": point.beyond_gradients for point in curve}
    beyond |= {f"epoch {point.epoch}, averaged": point.averaged_beyond_gradients for point in curve}
    return f"in the network of {chosen} {_misleads(beyond[chosen])}" if beyond[chosen] > MISLED else ""


def _misleads(beyond: float) -> str:
    return (
        f"gradients mislead: {ASKED_ATTACK}, which uses none, broke {beyond:.1%} of {ASKED_IMAGES} validation images, "
        f"all of which {MONITOR_ATTACK} had left. It is less robust than attacks by gradients say; believe autoattack "
        "and the masking panel"
    )


def refuse_collapse(
    network: nn.Module,
    validation: ImageSet,
    curve: list[CurvePoint],
    inner: InnerAttack | None,
    spec: TrainSpec,
) -> bool:
    """Refuse a constant answer, a robustness that is lost, and catastrophic overfitting of a weak inner attack.

    The signs of the latter (Wong et al. 2020): PGD accuracy falls to half of what it was, or the images of the inner
    attack are answered with far more confidence than PGD accuracy allows. Under a strong inner attack the first of them
    is another fault, such as too high a learning rate. Epochs of fewer bits are not compared with those of more.

    Returns:
        Whether the network still gives the same answer to everything, in the epochs in which it may.

    Raises:
        SameAnswer: it does so later.
        Overfitting: the inner attack is too weak.
        Collapse: PGD accuracy fell to half, and the inner attack is strong.
    """
    watched = validation.take(slice(0, MONITOR_IMAGES))
    answers = predict(network, watched.pixels()).argmax(1)
    share = float(answers.bincount().max()) / len(answers)
    expected = float(watched.labels.bincount().max()) / len(answers)
    now = curve[-1]
    slow_start = now.epoch < min(spec.warmup * spec.epochs + 1, spec.epochs)  # a fresh network may need an epoch
    same = share > 0.95 and expected < 0.9
    if same and not slow_start:
        raise SameAnswer(f"{share:.0%} of the validation images get the same answer after epoch {now.epoch}")
    if inner is None:
        return same
    weak = inner.steps <= WEAK_STEPS
    alike = [point for point in curve if point.eps <= now.eps]  # eps falls where it rises anew
    if spec.bits_ramp:  # which ends within, or after, the epoch of this number
        ends = math.ceil(spec.bits_ramp * spec.epochs)
        alike = [point for point in alike if point.epoch >= ends]
    best = max((point.robust_accuracy for point in alike), default=0.0)  # of this epoch, if it is the first
    if best > 0.2 and now.robust_accuracy < best / 2:
        fell = f"PGD accuracy fell from {best:.0%} to {now.robust_accuracy:.0%} in epoch {now.epoch}"
        raise Overfitting(f"catastrophic overfitting: {fell}") if weak else Collapse(fell)
    least = smoothed_entropy(spec.label_smoothing, len(validation.classes))
    confidence = math.exp(least - now.loss)  # geometric mean of the probability of the true class, under the attack
    at_full_eps = now.epoch - 1 >= spec.eps_ramp * spec.epochs * (1 - 1e-6)  # from its first step on
    trusted = spec.objective == "adversarial"  # only there the loss is that of the true class
    if trusted and at_full_eps and weak and confidence > now.robust_accuracy + 0.2:
        raise Overfitting(
            f"catastrophic overfitting: {inner.label} leaves {confidence:.0%} confidence in the true class, "
            f"PGD accuracy is {now.robust_accuracy:.0%} after epoch {now.epoch}"
        )
    return same


def smoothed_entropy(smoothing: float, classes: int) -> float:
    """The least that cross-entropy with smoothed labels can be: their entropy.

    >>> smoothed_entropy(0.0, 10), round(smoothed_entropy(0.1, 10), 3)
    (0.0, 0.5)
    """
    chances = [1 - smoothing + smoothing / classes, *[smoothing / classes] * (classes - 1)]
    return -sum(chance * math.log(chance) for chance in chances if chance)

"""The part of the masking panel that runs attacks: a weaker one must never do better than a stronger one.

Sources: Athalye, Carlini, Wagner, ICML 2018, section 3 (one step beats many, black box beats white box, random
sampling finds what gradients do not, unbounded attacks fail, more distortion does not help); Carlini et al., *On
Evaluating Adversarial Robustness*, 2019, section 5; Croce and Hein, ICML 2020. All comparisons are paired: on the same
images, those that one attack fooled and the other did not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from coldforge.attacks import PGD, Attack, Classifier, Judge, ThreatModel, margins, parse_attack, predict
from coldforge.compress import Backward, attacking, is_quantized
from coldforge.evaluate.binarization import surface_points
from coldforge.evaluate.masking_checks import SMALLEST_SHARE, allowed, check, percent
from coldforge.records import MaskingCheckRecord

STEPS = (5, 10, 20, 50)
"""Steps of PGD, each from a new random point with steps of 2.5 eps / K. Honest networks have converged at 20."""
SWEEP_STEPS = 20
"""Steps of PGD in the sweep over eps, and of each restart."""
RESTARTS = 5
EPS_FACTORS = (0.5, 1.0, 2.0, 4.0)
"""Radii of the sweep in units of eps; the whole box follows."""
STRONGEST = "apgd-t-30-3"
"""Tried on what PGD left before anything else is compared with the gradient attacks: on honest networks it finds most
of what Square finds and PGD does not."""
NOISE_POINTS = 64
"""Random points, an image; half of them on the surface. Few against the thousands of Square: noise should find next to
nothing that gradients do not."""
SQUARE = "square-1000"
"""Square finds most of what it ever finds in this many queries (the standard 5,000 belong to the evaluation itself)."""

STEPS_SHARE = 0.05
"""Images by which more steps do worse. Honest: at most 0.02; planted: up to 0.4."""
LATE_SHARE = 0.1
"""Images that fall only between 20 and 50 steps. Honest: at most 0.046."""
RESTARTS_SHARE = 0.05
"""Images that fall only in further restarts. Honest: at most 0.027, and 0.04 at 2 bits; planted: up to 0.4."""
UNBOUNDED_SHARE = 0.05
"""Images left when every pixel is free. Honest: 0; planted: 0.06 to 0.3."""
SQUARE_SHARE = 0.06
"""Images that Square alone fools. Honest: at most 0.028, and 0.035 at 2 bits; planted: 0.11 to 0.8."""
SCORE_POINTS = 8
"""Random points, an image, at which scores are compared with those of the image."""
FLAT_SHARE = 0.2
"""Images whose score is the same at all of these. Honest: 0; planted (labels in place of scores): 0.9 and more."""


@dataclass(frozen=True, eq=False)
class Task:
    """What is asked of an attack: images that are right when clean, the ball, the seed."""

    images: Tensor  # (n, C, H, W)
    labels: Tensor  # (n,)
    ball: ThreatModel
    seed: int

    def run(self, attack: Attack, model: Classifier, within: Tensor, judge: Judge | None = None) -> Tensor:
        """Images ``within`` (n,) that ``attack`` fools, ``(n,)`` bool."""
        left = within.nonzero()[:, 0]
        fooled = torch.zeros(len(within), dtype=torch.bool)
        fooled[left] = attack(
            model, self.images[left], self.labels[left], self.ball, seed=self.seed, indices=left, judge=judge
        ).fooled
        return fooled

    @property
    def all(self) -> Tensor:
        """(n,) bool: every image."""
        return torch.ones(len(self.images), dtype=torch.bool)

    def whole_box(self) -> Task:
        """The same with a ball that holds every image."""
        whole = 1.0 if self.ball.norm == "linf" else float(self.images[0].numel()) ** 0.5
        return self.scaled(whole / self.ball.eps)

    def scaled(self, factor: float) -> Task:
        """The same with ``factor`` times eps."""
        return replace(self, ball=replace(self.ball, eps=factor * self.ball.eps))


@dataclass(frozen=True, eq=False)
class WhiteBox:
    """A network in evaluation mode, attacked with every kind of gradient it has."""

    network: nn.Module
    backwards: Sequence[Backward]
    judge: Judge | None = None
    """Who has the last word, such as its file; None: the network."""

    def broken(self, task: Task, attacks: Sequence[Attack], within: Tensor | None = None) -> Tensor:
        """Images (of those ``within``) that one of ``attacks`` fools, ``(n,)`` bool."""
        left = task.all if within is None else within.clone()
        fooled = torch.zeros_like(left)
        for attack in attacks:
            for backward in self.backwards:
                with attacking(self.network, backward):
                    fooled |= task.run(attack, self.network, left & ~fooled, self.judge)
        return fooled


def pgd(steps: int, restarts: int = 1) -> list[Attack]:
    """PGD on cross-entropy, then on the margin. Random starts go by the label: another number of steps starts where
    this one does, so that they differ by their steps alone; restarts begin elsewhere.
    """
    label = "pgd" if restarts == 1 else "pgd-again"
    ce = PGD(label=label, steps=steps, restarts=restarts, rel_step=2.5 / steps)
    return [ce, ce.model_copy(update={"label": f"{label}-margin", "loss": "margin"})]


def attack_checks(
    box: WhiteBox, task: Task, surrogates: Mapping[str, nn.Module], asked: Classifier, say: Callable[[str], None]
) -> list[MaskingCheckRecord]:
    """Accuracy against steps, restarts and eps; FGSM, noise, Square and transfer against the gradient attacks.

    Args:
        box: what is attacked.
        task: the images, right when clean.
        surrogates: networks from which adversarial images are transferred.
        asked: who is asked by Square, and judges what is transferred: the deployed file if there is one, else the
            network.
        say: called with the name of what comes next.
    """
    say("steps")
    by_steps = {steps: box.broken(task, pgd(steps)) for steps in STEPS}
    checks = _step_checks(by_steps)
    pgd_breaks = by_steps[STEPS[-1]]

    say("restarts")
    white = torch.stack([*by_steps.values()]).any(0)
    white |= box.broken(task, [named(STRONGEST)], ~white)
    again = box.broken(task, pgd(SWEEP_STEPS, RESTARTS)[:1], ~white)
    checks.append(_restart_check(again))
    white |= again

    say("eps")
    by_eps = {f: box.broken(task.scaled(f), pgd(SWEEP_STEPS)) for f in EPS_FACTORS if f != 1}
    by_eps[1.0] = by_steps[SWEEP_STEPS]
    everything = box.broken(task.whole_box(), pgd(STEPS[-1]))
    curve = {f * task.ball.eps: standing(by_eps[f]) for f in EPS_FACTORS}
    checks += eps_checks(curve, standing(everything), "PGD", len(white))

    say("FGSM and noise")
    single = box.broken(task, [named("fgsm")], ~pgd_breaks)
    strong = f"PGD-{STEPS[-1]}"
    checks.append(paired("fgsm_beats_pgd", single, "FGSM, a single step,", strong, START))
    with attacking(box.network):
        noisy = fooled_by_noise(asked, task, ~white)
        checks.append(paired("noise_beats_gradient", noisy, NOISE, "gradient attacks", BEND))
        say("Square")
        checks.append(scores_vary(asked, task))
        found = task.run(named(SQUARE), asked, ~white)
    words = f"Square, which sees no gradients ({SQUARE}),"
    checks.append(paired("square_beats_gradient", found, words, "gradient attacks", BEND, SQUARE_SHARE))

    say("transfer")
    sources: list[tuple[nn.Module, Backward]] = [(other, "pass_through") for other in surrogates.values()]
    if is_quantized(box.network):
        sources.append((copy.deepcopy(box.network), "unrounded"))
    if sources:
        with attacking(box.network):
            found = transferred(sources, task, asked, ~white)
        checks.append(paired("transfer_beats_gradient", found, MADE, "gradient attacks on this one", BEND))
    return checks


START = "start PGD from the image too, and look for what bends the gradient away from it"
MADE = "images made on other networks"
NOISE = f"the best of {NOISE_POINTS} random points"
BEND = (
    "let gradients through what stops or bends them (BPDA), average them over random points (EOT), and report the "
    "worst case over Square and transfer"
)


def _step_checks(by_steps: Mapping[int, Tensor]) -> list[MaskingCheckRecord]:
    n = len(by_steps[STEPS[0]])
    stands = {steps: standing(broken) for steps, broken in by_steps.items()}
    worse = max(stands[more] - stands[fewer] for fewer, more in pairwise(STEPS))
    late = stands[STEPS[-2]] - stands[STEPS[-1]]
    curve = ", ".join(f"{steps}: {percent(stands[steps])}" for steps in STEPS)
    fell = f"from {STEPS[-2]} to {STEPS[-1]} steps another {percent(max(late, 0))} of the images fell"
    return [
        check(
            "more_steps_never_weaker",
            worse,
            allowed(n, STEPS_SHARE),
            f"more steps of PGD leave no more images standing ({curve})",
            f"more (and smaller) steps of PGD leave more images standing ({curve}): they do not follow the loss",
            "average the gradient over random points (EOT), or let it through what stops it (BPDA)",
        ),
        check(
            "steps_converged",
            late,
            allowed(n, LATE_SHARE),
            f"PGD has converged: {fell}",
            f"PGD has not converged: {fell}",
            "take more steps, or APGD, until the accuracy no longer falls",
        ),
    ]


def _restart_check(again: Tensor) -> MaskingCheckRecord:
    late = float(again.double().mean())
    more = (
        f"after PGD-{STEPS[-1]} and APGD-T, {RESTARTS} more starts of PGD broke another {percent(late)} of the images"
    )
    return check(
        "restarts",
        late,
        allowed(len(again), RESTARTS_SHARE),
        f"{more}: it matters little where an attack starts",
        f"{more}: where an attack ends is a matter of luck",
        "take many restarts, and average gradients over random points (EOT)",
    )


def eps_checks(by_eps: Mapping[float, float], unbounded: float, attack: str, n: int) -> list[MaskingCheckRecord]:
    """Accuracy against eps, and with every pixel free.

    Args:
        by_eps: share of the images that stand, by eps, which grows.
        unbounded: share that stands where eps holds the whole box.
        attack: its name.
        n: number of images.
    """
    stands = [*by_eps.values(), unbounded]
    worse = max(after - before for before, after in pairwise(stands))
    curve = ", ".join(f"{eps:.3g}: {percent(share)}" for eps, share in by_eps.items())
    return [
        check(
            "larger_eps_never_weaker",
            worse,
            allowed(n),
            f"the larger eps, the fewer images stand ({curve})",
            f"a larger eps leaves more images standing ({curve}), although it allows all that a smaller one does",
            "the attack gets stuck: let gradients through what stops them (BPDA), and scale its steps with eps",
        ),
        check(
            "unbounded",
            unbounded,
            allowed(n, UNBOUNDED_SHARE),
            f"free to change every pixel at will, {attack} leaves {percent(unbounded)} of the images standing",
            f"free to change every pixel at will, {attack} leaves {percent(unbounded)} of the images standing, where "
            "none should: it does not find what is certainly there",
            "let gradients through what stops them (BPDA); robust accuracies under such attacks mean nothing",
        ),
    ]


def paired(
    name: str, fooled: Tensor, weak: str, strong: str, remedy: str, share: float = SMALLEST_SHARE
) -> MaskingCheckRecord:
    """``fooled``: (n,) images that the weak attack fooled and the strong one did not."""
    count, n = int(fooled.sum()), len(fooled)
    found = f"{weak} fooled {count} of {n} images that {strong} did not"
    return check(name, count / n, allowed(n, share), found, f"{found}, though these know more", remedy)


def standing(broken: Tensor) -> float:
    """Share of the images that are not broken."""
    return 1 - float(broken.double().mean())


def fooled_by_noise(classifier: Classifier, task: Task, within: Tensor) -> Tensor:
    """Images ``within`` that a random point of the ball fools, ``(n,)`` bool."""
    generator = torch.Generator().manual_seed(task.seed)
    fooled = torch.zeros_like(within)
    for number in range(NOISE_POINTS):
        left = (within & ~fooled).nonzero()[:, 0]
        if not len(left):
            break
        clean = task.images[left]
        inside, surface = task.ball.random_start, surface_points
        points = inside(clean, generator) if number % 2 else surface(clean, task.ball, generator)
        fooled[left] = predict(classifier, points).argmax(1) != task.labels[left]
    return fooled


def transferred(sources: Sequence[tuple[nn.Module, Backward]], task: Task, asked: Classifier, within: Tensor) -> Tensor:
    """Images ``within`` that fool who is ``asked`` and were made on one of the ``sources``, each with the kind of its
    gradients, ``(n,)`` bool.
    """

    def judge(points: Tensor) -> Tensor:
        return predict(asked, points).argmax(1)

    fooled = torch.zeros_like(within)
    for other, mode in sources:
        with attacking(other, mode):
            for attack in pgd(STEPS[-1]):
                fooled |= task.run(attack, other, within & ~fooled, judge)
    return fooled


def scores_vary(classifier: Classifier, task: Task) -> MaskingCheckRecord:
    """A search without gradients goes where the score falls; labels in its place lead nowhere."""
    seen = _scores(classifier, task)
    flat, largest = float((seen == seen[0]).all(0).double().mean()), allowed(len(task.images), FLAT_SHARE)
    share = percent(flat)
    if flat > largest:
        wide = _scores(classifier, task.whole_box())
        if len(wide.unique()) > len(wide):  # labels have a few scores only
            return MaskingCheckRecord(
                name="scores_vary",
                passed=True,
                value=flat,
                threshold=largest,
                meaning=f"scores are the same everywhere around {share} of the images and differ farther away: the "
                "ball is smaller than what this network tells apart",
                conclusive=False,
            )
    return check(
        "scores_vary",
        flat,
        largest,
        f"scores tell near from far: they are the same everywhere around {share} of the images",
        f"scores are the same at {SCORE_POINTS} random points around {share} of the images, as if only labels were "
        "told: a search without gradients cannot see where it comes nearer",
        "let it see the logits, neither rounded nor cut off, and report transfer from a network that is open",
    )


def _scores(classifier: Classifier, task: Task) -> Tensor:
    """Margins at the images and at random points of the ball, ``(1 + SCORE_POINTS, n)``."""
    generator = torch.Generator().manual_seed(task.seed)
    points = [task.images, *(task.ball.random_start(task.images, generator) for _ in range(SCORE_POINTS))]
    return torch.stack([margins(predict(classifier, point), task.labels) for point in points])


def named(name: str) -> Attack:
    """The single attack of that name."""
    attack = parse_attack(name)
    assert isinstance(attack, Attack)
    return attack

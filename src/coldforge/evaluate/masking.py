"""The masking panel: does a robust accuracy hold, or did the attacks only fail?

A network that hides its gradients looks robust and is not. The panel looks for the known signs and says in words what
it found and what to do. It lowers no robust accuracy; it says whether to believe it. What each check asks, and where it
comes from: :mod:`coldforge.evaluate.masking_gradients`, :mod:`coldforge.evaluate.masking_attacks`,
:mod:`coldforge.evaluate.binarization`.

About 100 images are enough. On each the panel spends at most some 700 forward and backward passes (1,200 on a quantized
network, which has two kinds of gradients) and 1,600 forward passes; images that fall early cost far less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coldforge.attacks import Classifier, ThreatModel, check_images, predict, untouched
from coldforge.compress import attacking, is_quantized
from coldforge.errors import AttackError, ModelError
from coldforge.evaluate.binarization import binarization_check, binarization_test
from coldforge.evaluate.masking_attacks import (
    EPS_FACTORS,
    MADE,
    NOISE,
    SQUARE,
    Task,
    WhiteBox,
    attack_checks,
    eps_checks,
    fooled_by_noise,
    named,
    paired,
    scores_vary,
    standing,
    transferred,
)
from coldforge.evaluate.masking_checks import allowed, check, percent
from coldforge.evaluate.masking_gradients import gradient_checks, is_differentiable
from coldforge.evaluate.robustness import names_of
from coldforge.evaluate.target import BACKWARDS
from coldforge.models.checks import refuse_probabilities
from coldforge.records import MaskingCheckRecord, MaskingRecord

if TYPE_CHECKING:
    from coldforge.evaluate.target import Target

FEWEST_RIGHT = 10
"""Images right when clean, below which no share means anything and the verdict is not_run."""
BINARIZATION_IMAGES = 64
"""Each has a head of its own, which costs some 700 forward passes."""
REPEAT_TOLERANCE = 1e-5
"""In units of the spread of an image's logits: the same images, twice, in the same order. Deterministic kernels give
the same bits; noise of 1 % on the logits gives 0.003 and more."""
ORDER_TOLERANCE = 1e-2
"""The same in another order, and without neighbours. Float networks move by 1e-6, and a code of a quantized one
may flip."""
ASKED_ALONE = 16
"""Images that are also asked about without neighbours: a whole tile each."""
BLACK_BOX_SWEEP = "square-300"
"""Asked at several eps, so cheaper than what is compared."""
TRANSFER_SHARE = 0.4
"""Images that transfer alone fools where Square takes the part of the strong attack. With the gradients of a network
much like this one it finds more, honestly: at most 0.12, and 0.33 of images of 64 pixels; planted: 0.85."""
MOST_VALUES = 3 * 32 * 32
"""Of larger images Square changes too little in its queries for that comparison to say anything."""
CLOSED = "attack the network itself, whose gradients this file keeps to itself, or count the worst case over transfer"
PARTS = {"answers": 2, "gradients": 3, "steps": 25, "restarts": 10, "eps": 25, "FGSM and noise": 3, "Square": 17}
PARTS |= {"transfer": 5, "binarization": 10}
"""What takes how long, roughly, in percent."""


def masking_panel(
    target: Target,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    *,
    seed: int = 0,
    on_progress: Callable[[float, str], None] | None = None,
) -> MaskingRecord:
    """Look for the signs of masked gradients. The images' order changes nothing: they are sorted by their 8-bit pixels.

    Args:
        target: the network; its file, if there is one, judges every attack, is asked by Square, and for repeatability;
            its surrogates are what images are transferred from. Without a network (a black box) only what needs no
            gradients is done.
        images: test images ``(n, C, H, W)`` in [0, 1], about 100.
        labels: true labels ``(n,)``.
        threat_model: ball and box of the robust accuracy in question.
        seed: seed of all draws; the global random state stays as it was.
        on_progress: called with the finished fraction and the name of the part.

    Returns:
        Every check with its value, threshold and meaning. The verdict is ``"suspect"`` if one failed, ``"not_run"`` if
        fewer than :data:`FEWEST_RIGHT` images are right when clean, else ``"ok"``.

    Raises:
        ModelError: the network or the file returns probabilities, NaN or infinity in place of logits.
        AttackError: images outside [0, 1], labels that do not fit, or no images.
    """
    check_images(images, labels)
    if not len(images):
        raise AttackError("expected images for the masking panel, got none")
    order = names_of(images).argsort()
    images, labels = images[order], labels[order]
    say = _teller(on_progress)
    network = target.network
    file = target.file.logits if target.file is not None else None
    asked = [classifier for classifier in (network, file) if classifier is not None]
    if not asked:
        raise AttackError("expected a network or a file, got neither")
    with torch.random.fork_rng(devices=[]), untouched(asked[0]):
        torch.manual_seed(seed)
        say("answers")
        right, checks = _answers(asked, images, labels)
        task = Task(images[right], labels[right], threat_model, seed)
        if len(task.images) >= FEWEST_RIGHT:
            if network is not None and is_differentiable(network, task.images):
                checks += _white_box(network, task, target, say)
            else:
                checks.append(_no_gradients(network))
                checks += _black_box(file or asked[0], target.surrogates, task, say)
    enough = len(task.images) >= FEWEST_RIGHT
    if not enough:
        checks.append(_too_few(len(task.images), len(images)))
    if on_progress is not None:
        on_progress(1.0, "done")
    failed = any(not found.passed for found in checks)
    return MaskingRecord(verdict="suspect" if failed else "ok" if enough else "not_run", checks=tuple(checks))


def _teller(on_progress: Callable[[float, str], None] | None) -> Callable[[str], None]:
    """Called with the name of a part that begins."""

    def say(part: str) -> None:
        if on_progress is not None:
            names = list(PARTS)
            before = sum(PARTS[name] for name in names[: names.index(part)])
            on_progress(before / sum(PARTS.values()), part)

    return say


def _answers(asked: list[Classifier], images: Tensor, labels: Tensor) -> tuple[Tensor, list[MaskingCheckRecord]]:
    """Which images all of ``asked`` are right about ``(n,)``, and whether the answers can be relied on."""
    right = torch.ones(len(images), dtype=torch.bool)
    moves, depends = 0.0, 0.0
    for classifier in asked:
        with attacking(classifier) if isinstance(classifier, nn.Module) else torch.no_grad():
            first, second = predict(classifier, images), predict(classifier, images)
            turned = predict(classifier, images.flip(0)).flip(0)
            alone = torch.cat([predict(classifier, image) for image in images[:ASKED_ALONE].split(1)])
        _refuse_what_is_no_logits(first)
        right &= first.argmax(1) == labels
        moved = _differ(first, turned, ORDER_TOLERANCE)
        moved[: len(alone)] |= _differ(first[: len(alone)], alone, ORDER_TOLERANCE)
        moves = max(moves, float(_differ(first, second, REPEAT_TOLERANCE).double().mean()))
        depends = max(depends, float(moved.double().mean()))
    return right, [
        check(
            "repeatable",
            moves,
            allowed(len(images)),
            "the same images, asked twice, give the same logits",
            f"the same images, asked twice, give other logits ({percent(moves)} of them): the network is random or "
            "remembers",
            "average logits and gradients over the randomness (EOT), or switch it off",
        ),
        check(
            "independent_of_neighbours",
            depends,
            allowed(len(images)),
            "an image's logits do not depend on the images it is asked with",
            f"for {percent(depends)} of the images the logits depend on the order or the neighbours in the batch",
            "freeze batch statistics (evaluation mode) and everything else that images share",
        ),
    ]


def _differ(first: Tensor, second: Tensor, tolerance: float) -> Tensor:
    """Images whose logits ``(n, K)`` differ by more than ``tolerance`` spreads, ``(n,)`` bool."""
    spread = first.std(1).clamp_min(1e-12)
    return (first - second).abs().amax(1) > tolerance * spread


def _refuse_what_is_no_logits(logits: Tensor) -> None:
    wrong = int((~logits.isfinite()).any(1).sum())
    if wrong:
        raise ModelError(f"expected finite logits, got NaN or infinity for {wrong} of {len(logits)} test images")
    refuse_probabilities(logits)


def _white_box(network: nn.Module, task: Task, target: Target, say: Callable[[str], None]) -> list[MaskingCheckRecord]:
    backwards = BACKWARDS if is_quantized(network) else BACKWARDS[:1]
    say("gradients")
    generator = torch.Generator().manual_seed(task.seed)
    checks = gradient_checks(network, task.images, task.labels, task.ball, backwards, generator)

    file = target.file
    box = WhiteBox(network, backwards, None if file is None else file.labels)
    checks += attack_checks(box, task, target.surrogates, network if file is None else file.logits, say)
    say("binarization")
    planted = binarization_test(
        network, task.images[:BINARIZATION_IMAGES], task.ball, backwards=backwards, seed=task.seed
    )
    return [*checks, binarization_check(planted)]


def _black_box(
    classifier: Classifier, surrogates: Mapping[str, nn.Module], task: Task, say: Callable[[str], None]
) -> list[MaskingCheckRecord]:
    """What can be asked without gradients; Square takes the part of the strong attack."""
    say("eps")
    sweep = named(BLACK_BOX_SWEEP)
    factors = [factor for factor in EPS_FACTORS if factor >= 1]
    curve = {f * task.ball.eps: standing(task.scaled(f).run(sweep, classifier, task.all)) for f in factors}
    whole = task.whole_box().run(sweep, classifier, task.all)
    checks = eps_checks(curve, standing(whole), "Square", len(whole))
    say("Square")
    found = task.run(named(SQUARE), classifier, task.all)
    noisy = fooled_by_noise(classifier, task, ~found)
    checks.append(paired("noise_beats_square", noisy, NOISE, "Square", "give Square more queries and restarts"))
    checks.append(scores_vary(classifier, task))
    if surrogates:
        say("transfer")
        made = transferred([(other, "pass_through") for other in surrogates.values()], task, classifier, ~found)
        found_more = paired("transfer_beats_square", made, MADE, f"Square ({SQUARE})", CLOSED, TRANSFER_SHARE)
        if not found_more.passed and task.images[0].numel() > MOST_VALUES:
            meaning = f"not conclusive, so not counted (Square changes little of so large images): {found_more.meaning}"
            found_more = found_more.model_copy(update={"passed": True, "conclusive": False, "meaning": meaning})
        checks.append(found_more)
    return checks


def _no_gradients(network: nn.Module | None) -> MaskingCheckRecord:
    if network is None:
        meaning = (
            "a black box: no gradients to ask for, so the robust accuracy is an upper bound that rests on Square and "
            "on transfer alone"
        )
    else:
        meaning = (
            "logits do not depend on pixels in a way that gradients can follow, so gradient attacks cannot be run; let "
            "gradients through the operation that stops them (BPDA), and attack with Square"
        )
    return MaskingCheckRecord(name="differentiable", passed=network is None, value=0.0, threshold=1.0, meaning=meaning)


def _too_few(right: int, n: int) -> MaskingCheckRecord:
    return MaskingCheckRecord(
        name="enough_images",
        passed=True,
        value=float(right),
        threshold=float(FEWEST_RIGHT),
        meaning=f"only {right} of {n} images are right when clean, at least {FEWEST_RIGHT} are needed: attacks not run",
        conclusive=False,
    )

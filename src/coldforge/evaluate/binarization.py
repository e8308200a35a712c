"""The binarization test: plant an adversarial image and see whether the attack finds it.

Zimmermann, Brendel, Tramèr, Carlini, *Increasing Confidence in Adversarial Robustness Evaluations*, NeurIPS 2022,
algorithm 1. For each image the classifier's last linear layer is replaced by a head with two classes: points well
inside the ball on one side, one planted point of its surface on the other. So an adversarial image exists for certain,
and an attack that does not find it would also miss those of the real classifier. How often random sampling finds it
says how hard the test is.

Where we differ. Their head is a logistic regression, ours a linear discriminant: the same half-space up to how it
weighs the features, and solved in closed form. Features are projected at random onto a sixth of the number of pixels
where there are more of them (theirs: 512 features of 3,072 pixels): with about as many features as pixels the head
would recognise the planted point alone, pixel by pixel, which no attack could find. Images whose planted point the head
cannot separate are left out and counted; they abort theirs. Where the attack finds too few on a network whose
activations have fewer than 8 bits, it tries once more with the border half way to the planted point: that point differs
from all others in single codes, too, which no gradient foresees, though the attack comes most of the way. Broken
gradients find neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from coldforge.attacks import Classifier, ThreatModel
from coldforge.compress import ActivationQuantizer, Backward, QuantizedLayer, attacking
from coldforge.evaluate.masking_checks import check, percent
from coldforge.records import MaskingCheckRecord

INNER_POINTS = 512
"""Points on the near side of a head (theirs: 999). With half as many, random sampling succeeds up to twice as often."""
INNER_RADIUS = 0.95
"""They lie within this part of eps (the paper's eta)."""
TIGHT, HALFWAY = 0.999, 0.5
"""The border lies at this part of the way from the farthest inner point to the planted one: first as tight as the
paper's, then half way. There planted flaws find 0 to 0.2, networks at 4 bits 0.8 to 0.9 (tight: 0.3 to 0.7)."""
RANDOM_POINTS = 200
"""Points drawn by the random attack that measures how hard the test is (the paper's number)."""
PIXELS_PER_FEATURE = 6
MAX_FEATURES = 256
"""Limits what one head costs: a system of linear equations of that size."""
RIDGE = 0.1
"""Added to the covariance, in units of its mean diagonal. Features that hardly vary, or single codes of a quantized
layer, must not weigh without bound: with 0.001 an honest pruned network lost 8 points of ``found``, and random sampling
succeeded four times as often."""
STEPS = 50
"""Of the attack: projected gradient ascent, 2.5 eps / STEPS each, as PGD takes them."""
RESTARTS = 3

LEAST_FOUND = 0.75
"""Part of the planted images that the attack must find. Honest networks of the tests: 0.9 to 1; planted flaws: 0 to
0.16. Two networks of our own lay between them (docs/evidence.md)."""
MOST_AT_RANDOM = 0.5
"""Where random sampling finds more of them, the test says nothing."""
MOST_AT_RANDOM_HALFWAY = 0.25
"""The same with the border half way, where chance has it easier."""
LEAST_USABLE = 0.9
"""Where an adversarial image can be planted for fewer images, neither: rounding to 4 bits or less may be so coarse that
features hardly differ within a small ball, and what little differs are single codes that no gradient foresees."""


@dataclass(frozen=True)
class Binarization:
    """What came of the test."""

    images: int
    """Images for which an adversarial one could be planted."""
    attempted: int
    found: float
    """Part of them at which the attack found one."""
    found_at_random: float
    """Part of them at which random sampling found one."""
    features: int
    """Dimensions that a head saw."""
    layer: str
    """Where they come from: the input of this layer, or "logits"."""
    closeness: float = TIGHT
    """Where the border lay."""
    found_tight: float = -1.0
    """What was found at the tight border before; -1: this is that border."""

    @property
    def conclusive(self) -> bool:
        """Whether it says anything about the attack."""
        most = MOST_AT_RANDOM if self.closeness == TIGHT else MOST_AT_RANDOM_HALFWAY
        return self.images >= LEAST_USABLE * self.attempted and self.found_at_random <= most


def binarization_check(found: Binarization) -> MaskingCheckRecord:
    """What the test says, in words."""
    rates = (
        f"of the adversarial images planted for {found.images} images, the attack found {percent(found.found)}, random "
        f"sampling {percent(found.found_at_random)}"
    )
    if found.closeness < TIGHT:
        rates += f", with the border half way to them (all of the way the attack found {percent(found.found_tight)})"
    if not found.conclusive:
        why = f"not conclusive, so not counted ({found.images} of {found.attempted} images could be used): {rates}"
        return MaskingCheckRecord(
            name="binarization",
            passed=True,
            value=found.found,
            threshold=LEAST_FOUND,
            meaning=why,
            conclusive=False,
        )
    return check(
        "binarization",
        found.found,
        LEAST_FOUND,
        rates,
        f"{rates}: what is certainly there is not found",
        "the attack is too weak for this network: let gradients through (BPDA), average them (EOT), take more steps",
        at_least=True,
    )


@dataclass(frozen=True)
class _Heads:
    """One linear head for each of n images: a point is on the far side where ``weight @ features >= border``."""

    weight: Tensor  # (n, F)
    farthest: Tensor  # (n,) float64, inner point
    wanted: Tensor  # (n,) float64, planted point
    at_random: Tensor  # (n,) float64, the best that random sampling comes to
    usable: Tensor  # (n,) bool
    closeness: float = TIGHT

    @property
    def border(self) -> Tensor:
        """``(n,)``"""
        return self.farthest + self.closeness * (self.wanted - self.farthest)

    @property
    def random_success(self) -> Tensor:
        """``(n,)`` bool"""
        return self.at_random >= self.border

    def score(self, features: Tensor, which: Tensor) -> Tensor:
        """How far beyond the border ``features`` (m, F) of the images ``which`` (m,) lie, ``(m,)``."""
        return (features * self.weight[which]).sum(1) - self.border[which].float()


def binarization_test(
    network: nn.Module,
    images: Tensor,
    threat_model: ThreatModel,
    *,
    backwards: tuple[Backward, ...] = ("pass_through",),
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> Binarization:
    """Run the test on every image.

    Args:
        network: classifier with gradients, in evaluation mode.
        images: ``(n, C, H, W)`` in [0, 1].
        threat_model: ball and box.
        backwards: kinds of gradient that the attack tries on a quantized network.
        seed: seed of all draws.
        on_progress: called with the finished fraction.
    """
    say = on_progress or (lambda fraction: None)
    generator = torch.Generator().manual_seed(seed)
    name, raw = _feature_source(network, images[:1])
    project = _projection(len(raw[0]), images[0].numel() // PIXELS_PER_FEATURE, generator)

    def features(points: Tensor) -> Tensor:
        return project(_features(network, name, points))

    with attacking(network):
        heads = _plant(features, images, threat_model, generator, lambda part: say(0.5 * part))
    usable = int(heads.usable.sum())

    def attack(heads: _Heads, begin: float) -> Binarization:
        found = torch.zeros(len(images), dtype=torch.bool)
        tries = [backward for backward in backwards for _ in range(RESTARTS)]
        for number, backward in enumerate(tries):
            left = (heads.usable & ~found).nonzero()[:, 0]
            if not len(left):
                break
            with attacking(network, backward):
                found[left] = _ascend(features, images[left], left, heads, threat_model, generator)
            say(begin + 0.25 * (number + 1) / len(tries))
        return Binarization(
            images=usable,
            attempted=len(images),
            found=int(found.sum()) / max(usable, 1),
            found_at_random=int((heads.random_success & heads.usable).sum()) / max(usable, 1),
            features=heads.weight.shape[1],
            layer=name or "logits",
            closeness=heads.closeness,
        )

    tight = attack(heads, 0.5)
    if tight.found >= LEAST_FOUND or not tight.conclusive or not _coarse(network):
        return tight
    halfway = replace(attack(replace(heads, closeness=HALFWAY), 0.75), found_tight=tight.found)
    return halfway if halfway.found >= LEAST_FOUND and halfway.conclusive else tight


def _coarse(network: nn.Module) -> bool:
    """Whether activations have so few bits that single codes count."""
    return any(isinstance(module, ActivationQuantizer) and module.final_bits < 8 for module in network.modules())


def _plant(
    features: Classifier,
    images: Tensor,
    threat_model: ThreatModel,
    generator: torch.Generator,
    on_progress: Callable[[float], None],
) -> _Heads:
    weights, ends, usable = [], [], []
    inside = ThreatModel(threat_model.norm, INNER_RADIUS * threat_model.eps, threat_model.box)
    for number, image in enumerate(images):
        inner = inside.random_start(image.expand(INNER_POINTS, -1, -1, -1), generator)
        planted = surface_points(image[None], threat_model, generator)
        fresh = image.expand(RANDOM_POINTS // 2, -1, -1, -1)
        tried = [threat_model.random_start(fresh, generator), surface_points(fresh, threat_model, generator)]
        with torch.no_grad():
            seen = features(torch.cat([image[None], inner, planted, *tried])).nan_to_num().double()
        near, far, others = seen[: INNER_POINTS + 1], seen[INNER_POINTS + 1], seen[INNER_POINTS + 2 :]
        centre = near.mean(0)
        covariance = (near - centre).T @ (near - centre) / len(near)
        ridge = RIDGE * covariance.diagonal().mean() + 1e-30
        weight = torch.linalg.solve(covariance + ridge * torch.eye(len(centre), dtype=torch.float64), far - centre)
        weight = weight / weight.norm().clamp_min(1e-300)
        farthest, wanted = float((near @ weight).max()), float(far @ weight)
        border = farthest + TIGHT * (wanted - farthest)
        weights.append(weight.float())
        ends.append((farthest, wanted, float((others @ weight).max())))
        # in float32, as the attack sees it, the planted point must still lie beyond the border and the inner ones not
        scores = seen.float() @ weight.float() - border
        usable.append(bool(scores[INNER_POINTS + 1] >= 0) and bool((scores[: INNER_POINTS + 1] < 0).all()))
        on_progress((number + 1) / len(images))
    farthest, wanted, at_random = torch.tensor(ends, dtype=torch.float64).T
    return _Heads(torch.stack(weights), farthest, wanted, at_random, torch.tensor(usable))


def _ascend(
    features: Classifier,
    images: Tensor,
    names: Tensor,
    heads: _Heads,
    threat_model: ThreatModel,
    generator: torch.Generator,
) -> Tensor:
    """Which of ``images`` (those that ``names`` numbers) an ascent brings beyond the border, (m,) bool."""
    found = torch.zeros(len(images), dtype=torch.bool)
    points = threat_model.random_start(images, generator)
    length = 2.5 * threat_model.eps / STEPS
    for step in range(STEPS + 1):
        left = (~found).nonzero()[:, 0]
        if not len(left):
            break
        inputs = points[left].requires_grad_()
        with torch.enable_grad():
            score = heads.score(features(inputs), names[left])
            (gradient,) = torch.autograd.grad(score.sum(), inputs)
        found[left] = score.detach() >= 0
        if step < STEPS:
            moved = inputs.detach() + threat_model.step(gradient.nan_to_num(), length)
            points[left] = threat_model.project(moved, images[left])
    return found


def surface_points(images: Tensor, threat_model: ThreatModel, generator: torch.Generator) -> Tensor:
    """One random point of the ball's surface for each image ``(n, C, H, W)``: a corner of the linf ball."""
    noise = torch.empty(images.shape).normal_(generator=generator)
    return threat_model.project(images + threat_model.step(noise, threat_model.eps), images)


def _feature_source(network: nn.Module, image: Tensor) -> tuple[str, Tensor]:
    """Name of the linear layer that ran last, "" if there is none, and what it read, ``(1, F)``."""
    ran: list[str] = []
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, QuantizedLayer) and not module.is_conv):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: ran.append(name)))
    try:
        with torch.no_grad():
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    name = ran[-1] if ran else ""
    with torch.no_grad():
        return name, _features(network, name, image)


def _features(network: nn.Module, name: str, points: Tensor) -> Tensor:
    """What layer ``name`` reads when the network sees ``points``, flattened to ``(N, F)``; the logits for ""."""
    if not name:
        logits: Tensor = network(points)
        return logits
    read: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        network(points)
    finally:
        handle.remove()
    return read[-1].reshape(len(points), -1)


def _projection(features: int, limit: int, generator: torch.Generator) -> Classifier:
    """A random projection onto at most ``limit`` dimensions; nothing where there are no more than that."""
    limit = max(min(limit, MAX_FEATURES), 1)
    if features <= limit:
        return lambda values: values
    matrix = torch.empty(features, limit).normal_(generator=generator) / features**0.5
    return lambda values: values @ matrix

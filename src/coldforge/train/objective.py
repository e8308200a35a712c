"""What a step of training minimizes, and what its inner attack maximizes.

With q the target distribution of an image (one-hot, smoothed, or softened by a teacher), S the network, x the clean
image and x' the adversarial one:

- natural: CE(q, S(x)).
- adversarial: CE(q, S(x')); Madry et al., ICLR 2018. The inner attack maximizes CE(y, S(x')).
- trades: CE(q, S(x)) + beta KL(S(x) || S(x')); Zhang et al., ICML 2019, eq. 5. The inner attack maximizes the KL.
- distill: (1 - c) KL(q || S(x')) + c KL(q || S(x)) with the teacher's answer on the clean image as q and c a sixth:
  RSLAD, Zi et al., ICCV 2021, eq. 7. The inner attack maximizes CE(q, S(x')), whose gradient is that of the KL. Mixed
  with the label (``soft`` < 1) also a teacher that is not robust itself can be of use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.attacks import loss_direction, parse_inner, predict, untouched
from coldforge.errors import RecipeError
from coldforge.recipe import TrainSpec

CLEAN_SHARE = 1 / 6
"""Part of the distillation's loss that is taken on clean images."""


class Teacher:
    """Answers of a trained network on clean training images, as probabilities.

    Args:
        network: the teacher.
        temperature: its logits are divided by it.
        images: training images ``(N, C, H, W)`` whose answers are found once and kept, where training always shows
            them as they are; None: each batch is asked about anew.
    """

    def __init__(self, network: nn.Module, temperature: float, images: Tensor | None) -> None:
        self._network, self._temperature = network, temperature
        self._known = self._answer(images) if images is not None else None

    @property
    def asks(self) -> bool:
        """Whether every step takes a forward pass of the teacher."""
        return self._known is None

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """Probabilities ``(B, K)`` for a batch of images that are called ``indices``."""
        return self._answer(images) if self._known is None else self._known[indices]

    def _answer(self, images: Tensor) -> Tensor:
        return torch.softmax(predict(self._network, images) / self._temperature, 1)


@dataclass(frozen=True, eq=False)
class Objective:
    """The losses of one training."""

    spec: TrainSpec
    teacher: Teacher | None = None

    @property
    def robust(self) -> bool:
        """Whether there is an inner attack."""
        return self.spec.objective != "natural"

    @property
    def sees_clean(self) -> bool:
        """Whether the network also learns from the clean images."""
        return self.spec.objective != "adversarial"

    def targets(self, images: Tensor, labels: Tensor, indices: Tensor, classes: int) -> Tensor:
        """Target distributions ``(B, K)``."""
        smooth = self.spec.label_smoothing
        hard = F.one_hot(labels, classes).float() * (1 - smooth) + smooth / classes
        if self.teacher is None:
            return hard
        return torch.lerp(hard, self.teacher(images, indices), self.spec.soft)

    def direction(
        self, network: nn.Module, images: Tensor, labels: Tensor, targets: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """What the inner attack ascends: logits ``(B, K)`` to the gradient of its loss by them."""
        if self.spec.objective == "adversarial":
            return lambda logits: loss_direction(logits, labels, "ce")
        wanted = targets
        if self.spec.objective == "trades":
            with untouched(network), torch.no_grad():
                wanted = torch.softmax(network(images).float(), 1)
        return lambda logits: (torch.softmax(logits.float(), 1) - wanted).to(logits.dtype)

    def loss(self, network: nn.Module, images: Tensor, attacked: Tensor | None, targets: Tensor) -> Tensor:
        """The mean over the batch, from one forward pass over all images that count."""
        if attacked is None:
            return F.cross_entropy(network(images), targets)
        if not self.sees_clean:
            return F.cross_entropy(network(attacked), targets)
        clean, adversarial = network(torch.cat([images, attacked])).float().chunk(2)
        if self.spec.objective == "trades":
            drift = F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction="batchmean")
            return F.cross_entropy(clean, targets) + self.spec.beta * drift
        return torch.lerp(F.cross_entropy(adversarial, targets), F.cross_entropy(clean, targets), CLEAN_SHARE)

    def passes(self, steps: int) -> float:
        """Forward passes of the network that one image costs; a backward pass counts as two.

        Args:
            steps: of the inner attack. Each takes a forward pass and one to the pixels: 2 (gradients of weights are not
                taken).
        """
        if not self.robust:
            return 3.0
        outer = 6.0 if self.sees_clean else 3.0
        return outer * (2.0 if self.spec.awp else 1.0) + 2.0 * steps + (self.spec.objective == "trades")


def check_inner(spec: TrainSpec, augment: str | None = None) -> None:
    """Refuse an inner attack that cannot do what the training is called after.

    Args:
        spec: objective and inner attack.
        augment: how training images are augmented; None: not known yet.

    Raises:
        RecipeError: it starts from perturbations of images that are augmented, or where its gradient is 0.
    """
    start = parse_inner(spec.attack).start
    if spec.objective != "natural" and start == "previous" and augment not in (None, "none"):
        raise RecipeError(
            f"{spec.attack} starts where an image's perturbation ended in the epoch before, which augmentation moves; "
            'expected data.augment = "none", or another inner attack such as n-fgsm'
        )
    if spec.objective == "trades" and start == "image":
        raise RecipeError(
            f'{spec.attack} starts at the image, where the gradient of the objective "trades" is 0: it would never '
            "leave it; expected an inner attack with a random start, such as pgd-7"
        )

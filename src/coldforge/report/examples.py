"""Adversarial examples and what the networks answer: from which the report draws its images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coldforge.errors import UsageError


@dataclass(frozen=True, eq=False)
class Examples:
    """A few test images, attacked on each network separately (white box), and every answer.

    Raises:
        UsageError: where shapes, networks or labels do not fit together.
    """

    clean: NDArray[np.float32]
    """Clean images in [0, 1], (K, C, H, W)."""
    labels: NDArray[np.int64]
    """True labels, (K,)."""
    classes: tuple[str, ...]
    """Class names, one a label."""
    adversarial: dict[str, NDArray[np.float32]]
    """Label of a network to the images that were made against it, (K, C, H, W)."""
    predictions: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    """Label of a network to its answers on the clean and on its own adversarial images, (K,) each."""
    eps: float
    """Radius of the ball in pixel units."""
    norm: str = "linf"
    """Norm of the ball."""

    def __post_init__(self) -> None:
        if self.clean.ndim != 4 or self.clean.shape[1] not in (1, 3) or not len(self.clean):
            raise UsageError(f"examples: expected clean images (K, 1 or 3, H, W), got {self.clean.shape}")
        count = len(self.clean)
        _expect("labels", self.labels.shape, (count,))
        if not self.adversarial or set(self.adversarial) != set(self.predictions):
            raise UsageError(
                "examples: expected the same networks, at least one, in adversarial and predictions, got "
                f"{sorted(self.adversarial)} and {sorted(self.predictions)}"
            )
        for label, images in self.adversarial.items():
            _expect(f"adversarial images of {label!r}", images.shape, self.clean.shape)
            for answers in self.predictions[label]:
                _expect(f"predictions of {label!r}", answers.shape, (count,))
        answers = np.concatenate([self.labels, *(part for pair in self.predictions.values() for part in pair)])
        if answers.min() < 0 or answers.max() >= len(self.classes):
            raise UsageError(
                f"examples: expected labels from 0 to {len(self.classes) - 1} ({len(self.classes)} class names), "
                f"got {answers.min()} to {answers.max()}"
            )

    def __len__(self) -> int:
        return len(self.clean)


def _expect(what: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise UsageError(f"examples: expected {what} of shape {expected}, got {got}")

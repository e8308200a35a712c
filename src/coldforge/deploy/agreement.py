"""Do two classifiers, the differentiable twin and the exported file, give the same labels?"""

from __future__ import annotations

from torch import Tensor

from coldforge.errors import UsageError


def agreement(twin_labels: Tensor, artifact_labels: Tensor) -> float:
    """Fraction of equal labels.

    Args:
        twin_labels: (N,) integers.
        artifact_labels: (N,) integers, of the same images in the same order.

    Raises:
        UsageError: where the shapes differ or there are no labels.
    """
    if twin_labels.shape != artifact_labels.shape or twin_labels.ndim != 1 or len(twin_labels) == 0:
        raise UsageError(
            "agreement: expected two label vectors of the same images, at least one, "
            f"got shapes {tuple(twin_labels.shape)} and {tuple(artifact_labels.shape)}"
        )
    return int((twin_labels.cpu() == artifact_labels.cpu()).sum()) / len(twin_labels)

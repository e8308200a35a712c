"""Do two classifiers, the differentiable twin and the exported file, give the same labels?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coldforge.deploy.runtime import TILE, Session, pixels
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


@torch.no_grad()
def check_agreement(
    twin: Callable[[Tensor], Tensor], artifact: Session, images: Tensor, *, tile: int = TILE
) -> tuple[float, Tensor]:
    """Compare the twin with its file on a set of images, tile by tile.

    Args:
        twin: float32 (N, C, H, W) in [0, 1] to logits (N, K); in evaluation mode.
        artifact: the exported file.
        images: uint8 or float32 in [0, 1], (N, C, H, W).
        tile: images per call.

    Returns:
        Fraction of equal labels, and the artifact's labels, int64 (N,).

    Raises:
        UsageError: for no images, or images that do not fit the file.
    """
    answers = artifact.labels(images, tile=tile)
    starts = range(0, len(images), tile)
    labels = [twin(pixels(images[start : start + tile])).argmax(1).cpu() for start in starts]
    return agreement(torch.cat(labels) if labels else answers, answers), answers

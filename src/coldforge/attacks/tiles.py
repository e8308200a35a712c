"""How many images a network is asked about at once.

Kernels may round differently for different numbers of images, and an image's verdict must not depend on how many others
there are. So :data:`TILE` images at a time are the rule. Fewer are asked about where no more are left, and only after
this network was seen to give each image of two smaller tiles the same logits and gradients, to the bit, as in one of
the usual size: which it does or does not by the kernels that it runs, whatever the pixels. What holds for the smallest
is taken to hold for those between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coldforge.attacks.query import TILE, Classifier, query, untouched

MULTIPLE = 8
"""Tiles have a multiple of this many images."""
_TRIED = (MULTIPLE, 5 * MULTIPLE)
_WORTH = 4
"""Smaller tiles are tried only where one promises to save so many times the images that trying takes."""
_SHRINK = 0.75
"""A tile is made smaller where at most this part of it is still in use."""


class Tiles:
    """Chooses the sizes of tiles for one network.

    Args:
        model: the classifier.
        shape: of an image, ``(C, H, W)``.
        gradients: whether it is asked for gradients too.
    """

    def __init__(self, model: Classifier, shape: Sequence[int], *, gradients: bool) -> None:
        self._model, self._shape, self._gradients = model, tuple(shape), gradients
        self._alike: bool | None = None  # not known yet

    def next(self, size: int, busy: int, passes: int) -> int:
        """The size to go on with when nothing waits any more.

        Args:
            size: that of now.
            busy: images that are still attacked.
            passes: how often they will be asked about at most.
        """
        smaller = _rounded_up(busy)
        if smaller > _SHRINK * size:
            return size
        if self._alike is None and passes * (size - smaller) < _WORTH * (sum(_TRIED) + TILE):
            return size
        return smaller if self.alike() else size

    def of(self, images: int) -> int:
        """The size in which so many images are answered once."""
        return min(_rounded_up(images), TILE) if self.alike() else TILE

    def alike(self) -> bool:
        """Whether each image of a smaller tile gets what it gets in one of the usual size."""
        if self._alike is None:
            images = torch.rand(TILE, *self._shape, generator=torch.Generator().manual_seed(0))
            with untouched(self._model):
                usual = self._ask(images)
                self._alike = all(
                    torch.equal(one[:size], other)
                    for size in _TRIED
                    for one, other in zip(usual, self._ask(images[:size]), strict=True)
                )
        return self._alike

    def _ask(self, images: Tensor) -> list[Tensor]:
        def direction(logits: Tensor) -> Tensor:
            return torch.cos(torch.arange(logits.shape[1])).to(logits.dtype).expand_as(logits)

        logits, gradient = query(self._model, images, direction if self._gradients else None)
        return [logits] if gradient is None else [logits, gradient]


def _rounded_up(images: int) -> int:
    return max(-(-images // MULTIPLE) * MULTIPLE, MULTIPLE)

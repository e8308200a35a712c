"""How many images a network is asked about at once.

Kernels may round differently for different numbers of images, and an image's verdict must not depend on how many others
there are. So :data:`TILE` images at a time are the rule. Fewer are asked about where no more are left, and only after
this network was seen to give each image of such a tile the same logits and gradients, to the bit, as in one of the
usual size: which it does or does not by the kernels that it runs, whatever the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coldforge.attacks.query import TILE, Classifier, query, untouched

MULTIPLE = 8
"""Tiles have a multiple of this many images."""
_FEW = (2, 4)
"""Smaller sizes, for images that are asked about once: a judge is mostly shown one or two."""
_WORTH = 4
"""A size is tried only where it promises to save so many times the images that trying it takes."""
_SHRINK = 0.9
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
        self._usual: list[Tensor] = []  # what a tile of the usual size is answered
        self._alike: dict[int, bool] = {TILE: True}
        self._blind: dict[int, bool] = {}

    def next(self, size: int, busy: int, passes: int) -> int:
        """The size to go on with when nothing waits any more.

        Args:
            size: that of now.
            busy: images that are still attacked.
            passes: how often they will be asked about, roughly.
        """
        smaller = _rounded_up(busy)
        if smaller > _SHRINK * size:
            return size
        trying = 0 if smaller in self._alike else smaller + (0 if self._usual else TILE)
        return smaller if passes * (size - smaller) >= _WORTH * trying and self.alike(smaller) else size

    def of(self, images: int) -> int:
        """The size in which so many images are answered once."""
        sizes = (*_FEW, min(_rounded_up(images), TILE))
        return next((size for size in sizes if size >= min(images, TILE) and self.alike(size)), TILE)

    def alike(self, size: int) -> bool:
        """Whether each image of a tile of ``size``, a smaller one, gets what it gets in one of the usual size."""
        if size not in self._alike:
            images = self._images()
            with untouched(self._model):
                self._usual = self._usual or self._ask(images)
                try:
                    found = self._ask(images[:size])
                except Exception:  # foreign code may refuse another size in any way it likes
                    found = []
            same = [torch.equal(usual[:size], one) for usual, one in zip(self._usual, found, strict=False)]
            self._alike[size] = bool(same) and all(same)
        return self._alike[size]

    def blind(self, size: int) -> bool:
        """Whether a tile of ``size`` gets the same logits where no gradients are wanted."""
        if size not in self._blind:
            images = self._images()[:size]
            with untouched(self._model):
                self._blind[size] = torch.equal(self._ask(images)[0], query(self._model, images, None)[0])
        return self._blind[size]

    def _images(self) -> Tensor:
        """A tile to try things with."""
        return torch.rand(TILE, *self._shape, generator=torch.Generator().manual_seed(0))

    def _ask(self, images: Tensor) -> list[Tensor]:
        def direction(logits: Tensor) -> Tensor:
            return torch.cos(torch.arange(logits.shape[1])).to(logits.dtype).expand_as(logits)

        logits, gradient = query(self._model, images, direction if self._gradients else None)
        return [logits] if gradient is None else [logits, gradient]


def _rounded_up(images: int) -> int:
    return max(-(-images // MULTIPLE) * MULTIPLE, MULTIPLE)

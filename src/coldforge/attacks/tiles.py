"""How many images a network is asked about at once.

Kernels may round differently for different numbers of images, and an image's verdict must not depend on how many others
there are. So :data:`TILE` images at a time are the rule. Another number is taken where it saves time (more, while many
wait; fewer, for the last ones) and only after this network was seen to give each image of such a tile the same logits
and gradients, to the bit, as in one of the usual size: which it does or does not by the kernels that it runs, whatever
the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coldforge.attacks.query import TILE, Classifier, query

MULTIPLE = 8
"""Tiles have a multiple of this many images."""
LARGEST = 256
_PIXELS = 2**20
"""A tile larger than the usual one has at most so many values, so that large images do not fill the memory."""
_WORTH = 4
"""A size is tried out only where it promises to save so many times the images that trying it takes."""
_SHRINK = 0.75
"""A tile is made smaller where at most this part of it is still in use."""


class Tiles:
    """Chooses the sizes of the tiles of one attack.

    Args:
        model: the classifier.
        shape: of an image, ``(C, H, W)``.
        gradients: whether it is asked for gradients too.
    """

    def __init__(self, model: Classifier, shape: Sequence[int], *, gradients: bool) -> None:
        self._model, self._shape, self._gradients = model, tuple(shape), gradients
        self._fits = {TILE: True}

    def first(self, images: int, passes: int) -> int:
        """The size to begin with.

        Args:
            images: how many wait.
            passes: how often an image will be asked about at most.
        """
        numbers = torch.Size(self._shape).numel()
        size = min(_rounded_up(images), max(_PIXELS // numbers // MULTIPLE * MULTIPLE, TILE), LARGEST)
        if size <= TILE or images * passes < _WORTH * 2 * size:
            return TILE
        return size if self.fits(size) else TILE

    def next(self, size: int, busy: int, passes: int) -> int:
        """The size to go on with when nothing waits any more.

        Args:
            size: that of now.
            busy: images that are still attacked.
            passes: how often they will be asked about at most.
        """
        smaller = _rounded_up(busy)
        if smaller > _SHRINK * size or passes * (size - smaller) < _WORTH * (smaller + TILE):
            return size
        return smaller if self.fits(smaller) else size

    def fits(self, size: int) -> bool:
        """Whether each image of a tile of ``size`` gets what it gets in one of the usual size."""
        if size not in self._fits:
            generator = torch.Generator().manual_seed(size)
            images = torch.rand(max(size, TILE), *self._shape, generator=generator)
            usual = [self._ask(part) for part in _filled(images)]
            self._fits[size] = all(
                torch.equal(torch.cat(parts)[:size], found)
                for parts, found in zip(zip(*usual, strict=True), self._ask(images[:size]), strict=True)
            )
        return self._fits[size]

    def _ask(self, images: Tensor) -> list[Tensor]:
        def direction(logits: Tensor) -> Tensor:
            return torch.cos(torch.arange(logits.shape[1])).to(logits.dtype).expand_as(logits)

        logits, gradient = query(self._model, images, direction if self._gradients else None)
        return [logits] if gradient is None else [logits, gradient]


def _rounded_up(images: int) -> int:
    return max(-(-images // MULTIPLE) * MULTIPLE, MULTIPLE)


def _filled(images: Tensor) -> list[Tensor]:
    """Tiles of the usual size, the last one filled up."""
    parts = list(images.split(TILE))
    missing = TILE - len(parts[-1])
    parts[-1] = torch.cat([parts[-1], images[:missing]])
    return parts

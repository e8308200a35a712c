"""How many images a network is asked about at once.

Kernels may round differently for different numbers of images, and an image's verdict must not depend on how many others
there are. So :data:`TILE` images at a time are the rule. Another number is taken where it saves time (more, while many
wait; fewer, for the last ones) and only after this network was seen to give each image of such a tile the same logits
and gradients, to the bit, as in one of the usual size: which it does or does not by the kernels that it runs, whatever
the pixels. The smallest and the largest size are tried; what holds there is taken to hold between them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from coldforge.attacks.query import TILE, Classifier, query, untouched

MULTIPLE = 8
"""Tiles have a multiple of this many images."""
LARGEST = 256
_PIXELS = 2**20
"""A tile larger than the usual one has at most so many values, so that large images do not fill the memory."""
_WORTH = 4
"""Smaller tiles are tried only where one promises to save so many times the images that trying takes."""
_WORTH_LARGER = 30
"""A larger one saves a tenth of the time at best, and is tried where so many of its tiles will be asked about."""
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
        self._fits = {TILE: True}

    def first(self, images: int, passes: int) -> int:
        """The size to begin an attack with.

        Args:
            images: how many wait.
            passes: how often an image will be asked about at most.
        """
        size = min(_rounded_up(images), LARGEST)
        if size <= TILE or size * torch.Size(self._shape).numel() > _PIXELS or images * passes < _WORTH_LARGER * size:
            return TILE
        return size if self.fits(size) and self._is_faster(size) else TILE

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
        known = smaller >= TILE or MULTIPLE in self._fits
        if not known and passes * (size - smaller) < _WORTH * (MULTIPLE + TILE):
            return size
        return smaller if smaller >= TILE or self.fits(MULTIPLE) else min(size, TILE)

    def of(self, images: int) -> int:
        """The size in which so many images are answered once."""
        return MULTIPLE if images <= TILE // 2 and self.fits(MULTIPLE) else TILE

    def fits(self, size: int) -> bool:
        """Whether each image of a tile of ``size`` gets what it gets in one of the usual size."""
        if size not in self._fits:
            images = torch.rand(max(size, TILE), *self._shape, generator=torch.Generator().manual_seed(size))
            with untouched(self._model):
                usual = [torch.cat(parts)[:size] for parts in zip(*map(self._ask, _filled(images)), strict=True)]
                found = self._ask(images[:size])
            self._fits[size] = all(map(torch.equal, usual, found))
        return self._fits[size]

    def _is_faster(self, size: int) -> bool:
        """Whether an image takes less time in a tile of ``size`` than in one of the usual size. A wrong answer, on a
        machine that does other things too, costs time and nothing else.
        """
        images = torch.zeros(size, *self._shape)
        seconds = []
        for part in (images, images[:TILE]):
            started = time.perf_counter()
            self._ask(part)
            seconds.append((time.perf_counter() - started) / len(part))
        return seconds[0] < seconds[1]

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
    parts[-1] = torch.cat([parts[-1], images[: TILE - len(parts[-1])]])
    return parts

"""Training batches: a pure function of (seed, epoch), so that training resumes at any step to the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from coldforge.data.images import AUGMENTS, Augment, ImageSet
from coldforge.errors import DataError

PADDING = 4
"""Black pixels added on each side before the random crop."""


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches of one epoch over ``n`` images; the last, incomplete one is dropped unless it is the only one."""
    return max(1, n // batch_size)


def epoch_batches(
    data: ImageSet, *, batch_size: int, seed: int, epoch: int, augment: Augment = "none", start: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One epoch of shuffled batches ``(pixels, labels, indices)``.

    Every draw comes from (seed, epoch) or (seed, epoch, step): the batches from step ``start`` on are those that an
    undisturbed epoch yields there.

    Args:
        data: the images.
        batch_size: B; a set smaller than B yields one smaller batch, otherwise the last incomplete batch is dropped.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        augment: "none", or "crop-flip" as in :func:`crop_flip`.
        start: first step to yield, from 0.

    Yields:
        pixels: ``float32`` (B, C, H, W) in [0, 1].
        labels: ``int64`` (B,).
        indices: ``int64`` (B,), places of the images in ``data``.

    Raises:
        DataError: for a batch size below 1, an unknown augmentation or a step outside the epoch (at once, not at the
            first batch).
    """
    if batch_size < 1:
        raise DataError(f"batch_size: expected at least 1, got {batch_size}")
    if augment not in AUGMENTS:
        raise DataError(f"augment: expected one of {', '.join(AUGMENTS)}, got {augment!r}")
    steps = steps_per_epoch(len(data), batch_size)
    if not 0 <= start <= steps:
        raise DataError(f"start: expected a step in 0 ... {steps}, got {start}")
    order = torch.randperm(len(data), generator=_generator(seed, epoch))

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for step in range(start, steps):
            indices = order[step * batch_size : (step + 1) * batch_size]
            images = data.images[indices]
            if augment == "crop-flip":
                images = crop_flip(images, _generator(seed, epoch, step))
            yield images.to(torch.float32).div_(255), data.labels[indices], indices

    return batches()


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Zero-pad by 4, crop at a random place, mirror half of the images: the usual CIFAR augmentation.

    Args:
        images: (B, C, H, W), any type; not changed.
        generator: of the offsets and the flips.

    Returns:
        A new tensor of the same shape and type.
    """
    batch, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (PADDING,) * 4)
    offsets = torch.randint(2 * PADDING + 1, (2, batch, 1), generator=generator)
    flip = torch.rand(batch, 1, generator=generator) < 0.5
    rows = offsets[0] + torch.arange(height)  # (B, H)
    columns = torch.arange(width).expand(batch, width)
    columns = offsets[1] + torch.where(flip, width - 1 - columns, columns)  # (B, W)
    # One gather for the batch; the sliced channel axis moves to the end: (B, H, W, C).
    cropped = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()


def _generator(*parts: int) -> torch.Generator:
    digest = hashlib.sha256(repr(("coldforge batches", *parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

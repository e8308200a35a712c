"""From arrays in memory to a checked data set, and the split of validation images from *train*."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coldforge.data.images import Augment, DataSplits, ImageSet
from coldforge.errors import DataError

VALIDATION_SEED = 20240316
"""Seed of the split; fixed, so that runs with different recipe seeds hold out the same images."""

ORDER_SEED = 20240317
"""Seed of the order of :func:`mixed`; fixed for the same reason."""


def from_arrays(
    train_images: Any,
    train_labels: Any,
    test_images: Any,
    test_labels: Any,
    *,
    classes: Sequence[str] | None = None,
    name: str = "arrays",
    validation: int = 0,
    augment: Augment = "none",
) -> DataSplits:
    """A data set from NumPy arrays or torch tensors.

    Args:
        train_images: ``uint8`` or floating point in [0, 1] (rounded to 8 bits), (N, C, H, W) or (N, H, W).
        train_labels: whole numbers, (N,).
        test_images: as ``train_images``.
        test_labels: as ``train_labels``.
        classes: class names; by default "0" ... "K-1" with K from the labels, each of which must occur in train.
        name: readable name.
        validation: images split from train; 0 chooses 5,000, or a twelfth of train if that is less.
        augment: augmentation of training batches.

    Raises:
        DataError: for pixels outside [0, 1], labels out of range, or shapes that do not fit.
    """
    labels = [to_labels(train_labels, name=f"{name} train"), to_labels(test_labels, name=f"{name} test")]
    images = [to_images(train_images, name=f"{name} train"), to_images(test_images, name=f"{name} test")]
    if classes is None:
        classes = numbered_classes(labels[0].tolist(), labels[1].tolist(), name=name)
    train, test = (
        ImageSet(pixels, targets, tuple(classes), f"{name} {part}")
        for pixels, targets, part in zip(images, labels, ("train", "test"), strict=True)
    )
    return split(mixed(train), mixed(test), validation=validation, augment=augment)


def numbered_classes(train: Sequence[int], test: Sequence[int], *, name: str) -> tuple[str, ...]:
    """Class names "0" ... "K-1" of labels that are numbers.

    Raises:
        DataError: a number up to the largest one has no training image, so that labels do not count from 0.
    """
    known, seen = max([*train, *test, 1]) + 1, set(train)
    missing = next((label for label in range(known) if label not in seen), None)
    if missing is not None and min(seen, default=-1) >= 0:
        raise DataError(
            f"{name}: expected labels 0 ... {known - 1}, each with training images, found none with label {missing}; "
            "number the classes from 0 without gaps, or name them all (from_arrays(..., classes=...))"
        )
    return tuple(str(label) for label in range(known))


def mixed(images: ImageSet) -> ImageSet:
    """The same images in an order of our own, always the same one.

    Folders and many data sets come sorted by class: the first n images, which calibration and ``evaluate.n`` take,
    would be of one class.
    """
    return images.take(torch.randperm(len(images), generator=torch.Generator().manual_seed(ORDER_SEED)))


def split(train: ImageSet, test: ImageSet, *, validation: int = 0, augment: Augment = "none") -> DataSplits:
    """Hold out ``validation`` images of ``train`` (0: 5,000, or a twelfth if that is less) by a fixed permutation.

    Raises:
        DataError: where nothing would be left to train on.
    """
    n = len(train)
    held = validation or max(1, min(5000, n // 12))
    if held >= n:
        raise DataError(
            f"data.validation: expected fewer images than {train.name} has ({n}), got {held}; "
            "at least one must stay for training"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(VALIDATION_SEED))
    part = train.take(order[:held].sort().values)
    return DataSplits(
        train=train.take(order[held:].sort().values),
        validation=ImageSet(part.images, part.labels, part.classes, f"{train.name} (validation part)"),
        test=test,
        augment=augment,
    )


def to_images(array: Any, *, name: str) -> Tensor:
    """Check pixels and bring them to ``uint8`` (N, C, H, W).

    Raises:
        DataError: for another type or shape, or floats outside [0, 1].
    """
    images = _tensor(array, name=f"{name} images")
    if images.ndim == 3:
        images = images.unsqueeze(1)
    if images.ndim != 4:
        raise DataError(f"{name} images: expected (N, C, H, W) or (N, H, W), got shape {tuple(images.shape)}")
    if images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        raise DataError(
            f"{name} images: expected channels first, (N, C, H, W), got shape {tuple(images.shape)}; "
            "move the last axis to the second place"
        )
    if images.dtype == torch.uint8:
        return images.contiguous()  # the layout in memory must not change what a convolution rounds
    if not images.is_floating_point():
        raise DataError(f"{name} images: expected uint8 or floating point in [0, 1], got {array.dtype}")
    if images.numel() == 0:
        return images.to(torch.uint8)
    low, high = float(images.min()), float(images.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError(f"{name} images: expected finite pixels in [0, 1], found NaN or infinity")
    if low < 0 or high > 1:
        raise DataError(
            f"{name}: inputs outside [0, 1]: found {low:g} ... {high:g}; give pixels before normalization; "
            "normalization is a layer of the model"
        )
    return images.contiguous().to(torch.float32).mul(255).round_().to(torch.uint8)


def to_labels(array: Any, *, name: str) -> Tensor:
    """Check labels and bring them to ``int64`` (N,).

    Raises:
        DataError: for another shape, or for numbers that are not whole.
    """
    labels = _tensor(array, name=f"{name} labels")
    if labels.ndim != 1:
        raise DataError(f"{name} labels: expected shape (N,), got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{name} labels: expected whole numbers, got {str(labels.dtype).removeprefix('torch.')}")
    return labels.to(torch.int64)


def _tensor(array: Any, *, name: str) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach().cpu().clone()
    try:
        return torch.from_numpy(np.array(array))  # a copy: the caller's array may be read-only, or change later
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}: expected a NumPy array or a torch tensor, got {type(array).__name__} ({error})"
        ) from None

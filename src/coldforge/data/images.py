"""Images in memory: one set, and the three parts of a data set.

Pixels stay 8-bit until a batch is drawn; everything above this layer sees ``float32`` in [0, 1].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from coldforge.errors import DataError
from coldforge.recipe import DataSpec

Augment = Literal["none", "crop-flip"]
AUGMENTS: tuple[Augment, ...] = ("none", "crop-flip")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled 8-bit images of one size.

    Raises:
        DataError: for a wrong type or shape, no images at all, or a label that names no class.
    """

    images: Tensor
    """``uint8``, (N, C, H, W)."""
    labels: Tensor
    """``int64``, (N,); each in 0 ... K - 1."""
    classes: tuple[str, ...]
    """Names of the K classes."""
    name: str = "images"
    """Readable, for messages and reports; not part of the fingerprint."""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise DataError(
                f"{self.name}: expected images as uint8 (N, C, H, W), got {_dtype(images)} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise DataError(f"{self.name}: expected labels as int64 (N,), got {_dtype(labels)} {tuple(labels.shape)}")
        if len(images) != len(labels):
            raise DataError(
                f"{self.name}: expected one label per image, got {len(images)} images, {len(labels)} labels"
            )
        if images.numel() == 0:
            raise DataError(f"{self.name}: expected at least one image, got shape {tuple(images.shape)}")
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise DataError(f"{self.name}: expected at least two classes with distinct names, got {list(self.classes)}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"{self.name}: labels out of range: expected 0 ... {len(self.classes) - 1}, found {low} ... {high}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def take(self, indices: slice | Sequence[int] | Tensor) -> ImageSet:
        """The images at ``indices``, in that order; a slice shares memory."""
        if not isinstance(indices, slice):
            indices = torch.as_tensor(indices, dtype=torch.int64)
        return ImageSet(self.images[indices], self.labels[indices], self.classes, self.name)

    def pixels(self, indices: slice | Sequence[int] | Tensor | None = None) -> Tensor:
        """Images as ``float32`` (n, C, H, W) in [0, 1]; all of them without ``indices``."""
        images = self.images
        if indices is not None:
            images = images[indices if isinstance(indices, slice) else torch.as_tensor(indices, dtype=torch.int64)]
        return images.to(torch.float32).div_(255)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over shape, pixels, labels and class names."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        digest.update(self.images.contiguous().reshape(-1).numpy().data)
        digest.update(self.labels.contiguous().numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class DataSplits:
    """Train, validation and test part of a data set. The test part is never used to choose anything.

    Raises:
        DataError: where the parts differ in classes or image shape.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    augment: Augment = "none"
    """Augmentation of training batches."""
    named: DataSpec | None = field(default=None, init=False)
    """What :func:`load_data` was asked for; None for arrays, and for parts that were put together otherwise."""

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTS:
            raise DataError(f"augment: expected one of {', '.join(AUGMENTS)}, got {self.augment!r}")
        for part in (self.validation, self.test):
            if part.image_shape != self.train.image_shape:
                raise DataError(
                    f"{part.name}: expected images of (C, H, W) = {self.train.image_shape} as in "
                    f"{self.train.name}, got {part.image_shape}"
                )
            if part.classes != self.train.classes:
                raise DataError(
                    f"{part.name}: expected the classes of {self.train.name} {list(self.train.classes)}, "
                    f"got {list(part.classes)}"
                )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        return self.train.classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.train.image_shape

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the fingerprints of the parts and the augmentation."""
        return _digest(self.train.fingerprint, self.validation.fingerprint, self.test.fingerprint, self.augment)

    @cached_property
    def training_fingerprint(self) -> str:
        """SHA-256 (hex) over what trainings see: all but the test images."""
        return _digest(self.train.fingerprint, self.validation.fingerprint, self.augment)

    @property
    def mean(self) -> tuple[float, ...]:
        """Per-channel mean of the train and validation pixels in [0, 1]."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Per-channel (population) standard deviation of the train and validation pixels in [0, 1]."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        means, stds = [], []
        for channel in range(self.image_shape[0]):
            histogram = sum(
                torch.bincount(part.images[:, channel].reshape(-1), minlength=256)
                for part in (self.train, self.validation)
            )
            assert isinstance(histogram, Tensor)
            counts: list[int] = histogram.tolist()
            # Whole numbers until the last step: the same bits on every machine, at any size.
            n = sum(counts)
            total = sum(value * count for value, count in enumerate(counts))
            squares = sum(value * value * count for value, count in enumerate(counts))
            means.append(total / (n * 255))
            stds.append(math.sqrt((n * squares - total * total) / (n * n)) / 255)
        return tuple(means), tuple(stds)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()

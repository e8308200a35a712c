from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from coldforge.data import from_arrays
from coldforge.data.arrays import mixed, split, to_images
from coldforge.data.images import ImageSet
from coldforge.errors import DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 3, 8, 8), dtype=np.uint8)
LABELS = np.arange(24) % 3


def call(images: Any = IMAGES, labels: Any = LABELS, **options: Any) -> Any:
    return from_arrays(images, labels, IMAGES[:6], LABELS[:6], **options)


def test_numpy_torch_and_floats_give_the_same_set() -> None:
    expected = call()
    assert call(torch.from_numpy(IMAGES), torch.from_numpy(LABELS)).fingerprint == expected.fingerprint
    assert call(IMAGES / 255).fingerprint == expected.fingerprint
    assert call((IMAGES / 255).astype(np.float32), LABELS.astype(np.uint8)).fingerprint == expected.fingerprint
    assert expected.classes == ("0", "1", "2")


@pytest.mark.parametrize("scale", [1, 255])
def test_the_layout_in_memory_does_not_matter(scale: int) -> None:
    images = torch.from_numpy(IMAGES if scale == 1 else IMAGES / 255).contiguous(memory_format=torch.channels_last)
    splits = from_arrays(images, LABELS, images, LABELS)
    assert splits.test.pixels().is_contiguous()
    expected = mixed(ImageSet(torch.from_numpy(IMAGES), torch.from_numpy(LABELS), ("0", "1", "2"), "here"))
    assert torch.equal(splits.test.images, expected.images)
    assert torch.equal(splits.test.labels, expected.labels)


def test_grey_images_get_a_channel() -> None:
    splits = from_arrays(IMAGES[:, 0], LABELS, IMAGES[:6, 0], LABELS[:6])
    assert splits.image_shape == (1, 8, 8)


def test_the_callers_arrays_are_copied() -> None:
    images = torch.from_numpy(IMAGES.copy())
    splits = from_arrays(images, LABELS, images, LABELS)
    before = splits.test.images.clone()
    images.zero_()
    assert torch.equal(splits.test.images, before)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES / 127.5 - 1, LABELS, "inputs outside [0, 1]: found -1 ... 1; give pixels before normalization; norm"),
        (IMAGES.astype(np.float32), LABELS, "found 0 ... 255"),
        (np.where(IMAGES > 9, np.nan, 0.5), LABELS, "found NaN or infinity"),
        (IMAGES.astype(np.int64), LABELS, "expected uint8 or floating point in [0, 1], got int64"),
        (IMAGES.transpose(0, 2, 3, 1), LABELS, "expected channels first, (N, C, H, W), got shape (24, 8, 8, 3)"),
        (IMAGES[0, 0], LABELS, "expected (N, C, H, W) or (N, H, W), got shape (8, 8)"),
        (IMAGES, LABELS / 2, "expected whole numbers, got float64"),
        (IMAGES, LABELS[:, None], "expected shape (N,), got (24, 1)"),
        (IMAGES, LABELS - 1, "labels out of range: expected 0 ... 2, found -1 ... 1"),
        (["a.png"], LABELS, "expected a NumPy array or a torch tensor, got list"),
    ],
)
def test_bad_input(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        call(images, labels)


@pytest.mark.parametrize(
    ("given", "missing"), [(LABELS + 1, 0), (LABELS * 2, 1), (np.where(LABELS == 2, 1007, LABELS), 2)]
)
def test_labels_that_do_not_count_from_0_make_no_classes(given: Any, missing: int) -> None:
    """A class without images would be an output that is never right, in silence."""
    message = rf"expected labels 0 \.\.\. {given.max()}, each with training images, found none with label {missing};"
    with pytest.raises(DataError, match=message):
        from_arrays(IMAGES, given, IMAGES[:6], given[:6])
    named = from_arrays(IMAGES, LABELS, IMAGES[:6], LABELS[:6], classes=("a", "b", "c", "never seen"))
    assert len(named.classes) == 4


def test_label_beyond_the_given_classes() -> None:
    with pytest.raises(
        DataError, match=re.escape("arrays train: labels out of range: expected 0 ... 1, found 0 ... 2")
    ):
        call(classes=["cat", "dog"])


def test_rounding_to_bytes_is_to_the_nearest() -> None:
    levels = torch.arange(256).reshape(1, 1, 16, 16)
    assert torch.equal(to_images(levels / 255 + 0.4 / 255 * (levels < 255), name="x"), levels.to(torch.uint8))


def numbered(n: int) -> ImageSet:
    images = torch.arange(n, dtype=torch.int32).view(torch.uint8).reshape(n, 1, 2, 2)  # each image is its number
    return ImageSet(images, torch.arange(n) % 2, ("a", "b"), "numbered")


def numbers(data: ImageSet) -> list[int]:
    found: list[int] = data.images.reshape(len(data), 4).contiguous().view(torch.int32).flatten().tolist()
    return found


@pytest.mark.parametrize("n", [1, 2, 500])
def test_mixed_is_always_the_same_permutation_and_keeps_pairs(n: int) -> None:
    data = numbered(n)
    torch.manual_seed(1)
    first = mixed(data)
    torch.manual_seed(2)
    second = mixed(data)
    assert sorted(numbers(first)) == list(range(n))
    assert numbers(first) == numbers(second)
    assert first.labels.tolist() == [number % 2 for number in numbers(first)]
    assert (first.classes, first.name) == (data.classes, data.name)
    assert numbers(data) == list(range(n))
    assert n < 3 or numbers(first) != list(range(n))


def test_arrays_sorted_by_class_do_not_stay_so() -> None:
    labels = np.arange(1000) // 100
    images = np.broadcast_to(labels[:, None, None, None].astype(np.uint8), (1000, 1, 2, 2))
    splits = from_arrays(images, labels, images, labels)
    for part in (splits.train, splits.validation, splits.test):
        assert set(part.labels[:60].tolist()) == set(range(10))
        assert torch.equal(part.images[:, 0, 0, 0].long(), part.labels)


@pytest.mark.parametrize(("n", "validation", "expected"), [(1200, 0, 100), (72000, 0, 5000), (1200, 7, 7), (2, 0, 1)])
def test_validation_is_split_from_train(n: int, validation: int, expected: int) -> None:
    train, test = numbered(n), numbered(5)
    splits = split(train, test, validation=validation)
    assert len(splits.validation) == expected
    assert sorted(numbers(splits.train) + numbers(splits.validation)) == list(range(n))
    assert numbers(splits.train) == sorted(numbers(splits.train))  # file order
    assert splits.test is test


def test_validation_is_the_same_each_time_and_not_a_prefix() -> None:
    torch.manual_seed(1)
    first = numbers(split(numbered(1200), numbered(5)).validation)
    torch.manual_seed(2)
    assert numbers(split(numbered(1200), numbered(5)).validation) == first
    assert first != list(range(100))


def test_validation_must_leave_something() -> None:
    with pytest.raises(
        DataError, match=re.escape("data.validation: expected fewer images than numbered has (20), got 20")
    ):
        split(numbered(20), numbered(5), validation=20)

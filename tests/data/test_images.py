from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from coldforge.data import DataSplits, ImageSet
from coldforge.errors import DataError

MakeSet = Callable[..., ImageSet]
GOOD = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)


def test_pixels_are_the_bytes_over_255(make_set: MakeSet) -> None:
    data = make_set()
    pixels = data.pixels()
    assert pixels.dtype == torch.float32
    np.testing.assert_array_equal(pixels.numpy(), data.images.numpy().astype(np.float32) / np.float32(255))
    assert torch.equal(data.pixels([3, 1]), pixels[[3, 1]])
    assert torch.equal(data.pixels(slice(2, 5)), pixels[2:5])


def test_pixels_do_not_share_memory(make_set: MakeSet) -> None:
    data = make_set()
    before = data.images.clone()
    data.pixels().zero_()
    assert torch.equal(data.images, before)


def test_take_keeps_order_and_labels(make_set: MakeSet) -> None:
    data = make_set()
    part = data.take([5, 2])
    assert torch.equal(part.images, data.images[[5, 2]])
    assert part.labels.tolist() == data.labels[[5, 2]].tolist()
    assert len(data.take(slice(7))) == 7
    assert data.take(torch.tensor([1])).classes == data.classes


@pytest.mark.parametrize(
    ("images", "labels", "classes", "message"),
    [
        (GOOD.float(), torch.zeros(4).long(), ("a", "b"), r"expected images as uint8 \(N, C, H, W\), got float32"),
        (GOOD[0], torch.zeros(1).long(), ("a", "b"), r"got uint8 \(1, 2, 2\)"),
        (GOOD, torch.zeros(4), ("a", "b"), r"expected labels as int64 \(N,\), got float32"),
        (GOOD, torch.zeros(3).long(), ("a", "b"), "expected one label per image, got 4 images, 3 labels"),
        (GOOD, torch.tensor([0, 1, 2, 0]), ("a", "b"), r"labels out of range: expected 0 \.\.\. 1, found 0 \.\.\. 2"),
        (GOOD, torch.tensor([0, -1, 1, 0]), ("a", "b"), r"found -1 \.\.\. 1"),
        (GOOD, torch.zeros(4).long(), ("a", "a"), "at least two classes with distinct names"),
        (GOOD[:0], torch.zeros(0).long(), ("a", "b"), "expected at least one image"),
    ],
)
def test_constructor_says_expected_and_got(
    images: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ImageSet(images, labels, classes, "toy")


def test_fingerprint_sees_everything_but_the_name(make_set: MakeSet) -> None:
    data = make_set()
    same = ImageSet(data.images.clone(), data.labels.clone(), data.classes, "another name")
    assert same.fingerprint == data.fingerprint
    pixel, label = data.images.clone(), data.labels.clone()
    pixel[-1, -1, -1, -1] ^= 1
    label[-1] = (label[-1] + 1) % 4
    others = [
        ImageSet(pixel, data.labels, data.classes),
        ImageSet(data.images, label, data.classes),
        ImageSet(data.images, data.labels, ("x", *data.classes[1:])),
        ImageSet(data.images.reshape(24, 3, 4, 16), data.labels, data.classes),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_fingerprint_does_not_depend_on_the_memory_layout(make_set: MakeSet) -> None:
    data = make_set()
    strided = ImageSet(data.images.contiguous(memory_format=torch.channels_last), data.labels, data.classes)
    assert strided.fingerprint == data.fingerprint
    head = repr((tuple(data.images.shape), data.classes)).encode()
    expected = hashlib.sha256(head + data.images.numpy().tobytes() + data.labels.numpy().tobytes()).hexdigest()
    assert data.fingerprint == expected


def test_mean_and_std_are_those_of_train_and_validation(make_set: MakeSet) -> None:
    train, validation, test = make_set(20, seed=1), make_set(4, seed=2), make_set(8, seed=3)
    splits = DataSplits(train, validation, test)
    pixels = np.concatenate([train.images.numpy(), validation.images.numpy()]).astype(np.float64) / 255
    np.testing.assert_allclose(splits.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(splits.std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)


def test_splits_must_fit_together(make_set: MakeSet) -> None:
    small = make_set(shape=(3, 4, 4))
    with pytest.raises(DataError, match=re.escape("(C, H, W) = (3, 8, 8) as in toy, got (3, 4, 4)")):
        DataSplits(make_set(), make_set(), small)
    with pytest.raises(DataError, match="expected the classes of toy"):
        DataSplits(make_set(), make_set(), make_set(classes=3))
    with pytest.raises(DataError, match="expected one of none, crop-flip, got 'flip'"):
        DataSplits(make_set(), make_set(), make_set(), augment="flip")  # type: ignore[arg-type]


def test_splits_fingerprint_sees_each_part(make_set: MakeSet) -> None:
    a, b = make_set(seed=1), make_set(seed=2)
    prints = {DataSplits(*parts).fingerprint for parts in ((a, a, a), (b, a, a), (a, b, a), (a, a, b))}
    assert len(prints | {DataSplits(a, a, a, "crop-flip").fingerprint}) == 5

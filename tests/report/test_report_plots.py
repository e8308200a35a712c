"""Examples files and static figures."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from coldforge.errors import UsageError
from coldforge.records import MaskingRecord, Record
from coldforge.report.examples import Examples
from coldforge.report.plots import (
    adversarial_figure,
    axis_range,
    bubble_px,
    tradeoff_path,
    tradeoff_points,
)

Make = Callable[..., Record]


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    return matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]


def test_examples_that_do_not_fit_together_are_refused(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples(count=3)
    with pytest.raises(UsageError, match=r"expected clean images \(K, 1 or 3, H, W\), got \(3, 28, 28\)"):
        dataclasses.replace(examples, clean=examples.clean[:, 0])
    with pytest.raises(UsageError, match=r"expected labels of shape \(3,\), got \(2,\)"):
        dataclasses.replace(examples, labels=examples.labels[:2])
    with pytest.raises(UsageError, match="expected the same networks"):
        dataclasses.replace(examples, predictions={})
    with pytest.raises(UsageError, match=r"expected labels from 0 to 1 \(2 class names\), got 0 to 3"):
        dataclasses.replace(examples, classes=("a", "b"))


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32)])
def test_adversarial_figure_draws_images_and_answers(
    make_examples: Callable[..., Examples], channels: int, side: int
) -> None:
    image = pixels(adversarial_figure(make_examples(count=4, channels=channels, side=side)))
    assert image.shape[0] > 600
    assert image.shape[1] > 600
    green = (np.abs(image - np.array([0x1A, 0x7F, 0x4B]) / 255).max(axis=-1) < 0.02).sum()
    red = (np.abs(image - np.array([0xC0, 0x27, 0x2D]) / 255).max(axis=-1) < 0.02).sum()
    assert green > 50
    assert red > 50


def test_adversarial_figure_shows_wrong_answers_in_red_only_where_there_are_any(
    make_examples: Callable[..., Examples],
) -> None:
    examples = make_examples(count=2)
    right = dict.fromkeys(examples.adversarial, (examples.labels, examples.labels))
    same = dict.fromkeys(examples.adversarial, examples.clean)  # no perturbation: nothing red in the images either
    image = pixels(adversarial_figure(dataclasses.replace(examples, predictions=right, adversarial=same)))
    assert not (np.abs(image - np.array([0xC0, 0x27, 0x2D]) / 255).max(axis=-1) < 0.02).any()


def test_adversarial_figure_takes_dollars_many_images_and_pixels_outside_the_box(
    make_examples: Callable[..., Examples],
) -> None:
    examples = make_examples(count=12, classes=tuple(f"a $x_{i}$ class with a long name" for i in range(10)))
    wide = {label: images + 0.4 for label, images in examples.adversarial.items()}
    png = adversarial_figure(dataclasses.replace(examples, adversarial=wide, norm="l2"))
    assert pixels(png).shape == pixels(adversarial_figure(examples, max_images=8)).shape
    with pytest.raises(UsageError, match="max_images of at least 1, got 0"):
        adversarial_figure(examples, max_images=0)


def test_tradeoff_holds_every_attacked_stage(make_record: Make, minimal_record: Record) -> None:
    record = make_record()
    points = tradeoff_points(record)
    assert [point.label for point in points] == [stage.label for stage in record.stages]
    artifact = points[4]
    assert (artifact.label, artifact.kind, artifact.size_bytes) == ("artifact (int8 ONNX)", "artifact", 161_300)
    assert (artifact.clean, artifact.robust) == pytest.approx((84.48, 74.98))
    assert [point.kind for point in points[2:4]] == ["natural", "adversarial"]
    assert tradeoff_path(record) == [(0, 1), (1, 4)]
    assert tradeoff_path(make_record(artifact=False)) == [(0, 1)]
    assert tradeoff_points(minimal_record) == []


def test_tradeoff_marks_suspect_stages(make_record: Make, masking_suspect: MaskingRecord) -> None:
    points = tradeoff_points(make_record(masking=masking_suspect))
    assert [point.label for point in points if point.suspect] == [
        "adversarially tuned (suspect)",
        "artifact (int8 ONNX) (suspect)",
    ]


def test_bubble_area_is_the_file_size() -> None:
    assert (bubble_px(1_000_000, 1_000_000) / bubble_px(250_000, 1_000_000)) ** 2 == pytest.approx(4)
    assert bubble_px(1, 1_000_000) == 9.0
    assert bubble_px(0, 0) > 0


def test_axis_has_room_even_for_one_point() -> None:
    low, high = axis_range([50.0])
    assert low < 45
    assert high > 55
    assert axis_range([0.0, 100.0]) == (-8.0, 108.0)

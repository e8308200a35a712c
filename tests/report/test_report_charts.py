"""The curves of a training, as the page draws them."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from coldforge.records import CurvePoint
from coldforge.report.charts import Chart, curve_charts


def curve(**changes: list[float]) -> list[CurvePoint]:
    """Three epochs of an adversarial training, with other values for some fields."""
    fields: dict[str, Any] = {
        "loss": [1.2, 0.9, 0.8],
        "lr": [0.05] * 3,
        "eps": [0.05, 0.1, 0.1],
        "clean_accuracy": [0.8, 0.84, 0.85],
        "robust_accuracy": [0.70, 0.75, 0.76],
    } | changes
    return [CurvePoint(epoch=e + 1, **{name: values[e] for name, values in fields.items()}) for e in range(3)]


def tips(chart: Chart) -> list[str]:
    return re.findall(r"<title>(.+?)</title>", chart.svg)


def heights(chart: Chart) -> dict[str, float]:
    """From the tip of each point to where it is drawn, in pixels from above."""
    found = re.findall(r'<circle [^>]*cy="([\d.]+)"[^>]*><title>(.+?)</title>', chart.svg)
    return {tip: float(y) for y, tip in found}


def titles(charts: list[Chart]) -> list[str]:
    return [chart.title for chart in charts]


def test_what_was_not_measured_is_not_drawn() -> None:
    natural = curve_charts(curve(eps=[0.0] * 3, robust_accuracy=[-1.0] * 3), "naturally tuned")
    assert titles(natural) == ["Validation accuracy, %", "Training loss"]
    assert tips(natural[0]) == ["epoch 1: clean 80.0", "epoch 2: clean 84.0", "epoch 3: clean 85.0"]
    adversarial = curve_charts(curve(), "adversarially tuned")
    assert titles(adversarial) == ["Validation accuracy, %", "Training loss", "eps of the inner attack"]
    assert "averaged" not in "".join(chart.svg for chart in adversarial)


def test_averaged_weights_have_a_line_of_their_own() -> None:
    chart = curve_charts(curve(averaged_robust_accuracy=[0.60, 0.76, 0.775]), "adversarially tuned")[0]
    assert "epoch 3: averaged 77.5" in tips(chart)
    assert len(re.findall(r'<polyline class="line-averaged"', chart.svg)) == 1
    assert "77.5 averaged after epoch 3" in chart.svg, "the picture's name tells the last values"


@pytest.mark.parametrize("averaged", [False, True])
def test_what_square_broke_is_drawn(averaged: bool) -> None:
    more = {"averaged_beyond_gradients": [0.0, 0.02, 0.06]} if averaged else {}
    chart = curve_charts(curve(beyond_gradients=[0.004, 0.0, 0.012], **more), "adversarially tuned")[-1]
    assert chart.title == "Broken by Square after PGD, %"
    assert "epoch 3: 1.2" in tips(chart)
    assert ("epoch 3: averaged 6.0" in tips(chart)) is averaged


def test_a_harmless_percent_does_not_look_like_a_mountain() -> None:
    low = heights(curve_charts(curve(beyond_gradients=[0.0, 0.004, 0.01]), "a")[-1])
    assert 0 < low["epoch 1: 0.0"] - low["epoch 3: 1.0"] < 0.25 * low["epoch 1: 0.0"], "it stands in the lowest quarter"
    grown = heights(curve_charts(curve(beyond_gradients=[0.0, 0.02, 0.3]), "a")[-1])
    assert grown["epoch 3: 30.0"] < grown["epoch 2: 2.0"], "and much of it is not cut off"


def test_labels_stand_apart_from_each_other_and_from_the_axis() -> None:
    """All at 0 is the usual case of what Square broke; all at the top happens to accuracies."""
    nothing, everything = [0.0] * 3, [1.0] * 3
    charts = [
        curve_charts(curve(beyond_gradients=nothing, averaged_beyond_gradients=nothing), "a")[-1],
        curve_charts(
            curve(clean_accuracy=everything, robust_accuracy=everything, averaged_robust_accuracy=everything), "a"
        )[0],
        curve_charts(curve(clean_accuracy=nothing, robust_accuracy=nothing, averaged_robust_accuracy=nothing), "a")[0],
    ]
    for chart in charts:
        right = re.findall(r'<text class="end [\w-]+" x="([\d.]+)" y="([\d.]+)">', chart.svg)
        below = re.search(r'<text class="tick" x="([\d.]+)" y="([\d.]+)">epoch</text>', chart.svg)
        assert below
        places = [float(y) for _, y in right] + [float(below[2])]
        assert len({x for x, _ in right} | {below[1]}) == 1, "one above the other"
        assert len(places) >= 3
        assert all(b - a > 11 for a, b in itertools.pairwise(places)), "a line of 11 pixels"

"""What the page draws itself: the data of the interactive trade-off plot, and small inline SVG curves.

SVG colours come from the page's CSS variables, so that the curves follow the light and the dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from coldforge.records import CurvePoint, Record
from coldforge.report import text
from coldforge.report.plots import axis_range, bubble_px, robust_key, tradeoff_path, tradeoff_points

WIDTH, HEIGHT = 320.0, 160.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 98.0, 10.0, 26.0
_LINE = 13.0


def tradeoff_data(record: Record) -> dict[str, Any] | None:
    """What ``report.js`` hands to plotly; None where no stage was attacked."""
    points, key = tradeoff_points(record), robust_key(record)
    if key is None:
        return None
    largest = max(point.size_bytes for point in points)
    return {
        "xtitle": "clean accuracy, %",
        "ytitle": f"robust accuracy ({text.attack(key)}), %",
        "xrange": axis_range([point.clean for point in points]),
        "yrange": axis_range([point.robust for point in points]),
        "arrows": tradeoff_path(record),
        "points": [
            {
                "label": point.label,
                "kind": point.kind,
                "x": round(point.clean, 4),
                "y": round(point.robust, 4),
                "diameter": round(bubble_px(point.size_bytes, largest), 2),
                "suspect": point.suspect,
                "hover": f"clean {point.clean:.1f} %<br>robust {point.robust:.1f} %<br>{text.size(point.size_bytes)}",
            }
            for point in points
        ],
    }


@dataclass(frozen=True)
class Series:
    """One line of a chart; values that are None are gaps."""

    label: str
    css: str
    """CSS class that gives the colour."""
    values: Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """A titled SVG."""

    title: str
    svg: Markup


def curve_charts(curve: Sequence[CurvePoint], label: str) -> list[Chart]:
    """Accuracy, loss and, where they were used, eps of the inner attack and what Square broke, over the epochs of a
    training run.
    """
    epochs = [point.epoch for point in curve]
    accuracy = [
        Series("clean", "line-clean", [_percent(point.clean_accuracy) for point in curve]),
        Series("robust", "line-robust", [_percent(point.robust_accuracy) for point in curve]),
        Series("averaged", "line-averaged", [_percent(point.averaged_robust_accuracy) for point in curve]),
    ]
    charts = [
        Chart(
            "Validation accuracy, %",
            line_svg(epochs, accuracy, f"{label}: validation accuracy", 100.0, lambda v: f"{v:.1f}"),
        )
    ]
    losses = [_known(point.loss) for point in curve]
    top = _round_up(max((value for value in losses if value is not None), default=1.0))
    charts.append(
        Chart(
            "Training loss",
            line_svg(epochs, [Series("", "line-loss", losses)], f"{label}: loss", top, text.digits3),
        )
    )
    if any(point.eps > 0 for point in curve):
        eps = Series("", "line-eps", [_known(point.eps) for point in curve])
        top = _round_up(max(point.eps for point in curve))
        charts.append(
            Chart("eps of the inner attack", line_svg(epochs, [eps], f"{label}: eps", top, lambda v: f"{v:.3g}"))
        )
    beyond = [
        Series("", "line-robust", [_percent(point.beyond_gradients) for point in curve]),
        Series("averaged", "line-averaged", [_percent(point.averaged_beyond_gradients) for point in curve]),
    ]
    broken = [value for line in beyond for value in line.values if value is not None]
    if broken:
        top = _round_up(max(5.0, *broken))
        name = f"{label}: broken by Square after PGD"
        charts.append(Chart("Broken by Square after PGD, %", line_svg(epochs, beyond, name, top, lambda v: f"{v:.1f}")))
    return charts


def _percent(fraction: float) -> float | None:
    """None for what was not run (below 0)."""
    return _known(100 * fraction)


def _known(value: float) -> float | None:
    """None for what was not run (below 0) or is not a number."""
    return value if math.isfinite(value) and value >= 0 else None


def _round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 8 times a power of ten."""
    if not (math.isfinite(value) and value > 0):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 1.5, 2, 3, 4, 5, 8) if step * power >= value * 0.999), 10 * power)


def line_svg(
    epochs: Sequence[int], series: Sequence[Series], title: str, top: float, write: Callable[[float], str]
) -> Markup:
    """A line chart from 0 to ``top`` over ``epochs``, each line labelled with its last value at its right end.

    Lines without any value are left out.
    """
    inner_w, inner_h = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    first, span = epochs[0], max(1, epochs[-1] - epochs[0])

    def x(epoch: int) -> float:
        return _LEFT + inner_w * ((epoch - first) / span if len(epochs) > 1 else 0.5)

    def y(value: float) -> float:
        return _TOP + inner_h * (1 - min(max(value / top, 0.0), 1.0))

    parts = []
    for step in range(5):
        value = top * step / 4
        if step % 2 == 0:
            parts.append(
                f'<text class="tick" x="{_LEFT - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">{value:g}</text>'
            )
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
    for epoch in sorted({epochs[0], epochs[-1]} if len(epochs) > 6 else set(epochs)):
        parts.append(f'<text class="tick" x="{x(epoch):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{epoch}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - _RIGHT + 8}" y="{HEIGHT - 10}">epoch</text>')
    ends: list[tuple[float, str, str]] = []
    for line in series:
        spots = [(x(e), y(v), e, v) for e, v in zip(epochs, line.values, strict=True) if v is not None]
        if not spots:
            continue
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in spots)
        parts.append(f'<polyline class="{line.css}" points="{path}"/>')
        for px, py, epoch, value in spots:
            tip = escape(f"epoch {epoch}: {line.label} {write(value)}".replace("  ", " "))
            parts.append(
                f'<circle class="{line.css}" cx="{px:.1f}" cy="{py:.1f}" r="2.6"><title>{tip}</title></circle>'
            )
        ends.append((spots[-1][1], line.css, f"{write(spots[-1][3])} {line.label}".strip()))
    labels = sorted(ends)
    for place, (_, css, words) in zip(_spread([py + 3.5 for py, _, _ in labels]), labels, strict=True):
        parts.append(f'<text class="end {css}" x="{WIDTH - _RIGHT + 8}" y="{place:.1f}">{escape(words)}</text>')
    body = "".join(parts)
    name = escape(f"{title}, {', '.join(words for _, _, words in ends) or 'no values'} after epoch {epochs[-1]}")
    return Markup(f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{name}">{body}</svg>')


def _spread(places: Sequence[float]) -> list[float]:
    """Heights of labels, in rising order, moved apart so that none covers another or the word below the chart."""
    spread, lowest, highest = [], -math.inf, HEIGHT - _BOTTOM + 3.5
    for place in places:
        lowest = max(place, lowest + _LINE)
        spread.append(lowest)
    for index in reversed(range(len(spread))):
        spread[index] = min(spread[index], highest)
        highest = spread[index] - _LINE
    return spread

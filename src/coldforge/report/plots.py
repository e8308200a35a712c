"""Static figures, drawn with matplotlib's object interface: no window, no global state."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from coldforge.errors import UsageError
from coldforge.records import Record, StageName, StageRecord
from coldforge.report import text
from coldforge.report.examples import Examples
from coldforge.report.table import WORST, attacks, is_suspect

INK, MUTED, RULE = "#1d2329", "#5c6670", "#d9dde1"
RIGHT, WRONG = "#1a7f4b", "#c0272d"
COLOURS: dict[str, str] = {
    "baseline": "#7d8791",
    "compressed": "#5f8fb8",
    "natural": "#b58a2c",
    "adversarial": "#2c5c88",
    "artifact": "#c8501e",
    "reference": "#6b5b95",
    "control": "#4f8a6b",
}
"""One colour a kind of stage, the same in every figure."""


def kind(stage: StageRecord) -> str:
    """The key of :data:`COLOURS` for a stage."""
    return kind_of(stage.name, stage.label)


def kind_of(name: str, label: str) -> str:
    """The same from a stage's name and label."""
    if name != "tuned":
        return name
    return "natural" if "natural" in label and "adversarial" not in label else "adversarial"


def to_png(figure: Figure, dpi: int) -> bytes:
    """The figure as PNG; the same bytes each time."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


# --- adversarial examples --------------------------------------------------------------------------------------------


def adversarial_figure(examples: Examples, *, max_images: int = 8) -> bytes:
    """PNG of clean images and, for each network, its perturbations, its adversarial images and its answers.

    One column an image, headed by the true label. Each network has a block of its own: the perturbation (mean over
    the channels, blue darkens, red brightens) and the adversarial image, with the answers under it: right in green
    with a tick, wrong in red with a cross. Values outside [0, 1] are clipped for display only.

    Args:
        examples: what to draw.
        max_images: draw only the first so many.
    """
    count = min(len(examples), max_images)
    if count < 1:
        raise UsageError(f"adversarial_figure: expected max_images of at least 1, got {max_images}")
    networks = list(examples.adversarial)
    left, cell, label_h, block_head, answers = 1.25, 1.12, 0.30, 0.42, 0.44  # inches
    width = left + count * cell + 0.08
    height = 0.06 + label_h + cell + len(networks) * (block_head + 2 * cell + answers) + 0.02
    figure = Figure(figsize=(width, height))
    pad = 0.07
    top = height - 0.06 - label_h

    def at(column: int, y: float) -> Any:
        """Axes of an image whose upper edge is ``y`` inches above the bottom."""
        side = cell - pad
        axes = figure.add_axes(
            ((left + column * cell + pad / 2) / width, (y - side) / height, side / width, side / height)
        )
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(RULE)
        return axes

    defaults: dict[str, Any] = {"color": INK, "fontsize": 8.5, "va": "center"}

    def write(x: float, y: float, words: str, **style: Any) -> None:
        figure.text(x / width, y / height, words, **(defaults | style))

    def row_name(y: float, words: str, small: str = "") -> None:
        write(0.1, y - cell / 2 + (0.06 if small else 0), words, color=INK)
        if small:
            write(0.1, y - cell / 2 - 0.12, small, color=MUTED, fontsize=7)

    row_name(top, "clean", "true label above")
    for column in range(count):
        center = left + (column + 0.5) * cell
        name = examples.classes[int(examples.labels[column])]
        write(center, top + label_h / 2, short(name), ha="center", weight="bold")
        _draw(at(column, top), examples.clean[column])
    y = top - cell
    for network in networks:
        y -= block_head
        on_clean, on_adversarial = (part[:count] for part in examples.predictions[network])
        truth = examples.labels[:count]
        scores = (
            f"right on {int((on_clean == truth).sum())} of {count} clean and "
            f"{int((on_adversarial == truth).sum())} of {count} attacked"
        )
        figure.add_artist(_rule(0.1 / width, 1 - 0.08 / width, (y + block_head - 0.06) / height))
        write(0.1, y + 0.13, short(network, 60), weight="bold", fontsize=9.5)
        write(width - 0.1, y + 0.13, scores, ha="right", color=MUTED, fontsize=8)
        delta = examples.adversarial[network][:count] - examples.clean[:count]
        reach = examples.eps if examples.norm == "linf" else float(np.abs(delta).max()) or examples.eps
        span = 1.25 * reach  # a little more, or the ends of the colour map are nearly black
        row_name(y, "perturbation", f"−{reach:.2g}  to  +{reach:.2g}")
        row_name(y - cell, "attacked")
        for line, words in enumerate(("answer, clean", "answer, attacked")):
            write(0.1, y - 2 * cell - 0.08 - 0.17 * line, words, color=MUTED, fontsize=7.5)
        for column in range(count):
            axes = at(column, y)
            axes.imshow(delta[column].mean(axis=0), cmap="RdBu_r", vmin=-span, vmax=span, interpolation="nearest")
            _draw(at(column, y - cell), examples.adversarial[network][column])
            center = left + (column + 0.5) * cell
            for line, answer in enumerate((on_clean[column], on_adversarial[column])):
                good = answer == truth[column]
                write(
                    center,
                    y - 2 * cell - 0.08 - 0.17 * line,
                    f"{'✓' if good else '✗'} {short(examples.classes[int(answer)], 13)}",
                    ha="center",
                    color=RIGHT if good else WRONG,
                    fontsize=8 if line else 7.5,
                    weight="bold" if line else "normal",
                )
        y -= 2 * cell + answers
    return to_png(figure, dpi=150)


def _rule(x0: float, x1: float, y: float) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([x0, x1], [y, y], color=RULE, linewidth=0.8)


def _draw(axes: Any, image: NDArray[np.float32]) -> None:
    shown = np.clip(image, 0, 1)
    if len(shown) == 1:
        axes.imshow(shown[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(shown.transpose(1, 2, 0), interpolation="nearest")


def short(name: str, longest: int = 15) -> str:
    """A name that fits; dollar signs are escaped, they would start mathematics."""
    cut = name if len(name) <= longest else name[: longest - 1] + "…"
    return cut.replace("$", r"\$")


# --- trade-off -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One stage in the trade-off plot; accuracies in per cent."""

    label: str
    kind: str
    clean: float
    robust: float
    size_bytes: int
    suspect: bool


def robust_key(record: Record) -> str | None:
    """What the trade-off plot shows as robust: the worst case, or the first attack that more stages share."""
    names = [WORST, *attacks(record)]
    counts = {name: sum(name in stage.robust_accuracy for stage in record.stages) for name in names}
    best = max(names, key=lambda name: counts[name])
    return best if counts[best] else None


def tradeoff_points(record: Record) -> list[Point]:
    """The stages whose robust accuracy is known, in the record's order."""
    key = robust_key(record)
    return [
        Point(
            label=stage.label + (" (suspect)" if is_suspect(stage) else ""),
            kind=kind(stage),
            clean=100 * stage.clean_accuracy,
            robust=100 * stage.robust_accuracy[key],
            size_bytes=stage.size_bytes,
            suspect=is_suspect(stage),
        )
        for stage in record.stages
        if key is not None and key in stage.robust_accuracy
    ]


def tradeoff_path(record: Record) -> list[tuple[int, int]]:
    """Arrows as pairs of indices into :func:`tradeoff_points`: baseline, compressed, artifact (those there are)."""
    key = robust_key(record)
    stages = [stage for stage in record.stages if key is not None and key in stage.robust_accuracy]
    order: list[int] = []
    names: tuple[StageName, ...] = ("baseline", "compressed", "artifact")
    for name in names:
        order += [index for index, stage in enumerate(stages) if stage.name == name][:1]
    return list(itertools.pairwise(order))


def axis_range(values: Sequence[float]) -> tuple[float, float]:
    """Limits in per cent with room for bubbles: at least 12 points wide, within -8 and 108."""
    low, high = min(values), max(values)
    room = max(0.14 * (high - low), 6.0)
    return max(low - room, -8.0), min(high + room, 108.0)


def bubble_px(size_bytes: int, largest: int, biggest_px: float = 54.0) -> float:
    """Diameter of a bubble whose area is the file size; never below 9 pixels, so that it can be seen."""
    return max(9.0, biggest_px * math.sqrt(size_bytes / largest)) if largest > 0 else 16.0


def tradeoff_figure(record: Record) -> bytes:
    """PNG of clean against robust accuracy: one bubble a stage, its area the file size; arrows along the main job.

    Raises:
        UsageError: where no stage was attacked.
    """
    points, key = tradeoff_points(record), robust_key(record)
    if key is None:
        raise UsageError("tradeoff_figure: expected a record with robust accuracies, got none; list evaluate.attacks")
    wide, high, dpi = 720, 460, 100
    margins = {"left": 64, "right": 20, "bottom": 56, "top": 26}
    figure = Figure(figsize=(wide / dpi, high / dpi))
    inner = (wide - margins["left"] - margins["right"], high - margins["top"] - margins["bottom"])
    axes = figure.add_axes(
        (margins["left"] / wide, margins["bottom"] / high, inner[0] / wide, inner[1] / high), facecolor="white"
    )
    xlim, ylim = axis_range([p.clean for p in points]), axis_range([p.robust for p in points])
    axes.set_xlim(*xlim)
    axes.set_ylim(*ylim)
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=MUTED)
    axes.set_xlabel("clean accuracy, %", color=INK, fontsize=10)
    axes.set_ylabel(f"robust accuracy ({text.attack(key)}), %", color=INK, fontsize=10)

    largest = max(p.size_bytes for p in points)
    radii = [bubble_px(p.size_bytes, largest) / 2 for p in points]
    centers = [
        ((p.clean - xlim[0]) / (xlim[1] - xlim[0]) * inner[0], (p.robust - ylim[0]) / (ylim[1] - ylim[0]) * inner[1])
        for p in points
    ]
    to_points = 72 / dpi
    arrows: list[Box] = []
    for start, end in tradeoff_path(record):
        if math.dist(centers[start], centers[end]) > radii[start] + radii[end] + 8:
            axes.annotate(
                "",
                xy=(points[end].clean, points[end].robust),
                xytext=(points[start].clean, points[start].robust),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": MUTED,
                    "linewidth": 1.2,
                    "shrinkA": (radii[start] + 3) * to_points,
                    "shrinkB": (radii[end] + 3) * to_points,
                },
            )
            arrows += _boxes_along(centers[start], centers[end])
    for index in sorted(range(len(points)), key=lambda index: -radii[index]):
        point = points[index]
        axes.scatter(
            [point.clean],
            [point.robust],
            s=(2 * radii[index] * to_points) ** 2,
            color=COLOURS[point.kind],
            edgecolors=WRONG if point.suspect else "white",
            linewidths=2.0 if point.suspect else 1.2,
            alpha=0.92,
            zorder=3,
        )
    sizes = sorted(p.size_bytes for p in points)
    axes.set_title(
        f"bubble area: size of the ONNX file, {text.size(sizes[0])} to {text.size(sizes[-1])}",
        loc="right",
        fontsize=8,
        color=MUTED,
        pad=5,
    )
    boxes = place_labels(centers, radii, [(6.6 * len(p.label) + 4, 14.0) for p in points], inner, arrows)
    for point, (x, y), (cx, cy), radius in zip(points, boxes, centers, radii, strict=True):
        axes.annotate(
            short(point.label, 40),
            xy=(x / inner[0], y / inner[1]),
            xycoords="axes fraction",
            ha="center",
            va="center",
            fontsize=9,
            color=WRONG if point.suspect else INK,
            weight="bold" if point.kind == "artifact" else "normal",
            zorder=4,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
        _leader(axes, (x, y), (cx, cy), radius, 3.05 * len(point.label), inner)
    return to_png(figure, dpi=dpi * 2)


def _leader(
    axes: Any,
    label: tuple[float, float],
    center: tuple[float, float],
    radius: float,
    half: float,
    inner: tuple[float, float],
) -> None:
    """A thin line to a label that does not stand beside its bubble."""
    nearest = (min(max(center[0], label[0] - half), label[0] + half), label[1])
    distance = math.dist(nearest, center)
    if distance < radius + 18:
        return
    part = radius / distance
    start = (center[0] + part * (nearest[0] - center[0]), center[1] + part * (nearest[1] - center[1]))
    axes.annotate(
        "",
        xy=(start[0] / inner[0], start[1] / inner[1]),
        xytext=(nearest[0] / inner[0], nearest[1] / inner[1]),
        xycoords="axes fraction",
        textcoords="axes fraction",
        arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 7, "shrinkB": 0},
    )


Box = tuple[float, float, float, float]  # left, bottom, right, top


def _boxes_along(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """Small boxes along an arrow: what a label should not cover."""
    steps = max(1, int(math.dist(start, end) / 6))
    spots = [
        (start[0] + (end[0] - start[0]) * i / steps, start[1] + (end[1] - start[1]) * i / steps)
        for i in range(steps + 1)
    ]
    return [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]


def place_labels(
    centers: Sequence[tuple[float, float]],
    radii: Sequence[float],
    sizes: Sequence[tuple[float, float]],
    area: tuple[float, float],
    obstacles: Sequence[Box] = (),
) -> list[tuple[float, float]]:
    """Centers of labels beside their bubbles, each where it covers least of the others; all in pixels.

    Greedy: the labels are placed in order, each at the best of 64 places around its bubble.
    """
    taken = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(centers, radii, strict=True)]
    taken += obstacles
    placed: list[tuple[float, float]] = []
    for (x, y), radius, (width, height) in zip(centers, radii, sizes, strict=True):
        best, best_cost = (x, y), math.inf
        for ring, gap in enumerate((5.0, 20.0, 38.0, 60.0)):
            for turn in range(16):
                dx, dy = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
                cx = max(width / 2, min(x + dx * (radius + gap + width / 2), area[0] - width / 2))
                cy = y + dy * (radius + gap + height / 2)
                frame = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                outside = max(0, -frame[0]) + max(0, -frame[1]) + max(0, frame[2] - area[0])
                outside += max(0, frame[3] - area[1])
                cost = (
                    sum(_overlap(frame, other) for other in taken) + 60 * outside + 40 * ring + (6 if turn % 4 else 0)
                )
                if cost < best_cost:
                    best, best_cost = (cx, cy), cost
        placed.append(best)
        taken.append((best[0] - width / 2, best[1] - height / 2, best[0] + width / 2, best[1] + height / 2))
    return placed


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))

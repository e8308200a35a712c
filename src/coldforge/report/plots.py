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
from numpy.typing import NDArray

from coldforge.errors import UsageError
from coldforge.records import Record, StageName, StageRecord
from coldforge.report.examples import Examples
from coldforge.report.table import WORST, attacks

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
            label=stage.label + (" (suspect)" if record.is_suspect(stage) else ""),
            kind=kind(stage),
            clean=100 * stage.clean_accuracy,
            robust=100 * stage.robust_accuracy[key],
            size_bytes=stage.size_bytes,
            suspect=record.is_suspect(stage),
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

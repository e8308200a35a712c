"""The paper's Figure 1 from our sweeps, beside the values read off the paper, and what becomes of its claims.

    coldforge sweep recipes/paper-figure1-fashion-mnist.toml        # and its autoattack and literal sisters; cifar10
    python benchmarks/paper_figure.py sweep-paper-figure1-fashion-mnist […] [--out results/paper]
    python scripts/update_readme.py                                 # writes docs/paper.md from it

For each data set: DATA.csv, the points of all sweeps given so far (a sweep takes the place of what was there of its
data set, protocol, attack and seeds, so that seeds may be added one by one: `coldforge sweep FILE --seeds 1`); DATA.svg
and DATA.png, the figure; DATA.json, the verdicts. Without sweeps these are made anew from the points. A sweep that is
still at work may be given, too: what is missing is then said to be missing. Seeds of one recipe that were computed with
different settings are refused.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from paper_claims import judged, readings
from paper_points import (
    PAPER,
    Compression,
    Point,
    Read,
    joined,
    load_paper,
    load_points,
    merged,
    read_sweeps,
    save_points,
)  # fmt: skip

from coldforge.provenance import provenance
from coldforge.report.plots import COLOURS, INK, MUTED, RULE, WRONG, to_png
from coldforge.sealed import write_atomic
from coldforge.sweep import load_sweep

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
DATA = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
COLUMNS: tuple[tuple[Compression, str, str], ...] = (
    ("pruning", "natural", "pruned, base trained naturally"),
    ("pruning", "adversarial", "pruned, base trained adversarially"),
    ("quantization", "natural", "quantized, base trained naturally"),
    ("quantization", "adversarial", "quantized, base trained adversarially"),
)
ROWS = (("clean", "clean accuracy, %"), ("robust", "robust accuracy, %"))
AXES = {"pruning": "part of the channels removed", "quantization": "bits of weights and activations"}
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "none": ("not tuned", COLOURS["compressed"], {"marker": "v", "linestyle": ":"}),
    "natural": ("tuned naturally", COLOURS["natural"], {"marker": "s", "linestyle": "-"}),
    "adversarial": ("tuned adversarially", COLOURS["adversarial"], {"marker": "o", "linestyle": "-"}),
}
"""What the lines are called and how they look, as in the panels of a sweep's page."""
LITERAL: dict[str, Any] = {
    "marker": "*",
    "markersize": 9,
    "linestyle": "",
    "markeredgecolor": INK,
    "markeredgewidth": 0.6,
}
STRONGER: dict[str, Any] = {"marker": "_", "markersize": 11, "linestyle": "", "markeredgewidth": 2.2}
FROM_PAPER: dict[str, Any] = {"marker": "D", "markersize": 5.5, "linestyle": "", "markerfacecolor": "none"}
DENSE: dict[str, Any] = {"color": COLOURS["reference"], "linewidth": 1.1, "linestyle": (0, (6, 3))}


def figure_of(data: str, points: Sequence[Point], paper: Sequence[Read]) -> Figure:
    """Four columns (pruned, quantized; from either base), clean accuracy above, robust below."""
    figure = Figure(figsize=(13.2, 6.6))
    figure.subplots_adjust(left=0.052, right=0.99, bottom=0.085, top=0.81, hspace=0.09, wspace=0.06)
    grid = figure.subplots(2, 4, sharey=True, squeeze=False)
    mine = [point for point in points if point.data == data]
    for column, (compression, base, title) in enumerate(COLUMNS):
        part = [p for p in mine if p.compression in (compression, "none") and p.base == base]
        read = [r for r in paper if (r.data, r.compression) == (data, compression)]
        spots = _spots(compression, part, read)
        for row, (measure, name) in enumerate(ROWS):
            axes = grid[row][column]
            dense = [p for p in mine if (p.arm, p.base) == ("dense", base if measure == "clean" else "adversarial")]
            setting = {"natural": "standard"}.get(base, base)
            _draw(axes, measure, part, dense, [r for r in read if (r.setting, r.measure) == (setting, measure)], spots)
            axes.set_xticks(list(spots.values()), [f"{level:g}" for level in spots] if row else [])
            if not row:
                axes.set_title(title, fontsize=9.5, color=INK, loc="left")
            if not column:
                axes.set_ylabel(name, fontsize=9, color=INK)
        grid[1][column].set_xlabel(AXES[compression], fontsize=9, color=INK)
    grid[0][0].set_ylim(-3, 103)
    figure.text(
        0.052,
        0.96,
        f"{DATA[data]}: robustness after compression and fine-tuning",
        fontsize=12.5,
        color=INK,
        weight="bold",
    )
    figure.text(0.052, 0.945, _caption(mine), fontsize=8.5, color=MUTED, va="top", linespacing=1.35)
    _legend(figure, mine)
    return figure


def _caption(points: Sequence[Point]) -> str:
    main = [p for p in points if _is_main(p)]
    if not main:
        return "only points of other protocols so far"
    counts = Counter((point.compression, point.level, point.base, point.arm) for point in main).values()
    fewest, most = min(counts), max(counts)
    seeds = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    attacked = min(point.n_attacked for point in main)
    spread = "mean and standard deviation over" if most > 1 else "with"
    others = _others(points)
    return (
        f"Lines: corrected protocol, PGD-20 on {attacked:,} test images, {spread} {seeds} seed{'s' * (most > 1)}"
        + (f" ({others})" if others else "")
        + ".\nRead off the paper: its “standard” beside natural bases, its “adversarial” beside adversarial ones."
    )


def _others(points: Sequence[Point]) -> str:
    """The other protocols and attacks, each with its seeds and images."""
    names = {"literal": "stars", "corrected": "dashes"}
    found = []
    for protocol, name in names.items():
        part = [p for p in points if p.protocol == protocol and not _is_main(p)]
        if part:
            seeds = len({p.seed for p in part})
            found.append(f"{name}: {seeds} seed{'s' * (seeds > 1)}, {min(p.n_attacked for p in part):,} images")
    return "; ".join(found)


def _is_main(point: Point) -> bool:
    return point.protocol == "corrected" and point.attack == "pgd-20"


def _spots(compression: Compression, points: Sequence[Point], read: Sequence[Read]) -> dict[float, float]:
    """Level to its place: ratios where they are; bits at equal distances, many first."""
    levels = {p.level for p in points if p.compression == compression} | {r.level for r in read}
    if compression == "pruning":
        return {level: level for level in sorted(levels)}
    return {level: float(place) for place, level in enumerate(sorted(levels, reverse=True))}


def _draw(
    axes: Any,
    measure: str,
    points: Sequence[Point],
    dense: Sequence[Point],
    read: Sequence[Read],
    spots: dict[float, float],
) -> None:
    level_of_dense = [100 * getattr(p, measure) for p in dense if _is_main(p)]
    if level_of_dense:
        axes.axhline(statistics.fmean(level_of_dense), zorder=1, **DENSE)
    for arm, (_, colour, look) in ARMS.items():
        mine = [p for p in points if p.arm == arm]
        lines = _by_level([p for p in mine if _is_main(p)], measure)
        if lines:
            places = sorted(lines, key=lambda level: spots[level])
            axes.errorbar(
                [spots[level] for level in places],
                [statistics.fmean(lines[level]) for level in places],
                yerr=[statistics.stdev(lines[level]) if len(lines[level]) > 1 else 0.0 for level in places],
                color=colour, linewidth=1.5, markersize=4.5, elinewidth=1.0, capsize=2.5, zorder=3, **look,
            )  # fmt: skip
        for level, values in _by_level([p for p in mine if p.protocol == "literal"], measure).items():
            axes.plot(spots[level], statistics.fmean(values), color=colour, zorder=4, **LITERAL)
        if measure == "robust":
            strong = [p for p in mine if p.attack == "autoattack-lite"]
            for level, values in _by_level(strong, measure).items():
                axes.plot(spots[level], statistics.fmean(values), color=colour, zorder=5, **STRONGER)
            for point in (p for p in mine if p.masking == "suspect"):
                axes.plot(spots[point.level], 100 * point.robust, "x", color=WRONG, markersize=9, mew=1.8, zorder=6)
    axes.plot([spots[r.level] for r in read], [100 * r.value for r in read], color=INK, zorder=2, **FROM_PAPER)
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.07)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=MUTED)


def _by_level(points: Sequence[Point], measure: str) -> dict[float, list[float]]:
    """Level to the values of all seeds, in per cent."""
    found: dict[float, list[float]] = {}
    for point in points:
        found.setdefault(point.level, []).append(100 * getattr(point, measure))
    return found


def _legend(figure: Figure, points: Sequence[Point]) -> None:
    handles = [
        Line2D([], [], color=colour, linewidth=1.5, markersize=4.5, label=name, **look)
        for name, colour, look in ARMS.values()
    ]
    handles.append(Line2D([], [], label="dense (robust: trained adversarially)", **DENSE))
    handles.append(Line2D([], [], color=INK, label="read off the paper", **FROM_PAPER))
    if any(point.protocol == "literal" for point in points):
        handles.append(Line2D([], [], color="white", label="literal protocol", **LITERAL))
    if any(point.attack == "autoattack-lite" for point in points):
        handles.append(Line2D([], [], color=INK, label="AutoAttack-lite", **STRONGER))
    if any(point.masking == "suspect" for point in points):
        handles.append(Line2D([], [], color=WRONG, marker="x", linestyle="", markersize=8, label="suspect"))
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.045, 0.893), ncols=len(handles), frameon=False,
        fontsize=8.5, labelcolor=INK, handlelength=2.4, columnspacing=1.2,
    )  # fmt: skip


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG; the same bytes each time."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "coldforge", "svg.fonttype": "path"}):
        FigureCanvasSVG(figure)
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def write(data: str, points: Sequence[Point], sweeps: dict[str, Any], out: Path) -> None:
    """Table, figure and verdicts of one data set."""
    paper = load_paper()
    write_atomic(out / f"{data}.csv", lambda path: save_points(points, path))
    figure = figure_of(data, points, paper)
    write_atomic(out / f"{data}.png", to_png(figure, dpi=110))
    write_atomic(out / f"{data}.svg", to_svg(figure))
    record = {
        "what": "claims of arXiv 2403.09441 held against our sweeps: python benchmarks/paper_figure.py",
        "sweeps": sweeps,
        "not_computed": not_computed(data, sweeps),
        "claims": judged(points, data),
        "readings": readings(points, paper, data),
        "provenance": provenance(0, "python benchmarks/paper_figure.py"),
    }
    write_atomic(out / f"{data}.json", json.dumps(record, indent=1, default=str) + "\n")


def not_computed(data: str, sweeps: Mapping[str, Any]) -> dict[str, list[int]]:
    """Recipes of the figure to the seeds that no sweep has computed."""
    found = {}
    for path in sorted(RECIPES.glob(f"paper-figure1*{data}.toml")):
        spec = load_sweep(path)
        there = {seed for how in sweeps.values() if how["recipe"] == spec.name for seed in how["seeds"]}
        if left := sorted(set(spec.seeds) - there):
            found[spec.name] = left
    return found


def main() -> None:
    """Read sweeps, write results/paper."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", type=Path, help="folders that coldforge sweep wrote")
    parser.add_argument("--out", type=Path, default=PAPER)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    new, told = read_sweeps(arguments.sweeps)
    for data in DATA:
        found = [point for point in new if point.data == data]
        points = merged(load_points(arguments.out / f"{data}.csv"), found)
        if not points:
            continue
        before = arguments.out / f"{data}.json"
        sweeps = json.loads(before.read_text(encoding="utf-8"))["sweeps"] if before.is_file() else {}
        here = {name: how for name, how in told.items() if how["data"] == data}
        write(data, points, joined(sweeps, here), arguments.out)
        print(f"{arguments.out / data}.csv, .svg, .png, .json: {len(points)} points")


if __name__ == "__main__":
    main()

"""Static panels of a sweep: clean and robust accuracy against one axis, mean over seeds with standard deviations.

One figure for each axis whose values have an order (:func:`coldforge.report.sweep_rows.positions`) and of which at
least two were tried. The upper row is clean accuracy, the lower row robust accuracy in the worst case; one line for
each kind of stage. The other axes make the columns: one for each combination of their values, if these are at most
:data:`MOST_COLUMNS`. Otherwise some axes stay at the values of the most robust artifact, those that leave the most
columns; and where even one axis has too many values, some of them are shown. The caption says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from coldforge.report.plots import COLOURS, INK, MUTED, RULE, WRONG, short, to_png
from coldforge.report.sweep_rows import KINDS, ROBUST, Entry, positions, values_of
from coldforge.sweep.table import Sweep

MOST_COLUMNS = 4
_STYLES: dict[str, dict[str, Any]] = {
    "compressed": {"marker": "v", "linestyle": ":"},
    "natural": {"marker": "s", "linestyle": "-"},
    "adversarial": {"marker": "o", "linestyle": "-"},
    "artifact": {"marker": "D", "linestyle": "--"},
}
"""Kinds that are drawn; told apart by marker and dash as well as by colour."""
_ROWS = (("clean_accuracy", "clean accuracy, %"), (ROBUST, "robust accuracy, %"))


@dataclass(frozen=True)
class Panel:
    """One figure."""

    axis: str
    png: bytes
    width_px: int
    """At which its letters have the size of the page's small print."""
    caption: str
    """What is left out, such as "at bits=8, as in the most robust artifact"; empty where that is nothing."""
    suspect: bool
    """Some robust accuracy in it is suspect, and crossed."""


@dataclass(frozen=True)
class _Line:
    kind: str
    entries: list[Entry]  # one for each value of the axis, ascending


def panels(sweep: Sweep, means: Sequence[Entry]) -> list[Panel]:
    """The figures of a sweep, in the order of its axes.

    Args:
        sweep: its results.
        means: :func:`coldforge.report.sweep_rows.mean_entries`.
    """
    return [found for axis in sweep.axes if (found := _panel(sweep, means, axis)) is not None]


def _panel(sweep: Sweep, means: Sequence[Entry], axis: str) -> Panel | None:
    place = sweep.axes.index(axis)
    entries = [entry for entry in means if entry.point[place] and entry.kind in _STYLES]
    order = positions(list(dict.fromkeys(entry.point[place] for entry in entries)))
    if len(order) < 2:
        return None
    groups, caption = _columns(sweep, entries, place)
    tried = {entry.point[place] for _, group in groups for entry in group}
    order = {value: number for value, number in order.items() if value in tried}
    columns = [(title, _lines(group, place, order)) for title, group in groups]
    if not columns:
        return None
    drawn = [entry for _, lines in columns for line in lines for entry in line.entries]
    suspect = any(entry.suspect for entry in drawn)
    figure = _figure(axis, columns, place, _spots(order), suspect)
    return Panel(axis, to_png(figure, dpi=180), round(104 * figure.get_figwidth()), caption, suspect)


Group = tuple[str, list[Entry]]  # the title of a column, and what it shows


def _columns(sweep: Sweep, entries: Sequence[Entry], place: int) -> tuple[list[Group], str]:
    """The columns, and what the caption says about those that are left out."""
    lines: dict[tuple[str, ...], set[str]] = {}
    for e in entries:
        lines.setdefault(_without(e.point, place), set()).add(e.point[place])
    entries = [e for e in entries if len(lines[_without(e.point, place)]) > 1]
    if not entries:
        return [], ""
    best = _best_point(entries)
    others = [i for i in range(len(sweep.axes)) if i != place and len({e.point[i] for e in entries}) > 1]
    ways = [
        (chosen, _groups(sweep, entries, chosen, [i for i in others if i not in chosen], best))
        for count in range(len(others), -1, -1)
        for chosen in itertools.combinations(others, count)
    ]
    chosen, groups = max((way for way in ways if len(way[1]) <= MOST_COLUMNS), key=lambda way: len(way[1]))
    caption = []
    if len(groups) == 1 and (wider := [way for way in ways if len(way[0]) == 1 and len(way[1]) > 1]):
        chosen, everything = min(wider, key=lambda way: len(way[1]))
        groups = [everything[round(i * (len(everything) - 1) / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]
        caption.append(f"{MOST_COLUMNS} of {len(everything)} values of {sweep.axes[chosen[0]]}")
    fixed = [f"{sweep.axes[i]}={best[i]}" for i in others if i not in chosen and best[i]]
    if fixed:
        caption.insert(0, f"at {', '.join(fixed)}, as in the most robust artifact")
    return groups, "; ".join(caption)


def _without(point: tuple[str, ...], place: int) -> tuple[str, ...]:
    return (*point[:place], *point[place + 1 :])


def _groups(
    sweep: Sweep, entries: Sequence[Entry], chosen: Sequence[int], fixed: Sequence[int], best: tuple[str, ...]
) -> list[Group]:
    """One column for each combination of the chosen axes, in their order, where the fixed ones are as in ``best``."""
    kept = [e for e in entries if all(e.point[i] == best[i] for i in fixed)]
    told = [i for i in chosen if len({e.point[i] for e in kept}) > 1]
    orders = values_of(sweep)
    combinations = sorted(
        {tuple(e.point[i] for i in chosen) for e in kept},
        key=lambda values: [orders[sweep.axes[i]].index(v) for i, v in zip(chosen, values, strict=True)],
    )
    found = []
    for values in combinations:
        named = dict(zip(chosen, values, strict=True))
        title = "\n".join(short(f"{sweep.axes[i]} {named[i]}", 34) for i in told if named[i])
        found.append((title, [e for e in kept if all(e.point[i] == v for i, v in named.items())]))
    return found


def _best_point(entries: Sequence[Entry]) -> tuple[str, ...]:
    """The point of the artifact with the highest mean robust accuracy that is not suspect; of any entry without one."""

    def rank(entry: Entry) -> tuple[bool, bool, float]:
        robust = entry.cells[ROBUST].value if ROBUST in entry.cells else None
        return not entry.suspect, entry.kind == "artifact", -1.0 if robust is None else robust

    return max(entries, key=rank).point


def _lines(entries: Sequence[Entry], place: int, order: dict[str, float]) -> list[_Line]:
    """One line a kind."""
    found = []
    for kind in _STYLES:
        line = sorted((e for e in entries if e.kind == kind), key=lambda e: order[e.point[place]])
        if line:
            found.append(_Line(kind, line))
    return found


def _figure(
    axis: str, columns: Sequence[tuple[str, list[_Line]]], place: int, order: dict[str, float], suspect: bool
) -> Figure:
    attacked = any(_value(e, ROBUST) is not None for _, lines in columns for line in lines for e in line.entries)
    rows = _ROWS if attacked else _ROWS[:1]
    title_lines = max(title.count("\n") + 1 if title else 0 for title, _ in columns)
    wide = {1: 6.0, 2: 4.6, 3: 3.2}.get(len(columns), 2.5)  # inches
    left, right, bottom, gap, panel = 0.65, 0.25, 0.52, 0.20, 1.85
    top = 0.40 + 0.18 * title_lines
    width, height = left + right + wide * len(columns), bottom + top + panel * len(rows) + gap * (len(rows) - 1)
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=left / width, right=(left + wide * len(columns)) / width,
        bottom=bottom / height, top=1 - top / height, hspace=gap / panel, wspace=0.12,
    )  # fmt: skip
    grid = figure.subplots(len(rows), len(columns), sharex=True, sharey="row", squeeze=False)
    ticks = _ticks(order, wide)
    for r, (key, name) in enumerate(rows):
        for c, (title, lines) in enumerate(columns):
            axes = grid[r][c]
            _draw(axes, lines, key, place, order)
            axes.set_title(title if r == 0 else "", fontsize=8.5, color=INK, loc="left")
            axes.set_xticks([order[value] for value in ticks], ticks)
        grid[r][0].set_ylabel(name, fontsize=8.5, color=INK)
    figure.align_ylabels(list(grid[:, 0]))
    middle = (left + wide * len(columns) / 2) / width
    figure.text(middle, 0.08 / height, short(axis, 60), ha="center", va="bottom", fontsize=9, color=INK, weight="bold")
    kinds = [kind for kind in _STYLES if any(line.kind == kind for _, lines in columns for line in lines)]
    handles = [Line2D([], [], color=COLOURS[kind], label=KINDS[kind], **_look(kind)) for kind in kinds]
    if suspect:
        cross: dict[str, Any] = {"marker": "x", "linestyle": "", "markersize": 8, "markeredgewidth": 1.8}
        handles.append(Line2D([], [], color=WRONG, label="suspect", **cross))
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=((left - 0.12) / width, 1), ncols=len(handles),
        frameon=False, fontsize=8, labelcolor=INK, handlelength=2.6, columnspacing=1.6,
    )  # fmt: skip
    return figure


def _look(kind: str) -> dict[str, Any]:
    hollow = {"markerfacecolor": "white"} if kind == "artifact" else {}
    return {"linewidth": 1.5, "markersize": 4.5, **_STYLES[kind], **hollow}


def _spots(order: dict[str, float]) -> dict[str, float]:
    """Value to its place: plain numbers where they are; others, and numbers far apart, at equal distances."""
    values = sorted(order, key=lambda value: order[value])
    low, high = order[values[0]], order[values[-1]]
    near = low <= 0 or high / low <= 20
    if near and all(f"{order[value]:g}" == value for value in values):
        return order
    return {value: float(i) for i, value in enumerate(values)}


def _ticks(order: dict[str, float], wide: float) -> list[str]:
    """Values whose labels have room on an axis of ``wide`` inches, from the left."""
    values = sorted(order, key=lambda value: order[value])
    inch = 0.86 * wide / (order[values[-1]] - order[values[0]])
    kept = values[:1]
    for value in values[1:]:
        room = 0.07 * (len(value) + len(kept[-1])) / 2 + 0.08
        if (order[value] - order[kept[-1]]) * inch >= room:
            kept.append(value)
    return kept


def _draw(axes: Any, lines: Sequence[_Line], key: str, place: int, order: dict[str, float]) -> None:
    for line in lines:
        spots = [(order[e.point[place]], 100 * v, e) for e in line.entries if (v := _value(e, key)) is not None]
        if not spots:
            continue
        axes.errorbar(
            [x for x, _, _ in spots],
            [y for _, y, _ in spots],
            yerr=[100 * e.spread.get(key, 0.0) for _, _, e in spots],
            color=COLOURS[line.kind],
            ecolor=COLOURS[line.kind],
            elinewidth=1.0,
            capsize=2.5,
            zorder=3 if line.kind == "artifact" else 2,
            **_look(line.kind),
        )
        doubtful = [(x, y) for x, y, e in spots if e.suspect and key == ROBUST]
        if doubtful:
            axes.scatter(*zip(*doubtful, strict=True), marker="x", s=64, color=WRONG, linewidths=1.8, zorder=4)
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.08, y=0.12)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=MUTED)


def _value(entry: Entry, key: str) -> float | None:
    return entry.cells[key].value if key in entry.cells else None

"""The rows of a sweep's page: every stage of every trial, and means over seeds, for the table and the plot alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from coldforge.errors import UsageError
from coldforge.report import text
from coldforge.report.plots import kind_of
from coldforge.report.table import WORST
from coldforge.sweep.table import Mean, Row, Sweep, column, columns, over_seeds, threat_models

ROBUST = "robust:" + WORST
VERDICTS = {"ok": "ok", "suspect": "suspect", "not_run": "not checked"}
KINDS = {
    "artifact": "artifact",
    "adversarial": "tuned adversarially",
    "natural": "tuned naturally",
    "compressed": "compressed, not tuned",
    "baseline": "baseline",
    "reference": "dense, adversarially trained",
    "control": "control from scratch",
}
"""Kind of stage, as in :data:`coldforge.report.plots.COLOURS`, to what it is called in filters and legends."""


@dataclass(frozen=True)
class Measure:
    """One number of a row, and how it is written."""

    key: str
    """Column of the sweep's table."""
    header: str
    """In the table."""
    title: str
    """In the plot."""
    write: Callable[[float], str]
    unit: str = "%"
    """Of the plot's axis."""
    scale: float = 100.0
    """What a number is multiplied with to be in that unit."""
    larger: bool = False
    """Larger is better."""


@dataclass(frozen=True)
class Cell:
    """One number of one row."""

    text: str
    value: float | None
    detail: str = ""
    """The second line: an interval, a spread, how an energy was found."""
    flag: str = ""
    """A warning that must be shown with the text."""


@dataclass(frozen=True)
class Entry:
    """One row: a stage of a trial, or of all trials that differ in the seed only."""

    point: tuple[str, ...]
    """A value for each axis; empty where its grid does not have that axis."""
    seeds: tuple[int, ...]
    trials: tuple[str, ...]
    label: str
    """Of the stage."""
    kind: str
    """Key of :data:`KINDS`."""
    verdict: str
    """ok, suspect or not_run; of means: suspect where any is, ok where all are."""
    cells: dict[str, Cell]
    spread: dict[str, float]
    """Standard deviations over seeds; empty for single trials."""
    threat: str
    """The threat model; only entries of the same can be compared."""

    @property
    def suspect(self) -> bool:
        """The robust accuracy may not hold."""
        return self.verdict == "suspect"


def latency_column(sweep: Sweep) -> str | None:
    """The latency that ``coldforge pick`` means: the artifacts' at batch 1 in their first runtime; None without one."""
    for rows in ([row for row in sweep.rows if row["name"] == "artifact"], list(sweep.rows)):
        try:
            return column("latency", columns(rows))
        except UsageError:
            continue
    return None


def measures(sweep: Sweep) -> list[Measure]:
    """The numbers that the page shows: those that at least one row has."""
    timed = latency_column(sweep)
    runtime = text.runtime(timed.split(":")[1]) if timed else ""
    mark = _energy_mark(sweep.rows)
    known = [
        Measure("clean_accuracy", "clean %", "clean accuracy", text.percent, larger=True),
        Measure(ROBUST, "robust % (worst case)", "robust accuracy (worst case)", text.percent, larger=True),
        _scaled(sweep, "macs", "MACs", "multiply-adds", text.millions, ((1e6, "M"),)),
        _scaled(sweep, "size_bytes", "file", "file", _size, ((1e6, "MB"), (1e3, "KB"))),
        _scaled(sweep, "packed_bytes", "packed weights", "packed weights", _size, ((1e6, "MB"), (1e3, "KB"))),
        _scaled(sweep, "energy_j_per_image", "energy / image", f"energy of one image{mark}", text.energy,
                ((1, "J"), (1e-3, "mJ"), (1e-6, "µJ"))),
        _scaled(sweep, "train_seconds", "training", "training", text.duration, ((3600, "h"), (60, "min"), (1, "s"))),
    ]  # fmt: skip
    if timed:
        title = f"latency of one image ({runtime})"
        units = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))
        known.insert(5, _scaled(sweep, timed, f"latency ({runtime}, batch 1)", title, text.seconds, units))
    return [measure for measure in known if numbers(sweep.rows, measure.key)]


def attack_measures(sweep: Sweep) -> list[Measure]:
    """Robust accuracies that the plot can show: the worst case first, then each attack."""
    rest = [name for name in columns(sweep.rows) if name.startswith("robust:") and name not in _NOT_ATTACKS]
    found = [name for name in [ROBUST, *rest] if numbers(sweep.rows, name)]
    return [
        Measure(name, name, f"robust accuracy ({text.attack(name.removeprefix('robust:'))})", text.percent, larger=True)
        for name in found
    ]


_NOT_ATTACKS = (ROBUST, "robust:low", "robust:high")


def numbers(rows: Iterable[Row], name: str) -> list[float]:
    """The numbers of a column."""
    return [value for row in rows if (value := _number(row.get(name))) is not None]


def _number(value: object) -> float | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if plain else None  # type: ignore[arg-type]


def _size(count: float) -> str:
    return text.size(round(count))


def _scaled(
    sweep: Sweep, key: str, header: str, title: str, write: Callable[[float], str], units: Sequence[tuple[float, str]]
) -> Measure:
    """A measure in the largest unit in which the median is at least 1."""
    found = sorted(numbers(sweep.rows, key)) or [0.0]
    middle = found[len(found) // 2]
    factor, unit = next(((factor, unit) for factor, unit in units if middle >= factor), units[-1])
    return Measure(key, header, title, write, unit, 1 / factor)


def _energy_mark(rows: Sequence[Row]) -> str:
    """How the energies were found, to be read with each, such as ", estimated"."""
    found = {text.energy_mark(row["energy_method"]) for row in rows if _number(row.get("energy_j_per_image"))}
    return f", {text.join(sorted(found))}" if found else ""


# --- rows ------------------------------------------------------------------------------------------------------------


def single_entries(sweep: Sweep) -> list[Entry]:
    """One entry a stage of a trial."""
    shown = [*measures(sweep), *attack_measures(sweep)]
    return [
        Entry(
            point=tuple(row[axis] for axis in sweep.axes),
            seeds=(row["seed"],),
            trials=(row["trial"],),
            label=row["label"],
            kind=kind_of(row["name"], row["label"]),
            verdict=row["masking"],
            cells={measure.key: _single(row, measure) for measure in shown},
            spread={},
            threat=str(threat_models([row])),
        )
        for row in sweep.rows
    ]


def _single(row: Row, measure: Measure) -> Cell:
    value = _number(row.get(measure.key))
    if value is None:
        return Cell(text.NONE, None)
    bounds = {"clean_accuracy": "clean", ROBUST: "robust"}.get(measure.key, "")
    low, high = (_number(row.get(f"{bounds}:{end}")) for end in ("low", "high"))
    detail = text.interval((low, high)) if low is not None and high is not None else ""
    if measure.key == "energy_j_per_image":
        detail = text.energy_mark(row["energy_method"])
    return Cell(measure.write(value), value, detail, _flag(measure, row["masking"]))


def mean_entries(sweep: Sweep) -> list[Entry]:
    """One entry a stage of a point of the axes: means over seeds, with their standard deviations."""
    shown = [*measures(sweep), *attack_measures(sweep)]
    entries = []
    for mean in over_seeds(sweep):
        rows, verdict = mean.rows, verdict_of(mean.rows)
        entries.append(
            Entry(
                point=mean.point,
                seeds=tuple(row["seed"] for row in rows),
                trials=tuple(row["trial"] for row in rows),
                label=mean.stage,
                kind=kind_of(rows[0]["name"], mean.stage),
                verdict=verdict,
                cells={measure.key: _mean(mean, rows, measure, verdict) for measure in shown},
                spread={m.key: s for m in shown if (s := _number(mean.spread.get(m.key))) is not None},
                threat=str(threat_models(rows)),
            )
        )
    return entries


def verdict_of(rows: Sequence[Row]) -> str:
    """One verdict for several seeds: suspect where any is, ok where all are."""
    found = {row["masking"] for row in rows}
    return "suspect" if "suspect" in found else "ok" if found == {"ok"} else "not_run"


def failed_checks(rows: Iterable[Row]) -> str:
    """The masking checks that failed in any of these rows, in words; empty: none, or records that do not tell."""
    found = dict.fromkeys(name for row in rows for name in (row.get("masking:failed") or "").split(", ") if name)
    return text.join([name.replace("_", " ") for name in found])


def _mean(mean: Mean, rows: Sequence[Row], measure: Measure, verdict: str) -> Cell:
    value, spread = mean.mean.get(measure.key), _number(mean.spread.get(measure.key))
    if value is None:
        return Cell(text.NONE, None)
    detail = f"± {measure.write(spread)}" if spread else ""
    if measure.key == "energy_j_per_image":
        marks = sorted({text.energy_mark(row["energy_method"]) for row in rows if row["energy_method"]})
        detail = " ".join(filter(None, (detail, text.join(marks))))
    return Cell(measure.write(value), value, detail, _flag(measure, verdict))


def _flag(measure: Measure, verdict: str) -> str:
    return "suspect" if verdict == "suspect" and measure.key.startswith("robust:") else ""


# --- axes ------------------------------------------------------------------------------------------------------------


def values_of(sweep: Sweep) -> dict[str, list[str]]:
    """Axis to its values among the finished trials: ascending where they have an order, else as they first appear."""
    found = {}
    for axis in sweep.axes:
        values = list(dict.fromkeys(row[axis] for row in sweep.rows))
        order = positions([value for value in values if value])
        found[axis] = sorted(values, key=lambda value: order.get(value, -math.inf)) if order else values
    return found


def positions(values: Sequence[str]) -> dict[str, float]:
    """Value to its number, if the values are numbers or the same words around one number ("int8", "int4"); else empty.

    >>> positions(["0.1", "0.5"]), positions(["int8", "int4"]), positions(["natural", "adversarial"])
    ({'0.1': 0.1, '0.5': 0.5}, {'int8': 8.0, 'int4': 4.0}, {})
    """
    pattern = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.])|\d+(?:\.\d+)?")
    words = {pattern.sub("#", value) for value in values}
    found = {value: [float(part) for part in pattern.findall(value)] for value in values}
    if len(words) != 1 or any(not parts for parts in found.values()):
        return {}
    firsts = {value: parts[0] for value, parts in found.items()}
    return firsts if len(set(firsts.values())) == len(firsts) else {}


def plot_data(sweep: Sweep, singles: Sequence[Entry], means: Sequence[Entry]) -> dict[str, Any] | None:
    """What ``sweep.js`` draws; None where nothing was attacked or no trial is finished."""
    ys = attack_measures(sweep)
    xs = [m for m in measures(sweep) if m.key not in (ROBUST, "train_seconds")]
    xs.sort(key=lambda measure: (not measure.key.startswith("latency:"), measure.larger))  # stable
    if not ys or not xs:
        return None
    describe = partial(_described, ["clean_accuracy", *(m.key for m in [*xs, *ys] if m.key != "clean_accuracy")])
    return {
        "axes": list(sweep.axes),
        "ordered": [axis for axis, values in values_of(sweep).items() if positions([v for v in values if v])],
        "values": values_of(sweep),
        "kinds": list(KINDS.items()),
        "verdicts": VERDICTS,
        "ys": [_axis(measure) for measure in ys],
        "xs": [_axis(measure) for measure in xs],
        "entries": {"single": list(map(describe, singles)), "mean": list(map(describe, means))},
    }


def _axis(measure: Measure) -> dict[str, Any]:
    return {
        "key": measure.key,
        "title": measure.title,
        "unit": measure.unit,
        "scale": measure.scale,
        "larger": measure.larger,
    }


def _described(keys: Sequence[str], entry: Entry) -> dict[str, Any]:
    cells = {key: entry.cells[key] for key in keys if entry.cells[key].value is not None}
    return {
        "point": entry.point,
        "seeds": ", ".join(map(str, entry.seeds)),
        "trials": ", ".join(entry.trials),
        "label": entry.label,
        "kind": entry.kind,
        "verdict": entry.verdict,
        "threat": entry.threat,
        "values": {key: cell.value for key, cell in cells.items()},
        "spread": {key: entry.spread[key] for key in cells if key in entry.spread},
        "shown": {key: _in_a_line(cell) for key, cell in cells.items()},
    }


def _in_a_line(cell: Cell) -> str:
    if not cell.detail:
        return cell.text
    return f"{cell.text} {cell.detail}" if cell.detail.startswith("±") else f"{cell.text} ({cell.detail})"

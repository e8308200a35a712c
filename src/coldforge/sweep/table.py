"""Results of a sweep as one table: one row a stage of a trial, and means over seeds."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coldforge.errors import UsageError
from coldforge.records import Record, ThreatModelRecord
from coldforge.sealed import write_atomic
from coldforge.sweep.folder import RECORDS, SWEEP, Failure, load_failures
from coldforge.sweep.spec import say

PARQUET, CSV = "table.parquet", "table.csv"
Row = dict[str, Any]

SHORT = {
    "robust": "robust:worst_case",
    "clean": "clean_accuracy",
    "bytes": "size_bytes",
    "packed": "packed_bytes",
    "energy": "energy_j_per_image",
    "params": "params",
    "macs": "macs",
}
"""Short names of columns, for questions. ``latency`` is the first column of latencies at batch 1."""


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, read."""

    folder: Path
    name: str
    description: str
    axes: tuple[str, ...]
    rows: tuple[Row, ...]
    trials: int
    """How many there are, finished or not."""
    labels: dict[str, str] = field(default_factory=dict)
    """Trial to its label, finished or not."""
    seeds: tuple[int, ...] = ()
    failures: tuple[Failure, ...] = ()
    stages: dict[str, float] = field(default_factory=dict)
    """How many stages are distinct, how many the trials alone would take, macs and macs_alone; empty if not written."""

    @property
    def finished(self) -> tuple[str, ...]:
        """Trials that have a record."""
        return tuple(dict.fromkeys(row["trial"] for row in self.rows))


def load_results(folder: str | Path) -> Sweep:
    """All rows of the trials that are finished.

    Raises:
        UsageError: the folder holds no sweep, or a record is damaged.
    """
    folder = Path(folder)
    try:
        sweep = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
        trials = sweep["trials"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"expected a folder that `coldforge sweep` wrote, found none at {folder}: {error}") from None
    axes = tuple(dict.fromkeys(axis for trial in trials for axis in trial["point"]))
    rows = [row for trial in trials for row in _rows_of(folder, trial, axes)]
    return Sweep(
        folder,
        sweep["name"],
        sweep["description"],
        axes,
        tuple(rows),
        len(trials),
        labels={trial["id"]: trial["label"] for trial in trials},
        seeds=tuple(sorted({trial["seed"] for trial in trials})),
        failures=tuple(load_failures(folder).values()),
        stages=sweep.get("stages", {}),
    )


def _rows_of(folder: Path, trial: dict[str, Any], axes: Sequence[str]) -> Iterator[Row]:
    path = folder / RECORDS / f"{trial['id']}.json"
    if not path.is_file():
        return
    try:
        record = Record.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is no record of coldforge (damaged?): {error}") from None
    head = {"trial": trial["id"], "seed": trial["seed"]} | {axis: say(trial["point"].get(axis, "")) for axis in axes}
    head["images"] = record.images
    head |= {f"threat_model:{name}": value for name, value in record.threat_model.model_dump().items()}
    for stage in record.stages:
        row = head | {"exported": stage is record.exported} | flat(stage.model_dump(mode="json"))
        yield row | ({"masking": "suspect"} if record.is_suspect(stage) else {})


def flat(stage: dict[str, Any]) -> Row:
    """One stage of a record as columns: names as in ``record.json``, the parts of a value behind a colon."""
    row: Row = {}
    for name, value in stage.items():
        match name:
            case "robust_accuracy":
                row |= {f"robust:{attack}": accuracy for attack, accuracy in value.items()}
            case "robust_n":
                row["n_attacked"] = min(value.values(), default=0)
            case "clean_ci95":
                row |= {"clean:low": value[0], "clean:high": value[1]}
            case "robust_ci95":
                low, high = value.get("worst_case", (math.nan, math.nan))
                row |= {"robust:low": low, "robust:high": high}
            case "robust_accuracy_8bit":
                row |= {f"robust_8bit:{attack}": part for attack, part in value.items() if attack == "worst_case"}
            case "pruning_ratio":
                row |= {f"pruning_ratio:{part}": ratio for part, ratio in value.items()}
            case "latency_s":
                row |= {f"latency:{timing['runtime']}:{timing['batch']}": timing["median"] for timing in value}
            case "agreement":
                row |= {f"agreement:{part}": share for part, share in (value or {}).items()}
            case "masking":
                row["masking"] = value["verdict"]
                row["masking:failed"] = ", ".join(check["name"] for check in value["checks"] if not check["passed"])
            case "notes":
                row["notes"] = "; ".join(value)
            case "per_class" | "curve":
                pass
            case _:
                row[name] = value
    return row


def write_tables(sweep: Sweep) -> tuple[Path, Path]:
    """``table.parquet`` and ``table.csv`` in the sweep's folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = columns(sweep.rows)
    table = pa.table({name: [row.get(name) for row in sweep.rows] for name in names})
    write_atomic(sweep.folder / PARQUET, lambda path: pq.write_table(table, path))

    def write_csv(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(sweep.rows)

    write_atomic(sweep.folder / CSV, write_csv)
    return sweep.folder / PARQUET, sweep.folder / CSV


def columns(rows: Iterable[Row]) -> list[str]:
    """Names of all columns, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def threat_models(rows: Iterable[Row]) -> list[tuple[Any, ...]]:
    """Norm, eps, eps in 255ths and box of each that the rows were attacked under."""
    return sorted({tuple(row[f"threat_model:{part}"] for part in ThreatModelRecord.model_fields) for row in rows})


@dataclass(frozen=True)
class Mean:
    """One stage at one point of the axes, over seeds."""

    point: tuple[str, ...]
    stage: str
    """Label of the stage."""
    n: int
    """How many seeds."""
    mean: Row
    spread: Row
    """Standard deviation over seeds (of the sample); NaN for one seed."""
    rows: tuple[Row, ...]
    """One a seed."""


def over_seeds(sweep: Sweep) -> list[Mean]:
    """Mean and standard deviation of every number, for each stage and point."""
    groups: dict[tuple[tuple[str, ...], str], list[Row]] = {}
    for row in sweep.rows:
        groups.setdefault((tuple(row[axis] for axis in sweep.axes), row["label"]), []).append(row)
    found = []
    for (point, label), rows in groups.items():
        mean: Row = {}
        spread: Row = {}
        for name in columns(rows):
            numbers = [row[name] for row in rows if _is_number(row.get(name))]
            if numbers and name != "seed":
                mean[name] = statistics.fmean(numbers)
                spread[name] = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
        found.append(Mean(point, label, len(rows), mean, spread, tuple(rows)))
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# --- questions -------------------------------------------------------------------------------------------------------


def column(name: str, names: Sequence[str]) -> str:
    """The one of these columns that a short name means.

    Raises:
        UsageError: there is none.
    """
    if name == "latency":
        found = next((each for each in names if each.startswith("latency:") and each.endswith(":1")), "")
    else:
        found = SHORT.get(name, name)
    if found not in names:
        known = ", ".join([*SHORT, "latency", *(each for each in names if ":" in each)])
        raise UsageError(f"expected one of {known}; got {name!r}")
    return found


def pick(
    sweep: Sweep, *, least: Sequence[str] = (), most: Sequence[str] = (), minimize: str = "", maximize: str = ""
) -> Row:
    """The artifact that answers a question best.

    Args:
        sweep: its results.
        least: conditions such as "robust=0.70": at least.
        most: the same, at most, such as "bytes=200000".
        minimize: column to be small.
        maximize: column to be large; one of the two.

    Returns:
        The row of the artifact; a masking verdict of "suspect" does not count as robust and is passed over.

    Raises:
        UsageError: no trial is finished, none meets the conditions, a column is not known, or robust accuracies are
            compared that are of several threat models.
    """
    rows = [row for row in sweep.rows if row["name"] == "artifact"]
    if not rows:
        raise UsageError(f"{sweep.folder}: no trial is finished yet; run `coldforge sweep` again")
    if bool(minimize) == bool(maximize):
        raise UsageError("expected one of --minimize and --maximize, such as --minimize latency")
    conditions = [(*_condition(text), 1, "at least") for text in least]
    conditions += [(*_condition(text), -1, "at most") for text in most]
    names = columns(rows)
    goal = column(minimize or maximize, names)
    asked = [column(name, names) for name, *_ in conditions]
    compared = any(name.startswith(("robust:", "robust_8bit:")) for name in (goal, *asked))
    if compared and (several := threat_models(rows))[1:]:
        raise UsageError(
            f"these trials were attacked under {len(several)} threat models, whose robust accuracies cannot be "
            "compared; sweep each into a folder of its own"
        )
    good = [row for row in rows if row["masking"] != "suspect"]
    for (name, limit, sign, words), where in zip(conditions, asked, strict=True):
        kept = [row for row in good if _is_number(row.get(where)) and sign * (row[where] - limit) >= 0]
        if not kept and good:
            best = (max if sign > 0 else min)((row[where] for row in good if _is_number(row.get(where))), default=None)
            reached = "none has that number" if best is None else f"the best of those left has {best:g}"
            raise UsageError(f"no trial has {name} of {words} {limit:g}: {reached}")
        good = kept
    if not good:
        raise UsageError("the masking verdict of every trial is suspect: no robust accuracy holds")
    measured = [row for row in good if _is_number(row.get(goal))]
    if not measured:
        raise UsageError(f"no trial that meets the conditions has a number for {minimize or maximize}")
    return (min if minimize else max)(measured, key=lambda row: row[goal])


def _condition(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return name.strip(), float(number)
    except ValueError:
        raise UsageError(f"expected a condition such as robust=0.70, got {text!r}") from None

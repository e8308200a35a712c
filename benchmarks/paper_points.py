"""What the sweeps of the paper's figure found, as one small table, and the values read off the paper.

A point is one network: how it was compressed, from which base, how it was fine-tuned, and what it reached. Fine-tuned
adversarially it is the file that was exported; its verdicts are the file's.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from coldforge.errors import UsageError
from coldforge.records import LEAST_AGREEMENT, Record, load_record
from coldforge.sweep.folder import written
from coldforge.sweep.table import Row, Sweep, load_results

Compression = Literal["none", "pruning", "quantization"]
PAPER = Path(__file__).resolve().parent.parent / "results" / "paper"


@dataclass(frozen=True)
class Point:
    """One network under one attack; fractions, not per cent."""

    data: str
    protocol: Literal["corrected", "literal"]
    attack: str
    compression: Compression
    level: float
    """Part of the channels removed, or bits; 0 for a dense network."""
    base: Literal["natural", "adversarial"]
    """How the network was trained before it was compressed."""
    arm: Literal["dense", "none", "natural", "adversarial"]
    """How it was fine-tuned; "dense": the base itself."""
    seed: int
    clean: float
    n: int
    robust: float
    n_attacked: int
    masking: str
    params: int
    macs: int
    packed_bytes: int
    train_macs: float
    """Multiply-adds of the training that made it from the network before."""

    @property
    def case(self) -> tuple[str, str, str]:
        """Data, protocol and attack: points that may be compared."""
        return self.data, self.protocol, self.attack


def points_of(sweep: Sweep) -> list[Point]:
    """All networks of the trials that are finished, each once.

    Raises:
        UsageError: no trial is finished, the sweep has no axis "base", or a file does not answer as its network.
    """
    if not sweep.finished:
        raise UsageError(f"{sweep.folder}: no trial is finished yet; run `coldforge sweep` again")
    if "base" not in sweep.axes:
        raise UsageError(f"{sweep.folder}: expected a sweep with the axis base, got {', '.join(sweep.axes)}")
    recipe = _record(sweep, sweep.finished[0]).recipe
    source, attacks = recipe["data"]["source"], recipe["evaluate"]["attacks"]  # type: ignore[index]
    data = "cifar10" if source.startswith("cifar10") else "fashion-mnist"
    trials: dict[str, list[Row]] = {}
    for row in sweep.rows:
        trials.setdefault(row["trial"], []).append(row)
    found = [point for rows in trials.values() for point in _points_of_trial(rows, data, attacks[-1])]
    return list(dict.fromkeys(found))


def _points_of_trial(rows: Sequence[Row], data: str, attack: str) -> Iterable[Point]:
    small = next(row for row in rows if row["name"] == "compressed")
    pruned, bits = small["pruning_ratio:requested"], small["weight_bits"]
    compression: Compression = "quantization" if bits < 32 else "pruning"
    level = bits if bits < 32 else pruned
    for row in rows:
        match row["name"]:
            case "baseline":
                yield _point(row, row, data, attack, "none", 0.0, "dense")
            case "compressed":
                yield _point(row, row, data, attack, compression, level, "none")
            case "tuned" if not row["exported"]:
                yield _point(row, row, data, attack, compression, level, "natural")
            case "artifact":
                if min(row.get("agreement:clean", 1.0), row.get("agreement:adversarial", 1.0)) < LEAST_AGREEMENT:
                    raise UsageError(
                        f"trial {row['trial']}: the file and its twin disagree; find out why before showing it"
                    )
                tuned = next(other for other in rows if other["exported"])
                arm = "natural" if tuned["label"].startswith("naturally") else "adversarial"
                yield _point(row, tuned, data, attack, compression, level, arm)


def _point(row: Row, trained: Row, data: str, attack: str, compression: Compression, level: float, arm: str) -> Point:
    return Point(
        data,
        "corrected" if row["threat_model:box"] else "literal",
        attack,
        compression,
        float(level),
        row["base"],
        arm,  # type: ignore[arg-type]
        row["seed"],
        row["clean_accuracy"],
        row["n"],
        row["robust:worst_case"] if row["threat_model:box"] else row[f"robust:{attack}"],  # the paper has no transfer
        row["n_attacked"],
        row["masking"],
        row["params"],
        row["macs"],
        row["packed_bytes"],
        trained["train_macs"],
    )


def read_sweeps(folders: Iterable[Path]) -> tuple[list[Point], dict[str, dict[str, object]]]:
    """The points of some sweeps; and of each sweep (name and seeds) how far it is and what sharing saved.

    A sweep without a finished trial has no points yet, and is left out.
    """
    points, told = [], {}
    for folder in folders:
        sweep = load_results(folder)
        if not sweep.finished:
            continue
        found = points_of(sweep)
        points += found
        seeds = sorted({int(row["seed"]) for row in sweep.rows})  # of finished trials
        told[f"{sweep.name}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"] = {
            "recipe": sweep.name,
            "data": found[0].data,
            "seeds": seeds,
            "settings": _settings(folder),
            "commits": sorted({str(_record(sweep, trial).provenance["git_commit"]) for trial in sweep.finished}),
            "trials": sweep.trials,
            "finished": len(sweep.finished),
            "failures": [
                f"{', '.join(sweep.labels[trial] for trial in failure.trials)}: {failure.label}: {failure.error}"
                for failure in sweep.failures
            ],
            "repeated": _repeated(sweep),
            **sweep.stages,
        }
    return points, told


def _repeated(sweep: Sweep) -> list[str]:
    """Trainings that collapsed and were tried again; once each, though the row of the artifact tells of it, too."""
    said: dict[tuple[str, str], str] = {}
    for row in sweep.rows:
        if "collapsed" in row["notes"]:
            told = f"{sweep.labels[row['trial']]}: {row['label']}: {row['notes']}"
            said.setdefault((row["trial"], row["notes"]), told)
    return [*said.values()]


def _record(sweep: Sweep, trial: str) -> Record:
    return load_record(sweep.folder / "records" / f"{trial}.json")


def _settings(folder: Path) -> str:
    """A digest of all that a sweep and the recipe behind it say of its trials, seeds aside."""
    said = {key: value for key, value in written(folder).items() if key not in ("seeds", "trials", "stages")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What is told of all sweeps; a sweep takes the place of those of its recipe that have no other seeds.

    Raises:
        UsageError: seeds of one recipe were computed with different settings.
    """
    kept = {
        name: how
        for name, how in old.items()
        if not any(
            how["recipe"] == other["recipe"] and set(how["seeds"]) <= set(other["seeds"]) for other in new.values()
        )
    }
    found = kept | new
    for name, how in found.items():
        for other, beside in found.items():
            if how["recipe"] == beside["recipe"] and how["settings"] != beside["settings"]:
                raise UsageError(
                    f"{name} and {other}: expected the same settings, got different ones; give all seeds anew"
                )
    return found


# --- files -----------------------------------------------------------------------------------------------------------


def load_points(path: Path) -> list[Point]:
    """The table that :func:`save_points` wrote; none where there is none."""
    if not path.is_file():
        return []
    kinds = {"float": float, "int": int}
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Point(**{field.name: kinds.get(str(field.type), str)(row[field.name]) for field in fields(Point)})
            for row in csv.DictReader(file)
        ]


def save_points(points: Iterable[Point], path: Path) -> None:
    """Write the table, sorted."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Point)])
        writer.writerows(sorted(map(astuple, points)))


def merged(old: Iterable[Point], new: Sequence[Point]) -> list[Point]:
    """All points; new ones take the place of all old ones of their data, protocol, attack and seed."""
    replaced = {(point.case, point.seed) for point in new}
    return [point for point in old if (point.case, point.seed) not in replaced] + list(new)


@dataclass(frozen=True)
class Read:
    """One value read off the paper's figure."""

    data: str
    compression: Compression
    level: float
    setting: Literal["standard", "adversarial"]
    """As in its legend."""
    measure: Literal["clean", "robust"]
    value: float


def load_paper(path: Path = PAPER / "figure1.csv") -> list[Read]:
    """The values read off Figure 1 of arXiv 2403.09441; the head of the file tells how."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return [
        Read(
            row["data"],
            "quantization" if row["compression"] == "ptq" else "pruning",
            float(row["level"].removeprefix("int")),
            row["setting"],  # type: ignore[arg-type]
            row["measure"],  # type: ignore[arg-type]
            float(row["value"]),
        )
        for row in rows
    ]

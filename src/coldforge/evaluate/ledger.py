"""What happened to each test image, in memory, on disk, and while an evaluation is under way."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coldforge.attacks import AttackResult
from coldforge.evaluate.statistics import wilson_interval

WORST_CASE = "worst_case"
_WRITTEN = ("fooled", "step", "restart", "queries", "norm", "margin", "finished", "disputed", "fooled_8bit")
"""Columns of numbers, one of each for every attack."""


@dataclass(frozen=True)
class Ledger:
    """What happened to each of n test images.

    ``right`` are the clean verdicts; each attack adds, for the m <= n images at the front, which it fooled, what
    exactly did it, at which step and restart of it, after how many queries, the norm of that perturbation, and the
    smallest margin seen. Images that were wrong when clean were not attacked (step -1, no queries) and count as fooled.
    """

    labels: Tensor  # (n,) int64
    answers: Tensor  # (n,) int64, on the clean image
    fooled: dict[str, Tensor] = field(default_factory=dict)  # attack -> (m,) bool
    step: dict[str, Tensor] = field(default_factory=dict)  # (m,) int64, -1 without
    restart: dict[str, Tensor] = field(default_factory=dict)  # (m,) int64, -1 without
    queries: dict[str, Tensor] = field(default_factory=dict)  # (m,) int64
    norm: dict[str, Tensor] = field(default_factory=dict)  # (m,) float32, NaN without
    margin: dict[str, Tensor] = field(default_factory=dict)  # (m,) float32, infinite without
    by: dict[str, list[str]] = field(default_factory=dict)  # part of an ensemble and way, such as "square on the file"
    finished: dict[str, Tensor] = field(default_factory=dict)  # (m,) bool: fooled, or stood to the end
    disputed: dict[str, Tensor] = field(default_factory=dict)  # (m,) bool: fooled the search, not who judges
    fooled_8bit: dict[str, Tensor] = field(default_factory=dict)  # (m,) bool: with 8-bit pixels, too
    seed: int = 0

    @property
    def right(self) -> Tensor:
        """(n,) bool: right when clean."""
        return self.answers == self.labels

    @property
    def unfinished(self) -> dict[str, int]:
        """Attack -> images that it did not finish for want of budget; they count as standing."""
        counts = {attack: int((~finished).sum()) for attack, finished in self.finished.items()}
        return {attack: count for attack, count in counts.items() if count}

    def survived(self, attack: str, *, in_8_bits: bool = False) -> Tensor:
        """(m,) bool: right when clean and under that attack; ``"worst_case"``: under every attack run. ``in_8_bits``:
        what the attack found is rounded to 8-bit pixels before it counts.
        """
        columns = self.fooled_8bit if in_8_bits else self.fooled
        if attack != WORST_CASE:
            return ~columns[attack]
        if not columns:
            return self.right
        part = min(len(fooled) for fooled in columns.values())
        survived = self.right[:part].clone()
        for fooled in columns.values():
            survived &= ~fooled[:part]
        return survived

    def open(self, attack: str, count: int) -> None:
        """Begin the columns of an attack on the first ``count`` images."""
        right = self.right[:count]
        self.fooled[attack] = ~right
        self.finished[attack] = ~right
        self.disputed[attack] = torch.zeros(count, dtype=torch.bool)
        self.fooled_8bit[attack] = ~right
        self.step[attack] = torch.full((count,), -1)
        self.restart[attack] = torch.full((count,), -1)
        self.queries[attack] = torch.zeros(count, dtype=torch.int64)
        self.norm[attack] = torch.full((count,), torch.nan)
        self.margin[attack] = torch.full((count,), torch.inf)
        self.by[attack] = [""] * count

    def enter(self, attack: str, image: int, row: Row, by: str, *, last: bool) -> None:
        """Add what one try of an attack found on one image.

        Args:
            attack: an attack that was opened.
            image: position of the image.
            row: what was found.
            by: what is said of a success.
            last: no further try follows if the image stands.
        """
        self.queries[attack][image] += row.queries
        self.margin[attack][image] = self.least_margin(attack, image, row)
        self.disputed[attack][image] |= row.disputed
        self.finished[attack][image] = row.fooled or last
        if row.fooled:
            self.fooled[attack][image] = True
            self.fooled_8bit[attack][image] = row.fooled_8bit
            self.step[attack][image], self.restart[attack][image] = row.step, row.restart
            self.norm[attack][image] = row.norm
            self.by[attack][image] = by

    def least_margin(self, attack: str, image: int, row: Row) -> Tensor:
        """The smallest margin that an attack saw on an image, with what one more try found; NaN if it saw that."""
        return torch.minimum(self.margin[attack][image], torch.tensor(row.margin))

    def write(self, path: Path) -> None:
        """One row an image, as parquet."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        n = len(self.labels)
        columns: dict[str, object] = {
            "image": list(range(n)),
            "label": self.labels.tolist(),
            "clean_answer": self.answers.tolist(),
            "clean_right": self.right.tolist(),
            "seed": [self.seed] * n,
        }
        for attack in self.fooled:
            for what in _WRITTEN:
                values = getattr(self, what)[attack].tolist() if attack in getattr(self, what) else []
                columns[f"{attack}:{what}"] = values + [None] * (n - len(values))
            broken_by = self.by.get(attack, [])
            columns[f"{attack}:by"] = [*broken_by, *[None] * (n - len(broken_by))]
        pq.write_table(pa.table(columns), path)

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """What :meth:`write` wrote: labels, answers, and of each attack what it fooled and finished, and by what."""
        import pyarrow.parquet as pq

        columns = pq.read_table(path).to_pydict()
        ledger = cls(torch.tensor(columns["label"]), torch.tensor(columns["clean_answer"]))
        for name in columns:
            attack, colon, what = name.rpartition(":")
            if colon and what == "fooled":
                count = sum(value is not None for value in columns[name])
                ledger.open(attack, count)
                ledger.fooled[attack] = torch.tensor(columns[name][:count])
                ledger.finished[attack] = torch.tensor(columns[f"{attack}:finished"][:count])
                ledger.by[attack] = [by or "" for by in columns[f"{attack}:by"][:count]]
        return ledger


@dataclass(frozen=True)
class Row:
    """What one try of one attack found on one image."""

    fooled: bool
    step: int
    restart: int
    queries: int
    norm: float
    margin: float
    disputed: bool
    fooled_8bit: bool

    @classmethod
    def of(cls, result: AttackResult, position: int, norm: float, fooled_8bit: bool) -> Row:
        """From an attack's result; ``norm``: of the perturbation; ``fooled_8bit``: with 8-bit pixels, too."""
        fooled = bool(result.fooled[position])
        return cls(
            fooled=fooled,
            step=int(result.step[position]),
            restart=int(result.restart[position]),
            queries=int(result.queries[position]),
            norm=norm if fooled else float("nan"),
            margin=float(result.margin[position]),
            disputed=bool(result.disputed[position]),
            fooled_8bit=fooled_8bit,
        )


class Journal:
    """An evaluation under way: one line of JSON for each image and try, and for the time spent so far. A kill loses a
    second of work, and what the try at hand has fooled, which is soon done again.

    Args:
        path: the file; None keeps nothing. One of another evaluation, or damaged, is started again.
        key: names what is evaluated.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path = path
        self._before, self._begun = 0.0, time.monotonic()
        self._rows: dict[str, dict[int, Row]] = {}
        self._waiting: list[str] = []
        if path is not None and not self._read(path, key):
            path.write_text(json.dumps({"evaluation": key}) + "\n", encoding="utf-8")

    @property
    def spent(self) -> float:
        """Seconds since the beginning, those of processes that were killed or ran out of budget included."""
        return self._before + time.monotonic() - self._begun

    def found(self, what: str) -> dict[int, Row]:
        """What is known of one try: image -> row."""
        return self._rows.get(what, {})

    def add(self, what: str, image: int, row: Row) -> None:
        """Keep one more row; :meth:`flush` brings it to the disk."""
        if self._path is not None:
            self._waiting.append(json.dumps({"try": what, "image": image, **row.__dict__}) + "\n")

    def flush(self) -> None:
        """Write what is waiting, and the time."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines([*self._waiting, json.dumps({"spent": self.spent}) + "\n"])
                file.flush()
                os.fsync(file.fileno())
            self._waiting.clear()

    def _read(self, path: Path, key: str) -> bool:
        if not path.is_file():
            return False
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if not lines or _parsed(lines[0]).get("evaluation") != key:
            return False
        for line in lines[1:]:
            values = _parsed(line)  # the last line of a killed run may be torn
            if isinstance(spent := values.get("spent"), float) and 0 <= spent < float("inf"):
                self._before = spent
            with contextlib.suppress(KeyError, TypeError):
                what, image = values.pop("try"), values.pop("image")
                self._rows.setdefault(what, {})[image] = Row(**values)
        if not lines[-1].endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
        return True


def _parsed(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


@dataclass(frozen=True)
class Robustness:
    """Accuracies of one network, as they stand in the record."""

    n: int
    clean_accuracy: float
    clean_ci95: tuple[float, float]
    robust_accuracy: dict[str, float]
    robust_n: dict[str, int]
    robust_ci95: dict[str, tuple[float, float]]
    robust_accuracy_8bit: dict[str, float]
    per_class: dict[str, dict[str, float]]


def summarize(ledger: Ledger, classes: Sequence[str]) -> Robustness:
    """Fractions, counts, Wilson intervals, and accuracy per class."""
    robust_accuracy, robust_n, robust_ci95, rounded = {}, {}, {}, {}
    for attack in [*ledger.fooled, WORST_CASE]:
        survived = ledger.survived(attack)
        robust_n[attack] = len(survived)
        robust_accuracy[attack] = int(survived.sum()) / len(survived)
        robust_ci95[attack] = wilson_interval(int(survived.sum()), len(survived))
        rounded[attack] = int(ledger.survived(attack, in_8_bits=True).sum()) / len(survived)
    worst = ledger.survived(WORST_CASE)
    per_class = {}
    for index, name in enumerate(classes):
        members = ledger.labels == index
        attacked = members[: len(worst)]
        if int(members.sum()) and int(attacked.sum()):
            per_class[name] = {
                "n": float(members.sum()),
                "n_attacked": float(attacked.sum()),
                "clean": float(ledger.right[members].double().mean()),
                "worst_case": float(worst[attacked].double().mean()),
            }
    right, n = int(ledger.right.sum()), len(ledger.labels)
    clean = right / n, wilson_interval(right, n)
    return Robustness(n, *clean, robust_accuracy, robust_n, robust_ci95, rounded, per_class)

"""The best trial for each question that people ask of a sweep, in words, with the command that writes its folder."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from coldforge.errors import UsageError
from coldforge.report import text
from coldforge.report.sweep_rows import ROBUST, VERDICTS, latency_column, numbers
from coldforge.sweep.table import Row, Sweep, pick

KEPT_ROBUST, KEPT_CLEAN = 0.95, 0.98
"""Conditions ask for this part of the best accuracy, rounded down to a whole per cent."""


@dataclass(frozen=True)
class Answer:
    """One question and the artifact that answers it best."""

    question: str
    trial: str
    label: str
    robust: str
    """With its 95 % interval."""
    flag: str
    """A warning that must be shown with the robust accuracy; never suspect, those are passed over."""
    facts: tuple[str, ...]
    """Clean accuracy, size, cost."""
    command: str


def answers(sweep: Sweep) -> list[Answer]:
    """The questions that the sweep's numbers allow; none where no artifact holds a robust accuracy."""
    return [
        _answer(sweep, question, conditions, row)
        for question, conditions in _questions(sweep)
        if (row := _best(sweep, conditions)) is not None
    ]


Conditions = dict[str, str]
"""``min``, ``max``, ``minimize`` and ``maximize``, as ``coldforge pick`` takes them."""


def _questions(sweep: Sweep) -> Iterator[tuple[str, Conditions]]:
    yield "Most robust", {"maximize": "robust"}
    best = _best(sweep, {"maximize": "robust"})
    if best is None:
        return
    rows = [row for row in sweep.rows if row["name"] == "artifact" and row["masking"] != "suspect"]
    floor = math.floor(100 * KEPT_ROBUST * best[ROBUST] + 1e-9)
    if floor > 0:
        tough = f"with at least {floor} % robust accuracy"
        least = f"robust={floor / 100:g}"
        yield f"Smallest file {tough}", {"min": least, "minimize": "bytes"}
        if latency_column(sweep):
            yield f"Fastest {tough}", {"min": least, "minimize": "latency"}
        if numbers(rows, "energy_j_per_image"):
            yield f"Least energy {tough}", {"min": least, "minimize": "energy"}
    clean = math.floor(100 * KEPT_CLEAN * max(numbers(rows, "clean_accuracy")) + 1e-9)
    if clean > 0:
        yield (
            f"Most robust with at least {clean} % clean accuracy",
            {"min": f"clean={clean / 100:g}", "maximize": "robust"},
        )
    sizes = numbers(rows, "size_bytes")
    limit = _round_up(statistics.median_low(sizes))
    if limit < max(sizes):
        yield f"Most robust file of at most {text.size(limit)}", {"max": f"bytes={limit}", "maximize": "robust"}


def _round_up(count: float) -> int:
    """To two digits, so that people can say it."""
    digits = math.floor(math.log10(max(count, 1)))
    power = int(10 ** max(0, digits - 1))
    return math.ceil(count / power) * power


def _best(sweep: Sweep, given: Conditions) -> Row | None:
    try:
        return pick(
            sweep,
            least=[given["min"]] if "min" in given else (),
            most=[given["max"]] if "max" in given else (),
            minimize=given.get("minimize", ""),
            maximize=given.get("maximize", ""),
        )
    except UsageError:  # no trial has the number, or none meets the condition
        return None


def _answer(sweep: Sweep, question: str, conditions: Conditions, row: Row) -> Answer:
    words = [word for name, value in conditions.items() for word in (f"--{name}", value)]
    timed = latency_column(sweep)
    facts = [
        f"clean {text.percent(row['clean_accuracy'])} %",
        text.size(row["size_bytes"]),
        f"{text.millions(row['macs'])} MACs",
    ]
    if timed and row.get(timed):
        facts.append(f"{text.seconds(row[timed])} an image")
    if row.get("energy_j_per_image"):
        facts.append(f"{text.energy(row['energy_j_per_image'])} ({text.energy_mark(row['energy_method'])})")
    bounds = numbers([row], "robust:low") + numbers([row], "robust:high")
    interval = f" ({text.interval((bounds[0], bounds[1]))})" if len(bounds) == 2 else ""
    return Answer(
        question=question,
        trial=row["trial"],
        label=sweep.labels.get(row["trial"]) or row["trial"],
        robust=f"{text.percent(row[ROBUST])} %{interval}",
        flag="" if row["masking"] == "ok" else VERDICTS[row["masking"]],
        facts=tuple(facts),
        command=shlex.join(["coldforge", "pick", str(sweep.folder), *words]),
    )

"""The terminal: results as tables or JSON on standard output, and the live display of a run on standard error."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, get_args, get_origin

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from coldforge.progress import Progress, Step
from coldforge.report import text
from coldforge.spec import Spec
from coldforge.store import Entry

if TYPE_CHECKING:
    from coldforge.deploy.bench import BenchRow
    from coldforge.evaluation.sensitivity import Sensitivity
    from coldforge.records import EvaluationRecord

LINE_EVERY_S = 15.0
"""Without a terminal, a stage that goes on says so at most this often."""


# --- results ---------------------------------------------------------------------------------------------------------


class _Stdout(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the caller; by default the program ends here, as failed."""
        raise BrokenPipeError


def stdout() -> Console:
    """Standard output; wide where it is not a terminal, so that tables in pipes and files are whole."""
    return _Stdout() if sys.stdout.isatty() else _Stdout(width=200)


def print_json(value: object) -> None:
    """Plain values for machines."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table for people."""
    table = Table(*headers, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    stdout().print(table)


def print_bench(rows: Sequence[BenchRow]) -> None:
    """The rows of a bench side by side, and how the energy was found."""
    cells = [
        (
            row.name,
            text.runtime(row.runtime),
            row.batch,
            row.threads,
            text.seconds(row.median),
            f"{text.seconds(row.p10)} to {text.seconds(row.p90)}",
            f"{row.images_per_s:,.0f}",
            text.times(row.ratio),
            text.size(row.size_bytes),
            text.energy(row.energy_j_per_image),
        )
        for row in rows
    ]
    headers = ("file", "runtime", "batch", "threads", "median", "p10 to p90", "images/s", "speed", "size", "per image")
    print_table(headers, cells)
    methods = ", ".join(sorted({row.energy_method for row in rows}))
    sys.stdout.write(f"median: of one call; speed: compared with the first file; energy per image: {methods}\n")


def print_sensitivity(rows: Sequence[Sensitivity]) -> None:
    """One line a layer and way, dearest first, after the network itself."""
    whole, *others = rows
    cells: list[tuple[object, ...]] = [
        (
            row.layer,
            row.how,
            text.percent(row.robust_accuracy),
            _points(row),
            text.percent(row.clean_accuracy),
            *_saved(row),
        )
        for row in sorted(others, key=lambda row: -row.robust_loss)
    ]
    start = (
        whole.layer,
        whole.how,
        text.percent(whole.robust_accuracy),
        "",
        text.percent(whole.clean_accuracy),
        "",
        "",
    )
    headers = ("layer", "compressed by", "robust", "cost, points [95 %]", "clean", "params saved", "MACs saved")
    print_table(headers, [start, *cells])
    sys.stdout.write("robust: under PGD-10, on validation images; nothing was trained after the compression\n")


def _points(row: Sensitivity) -> str:
    low, high = row.robust_loss_ci95
    return f"{100 * row.robust_loss:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _saved(row: Sensitivity) -> tuple[str, str]:
    return (text.percent(row.params), text.percent(row.macs)) if row.params else ("", "")


def print_evaluation(record: EvaluationRecord) -> None:
    """The table of attacks, the result in a sentence, every warning, and the verdict of the masking checks."""
    from coldforge.report.evaluation import cautions, evaluation_table, footnotes, headline
    from coldforge.report.verdict import verdict_lines

    stdout().print(evaluation_table(record))
    warnings = [f"{title}. {sentence}" for title, sentence in cautions(record)]
    notes = [f"Note: {note}." for note in record.notes]
    lines = [headline(record), *warnings, *notes, "", *verdict_lines(record.masking), "", *footnotes(record)]
    sys.stdout.write("\n".join(lines) + "\n")


def print_entries(entries: Sequence[Entry], as_json: bool) -> None:
    """Stages of the store."""
    if as_json:
        print_json([asdict(entry) for entry in entries])
    elif entries:
        headers = ("stage", "key", "label", "size", "created", "needed by, or problem")
        cells = [
            (
                entry.kind,
                entry.key[:16],
                (entry.describe or {}).get("label", ""),
                text.size(entry.size_bytes),
                entry.created,
                entry.problem or ", ".join(entry.needed_by) or "no record",
            )
            for entry in entries
        ]
        print_table(headers, cells)


def documented_toml(spec: Spec, table: str = "") -> str:
    """A recipe as TOML, with the meaning of each key as a comment above it.

    Args:
        spec: the recipe, or one table of it.
        table: name of that table.
    """
    import tomli_w

    lines, tables = [*_comments(type(spec).__doc__), f"[{table}]"] if table else [], []
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if isinstance(value, Spec):
            tables.append(documented_toml(value, f"{table}.{name}" if table else name))
            continue
        lines += _comments(field.description)
        choices = [str(choice) for choice in _choices(field.annotation)]
        if not all(re.search(rf"\b{re.escape(choice)}\b", field.description or "") for choice in choices):
            lines.append(f"# One of: {', '.join(choices)}.")
        lines.append(tomli_w.dumps({name: list(value) if isinstance(value, tuple) else value}).rstrip())
    return "\n\n".join(["\n".join(lines), *tables]) + ("" if table else "\n")


def _comments(text: str | None) -> list[str]:
    return [f"# {line.strip()}" for line in (text or "").strip().splitlines()]


def _choices(annotation: object) -> tuple[object, ...]:
    """The values that a type spells out, also for the elements of a tuple."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in _choices(part))


# --- progress --------------------------------------------------------------------------------------------------------


class Forecast:
    """Time left of a run, from the plan's estimates and what the finished stages really took.

    Args:
        steps: the plan.
        clock: seconds that only grow.
    """

    def __init__(self, steps: Sequence[Step], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = [(step.label, step.estimate_s) for step in steps if not step.cached]
        self._total = sum(seconds for _, seconds in self._left)
        self._planned = self._spent = 0.0  # of the finished stages
        self._estimate = self._fraction = 0.0  # of the current stage
        self._started: float | None = None

    def begin(self, label: str) -> None:
        """A stage starts."""
        found = next((item for item in self._left if item[0] == label), None)
        if found is not None:
            self._left.remove(found)
        self._estimate, self._fraction, self._started = (found[1] if found else 0.0), 0.0, self._clock()

    def advance(self, fraction: float) -> None:
        """The current stage is done up to a fraction."""
        self._fraction = min(max(fraction, 0.0), 1.0)

    def end(self, *, cached: bool = False) -> float:
        """The current stage is complete; returns its seconds."""
        seconds = self.stage_seconds()
        if not cached:
            self._planned, self._spent = self._planned + self._estimate, self._spent + seconds
        else:
            self._total -= self._estimate
        self._estimate = self._fraction = 0.0
        self._started = None
        return seconds

    def stage_seconds(self) -> float:
        """How long the current stage has been running."""
        return 0.0 if self._started is None else self._clock() - self._started

    def stage_left(self) -> float:
        """Seconds left of the current stage: extrapolated, once enough of it is done."""
        seconds = self.stage_seconds()
        if self._fraction >= 0.05:
            return seconds * (1 - self._fraction) / self._fraction
        return max(self._estimate * self._pace() - seconds, 0.0)

    def left(self) -> float:
        """Seconds left of the run."""
        return self.stage_left() + self._pace() * sum(seconds for _, seconds in self._left)

    def fraction(self) -> float:
        """Part of the planned work that is done, 0 to 1."""
        if self._total <= 0:
            return 1.0
        return min((self._planned + self._estimate * self._fraction) / self._total, 1.0)

    def _pace(self) -> float:
        """Real seconds for each estimated one; the estimate counts as 10 s of evidence for itself."""
        return (self._spent + 10.0) / (self._planned + 10.0)


class RichProgress(Progress):
    """Shows a run on a console: a live bar on a terminal, plain lines elsewhere. Use it as a context manager.

    Args:
        console: where to; normally standard error.
        quiet: only notes.
        clock: seconds that only grow.
    """

    def __init__(self, console: Console, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._quiet, self._clock = console, quiet, clock
        self._forecast = Forecast((), clock)
        self._count = self._done = 0
        self._label = ""
        self._cached: set[str] = set()
        self._last_line = 0.0
        self._bars: Bars | None = None
        self._run = self._stage = TaskID(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def plan(self, steps: Sequence[Step]) -> None:
        """Say what is to come and how long it takes; start the bar."""
        self._forecast = Forecast(steps, self._clock)
        self._count, self._done = len(steps), 0
        self._cached = {step.label for step in steps if step.cached}
        if self._quiet:
            return
        self._say(plan_line(steps))
        for step in steps:
            self._say(f"  {step.label}: {'in the store' if step.cached else about(step.estimate_s)}")
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
            self._bars = Bars(*columns, console=self._console, transient=True, refresh_per_second=4)
            self._run = self._bars.add_task("the run", total=1.0, detail="")
            self._stage = self._bars.add_task("", total=1.0, detail="")
            self._bars.start()

    def begin(self, label: str) -> None:
        """Name the stage that starts."""
        self._label = label
        self._forecast.begin(label)
        self._last_line = self._clock()
        if self._quiet:
            return
        if self._bars is None and label not in self._cached:  # of these, one line is enough
            self._say(f"{self._number()} {label} …")
        self._show(0.0, "")

    def advance(self, fraction: float, detail: str = "") -> None:
        """Move the bar; without a terminal, a line now and then."""
        self._forecast.advance(fraction)
        if self._quiet:
            return
        self._show(fraction, detail)
        if self._bars is None and self._clock() - self._last_line >= LINE_EVERY_S:
            self._last_line = self._clock()
            words = f"{self._number()} {self._label}: {100 * fraction:.0f} %, {about(self._forecast.left())} left"
            self._say(f"{words} ({detail})" if detail else words)

    def note(self, text: str) -> None:
        """Print what a person should read, quiet or not."""
        self._say(f"note: {text}", style="yellow")

    def end(self, label: str, *, cached: bool = False) -> None:
        """Say that a stage is complete, and how long it took."""
        seconds = self._forecast.end(cached=cached)
        if not self._quiet:
            self._say(f"{self._number()} {label}: {'in the store' if cached else f'done in {_seconds(seconds)}'}")
        self._done += 1
        self._show(1.0, "")

    def _number(self) -> str:
        return f"[{self._done + 1}/{max(self._count, self._done + 1)}]"

    def _show(self, fraction: float, detail: str) -> None:
        if self._bars is None:
            return
        left = self._forecast.left()
        words = f"{100 * self._forecast.fraction():3.0f} %  {about(left)} left" if left > 0 else ""
        self._bars.update(self._run, completed=self._forecast.fraction(), detail=words)
        self._bars.update(self._stage, completed=fraction, description=f"{self._number()} {self._label}", detail=detail)

    def _say(self, line: str, style: str = "") -> None:
        console = self._bars.console if self._bars is not None else self._console
        console.print(Text(line, style=style), soft_wrap=True)


def plan_line(steps: Sequence[Step]) -> str:
    """The plan in one line: how many stages, how many of them done, how long the rest takes."""
    todo = [step for step in steps if not step.cached]
    stages = f"{len(steps)} stage{'' if len(steps) == 1 else 's'}"
    kept = f" ({len(steps) - len(todo)} in the store)" if len(todo) < len(steps) else ""
    if not todo:
        return f"{stages}, all in the store: nothing to compute"
    return f"{stages}{kept}, {about(sum(step.estimate_s for step in todo))} of computing; stop with Ctrl-C at any time"


def about(seconds: float) -> str:
    """An estimate, rounded as coarsely as it deserves.

    >>> about(3.2), about(47), about(192), about(4000)
    ('a few seconds', 'about 50 s', 'about 3 min', 'about 1 h 07 min')
    """
    if seconds < 7.5:
        return "a few seconds"
    if seconds < 85:
        return f"about {5 * round(seconds / 5)} s" if seconds < 30 else f"about {10 * round(seconds / 10)} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 60 else f"about {text.duration(60.0 * minutes)}"


def _seconds(seconds: float) -> str:
    return text.duration(seconds) if seconds >= 0.05 else "no time"

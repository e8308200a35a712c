"""A sweep in the terminal: the live table, the plan, the results."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from coldforge.console import LINE_EVERY_S, about, print_table
from coldforge.report import text
from coldforge.report.sweep_rows import failed_checks, verdict_of
from coldforge.sweep import Listener, State, time_left
from coldforge.sweep.graph import counts_by_kind
from coldforge.sweep.plan import Plan, notes_on
from coldforge.sweep.table import Sweep, over_seeds

_NAMED = 8
"""Stages under way that a row of the live table names."""


class SweepListener(Listener):
    """Shows a sweep on standard error: a live table on a terminal, a line now and then elsewhere.

    Args:
        slots: tasks at a time.
        quiet: failures only.
        console: where to; default: standard error.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        *,
        slots: int,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots, self._quiet, self._clock = slots, quiet, clock
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._state: State | None = None
        self._not_before = -math.inf
        self._shown = Table()
        self._failed: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._state is not None and not self._quiet:
            self._console.print(_line(self._state, self._slots), highlight=False, markup=False)

    def planned(self, state: State) -> None:
        """Say what is to come."""
        self._failed, self._state = set(state.failures), state
        if self._quiet:
            return
        words = f"{len(state.trials)} trials, {len(state.graph.tasks)} stages, {state.found} of them in the store"
        self._console.print(words, highlight=False)
        for note in notes_on(state):
            self._console.print(note, style="yellow", highlight=False, markup=False)
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._drawn, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def changed(self, state: State) -> None:
        """Say what failed; without a live table, where the sweep stands, now and then."""
        newest = list(takewhile(lambda key: key not in self._failed, reversed(state.failures)))
        for key in reversed(newest):
            self._failed.add(key)
            failure = state.failures[key]
            self._console.print(f"failed: {failure.label}: {failure.error}", style="red", markup=False)
        if self._quiet or self._live is not None or self._clock() < self._not_before:
            return
        self._not_before = self._clock() + LINE_EVERY_S
        self._console.print(_line(state, self._slots), highlight=False, markup=False)

    def _drawn(self) -> Table:
        """The live table, for the thread that shows it. In a long sweep that is work: it gets a twentieth of time."""
        begin = self._clock()
        if self._state is not None and begin >= self._not_before:
            self._shown = self._table(self._state)
            end = self._clock()
            self._not_before = end + 20 * (end - begin)
        return self._shown

    def _table(self, state: State) -> Table:
        table = Table("stage", "made", "failed", "now", box=box.SIMPLE_HEAD, title=_line(state, self._slots))
        tasks = state.graph.tasks
        now, failures = ([tasks[key] for key in list(keys)] for keys in (state.running, state.failures))  # they change
        for kind, (total, done) in counts_by_kind(state.graph, state.done).items():
            failed = sum(task.kind == kind for task in failures)
            running = [task.label for task in now if task.kind == kind]
            more = f" … and {len(running) - _NAMED} more" if len(running) > _NAMED else ""
            table.add_row(kind, f"{done} of {total}", str(failed or ""), ", ".join(running[:_NAMED]) + more)
        return table


def _line(state: State, slots: int) -> str:
    left = time_left(state, slots)
    rest = f", {about(left)} left" if left else ""
    failed = f", {len(state.lost)} failed" if state.failures else ""
    return (
        f"{len(state.finished)} of {len(state.trials)} trials, {len(state.done)} of {len(state.graph.tasks)} stages"
        f"{failed}{rest}"
    )


def print_plan(plan: Plan) -> None:
    """What a sweep would do."""
    shown = list(plan.trials[:20])
    more = len(plan.trials) - len(shown)
    sys.stdout.write(f"{plan.name}: {len(plan.trials)} trials, {plan.finished} finished\n")
    sys.stdout.write("".join(f"  {label}\n" for label in shown) + (f"  … and {more} more\n" if more else ""))
    rows = [(kind, total, done) for kind, (total, done) in plan.kinds.items()]
    print_table(("stage", "distinct", "in the store"), rows)
    total = sum(count for count, _ in plan.kinds.values())
    share = plan.macs / plan.macs_alone if plan.macs_alone else 1.0
    sys.stdout.write(
        f"{total} stages in place of {plan.stages_alone} without sharing; {text.big(plan.macs)} of "
        f"{text.big(plan.macs_alone)} multiply-adds ({100 * share:.0f} %)\n"
    )
    for label, count, stages in plan.shared:
        sys.stdout.write(f"  shared by {count} trials{' each' if stages > 1 else ''}: {label}")
        sys.stdout.write(f" ({stages} stages)\n" if stages > 1 else "\n")
    for trial, why in plan.failed.items():
        sys.stdout.write(f"failed before: {trial}: {why}\n")
    for note in plan.notes:
        sys.stdout.write(f"{note}\n")
    sys.stdout.write(f"{about(plan.seconds_left)} of one worker are left\n")


def print_sweep(results: Sweep, state: State, page: Path) -> None:
    """The artifacts, means over seeds, what failed, and what was written."""
    found = [mean for mean in over_seeds(results) if mean.stage.startswith("artifact")]
    suspect = [verdict_of(mean.rows) == "suspect" for mean in found]
    rows = [
        (
            *mean.point,
            mean.n,
            _with_spread(mean.mean, mean.spread, "clean_accuracy"),
            _with_spread(mean.mean, mean.spread, "robust:worst_case") + (" SUSPECT" if flagged else ""),
            text.size(round(mean.mean["size_bytes"])),
            text.big(mean.mean["macs"]),
        )
        for mean, flagged in zip(found, suspect, strict=True)
    ]
    print_table((*results.axes, "seeds", "clean %", "robust % (worst case)", "file", "MACs"), rows)
    lost = state.lost
    for trial in state.trials:
        if trial.id in lost:
            sys.stdout.write(f"failed: {trial.label}: {lost[trial.id]}\n")
    if lost:
        sys.stdout.write("--retry-failed tries again what failed\n")
    if any(suspect):
        why = failed_checks(row for mean in found for row in mean.rows)
        failed = f" Failed: {why}." if why else ""
        sys.stdout.write(
            f"SUSPECT: the masking panel does not believe this robust accuracy.{failed} What a check means, and what "
            f"to do, is in {results.folder}/records/TRIAL.json\n"
        )
    graph = state.graph
    if graph.macs_alone:
        share = graph.macs / graph.macs_alone
        sys.stdout.write(
            f"shared stages: {100 * share:.0f} % of the multiply-adds that independent trials would take\n"
        )
    sys.stdout.write(f"Written: {results.folder}/table.csv, table.parquet, records/\n")
    sys.stdout.write(f"Look at: {page}\n")


def _with_spread(mean: dict[str, float], spread: dict[str, float], name: str) -> str:
    apart = spread.get(name, float("nan"))
    return text.percent(mean.get(name)) + (f" ± {text.percent(apart)}" if apart == apart else "")

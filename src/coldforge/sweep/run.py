"""The conductor of a sweep: hands out stages whose inputs are there, keeps failures, writes records.

Everything that it knows stands in the store and in the sweep's folder, so a sweep that was killed is continued by the
same call: stages that are there are not made again, and a failed one is not tried again unless that is asked for.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coldforge.errors import StoreError, UsageError
from coldforge.sealed import write_atomic
from coldforge.spec import spec_hash
from coldforge.sweep.executors import Executor
from coldforge.sweep.folder import FAILURES, RECORDS, SWEEP, Failure, load_failures, record_path, writing, written
from coldforge.sweep.graph import EXCLUSIVE, Graph, Workshop
from coldforge.sweep.outcome import Outcome, attempt
from coldforge.sweep.spec import SweepSpec, Trial, base_of


@dataclass
class State:
    """Where a sweep stands."""

    spec: SweepSpec
    trials: Sequence[Trial]
    graph: Graph
    done: set[str] = field(default_factory=set)
    """Stages that are there."""
    found: int = 0
    """How many of them were there before."""
    failures: dict[str, Failure] = field(default_factory=dict)
    elsewhere: dict[str, Failure] = field(default_factory=dict)
    """Failures of trials that this call leaves out, such as those of other seeds."""
    others: list[dict[str, Any]] = field(default_factory=list)
    """Trials that an earlier call left in the folder, of other seeds, as they stand in ``sweep.json``."""
    dropped: int = 0
    """How many trials of an earlier call leave the folder, as they have other settings than these."""
    stale: dict[str, str] = field(default_factory=dict)
    """Trials with a record that is made of other stages than theirs, to the digest of those: it stays until there is a
    new one."""
    running: dict[str, float] = field(default_factory=dict)
    """Stage to when it was handed out."""
    finished: set[str] = field(default_factory=set)
    """Trials whose record is written."""
    spent: dict[tuple[str, bool], tuple[float, float]] = field(default_factory=dict)
    """(Kind of stage, whether its work is counted in multiply-adds) to (seconds, multiply-adds or estimated seconds) of
    those made in this call."""

    @property
    def lost(self) -> dict[str, str]:
        """Trials that cannot be finished, to why."""
        return {trial: f"{self.failures[key].label}: {self.failures[key].error}" for trial, key in self.guilty.items()}

    @property
    def guilty(self) -> dict[str, str]:
        """Trials that cannot be finished, to the first stage that failed them."""
        blame = self.graph.blocked_by(list(self.failures))
        found = {}
        for trial, keys in zip(self.trials, self.graph.needed, strict=True):
            key = next((blame[key] for key in keys if key in blame), None)
            if key is not None:
                found[trial.id] = key
        return found


class Listener:
    """Is told how a sweep goes; does nothing."""

    def planned(self, state: State) -> None:
        """Once, before any work."""

    def changed(self, state: State) -> None:
        """A stage was begun, made or failed, or a trial finished."""


def survey(spec: SweepSpec, trials: Sequence[Trial], workshop: Workshop, out: Path | None = None) -> State:
    """What must be done, what is there, and what failed before; nothing is computed."""
    graph = Graph.of(trials, workshop)
    workshop.use(graph.tasks.values())
    done = {key for key, task in graph.tasks.items() if workshop.has(task)}
    state = State(spec, trials, graph, done=done, found=len(done))
    if out is not None:
        before = written(out)
        if before and before["name"] != spec.name:
            raise UsageError(f"--out: {out} holds another sweep; name another folder")
        ours = {trial.id for trial in trials}
        elsewhere = [trial for trial in before.get("trials", ()) if trial["id"] not in ours]
        if elsewhere and _is_same(before, spec):
            state.others = [trial for trial in elsewhere if trial["seed"] not in spec.seeds]
        state.dropped = len(elsewhere) - len(state.others)
        others = {trial["id"] for trial in state.others}
        for key, failure in load_failures(out).items():
            if key in graph.tasks:
                if key not in done:
                    state.failures[key] = failure
            elif failure.trials and others >= set(failure.trials):
                state.elsewhere[key] = failure
        made_of = {trial["id"]: str(trial.get("made_of")) for trial in before.get("trials", ())}
        for trial, keys in zip(trials, graph.needed, strict=True):
            if record_path(out, trial).is_file():
                if made_of.get(trial.id) == _made_of(keys):
                    state.finished.add(trial.id)
                else:
                    state.stale[trial.id] = made_of.get(trial.id, "")
    return state


def _is_same(before: Mapping[str, Any], spec: SweepSpec) -> bool:
    """Whether a sweep's file that an earlier call left is of this sweep, seeds aside, and of the same recipe."""
    now = {**spec.model_dump(mode="json"), "base": base_of(spec)}
    aside = {"seeds", "description", "recipe" if "base" in before else "base"}  # what a recipe says, not where it lies
    return all(before.get(key) == value for key, value in now.items() if key not in aside)


def _made_of(keys: Sequence[str]) -> str:
    """What a record is made of, in short: one that is made of other stages must be written anew."""
    return spec_hash(*keys)[:16]


def conduct(
    state: State, workshop: Workshop, executor: Executor, out: Path, *, retry_failed: bool = False, listener: Listener
) -> State:
    """Make all that is missing, and write records as trials are finished.

    Args:
        state: from :func:`survey`.
        workshop: writes the records and makes what is timed; may be the one that the executor has.
        executor: makes the stages.
        out: folder of the sweep.
        retry_failed: try again what failed before.
        listener: told of every step.

    Returns:
        The state at the end. Failures are in it, and no exception.

    Raises:
        StoreError: the folder cannot be written.
    """
    if retry_failed:
        state.failures.clear()
    _prepare(state, out)
    if len(state.done) < len(state.graph.tasks):  # otherwise records keep them
        workshop.keep(out / SWEEP, state.graph.tasks.values())
    try:
        _Conductor(state, workshop, executor, out, listener).run()
    finally:
        if state.stale:
            _write_sweep(state, out)  # which of these records are new now
    return state


class _Conductor:
    def __init__(self, state: State, workshop: Workshop, executor: Executor, out: Path, listener: Listener) -> None:
        self._state, self._workshop, self._executor = state, workshop, executor
        self._out, self._listener = out, listener
        graph = state.graph
        blocked = graph.blocked_by(state.failures)
        wanted = [key for key in graph.tasks if key not in state.done and key not in blocked]
        self._missing = {key: sum(read not in state.done for read in graph.tasks[key].inputs) for key in wanted}
        self._left = [sum(key not in state.done for key in keys) for keys in graph.needed]
        self._owners: dict[str, list[int]] = {}
        for number, keys in enumerate(graph.needed):
            for key in keys:
                if key not in state.done:
                    self._owners.setdefault(key, []).append(number)
        # the newest first: what a finished stage made possible comes before other trials, so that trials end early
        self._ready: deque[str] = deque(reversed([key for key in wanted if not self._missing[key]]))
        self._alone: deque[str] = deque()
        self._failures = _FailureFile(out, state)

    def run(self) -> None:
        self._listener.planned(self._state)
        try:
            for number, left in enumerate(self._left):
                if not left:
                    self._finish(number)
            while outcomes := self._work():
                for outcome in outcomes:
                    self._take(outcome)
                self._failures.save()
                self._listener.changed(self._state)
        finally:
            self._executor.close()
            self._failures.save(at_once=True)

    def _work(self) -> list[Outcome]:
        """What was done since; nothing where nothing is left that can be done."""
        if self._hand_out():
            return self._executor.wait()
        if not self._alone:
            return []
        # made here, on the machine whose name its key bears, with no worker's share of the processors
        key = self._alone.popleft()
        self._state.running[key] = time.monotonic()
        return [attempt(self._workshop, self._trial(key), key)]

    def _hand_out(self) -> bool:
        """Keep all workers busy; False where nothing is under way or can be begun."""
        state = self._state
        while len(state.running) < self._executor.slots and self._ready:
            key = self._ready.pop()
            if state.graph.tasks[key].kind in EXCLUSIVE:
                self._alone.append(key)
            else:
                state.running[key] = time.monotonic()
                self._executor.submit(self._trial(key), key)
        return bool(state.running)

    def _trial(self, key: str) -> Trial:
        return self._state.trials[self._state.graph.trial_of[key]]

    def _take(self, outcome: Outcome) -> None:
        state, key = self._state, outcome.key
        task = state.graph.tasks[key]
        del state.running[key]
        if outcome.hopeless:
            raise StoreError(outcome.error)
        if outcome.error:
            state.failures[key] = Failure(task.label, outcome.error, outcome.details)
            self._failures.changed = True
            return
        state.done.add(key)
        pace = task.kind, task.macs > 0
        seconds, work = state.spent.get(pace, (0.0, 0.0))
        state.spent[pace] = seconds + outcome.seconds, work + (task.macs or task.seconds or 1.0)
        for reader in state.graph.readers.get(key, ()):
            if reader in self._missing:
                self._missing[reader] -= 1
                if not self._missing[reader]:
                    self._ready.append(reader)
        for number in self._owners.pop(key, ()):
            self._left[number] -= 1
            if not self._left[number]:
                self._finish(number)

    def _finish(self, number: int) -> None:
        trial = self._state.trials[number]
        if trial.id not in self._state.finished:
            with writing(self._out):
                self._workshop.finish(trial, record_path(self._out, trial))
            self._state.finished.add(trial.id)


def time_left(state: State, slots: int) -> float | None:
    """Seconds that the rest will take, from the speed of what was made, of the same kind where there is any; None while
    nothing tells how long a multiply-add takes.
    """
    if not state.spent:
        return None
    beside, alone, blocked = 0.0, 0.0, state.graph.blocked_by(state.failures)
    for key, task in state.graph.tasks.items():
        if key in state.done or key in blocked:
            continue
        counted = task.macs > 0  # else its work is in seconds, as estimated
        alike = state.spent.get((task.kind, counted))
        known = [alike] if alike else [spent for (_, macs), spent in state.spent.items() if macs == counted]
        if counted and not known:
            return None
        seconds, work = (sum(column) for column in zip(*known, strict=True)) if known else (1.0, 1.0)
        takes = seconds / work * (task.macs or task.seconds or 1.0)
        if task.kind in EXCLUSIVE:
            alone += takes
        else:
            beside += takes
    return beside / slots + alone


# --- the folder ------------------------------------------------------------------------------------------------------


def _prepare(state: State, out: Path) -> None:
    with writing(out):
        (out / RECORDS).mkdir(parents=True, exist_ok=True)
    _write_sweep(state, out)
    if state.failures or (out / FAILURES).exists():
        _write_failures(out, state)


def _write_sweep(state: State, out: Path) -> None:
    graph = state.graph
    trials = []
    for trial, keys in zip(state.trials, graph.needed, strict=True):
        old = trial.id in state.stale and trial.id not in state.finished
        made_of = state.stale[trial.id] if old else _made_of(keys)
        about = {"id": trial.id, "label": trial.label, "point": dict(trial.point), "seed": trial.seed}
        trials.append({**about, "made_of": made_of})
    stages = {
        "distinct": len(graph.tasks),
        "alone": sum(map(len, graph.needed)),
        "macs": graph.macs,
        "macs_alone": graph.macs_alone,
    }
    base = base_of(state.spec)
    content = {**state.spec.model_dump(mode="json"), "base": base, "trials": [*state.others, *trials], "stages": stages}
    content["seeds"] = sorted({trial["seed"] for trial in content["trials"]})
    with writing(out):
        write_atomic(out / SWEEP, json.dumps(content, indent=1, default=str) + "\n")


def _write_failures(out: Path, state: State) -> None:
    lost: dict[str, list[str]] = {}
    for trial, key in state.guilty.items():
        lost.setdefault(key, []).append(trial)
    ours = {key: {**asdict(failure), "trials": lost.get(key, [])} for key, failure in state.failures.items()}
    content = {**{key: asdict(failure) for key, failure in state.elsewhere.items()}, **ours}
    with writing(out):
        write_atomic(out / FAILURES, json.dumps(content, indent=1) + "\n")


class _FailureFile:
    """Writes failures as they come, but spends only a twentieth of the time on it: where thousands fail, the file is
    long. What a kill takes away is tried once more.
    """

    def __init__(self, out: Path, state: State) -> None:
        self._out, self._state = out, state
        self._not_before = 0.0
        self.changed = False

    def save(self, *, at_once: bool = False) -> None:
        """Write what has changed."""
        begin = time.monotonic()
        if self.changed and (at_once or begin >= self._not_before):
            _write_failures(self._out, self._state)
            end = time.monotonic()
            self._not_before, self.changed = end + 20 * (end - begin), False

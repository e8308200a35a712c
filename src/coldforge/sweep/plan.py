"""What a sweep would take: what is shared, what is there, and estimates."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from coldforge.errors import UsageError
from coldforge.sweep.folder import ADDED, written
from coldforge.sweep.graph import counts_by_kind
from coldforge.sweep.run import State
from coldforge.sweep.spec import SweepSpec, Trial, expand

_MOST_SHARED = 8


@dataclass(frozen=True)
class Plan:
    """For ``--dry-run``."""

    name: str
    trials: tuple[str, ...]
    """Labels."""
    finished: int
    failed: dict[str, str]
    """Trial to why it cannot be finished."""
    kinds: dict[str, tuple[int, int]]
    """Kind of stage to (how many, how many of them are in the store)."""
    stages_alone: int
    """Stages that the trials would need without sharing."""
    macs: float
    macs_alone: float
    """Multiply-adds without sharing."""
    seconds_left: float
    """Of one worker, from the measured throughput."""
    notes: tuple[str, ...]
    """What becomes of the results that are in the folder already."""
    shared: tuple[tuple[str, int, int], ...]
    """The stages that most trials share: label, number of trials, and how many stages of that label they share so."""

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def plan_of(state: State, macs_per_second: float) -> Plan:
    """The plan of a surveyed sweep."""
    graph = state.graph
    uses: dict[str, int] = {}
    for keys in graph.needed:
        for key in keys:
            uses[key] = uses.get(key, 0) + 1
    alike = Counter((graph.tasks[key].label, count) for key, count in uses.items() if count > 1)
    most = sorted(alike, key=lambda pair: -pair[1])[:_MOST_SHARED]  # stable: in the order of the arrow
    blocked = graph.blocked_by(state.failures)
    left = [task for key, task in graph.tasks.items() if key not in state.done and key not in blocked]
    return Plan(
        name=state.spec.name,
        trials=tuple(trial.label for trial in state.trials),
        finished=len(state.finished),
        failed=state.lost,
        kinds=counts_by_kind(graph, state.done),
        stages_alone=sum(len(keys) for keys in graph.needed),
        macs=graph.macs,
        macs_alone=graph.macs_alone,
        seconds_left=sum(task.macs / macs_per_second + task.seconds for task in left),
        notes=tuple(notes_on(state)),
        shared=tuple((label, count, alike[label, count]) for label, count in most),
    )


def notes_on(state: State) -> list[str]:
    """What becomes of the results that are in the folder already, a sentence each."""
    found = []
    if state.dropped:
        found.append(
            f"trials of an earlier sweep that leave the table: {state.dropped}; its recipe or its file was another, "
            "their records stay in records/"
        )
    if state.stale:
        found.append(
            f"records that are made anew: {len(state.stale)}; they are of other data, of other versions or of another "
            "machine, and stand until the new ones are there"
        )
    return found


def trial_of(folder: Path, name: str) -> Trial:
    """One trial of a sweep's folder, with its recipe.

    Raises:
        UsageError: the folder does not hold it.
    """
    content = written(folder)
    said = {key: value for key, value in content.items() if key not in ADDED}
    if "base" in content:  # the recipe as it was: the file of it may have changed, or lie elsewhere
        said |= {"recipe": content["base"], "set": {}}
    for trial in expand(SweepSpec.model_validate(said)):
        if trial.id == name:
            return trial
    raise UsageError(f"{folder}: expected the trial {name}, found none; it is of an earlier sweep")

"""The stages of all trials, each once: what must be made, in which order, and what is shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from coldforge.sweep.spec import Trial

EXCLUSIVE = ("measure",)
"""Kinds of stages that are made alone, after all others: their clock must not run while others compute."""


@dataclass(frozen=True, slots=True)
class Task:
    """One stage of the sweep."""

    key: str
    kind: str
    label: str
    inputs: tuple[str, ...]
    """Keys of the stages that it reads."""
    macs: float = 0.0
    seconds: float = 0.0
    """Estimates, of :class:`coldforge.stages.Stage`."""


class Workshop(Protocol):
    """Knows the stages of a trial and makes them. Workers get a copy of their own, so it can be pickled."""

    def tasks(self, trial: Trial) -> Sequence[Task]:
        """The stages of a trial, in an order in which they can be made."""

    def use(self, tasks: Iterable[Task]) -> None:
        """Say that these are needed as long as this process lives: nobody may delete them from under it."""

    def keep(self, path: Path, tasks: Iterable[Task]) -> None:
        """Keep them as long as that file exists."""

    def has(self, task: Task) -> bool:
        """Whether the stage was made before."""

    def make(self, trial: Trial, key: str) -> None:
        """Make one stage of a trial; what it reads is there."""

    def finish(self, trial: Trial, path: Path) -> None:
        """Write the record of a trial whose stages are all there, and keep these for as long as it exists."""


@dataclass
class Graph:
    """Distinct tasks, who reads them, and whose they are."""

    tasks: dict[str, Task] = field(default_factory=dict)
    trial_of: dict[str, int] = field(default_factory=dict)
    """Task to the number of the first trial that has it."""
    readers: dict[str, list[str]] = field(default_factory=dict)
    """Task to those that read it."""
    needed: list[tuple[str, ...]] = field(default_factory=list)
    """For each trial the keys of its tasks."""
    macs_alone: float = 0.0
    """What the trials would take if each were run on its own, in multiply-adds."""

    @classmethod
    def of(cls, trials: Iterable[Trial], workshop: Workshop) -> Graph:
        """The graph of all trials."""
        graph = cls()
        for number, trial in enumerate(trials):
            tasks = workshop.tasks(trial)
            graph.macs_alone += sum(task.macs for task in tasks)
            graph.needed.append(tuple(dict.fromkeys(task.key for task in tasks)))
            for task in tasks:
                if task.key in graph.tasks:
                    continue
                graph.tasks[task.key] = task
                graph.trial_of[task.key] = number
                for read in task.inputs:
                    graph.readers.setdefault(read, []).append(task.key)
        return graph

    @property
    def macs(self) -> float:
        """What the sweep takes, every stage once, in multiply-adds."""
        return sum(task.macs for task in self.tasks.values())

    def blocked_by(self, failed: Iterable[str]) -> dict[str, str]:
        """Tasks that can never be made because of ``failed`` ones, to the one that is to blame."""
        blame = {key: key for key in failed if key in self.tasks}
        waiting = list(blame)
        while waiting:
            key = waiting.pop()
            for reader in self.readers.get(key, ()):
                if reader not in blame:
                    blame[reader] = blame[key]
                    waiting.append(reader)
        return blame


def counts_by_kind(graph: Graph, done: Mapping[str, object] | set[str]) -> dict[str, tuple[int, int]]:
    """Kind of stage to (how many there are, how many of them are in ``done``), in the order of the arrow."""
    found: dict[str, tuple[int, int]] = {}
    for key, task in graph.tasks.items():
        total, ready = found.get(task.kind, (0, 0))
        found[task.kind] = total + 1, ready + (key in done)
    return found

"""Trials that cost nothing, or a fixed number of matrix products; and an executor whose workers live on a clock.

A trial has the stages baseline -> prune -> finetune -> evaluate, which write a number each: the trunk (a baseline for
each seed, a pruned network for each seed and ratio) is shared, two stages are its own. Its record is a real one of
several rows with the numbers exchanged. Store, graph, conductor, records and tables are the real ones.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from coldforge.records import Record, load_record
from coldforge.sealed import write_atomic
from coldforge.spec import spec_hash
from coldforge.stages.shop import read_json, write_json
from coldforge.store import Store
from coldforge.sweep import SweepSpec, Task, Trial
from coldforge.sweep.executors import Outcome

PATTERN = Path(__file__).parents[1] / "results" / "fashion-mnist"


def sweep_of(trials: int, *, seeds: int = 10, ratios: int = 20) -> SweepSpec:
    """A sweep of that many trials, a multiple of seeds times ratios."""
    axes = {
        "prune.ratio": [round(0.04 * number, 2) for number in range(ratios)],
        "finetune.lr": [0.001 * (number + 1) for number in range(trials // (seeds * ratios))],
    }
    return SweepSpec(name="synthetic", recipe="quickstart", seeds=tuple(range(seeds)), axes=axes)


class Numbers:
    """Stages that write a number each.

    Args:
        root: of the store.
        products: matrix products (512 x 512, one thread) that the last stage of a trial computes first.
        pause: seconds that it sleeps.
    """

    def __init__(self, root: Path, products: int = 0, pause: float = 0.0) -> None:
        self._root, self._products, self._pause = root, products, pause
        self._store = Store(root)
        self._pattern: Record | None = None

    def __reduce__(self) -> tuple[type[Numbers], tuple[Path, int, float]]:
        return Numbers, (self._root, self._products, self._pause)

    def tasks(self, trial: Trial) -> Sequence[Task]:
        """baseline -> prune -> finetune -> evaluate."""
        ratio, rate = trial.recipe.prune.ratio, trial.recipe.finetune.lr
        baseline = spec_hash("baseline", trial.seed)
        prune = spec_hash("prune", baseline, ratio)
        finetune = spec_hash("finetune", prune, rate)
        return [
            Task(baseline, "baseline", f"baseline {trial.seed}", (), macs=100.0),
            Task(prune, "prune", f"prune {ratio:g}", (baseline,), macs=1.0),
            Task(finetune, "finetune", f"finetune {rate:g}", (prune,), macs=10.0),
            Task(spec_hash("evaluate", finetune), "evaluate", f"evaluate {rate:g}", (finetune,), macs=2.0),
        ]

    def use(self, tasks: Iterable[Task]) -> None:
        """Keep them from being pruned."""
        self._store.use((task.kind, task.key) for task in tasks)

    def keep(self, path: Path, tasks: Iterable[Task]) -> None:
        """Keep them as long as that file exists."""
        self._store.register(path, [task.key for task in tasks])

    def has(self, task: Task) -> bool:
        """Whether the store holds it."""
        return self._store.has(task.kind, task.key)

    def make(self, trial: Trial, key: str) -> None:
        """Compute, read the number before, write one."""
        tasks = {task.key: task for task in self.tasks(trial)}
        task = tasks[key]

        def build(folder: Path) -> None:
            if task.kind == "evaluate":
                multiply(self._products)
                time.sleep(self._pause)
            total = sum(self._number(tasks[read]) for read in task.inputs)
            write_json(folder / "result.json", {"number": total + int(key[:4], 16)})

        self._store.stage(task.kind, key, build, describe={"label": task.label})

    def finish(self, trial: Trial, path: Path) -> None:
        """A whole record, registered."""
        tasks = self.tasks(trial)
        self._pattern = self._pattern or load_record(PATTERN)
        changes = {"params": self._number(tasks[-1]), "clean_accuracy": trial.recipe.prune.ratio}
        rows = tuple(row.model_copy(update=changes) for row in self._pattern.stages)
        write_atomic(path, self._pattern.model_copy(update={"stages": rows}).to_json())
        self._store.register(path, [task.key for task in tasks])

    def _number(self, task: Task) -> int:
        return int(read_json(self._store.path(task.kind, task.key) / "result.json")["number"])


TINY = SweepSpec(
    name="tiny",
    recipe="quickstart",
    set={
        "data.train_n": 400,
        "data.test_n": 40,
        "model.train.epochs": 1,
        "finetune.epochs": 1,
        "finetune.arms": ["natural"],
        "deploy.arm": "natural",
        "evaluate.attacks": ["fgsm"],
        "evaluate.n": 20,
        "evaluate.masking_n": 0,
    },
    axes={"prune.ratio": {"from": 0.1, "to": 0.6, "step": 0.1}},
)
"""Real trials, as small as they can be; their stages are as many as any trial's."""


def multiply(products: int) -> None:
    """So many products of two matrices, at one thread."""
    if not products:
        return
    torch.set_num_threads(1)
    left = torch.rand(512, 512, generator=torch.Generator().manual_seed(0))
    for _ in range(products):
        left = torch.tanh(left @ left)


class Nothing(Numbers):
    """The same stages, made by nobody and kept nowhere: what is left is the conductor."""

    def use(self, tasks: Iterable[Task]) -> None:
        """There is nothing to keep."""

    def keep(self, path: Path, tasks: Iterable[Task]) -> None:
        """There is nothing to keep."""

    def has(self, task: Task) -> bool:
        """Never."""
        return False

    def finish(self, trial: Trial, path: Path) -> None:
        """Write nothing."""


class Simulated:
    """Any number of workers whose tasks end when a clock of their own says so; the only real time is the conductor's.

    Args:
        slots: workers.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.clock = 0.0
        """Simulated seconds."""
        self._draw = random.Random(0)
        self._ends: list[tuple[float, str]] = []

    def submit(self, trial: Trial, key: str) -> None:
        """It takes one to three minutes."""
        heapq.heappush(self._ends, (self.clock + self._draw.uniform(60, 180), key))

    def wait(self) -> list[Outcome]:
        """The one that ends next."""
        begun = self.clock
        self.clock, key = heapq.heappop(self._ends)
        return [Outcome(key, self.clock - begun)]

    def close(self) -> None:
        """Nobody is left."""
        self._ends.clear()

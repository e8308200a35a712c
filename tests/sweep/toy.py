"""Stages that write a number in a moment, so that sweeps can be tested by the hundred; also run as a program.

A trial has the stages base -> middle -> leaf -> measure, keyed by the settings that each depends on. Every stage that
is complete appends a line to ``log`` beside the store.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from coldforge.records import Record
from coldforge.sealed import write_atomic
from coldforge.spec import spec_hash
from coldforge.store import Store
from coldforge.sweep import Listener, Task, conduct, expand, load_sweep, make_executor, survey


class ToyWorkshop:
    """Numbers in place of networks."""

    def __init__(self, root, record, *, seconds=0.0, trouble=None):
        self.root, self.record, self.seconds, self.trouble = Path(root), record, seconds, trouble or {}
        self.store = Store(root)

    def __reduce__(self):
        return _toy, (self.root, self.record, self.seconds, self.trouble)

    def tasks(self, trial):
        ratio, bits = trial.recipe.prune.ratio, trial.recipe.quantize.weight_bits
        base = spec_hash("base", trial.seed)
        middle = spec_hash("middle", base, ratio)
        leaf = spec_hash("leaf", middle, bits)
        return [
            Task(base, "base", f"base {trial.seed}", (), macs=100.0),
            Task(middle, "middle", f"middle {ratio:g}", (base,), macs=10.0),
            Task(leaf, "leaf", f"leaf {ratio:g} {bits}", (middle,), macs=1.0),
            Task(spec_hash("measure", leaf), "measure", f"measure {ratio:g} {bits}", (leaf,), seconds=0.1),
        ]

    def use(self, tasks):
        self.store.use((task.kind, task.key) for task in tasks)

    def keep(self, path, tasks):
        self.store.register(path, [task.key for task in tasks])

    def has(self, task):
        return self.store.has(task.kind, task.key)

    def make(self, trial, key):
        tasks = {task.key: task for task in self.tasks(trial)}
        task = tasks[key]
        self.log(f"begin {task.label}")

        def build(folder):
            time.sleep(self.seconds)
            self.cause_trouble(task.label)
            total = sum(self.number(tasks[read]) for read in task.inputs)
            (folder / "number").write_text(str(total + int(key[:4], 16)))

        self.store.stage(task.kind, key, build)
        self.log(f"made {task.label} {key[:16]}")

    def number(self, task):
        return int((self.store.path(task.kind, task.key) / "number").read_text())

    def finish(self, trial, path):
        numbers = [self.number(task) for task in self.tasks(trial)]
        stage = self.record.stages[-1].model_copy(
            update={"params": numbers[-1], "macs": numbers[1], "clean_accuracy": trial.recipe.prune.ratio}
        )
        write_atomic(path, self.record.model_copy(update={"stages": (stage,)}).to_json())

    def cause_trouble(self, label):
        what = self.trouble.get(label)
        if what == "error":
            raise ValueError("this cannot be made")
        if isinstance(what, int):  # die so many times
            mark = self.root.parent / f"deaths-{label}"
            deaths = int(mark.read_text()) if mark.exists() else 0
            if deaths < what:
                mark.write_text(str(deaths + 1))
                os.kill(os.getpid(), signal.SIGKILL)

    def log(self, line):
        with open(self.root.parent / "log", "a", encoding="utf-8") as file:
            file.write(f"{time.monotonic():.6f} {os.getpid()} {line}\n")


def _toy(root, record, seconds, trouble):
    workshop = ToyWorkshop(root, record, seconds=seconds, trouble=trouble)
    workshop.log("came to a worker")
    return workshop


def main(file, record, executor, folder):
    """``python toy.py SWEEP RECORD EXECUTOR FOLDER``"""
    folder = Path(folder)
    spec = load_sweep(file)
    workshop = ToyWorkshop(folder / "store", Record.model_validate_json(Path(record).read_bytes()), seconds=0.02)
    trials = expand(spec)
    state = survey(spec, trials, workshop, folder / "out")
    hands = make_executor(executor, workshop, workers=2, threads=1)
    conduct(state, workshop, hands, folder / "out", listener=Listener())
    print(json.dumps({"finished": len(state.finished), "failures": len(state.failures)}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Who does the work: this process, some processes of this machine, or a Ray cluster. One small interface.

An executor is given (trial, key) pairs whose inputs are there, and hands back outcomes. Stages travel through the
store, which all workers share; two of them asked for the same stage build it once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from coldforge.errors import UsageError
from coldforge.provenance import physical_cores
from coldforge.sweep.graph import Workshop
from coldforge.sweep.outcome import MOST_LOSSES, Outcome, attempt
from coldforge.sweep.spec import Trial

_PARENT_SECONDS = 1.0


class Executor(Protocol):
    """Makes stages."""

    @property
    def slots(self) -> int:
        """How many tasks it works on at a time."""

    def submit(self, trial: Trial, key: str) -> None:
        """Begin, or queue, one task."""

    def wait(self) -> list[Outcome]:
        """At least one outcome; blocks until there is one."""

    def close(self) -> None:
        """Stop at once; what is unfinished is resumed by the next sweep."""


class Serial:
    """One task after the other, in this process."""

    slots = 1

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self._waiting: deque[tuple[Trial, str]] = deque()

    def submit(self, trial: Trial, key: str) -> None:
        """Queue one task."""
        self._waiting.append((trial, key))

    def wait(self) -> list[Outcome]:
        """Make the next one."""
        return [attempt(self._workshop, *self._waiting.popleft())]

    def close(self) -> None:
        """Forget what is queued."""
        self._waiting.clear()


class Processes:
    """Workers of this machine, each with its share of the processors.

    A worker that dies (out of memory, killed) is replaced and its task tried :data:`MOST_LOSSES` times in all.

    Args:
        workshop: copied to each worker.
        workers: how many.
        threads: processors that each may use.
    """

    def __init__(self, workshop: Workshop, *, workers: int, threads: int) -> None:
        self.slots = workers
        self._workshop, self._threads = workshop, threads
        self._context = multiprocessing.get_context("spawn")
        self._waiting: deque[tuple[Trial, str]] = deque()
        self._losses: dict[str, int] = {}
        self._workers: dict[int, _Worker] = {}

    def submit(self, trial: Trial, key: str) -> None:
        """Give a task to a worker that is free, or queue it."""
        self._waiting.append((trial, key))
        self._hand_out()

    def wait(self) -> list[Outcome]:
        """What workers have finished since, and what was given up."""
        found: list[Outcome] = []
        while not found:
            busy = {worker.pipe: number for number, worker in self._workers.items() if worker.task is not None}
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                found += self._receive(busy[ready])
            self._hand_out()
        return found

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            worker.process.terminate()
        for worker in self._workers.values():
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
            worker.pipe.close()
        self._workers.clear()
        self._waiting.clear()

    def _receive(self, number: int) -> list[Outcome]:
        worker = self._workers[number]
        assert worker.task is not None
        trial, key = worker.task
        worker.task = None
        try:
            outcome: Outcome = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(5)
            code = worker.process.exitcode
            worker.pipe.close()
            del self._workers[number]
            self._losses[key] = self._losses.get(key, 0) + 1
            if self._losses[key] >= MOST_LOSSES:
                why = f"the worker died {MOST_LOSSES} times (exit code {code}): out of memory, or killed"
                return [Outcome(key, 0.0, why)]
            self._waiting.appendleft((trial, key))
            return []
        return [outcome]

    def _hand_out(self) -> None:
        while self._waiting:
            free = next((worker for worker in self._workers.values() if worker.task is None), None)
            if free is None:
                number = next((number for number in range(self.slots) if number not in self._workers), None)
                if number is None:
                    return
                free = self._workers[number] = self._start(number)
            task = self._waiting.popleft()
            try:
                free.pipe.send(task)
                free.task = task
            except OSError:  # it died while idle; the next round starts another
                self._waiting.appendleft(task)
                for number, worker in list(self._workers.items()):
                    if worker is free:
                        worker.pipe.close()
                        del self._workers[number]

    def _start(self, number: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, self._workshop, number, self._threads, self.slots, os.getpid()), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)


@dataclass
class _Worker:
    process: Any  # multiprocessing.context.SpawnProcess
    pipe: Connection
    task: tuple[Trial, str] | None = None


def _work(pipe: Connection, workshop: Workshop, number: int, threads: int, workers: int, parent: int) -> None:
    """A worker's life: tasks until the pipe closes. Ctrl-C is the parent's business; without a parent it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _pin(number, threads, workers)
    while True:
        try:
            trial, key = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(attempt(workshop, trial, key))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


def _pin(number: int, threads: int, workers: int) -> None:
    """Keep a worker to its share of the processors, where the system can do that and the workers take all of them: with
    fewer, two sweeps would sit on the same ones.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if not hasattr(os, "sched_setaffinity"):
        return
    processors = sorted(os.sched_getaffinity(0))
    if workers * threads < len(processors):
        return
    first = number * threads % len(processors)
    share = (processors * 2)[first : first + threads]
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, share)


def make_executor(name: str, workshop: Workshop, *, workers: int, threads: int, address: str = "") -> Executor:
    """The executor of that name.

    Args:
        name: "serial", "process" or "ray".
        workshop: makes the stages.
        workers: how many tasks at a time; 0: as many as the processors, of this machine or the Ray cluster, allow.
        threads: of each task.
        address: of a Ray cluster; empty starts a local one.

    Raises:
        UsageError: another name, a number of workers below 0, or Ray is not installed.
    """
    if workers < 0:
        raise UsageError(f"--workers: expected 1 or more, or 0 for as many as there is room for, got {workers}")
    if name == "serial":
        return Serial(workshop)
    if name == "process":
        workers = workers or max(physical_cores() // threads, 1)
        return Processes(workshop, workers=workers, threads=threads)
    if name == "ray":
        from coldforge.sweep.ray_executor import RayExecutor

        return RayExecutor(workshop, workers=workers, threads=threads, address=address)
    raise UsageError(f"--executor: expected serial, process or ray, got {name!r}")

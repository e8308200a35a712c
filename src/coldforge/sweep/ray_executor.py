"""Stages as tasks of a Ray cluster; the store is a folder that all its machines share."""

from __future__ import annotations

import importlib
import os
import sys
import uuid
from typing import Any

from coldforge.errors import UsageError
from coldforge.provenance import physical_cores
from coldforge.sweep.graph import Workshop
from coldforge.sweep.outcome import MOST_LOSSES, Outcome, attempt
from coldforge.sweep.spec import Trial

_workshops: dict[str, Workshop] = {}
"""Of this worker, which makes many stages of one sweep: its workshop has the data in memory."""


def _attempt(sweep: str, boxed: list[Any], trial: Trial, key: str) -> Outcome:
    """In a worker: make one stage. A reference in a list is fetched when that is asked for, not with every task."""
    if sweep not in _workshops:
        _workshops.clear()
        _workshops[sweep] = importlib.import_module("ray").get(boxed[0])
    return attempt(_workshops[sweep], trial, key)


class RayExecutor:
    """Hands tasks to Ray, which places them where processors are free and retries those whose worker was lost.

    Args:
        workshop: put into Ray's object store once.
        workers: most tasks at a time; 0: as many as the cluster has room for.
        threads: processors that each takes.
        address: of an existing cluster, such as "auto" or "ray://host:10001"; empty starts a local one for this run.

    Raises:
        UsageError: Ray is not installed; when work begins, that no machine of the cluster has room for a task.
    """

    def __init__(self, workshop: Workshop, *, workers: int, threads: int, address: str = "") -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise UsageError(
                "--executor ray: expected the package ray, found none; pip install coldforge[ray]"
            ) from None
        self._made_by, self._workers, self._threads, self._address = workshop, workers, threads, address
        self._ours = False
        self._attempt: Any = None
        self._running: dict[Any, str] = {}

    @property
    def slots(self) -> int:
        """How many tasks it works on at a time."""
        if not self._workers:
            self._connect()
            self._workers = sum(room // self._threads for room in self._rooms())
        return self._workers

    def _rooms(self) -> list[int]:
        """Processors of each machine."""
        return [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]

    def _connect(self) -> None:
        """Join or start the cluster, when there is something to do: that takes seconds."""
        if self._attempt is not None:
            return
        self._ours = not self._ray.is_initialized()
        if self._ours:
            paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the user's own architectures are there
            processors = self._workers * self._threads or max(physical_cores(), self._threads)
            os.environ.setdefault("RAY_task_oom_retries", str(MOST_LOSSES - 1))  # of its own accord: without end
            local = {"num_cpus": processors, "include_dashboard": False, "runtime_env": {"env_vars": paths}}
            where = {"address": self._address} if self._address else local
            self._ray.init(log_to_driver=False, configure_logging=False, **where)
        if self._threads > (most := max(self._rooms(), default=0)):
            raise UsageError(
                f"threads: expected at most {most}, the processors of the largest machine of the Ray cluster, got "
                f"{self._threads}: no task would ever begin"
            )
        self._sweep, self._workshop = uuid.uuid4().hex, [self._ray.put(self._made_by)]
        self._attempt = self._ray.remote(num_cpus=self._threads, max_retries=MOST_LOSSES - 1)(_attempt)

    def submit(self, trial: Trial, key: str) -> None:
        """Hand one task to Ray."""
        self._connect()
        self._running[self._attempt.remote(self._sweep, self._workshop, trial, key)] = key

    def wait(self) -> list[Outcome]:
        """All that was finished since; a task whose worker was lost too often is an error."""
        running = list(self._running)
        self._ray.wait(running, num_returns=1)
        ready, _ = self._ray.wait(running, num_returns=len(running), timeout=0)
        found = []
        for reference in ready:
            key = self._running.pop(reference)
            try:
                found.append(self._ray.get(reference))
            except self._ray.exceptions.RayError as error:
                found.append(Outcome(key, 0.0, f"Ray gave up: {str(error).strip().splitlines()[0]}", str(error)))
        return found

    def close(self) -> None:
        """Cancel what runs; end the cluster if it was started here."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._ours:
            self._ray.shutdown()

"""Stages as tasks of a Ray cluster; the store is a folder that all its machines share."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from coldforge.errors import UsageError
from coldforge.sweep.executors import MOST_LOSSES, Outcome, attempt
from coldforge.sweep.graph import Workshop
from coldforge.sweep.spec import Trial


class RayExecutor:
    """Hands tasks to Ray, which places them where processors are free and retries those whose worker was lost.

    Args:
        workshop: put into Ray's object store once.
        workers: most tasks at a time.
        threads: processors that each takes.
        address: of an existing cluster, such as "auto" or "ray://host:10001"; empty starts a local one for this run.

    Raises:
        UsageError: Ray is not installed.
    """

    def __init__(self, workshop: Workshop, *, workers: int, threads: int, address: str = "") -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise UsageError(
                "--executor ray: expected the package ray, found none; pip install coldforge[ray]"
            ) from None
        self.slots = workers
        self._ours = not self._ray.is_initialized()
        if self._ours:
            paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the user's own architectures are there
            local = {"num_cpus": workers * threads, "include_dashboard": False, "runtime_env": {"env_vars": paths}}
            where = {"address": address} if address else local
            self._ray.init(log_to_driver=False, configure_logging=False, **where)
        self._workshop = self._ray.put(workshop)
        self._attempt = self._ray.remote(num_cpus=threads, max_retries=MOST_LOSSES - 1)(attempt)
        self._running: dict[Any, str] = {}

    def submit(self, trial: Trial, key: str) -> None:
        """Hand one task to Ray."""
        self._running[self._attempt.remote(self._workshop, trial, key)] = key

    def wait(self) -> list[Outcome]:
        """What was finished since; a task whose worker was lost too often is an error."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
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

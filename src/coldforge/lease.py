"""What living processes use: a list beside a lock that the system drops when the process ends, even by SIGKILL."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

from coldforge.sealed import write_atomic


class Lease:
    """The names that this process uses; other processes read them with :func:`leased_names`.

    Args:
        folder: where the leases of all processes are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.pid = os.getpid()
        self.file = folder / f"{self.pid}-{uuid.uuid4().hex[:8]}.json"
        self._lock = FileLock(self.file.with_suffix(".lock"), thread_local=False)
        self._names: list[str] = []

    def add(self, name: str) -> None:
        """Announce one more name. Does nothing in a folder that cannot be written: nobody can prune there either."""
        if name in self._names:
            return
        self._names.append(name)
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if not self._lock.is_locked:
                self._lock.acquire(timeout=0)
            write_atomic(self.file, json.dumps(self._names))


def leased_names(folder: Path, *, besides: Lease | None = None) -> set[str]:
    """Names used by living processes; the files of dead ones are removed.

    Args:
        folder: where the leases are kept.
        besides: a lease that does not count.
    """
    names: set[str] = set()
    for file in folder.glob("*.json"):
        if besides is not None and file == besides.file:
            continue
        lock = FileLock(file.with_suffix(".lock"))
        try:
            with lock.acquire(timeout=0):
                file.unlink(missing_ok=True)
            file.with_suffix(".lock").unlink(missing_ok=True)
        except Timeout:  # its process lives
            with contextlib.suppress(OSError, ValueError):
                names.update(json.loads(file.read_bytes()))
    return names

"""What living processes use: a list beside a lock that the system drops when the process ends, even by SIGKILL.

The list only grows, a line a name, so that a process that uses thousands of stages writes, and is read, once for each.
It need not outlive the machine: nothing here waits for the disk.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout


class Lease:
    """The names that this process uses; other processes ask :class:`Leases`.

    Args:
        folder: where the leases of all processes are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.pid = os.getpid()
        self.file = folder / f"{self.pid}-{uuid.uuid4().hex[:8]}.txt"
        self._lock = FileLock(self.file.with_suffix(".lock"), thread_local=False)
        self._names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """Announce more names. Does nothing in a folder that cannot be written: nobody can prune there either."""
        new = [name for name in dict.fromkeys(names) if name not in self._names]
        if not new:
            return
        self._names.update(new)
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if not self._lock.is_locked:
                self._lock.acquire(timeout=0)
            with self.file.open("a", encoding="utf-8") as file:
                file.write("".join(f"{name}\n" for name in new))


class Leases:
    """Names used by living processes; the files of dead ones are removed.

    Args:
        folder: where the leases are kept.
        besides: a lease that does not count.
    """

    def __init__(self, folder: Path, *, besides: Lease | None = None) -> None:
        self._folder, self._besides = folder, besides
        self._read: dict[Path, tuple[int, set[str]]] = {}
        """File to (bytes read so far, names)."""

    def __contains__(self, name: str) -> bool:
        return any(name in self._names(file) for file in self._living())

    def _living(self) -> list[Path]:
        found = []
        for file in self._folder.glob("*.txt"):
            if self._besides is not None and file == self._besides.file:
                continue
            lock = FileLock(file.with_suffix(".lock"))
            try:
                with lock.acquire(timeout=0):
                    file.unlink(missing_ok=True)
                file.with_suffix(".lock").unlink(missing_ok=True)
            except Timeout:  # its process lives
                found.append(file)
        return found

    def _names(self, file: Path) -> set[str]:
        """All names in a file, of which only the new lines are read."""
        done, names = self._read.get(file, (0, set()))
        with contextlib.suppress(OSError), file.open("rb") as lines:
            lines.seek(done)
            whole = lines.read().rpartition(b"\n")[0]  # a line that is being written ends later
            if whole:
                names.update(whole.decode().split("\n"))
                done += len(whole) + 1
        self._read[file] = done, names
        return names

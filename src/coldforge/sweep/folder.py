"""A sweep's folder: what its files are called, who may write them, and what of them is read again.

<out>/sweep.json       the file as it was read, the recipe behind it, every trial with its point, and what sharing saves
<out>/records/ID.json  one record a finished trial
<out>/failures.json    what failed, with its traceback
<out>/table.parquet    one row a stage, and table.csv
<out>/report.html      all of it to look at
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from coldforge.errors import StoreError, UsageError
from coldforge.sweep.spec import Trial

SWEEP, RECORDS, FAILURES = "sweep.json", "records", "failures.json"
ADDED = ("base", "trials", "stages")
"""Keys of ``sweep.json`` that are not of the sweep's file."""


@dataclass(frozen=True)
class Failure:
    """A stage that could not be made."""

    label: str
    error: str
    details: str
    trials: tuple[str, ...] = ()
    """Ids of those that cannot be finished because of it; filled in where it is written."""


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep every other sweep out of a folder: each writes what it knows, and nothing of the other.

    Raises:
        UsageError: another sweep is at work there.
        StoreError: the folder cannot be written.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"another sweep is at work in {out}; wait for it, or name another folder with --out: they share the "
                "store all the same"
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Inside, what the system says of a folder that cannot be written becomes a :class:`StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write the sweep into {out}: {error.strerror or error}") from error


def record_path(out: Path, trial: Trial) -> Path:
    """Where the record of a trial stands, or will stand."""
    return out / RECORDS / f"{trial.id}.json"


def written(out: Path) -> dict[str, Any]:
    """The sweep's file as an earlier call left it."""
    path = out / SWEEP
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def load_failures(out: Path) -> dict[str, Failure]:
    """What failed in a sweep's folder, by key; none where there is no such file."""
    path = out / FAILURES
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {key: Failure(**{**values, "trials": tuple(values.get("trials", ()))}) for key, values in found.items()}

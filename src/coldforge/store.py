"""Content-addressed stages: what was computed once is found again, whole and verified.

    root/stages/<kind>/<key, 16 digits>/   finished stages, each with a manifest.json of sizes and checksums
    root/work/<kind>-<key>/                stages being built; checkpoints survive a kill here
    root/locks/                            one file lock per stage: two processes never build the same one
    root/records/                          which record.json needs which stages
    root/running/                          what living processes use, so that prune() leaves it alone
    root/trash/                            being deleted

A stage becomes visible by one rename of a folder whose files are on the disk already, so a kill at any moment leaves
nothing, a work folder that can be resumed, or the whole stage.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel

from coldforge.errors import StoreError, UsageError
from coldforge.lease import Lease, Leases
from coldforge.progress import Progress
from coldforge.sealed import (
    MANIFEST,
    find_problem,
    fsync,
    only_for_resuming,
    read_manifest,
    seal,
    size_of,
    write_atomic,
)
from coldforge.spec import identity, spec_hash

__all__ = ["Entry", "Pruned", "Store", "default_root", "key"]

_SHORT = 16  # digits of a key in a folder name: 64 bits; the manifest holds all of it
_PATIENCE_S = 3.0  # waiting longer than this for another process is said
_DISK_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FOLDER_ERRORS = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}  # the store's fault only outside of a build's own folder
_DISK_WORDS = ("No space left on device", "Read-only file system", "Disk quota exceeded")


@dataclass(frozen=True)
class Entry:
    """One finished stage, or one unfinished work folder."""

    kind: str
    """baseline, prune, finetune, …; "unfinished" for a work folder."""
    key: str
    """The full key; the first digits where the manifest cannot be read."""
    path: Path
    size_bytes: int
    created: str = ""
    """UTC time in ISO 8601."""
    describe: Mapping[str, Any] | None = None
    """What the builder said about it."""
    needed_by: tuple[str, ...] = ()
    """Existing records that stand on it."""
    problem: str = ""
    """What is damaged; empty where nothing is."""


@dataclass(frozen=True)
class Pruned:
    """What :meth:`Store.prune` deleted, or would delete."""

    entries: tuple[Entry, ...]
    size_bytes: int
    """Bytes freed."""


# --- keys and files --------------------------------------------------------------------------------------------------


def key(kind: str, version: int, spec: object, inputs: Sequence[str] = ()) -> str:
    """The key of a stage: SHA-256 (hex) of all that decides its bits.

    Args:
        kind: name of the stage, such as ``"baseline"``.
        version: format version of the stage; raise it when the code that builds it changes its result.
        spec: a spec, a plain value, or mappings and lists of these.
        inputs: keys of the upstream stages and fingerprints of the data, in order.
    """
    return spec_hash(kind, version, list(inputs), _plain(spec))


def _plain(value: object) -> object:
    """Specs at any depth as plain values."""
    if isinstance(value, BaseModel):
        return identity(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def default_root() -> Path:
    """``$COLDFORGE_HOME``, or the folder ``coldforge`` in the platform's cache folder of the user."""
    if home := os.environ.get("COLDFORGE_HOME"):
        return Path(home).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base).absolute() / "coldforge"


# --- the store -------------------------------------------------------------------------------------------------------


class Store:
    """A folder of finished stages, shared by any number of processes.

    Args:
        root: the folder; made when first written to. Default: :func:`default_root`.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root).expanduser().absolute() if root is not None else default_root()
        self._lease: Lease | None = None

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return Store, (self.root,)  # a lease belongs to one process

    def path(self, kind: str, key: str) -> Path:
        """Where the finished stage stands, or will stand."""
        return self.root / "stages" / kind / key[:_SHORT]

    def has(self, kind: str, key: str) -> bool:
        """Whether the stage is there, complete by file sizes (checksums are for :meth:`stage` and :meth:`verify`)."""
        return not find_problem(self.path(kind, key), key, checksums=False)

    def stage(
        self,
        kind: str,
        key: str,
        build: Callable[[Path], object],
        *,
        describe: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Path:
        """The folder of a stage, complete and verified; built first if need be.

        Args:
            kind: name of the stage: letters, digits, ``-`` and ``_``.
            key: from :func:`key`.
            build: writes the stage's files into the folder it is given. That folder is the same one after a kill, and
                holds the files and folders named ``checkpoint…`` that the killed build left there; all else is gone.
                Write checkpoints with :func:`~coldforge.sealed.write_atomic`. They are deleted when the stage is
                complete.
            describe: plain values for people and lists; ``label`` names the stage in messages.
            progress: is told of damage found and of waiting for other processes.

        Raises:
            StoreError: where the store cannot be written: full or read-only disk, no permission.
        """
        if not re.fullmatch(r"[\w-]+", kind):
            raise UsageError(f"expected a stage kind of letters, digits, '-' and '_', got {kind!r}")
        describe, progress = describe or {}, progress or Progress()
        label = str(describe.get("label", kind))
        final = self.path(kind, key)
        try:
            self.use([(kind, key)])
            with self._locked(self._name(kind, key), label, progress):
                if final.exists():
                    problem = find_problem(final, key)
                    if not problem:
                        return final
                    progress.note(f"stage {label!r} in the store was damaged ({problem}); rebuilding")
                    self._discard(final)
                self._build(kind, key, build, describe)
        except OSError as error:
            if isinstance(error, Timeout) or not self._disk_trouble(error):
                raise
            if not find_problem(final, key):
                return final  # a complete stage in a store that cannot be written is as good as any
            raise self._cannot_write(error) from error
        except Exception as error:
            if any(words in str(error) for words in _DISK_WORDS):  # libraries wrap what the system said
                raise self._cannot_write(error) from error
            raise
        return final

    def _build(self, kind: str, key: str, build: Callable[[Path], object], describe: Mapping[str, Any]) -> None:
        """Build, seal and publish; the lock is held."""
        work, final = self.root / "work" / self._name(kind, key), self.path(kind, key)
        work.mkdir(parents=True, exist_ok=True)
        if find_problem(work, key):  # else the last process was killed between sealing and publishing
            for path in work.iterdir():
                if not only_for_resuming(path.relative_to(work)):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            build(work)
            seal(work, kind, key, describe)
        listed = {work / name for name in read_manifest(work)["files"]} | {work / MANIFEST}
        for path in [path for path in work.rglob("*") if path.is_file() and path not in listed]:
            path.unlink()
        for path in sorted(work.rglob("checkpoint*"), reverse=True):
            shutil.rmtree(path)
        fsync(work)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.rename(work, final)
        fsync(final.parent)

    def use(self, stages: Iterable[tuple[str, str]]) -> None:
        """Keep stages, there or to come, from the :meth:`prune` of other processes as long as this one lives.

        Args:
            stages: (kind, key) of each.
        """
        if self._lease is None or self._lease.pid != os.getpid():
            self._lease = Lease(self.root / "running")
        self._lease.add(self._name(kind, key) for kind, key in stages)

    def entries(self) -> list[Entry]:
        """All finished stages, by kind and time; unreadable ones have a ``problem``."""
        needed = self._needed()
        found = []
        for folder in sorted((self.root / "stages").glob("*/*")):
            entry = Entry(kind=folder.parent.name, key=folder.name, path=folder, size_bytes=size_of(folder))
            try:
                manifest = read_manifest(folder)
                entry = replace(entry, key=manifest["key"], created=manifest["created"], describe=manifest["describe"])
            except ValueError as error:
                entry = replace(entry, problem=str(error))
            found.append(replace(entry, needed_by=tuple(needed.get(folder.name, ()))))
        return sorted(found, key=lambda entry: (entry.kind, entry.created, entry.key))

    def verify(self) -> list[Entry]:
        """Check every size and checksum; returns all stages, the damaged ones with a ``problem``."""
        return [replace(entry, problem=entry.problem or find_problem(entry.path)) for entry in self.entries()]

    def size_bytes(self) -> int:
        """Bytes of everything below the root."""
        return size_of(self.root)

    def register(self, record_path: str | Path, keys: Iterable[str]) -> None:
        """Say that a record stands on these stages: :meth:`prune` keeps them as long as that file exists.

        Args:
            record_path: path of ``record.json``, or of what stands for a run or a sweep that is not finished;
                registering it again replaces what it needed before.
            keys: full keys.
        """
        keys = sorted(keys)
        if wrong := [item for item in keys if not re.fullmatch(r"[0-9a-f]{16,}", item)]:
            raise UsageError(f"expected keys of stages (hexadecimal, at least 16 digits), got {wrong[0]!r}")
        path = str(Path(record_path).expanduser().absolute())
        file = self.root / "records" / f"{spec_hash(path)[:_SHORT]}.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps({"record": path, "keys": keys}, indent=2) + "\n")
        except OSError as error:
            raise self._cannot_write(error) from error

    def prune(self, *, dry_run: bool = False) -> Pruned:
        """Delete what nobody needs any more.

        That is: stages, and work folders of interrupted builds with their checkpoints, that no existing registered
        record stands on, and remains. What another living process uses or builds stays.

        Args:
            dry_run: only say what would be deleted.
        """
        removed: list[Entry] = []
        in_use = Leases(self.root / "running", besides=self._lease)
        try:
            for entry in [*self.entries(), *self._unfinished()]:
                if entry.needed_by:
                    continue
                unfinished = entry.kind == "unfinished"
                name = entry.path.name if unfinished else self._name(entry.kind, entry.path.name)
                with self._lock_if_free(name) as free:
                    if not free or name in in_use or not entry.path.exists():
                        continue
                    removed.append(entry)
                    if not dry_run:
                        self._discard(entry.path)
            if not dry_run:
                shutil.rmtree(self.root / "trash", ignore_errors=True)
                for file, record, _ in self._registrations():
                    if not Path(record).exists():
                        file.unlink(missing_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from error
        return Pruned(tuple(removed), sum(entry.size_bytes for entry in removed))

    # --- inside ------------------------------------------------------------------------------------------------------

    def _name(self, kind: str, key: str) -> str:
        return f"{kind}-{key[:_SHORT]}"

    def _unfinished(self) -> list[Entry]:
        folders = [(path, path.name.rpartition("-")[2]) for path in sorted((self.root / "work").glob("*"))]
        needed = self._needed()
        return [
            Entry("unfinished", key, path, size_of(path), needed_by=tuple(needed.get(key, ()))) for path, key in folders
        ]

    def _registrations(self) -> Iterator[tuple[Path, str, list[str]]]:
        """(file, path of the record, keys) of every readable registration."""
        for file in sorted((self.root / "records").glob("*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                content = json.loads(file.read_bytes())
                yield file, str(content["record"]), [str(item) for item in content["keys"]]

    def _needed(self) -> dict[str, list[str]]:
        """Short key to the existing records that need it."""
        needed: dict[str, list[str]] = {}
        for _, record, keys in self._registrations():
            if Path(record).exists():
                for item in keys:
                    needed.setdefault(item[:_SHORT], []).append(record)
        return needed

    def _discard(self, path: Path) -> None:
        """Out of the way by one rename, then deleted: a kill in between leaves no half-deleted stage."""
        trash = self.root / "trash" / f"{path.name}-{uuid.uuid4().hex[:8]}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self, name: str, label: str, progress: Progress) -> Iterator[None]:
        lock = self._lock(name)
        try:
            lock.acquire(timeout=_PATIENCE_S)
        except Timeout:
            progress.note(f"stage {label!r} is being built by another process; waiting for it")
            lock.acquire(poll_interval=0.2)
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _lock_if_free(self, name: str) -> Iterator[bool]:
        lock = self._lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _lock(self, name: str) -> FileLock:
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock")

    def _disk_trouble(self, error: OSError) -> bool:
        """Whether an error is about the store's own disk, and not about, say, a data file that build() reads."""
        names = [name for name in (error.filename, error.filename2) if isinstance(name, (str, bytes, os.PathLike))]
        paths = [Path(os.fsdecode(name)) for name in names]
        ours = not paths or any(path.is_relative_to(self.root) or self.root.is_relative_to(path) for path in paths)
        if error.errno in _FOLDER_ERRORS:
            return ours and not any(path.is_relative_to(self.root / "work") for path in paths)
        return (ours and error.errno in _DISK_ERRORS) or any(words in str(error) for words in _DISK_WORDS)

    def _cannot_write(self, error: Exception) -> StoreError:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        folder = next(path for path in (self.root, *self.root.parents) if path.is_dir())
        free = shutil.disk_usage(folder).free / 1e6
        return StoreError(
            f"cannot write to the store at {self.root}: {reason} ({free:,.0f} MB free there). Set $COLDFORGE_HOME to a "
            "folder on a disk with room that you may write to, or run `coldforge store prune`, which leaves what "
            "records and unfinished runs need; then run the same command again"
        )

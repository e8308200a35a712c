"""Files and folders that exist whole or not at all: atomic writes, fsync, and manifests with checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from coldforge._version import __version__
from coldforge.errors import UsageError
from coldforge.spec import spec_hash

MANIFEST = "manifest.json"


def write_atomic(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file whole or not at all, for good: temporary name, fsync, rename, fsync of the folder.

    Args:
        path: where the file goes; its folder exists.
        content: the bytes, a text (UTF-8), or a function that writes the file at the path it is given.
    """
    write_whole(path, content)
    fsync(path.parent)


def write_whole(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """The same without the last step: a power cut may leave no file, or the one before. Half of one it never leaves."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def fsync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if path.is_dir() and sys.platform == "win32":
        return  # folders cannot be synced there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # files come and go while others work
            if path.is_file():
                total += path.stat().st_size
    return total


def only_for_resuming(relative: Path) -> bool:
    """Whether a path below a stage's folder is a checkpoint, which never becomes part of the stage."""
    return any(part.startswith("checkpoint") for part in relative.parts)


def seal(folder: Path, kind: str, key: str, describe: Mapping[str, Any]) -> None:
    """Bring all files of a folder to the disk and write its manifest; checkpoints are left out.

    The names in the folder itself are left to the caller's :func:`fsync`.

    Raises:
        UsageError: where there is a file of the manifest's name already.
    """
    if (folder / MANIFEST).exists():
        raise UsageError(f"expected a stage {kind!r} without a file {MANIFEST}: that name is the store's; rename it")
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if not only_for_resuming(path.relative_to(folder)):
            fsync(path)
            files[path.relative_to(folder).as_posix()] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    for inner in sorted({(folder / name).parent for name in files} - {folder}):
        fsync(inner)
    manifest = {
        "kind": kind,
        "key": key,
        "describe": json.loads(json.dumps(dict(describe), default=str)),  # as it will be read back
        "files": files,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "coldforge_version": __version__,
    }
    write_whole(folder / MANIFEST, json.dumps({**manifest, "checksum": spec_hash(manifest)}, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed folder.

    Raises:
        ValueError: where it is missing or damaged; the text says which.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        checksum = manifest.pop("checksum")
    except FileNotFoundError:
        raise ValueError(f"file {MANIFEST}: missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"file {MANIFEST}: not readable") from None
    if checksum != spec_hash(manifest):
        raise ValueError(f"file {MANIFEST}: checksum differs")
    return manifest


def find_problem(folder: Path, key: str | None = None, *, checksums: bool = True) -> str:
    """What is wrong with a sealed folder; empty where nothing is.

    Args:
        folder: the folder.
        key: the key it is expected to have.
        checksums: read every file; False only compares sizes.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if key is not None and manifest["key"] != key:
        return f"file {MANIFEST}: belongs to another key"
    for name, expected in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"file {name}: expected {expected['bytes']} bytes, got {size}"
            if checksums and sha256_of(folder / name) != expected["sha256"]:
                return f"file {name}: checksum differs"
        except FileNotFoundError:
            return f"file {name}: missing"
        except OSError as error:
            return f"file {name}: not readable ({error.strerror})"
    return ""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Decoded images on disk: decoding 60,000 compressed images takes long, reading 180 MB does not."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from coldforge.data.images import ImageSet
from coldforge.errors import DataError
from coldforge.spec import spec_hash

FORMAT = 1
"""Raise it when the decoding changes."""


def source_key(name: str, files: Iterable[Path]) -> str:
    """Hash of a source and of the path, size and modification time of its files."""
    stats = [(str(file.resolve()), file.stat()) for file in sorted(files)]
    return spec_hash(FORMAT, name, [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats])


def cached_sets(
    folder: Path, key: str, name: str, decode: Callable[[], tuple[ImageSet, ImageSet]]
) -> tuple[ImageSet, ImageSet]:
    """Train and test set ``key`` from ``folder``, or from ``decode``, which is then remembered.

    A damaged entry is decoded again. Where nothing can be written (read-only or full disk) nothing is remembered:
    this file only saves time.
    """
    path = folder / f"{key[:32]}.safetensors"
    found = _read(path, name) if path.is_file() else None
    if found is not None:
        return found
    train, test = decode()
    with contextlib.suppress(OSError, SafetensorError):
        _write(path, train, test)
    return train, test


def _read(path: Path, name: str) -> tuple[ImageSet, ImageSet] | None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            classes = tuple(json.loads(metadata["classes"]))
            train, test = (
                ImageSet(
                    file.get_tensor(f"{part}.images"), file.get_tensor(f"{part}.labels"), classes, f"{name} {part}"
                )
                for part in ("train", "test")
            )
    except (OSError, SafetensorError, KeyError, ValueError, DataError):
        return None
    same = (train.fingerprint, test.fingerprint) == (metadata.get("train"), metadata.get("test"))
    return (train, test) if same else None


def _write(path: Path, train: ImageSet, test: ImageSet) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix=".safetensors")
    os.close(handle)
    try:
        save_file(
            {f"{part}.{kind}": getattr(data, kind).contiguous() for part, data in (("train", train), ("test", test))
             for kind in ("images", "labels")},
            temporary,
            {"classes": json.dumps(train.classes), "train": train.fingerprint, "test": test.fingerprint},
        )  # fmt: skip
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)

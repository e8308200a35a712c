"""The idx format of the MNIST family: a magic number, big-endian sizes, then bytes; plain or gzipped."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from coldforge.errors import DataError

_UNSIGNED_BYTE = 8


class Readable(Protocol):
    """A file on disk or inside the package (``Path`` or ``importlib.resources`` traversable)."""

    @property
    def name(self) -> str:
        """File name."""

    def read_bytes(self) -> bytes:
        """Whole content."""


def find_idx(folder: Path, name: str) -> Path | None:
    """``folder/name``, or ``folder/name.gz``, or None where neither exists."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(file: Readable, *, sha256: str = "") -> Tensor:
    """Read a file of unsigned bytes.

    Args:
        file: the file; unpacked where it begins as gzip does.
        sha256: expected digest of the unpacked bytes; empty skips the check.

    Returns:
        ``uint8``, of the shape in the header.

    Raises:
        DataError: for a file that is damaged, truncated or another one than expected.
    """
    content = file.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file.name} is damaged ({error}); get it again") from None
    if sha256 and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{file.name}: expected sha256 {sha256} (unpacked), got {found}; get the file again")
    if len(content) < 4 or content[:3] != bytes((0, 0, _UNSIGNED_BYTE)):
        raise DataError(f"{file.name}: expected an idx file of unsigned bytes, got first bytes {content[:4].hex(' ')}")
    dims = content[3]
    header = 4 + 4 * dims
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    size = 1
    for length in shape:
        size *= length
    if len(content) != header + size:
        raise DataError(
            f"{file.name}: expected {header + size} bytes for shape {shape}, got {len(content)}; get the file again"
        )
    if not size:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)


def idx_bytes(array: Tensor) -> bytes:
    """The idx file of a ``uint8`` tensor, not packed."""
    if array.dtype != torch.uint8:
        raise DataError(f"expected uint8, got {array.dtype}")
    header = bytes((0, 0, _UNSIGNED_BYTE, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.contiguous().numpy().tobytes()

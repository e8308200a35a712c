from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from coldforge.data.idx import find_idx, idx_bytes, read_idx
from coldforge.errors import DataError

ARRAY = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("array", [ARRAY, ARRAY[0, 0], ARRAY[:0]])
def test_round_trip(array: torch.Tensor, packed: bool, tmp_path: Path) -> None:
    file = tmp_path / "x"
    content = idx_bytes(array)
    file.write_bytes(gzip.compress(content) if packed else content)
    found = read_idx(file)
    assert found.shape == array.shape
    assert torch.equal(found, array)


def test_the_header_is_that_of_the_format() -> None:
    assert idx_bytes(ARRAY)[:16] == bytes.fromhex("00000803 00000002 00000003 00000004".replace(" ", ""))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(ARRAY)[:-1], r"expected 40 bytes for shape \(2, 3, 4\), got 39"),
        (idx_bytes(ARRAY) + b"x", "got 41"),
        (idx_bytes(ARRAY)[:7], "expected .* bytes"),
        (b"", "expected an idx file of unsigned bytes"),
        (b"<html>", "expected an idx file of unsigned bytes, got first bytes 3c 68 74 6d"),
        (gzip.compress(idx_bytes(ARRAY), mtime=0)[:-12], "is damaged"),
        (b"\x1f\x8b not gzip", "is damaged"),
    ],
)
def test_damaged_files(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "train-images"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"train-images.*{message}"):
        read_idx(file)


def test_another_digest(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(idx_bytes(ARRAY))
    with pytest.raises(DataError, match=r"expected sha256 abc \(unpacked\), got [0-9a-f]{64}"):
        read_idx(tmp_path / "x", sha256="abc")


def test_find_idx_prefers_the_plain_file(tmp_path: Path) -> None:
    assert find_idx(tmp_path, "x") is None
    (tmp_path / "x.gz").touch()
    assert find_idx(tmp_path, "x") == tmp_path / "x.gz"
    (tmp_path / "x").touch()
    assert find_idx(tmp_path, "x") == tmp_path / "x"

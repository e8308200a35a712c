from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from coldforge.deploy.bench import bench
from coldforge.errors import UsageError


def test_files_and_folders_side_by_side(int8: Any, float32: Any, tmp_path: Path) -> None:
    shutil.copy(int8.path, tmp_path / "small.onnx")
    rows = bench([float32.path.parent, tmp_path / "small.onnx"], batches=(1, 8), threads=1, seconds=0.02)
    assert [(row.batch, row.name) for row in rows] == [
        (batch, name) for batch in (1, 8) for name in (float32.path.parent.name, "small.onnx")
    ]
    for row in rows:
        first = next(other for other in rows if other.batch == row.batch)
        assert 0 < row.p10 <= row.median <= row.p90
        assert row.ratio == pytest.approx(first.median / row.median)
        assert row.images_per_s == pytest.approx(row.batch / row.median)
        assert row.energy_j_per_image > 0
        assert row.energy_method.startswith(("measured", "estimated"))
        assert (row.runtime, row.threads) == ("onnxruntime", 1)
    assert rows[0].size_bytes == float32.path.stat().st_size > rows[1].size_bytes == int8.path.stat().st_size


def test_equal_names_become_whole_paths(int8: Any, float32: Any) -> None:
    rows = bench([int8.path, float32.path], batches=(1,), threads=1, seconds=0.0)
    assert [row.name for row in rows] == [str(int8.path), str(float32.path)]


def test_errors_say_what_was_expected(tmp_path: Path, int8: Any) -> None:
    with pytest.raises(UsageError, match=r"a folder that holds model\.onnx, found nothing at"):
        bench([tmp_path])
    with pytest.raises(UsageError, match=r"expected at least one file.*got 0 files"):
        bench([])
    with pytest.raises(UsageError, match=r"batches \[0\]"):
        bench([int8.path], batches=(0,))

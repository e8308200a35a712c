"""The page of a folder, drawn from what lies in it."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from coldforge.records import Record
from coldforge.report.folder import GALLERY, draw


def gallery(folder: Path, channels: int) -> None:
    images = np.zeros((2, channels, 8, 8), np.float32)
    answers = np.zeros(2, np.int64)
    arrays = {"clean": images, "labels": answers, "baseline/adversarial": images}
    arrays |= {"baseline/clean_answer": answers, "baseline/adversarial_answer": answers}
    save_file(arrays, folder / GALLERY)


@pytest.mark.parametrize(("channels", "drawn"), [(1, True), (3, True), (2, False), (4, False)])
def test_images_that_are_no_pictures_are_not_drawn(
    channels: int, drawn: bool, minimal_record: Record, tmp_path: Path
) -> None:
    """With 2 or 4 channels everything else is there."""
    record = minimal_record.model_copy(update={"provenance": {"classes": ["a", "b"]}})
    (tmp_path / "record.json").write_text(record.to_json())
    gallery(tmp_path, channels)
    assert draw(tmp_path).is_file()
    assert (tmp_path / "adversarial.png").is_file() == drawn

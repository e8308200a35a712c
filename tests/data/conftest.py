from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coldforge.data import ImageSet


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_set() -> Callable[..., ImageSet]:
    def make(n: int = 24, shape: tuple[int, int, int] = (3, 8, 8), classes: int = 4, seed: int = 0) -> ImageSet:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
        return ImageSet(images, torch.arange(n) % classes, tuple("abcdefgh"[:classes]), "toy")

    return make


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """PNG bytes of a ``uint8`` tensor (C, H, W) of 1 or 3 channels."""

    def to_png(image: torch.Tensor) -> bytes:
        array = image.permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(array.squeeze(-1) if array.shape[-1] == 1 else array)).save(buffer, "png")
        return buffer.getvalue()

    return to_png


@pytest.fixture
def write_parquet(encode: Callable[..., bytes]) -> Callable[..., None]:
    def write(path: Path, data: ImageSet, **columns: list[object]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pictures = [{"bytes": encode(image), "path": None} for image in data.images]
        table = {"img": pictures, "label": data.labels.tolist()} | columns
        pq.write_table(pa.table(table), path)

    return write

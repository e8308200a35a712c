"""Make the Fashion-MNIST part that ships with coldforge: the first 1,200 training and 200 test images of each class.

Usage: python scripts/make_fashion_mnist_mini.py [FOLDER WITH THE FOUR FULL IDX FILES]

Images keep their order. The digests that it prints belong into ``coldforge/data/sources.py`` (MINI_SHA256).
"""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import torch

from coldforge.data.idx import find_idx, idx_bytes, read_idx
from coldforge.data.sources import DEBIAN_FASHION_MNIST, FASHION_MNIST_SHA256, IDX_FILES

PER_CLASS = {"train": 1200, "t10k": 200}
TARGET = Path(__file__).parents[1] / "src" / "coldforge" / "data" / "fashion_mnist_mini"


def main(folder: Path) -> None:
    """Read the full set from ``folder`` and write the four small files."""
    arrays = {}
    for name, digest in zip(IDX_FILES, FASHION_MNIST_SHA256, strict=True):
        file = find_idx(folder, name)
        if file is None:
            sys.exit(f"expected {name}[.gz] in {folder}; run `apt-get install dataset-fashion-mnist`")
        arrays[name] = read_idx(file, sha256=digest)
    for part, count in PER_CLASS.items():
        labels = arrays[f"{part}-labels-idx1-ubyte"]
        chosen = torch.cat([torch.nonzero(labels == label).flatten()[:count] for label in range(10)]).sort().values
        for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
            content = idx_bytes(arrays[name][chosen])
            packed = gzip.compress(content, compresslevel=9, mtime=0)
            (TARGET / f"{name}.gz").write_bytes(packed)
            sys.stdout.write(f"{hashlib.sha256(content).hexdigest()}  {name}  {len(packed)} bytes packed\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEBIAN_FASHION_MNIST)

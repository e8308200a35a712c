"""Named data sets, and where their files are looked for.

Fashion-MNIST: Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747 (MIT licence). CIFAR-10: Krizhevsky 2009.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from coldforge.data.arrays import mixed, split
from coldforge.data.hub import folder_sets, hub_sets, parquet_files, parquet_sets
from coldforge.data.idx import Readable, find_idx, read_idx
from coldforge.data.images import Augment, DataSplits, ImageSet
from coldforge.errors import DataError, nearest
from coldforge.recipe import DataSpec
from coldforge.store import default_root

SOURCES = ("fashion-mnist-mini", "fashion-mnist", "cifar10", "hf", "folder", "parquet")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IDX_FILES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip
FASHION_MNIST_SHA256 = (
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
"""Of the unpacked :data:`IDX_FILES`, as published."""
MINI_SHA256 = (
    "ded9297f1d7b567047797bb831eb9cfd84010a483a4075cb9fc0465219002cb7",
    "11a34fec6f816dbe22c806d6de7e130fa048759622a0e6f6da8feb272e09ee1d",
    "15a92dd1e9b16ea361928086e77df4dfa890c255c00b5a8c8162c1040ce8eef1",
    "234596aeb6eb48133ec99a62541f90bc0728c9559a681f1e0638037462458f2c",
)
"""Of the unpacked :data:`IDX_FILES` that ship with coldforge."""
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def load_data(spec: DataSpec | None = None, *, cache: Path | None = None) -> DataSplits:
    """Read, check and split a data set.

    ``spec.source`` is one of

    - ``fashion-mnist-mini``: 12,000 + 2,000 images that ship with coldforge;
    - ``fashion-mnist[:DIR]``: idx files, plain or gzipped, in DIR, ``$COLDFORGE_FASHION_MNIST`` or Debian's folder;
      else from the hub;
    - ``cifar10[:DIR]``: ``train.parquet`` and ``test.parquet`` in DIR or ``$COLDFORGE_CIFAR10``; else from the hub;
    - ``hf:NAME`` or ``hf:NAME:CONFIG``: any image classification set of the Hugging Face hub. Where it has no test
      split, its published validation split is the test set;
    - ``folder:DIR``: ``train/CLASS/*`` and ``test/CLASS/*``;
    - ``parquet:DIR``: ``train*.parquet`` and ``test*.parquet``.

    The validation part is always split from train, by a permutation that does not depend on the seed of a recipe.

    Args:
        spec: the ``[data]`` table; by default the embedded set.
        cache: folder for decoded images; by default ``data/`` in ``$COLDFORGE_HOME`` or the user's cache
            folder.

    Raises:
        DataError: for an unknown source, a missing data set (names the ways to get it), damaged files, or images and
            labels that do not fit.
    """
    spec = spec or DataSpec()
    train, test = _sets(spec.source, cache or default_root() / "data")
    if spec.source.startswith(("hf:", "folder:", "parquet:")):
        train, test = mixed(train), mixed(test)
    if spec.train_n:
        train = train.take(slice(spec.train_n))
    if spec.test_n:
        test = test.take(slice(spec.test_n))
    automatic: Augment = "crop-flip" if train.image_shape[0] == 3 else "none"
    augment = automatic if spec.augment == "auto" else spec.augment
    data = split(train, test, validation=spec.validation, augment=augment)
    object.__setattr__(data, "named", spec)  # not an argument: a copy with other images must not be called by this name
    return data


def locate(source: str) -> Path | None:
    """The folder that :func:`load_data` reads ``"fashion-mnist"`` or ``"cifar10"`` from; None: from the hub.

    Raises:
        DataError: a folder was named where nothing of the kind is.
    """
    kind, _, place = source.partition(":")
    if kind == "cifar10":
        folder = _named_folder(place, "COLDFORGE_CIFAR10")
        if folder is not None:
            parquet_files(folder, "cifar10")
        return folder
    folder = _named_folder(place, "COLDFORGE_FASHION_MNIST")
    if folder is None and find_idx(DEBIAN_FASHION_MNIST, IDX_FILES[0]):
        folder = DEBIAN_FASHION_MNIST
    if folder is not None:
        _fashion_mnist_files(folder)
    return folder


def _sets(source: str, cache: Path) -> tuple[ImageSet, ImageSet]:
    kind, _, place = source.partition(":")
    match kind:
        case "fashion-mnist-mini" if not place:
            folder = resources.files("coldforge.data") / "fashion_mnist_mini"
            return _idx_sets([folder / f"{name}.gz" for name in IDX_FILES], MINI_SHA256, kind)
        case "fashion-mnist":
            return _fashion_mnist(source, cache)
        case "cifar10":
            return _cifar10(source, cache)
        case "hf" if place:
            name, _, config = place.partition(":")
            return hub_sets(name, config=config, cache=cache)
        case "folder" if place:
            return folder_sets(_existing(place, source), cache=cache, name=source)
        case "parquet" if place:
            return parquet_sets(_existing(place, source), cache=cache, name=source)
        case "memory":
            raise DataError(f"data.source: {place} were arrays in memory; name their images, such as folder:DIR")
        case "hf" | "folder" | "parquet":
            raise DataError(f"data.source: expected {kind}:{'NAME' if kind == 'hf' else 'DIR'}, got {source!r}")
        case "fashion-mnist-mini":
            raise DataError(f"data.source: expected 'fashion-mnist-mini' without a folder, got {source!r}")
        case _:
            raise DataError(f"data.source: unknown data set {source!r}; {nearest(kind, SOURCES)}")


def _fashion_mnist(source: str, cache: Path) -> tuple[ImageSet, ImageSet]:
    folder = locate(source)
    if folder is None:
        hint = (
            "; or run `apt-get install dataset-fashion-mnist`, or put the four idx files of "
            "https://github.com/zalandoresearch/fashion-mnist into a folder and name it: fashion-mnist:DIR or "
            "$COLDFORGE_FASHION_MNIST; or use the embedded fashion-mnist-mini"
        )
        return hub_sets("zalando-datasets/fashion_mnist", cache=cache, classes=FASHION_MNIST_CLASSES, hint=hint)
    return _idx_sets(_fashion_mnist_files(folder), FASHION_MNIST_SHA256, "fashion-mnist")


def _fashion_mnist_files(folder: Path) -> list[Path]:
    files = []
    for name in IDX_FILES:
        file = find_idx(folder, name)
        if file is None:
            raise DataError(
                f"fashion-mnist: expected {name} or {name}.gz in {folder}, found neither; "
                "`apt-get install dataset-fashion-mnist` puts them into /usr/share/datasets/fashion-mnist"
            )
        files.append(file)
    return files


def _cifar10(source: str, cache: Path) -> tuple[ImageSet, ImageSet]:
    folder = locate(source)
    if folder is None:
        hint = (
            "; or put train.parquet and test.parquet of https://huggingface.co/datasets/uoft-cs/cifar10 into a folder "
            "and name it: cifar10:DIR or $COLDFORGE_CIFAR10"
        )
        return hub_sets("uoft-cs/cifar10", cache=cache, classes=CIFAR10_CLASSES, hint=hint)
    return parquet_sets(folder, cache=cache, name="cifar10", classes=CIFAR10_CLASSES)


def _idx_sets(files: Sequence[Readable], digests: Sequence[str], name: str) -> tuple[ImageSet, ImageSet]:
    arrays = [read_idx(file, sha256=digest) for file, digest in zip(files, digests, strict=True)]
    train, test = (
        ImageSet(arrays[i].unsqueeze(1), arrays[i + 1].long(), FASHION_MNIST_CLASSES, f"{name} {part}")
        for i, part in ((0, "train"), (2, "test"))
    )
    return train, test


def _named_folder(place: str, variable: str) -> Path | None:
    """The folder after the colon, else that of an environment variable, else None; it must exist where named."""
    if place:
        return _existing(place, "data.source")
    return _existing(os.environ[variable], f"${variable}") if os.environ.get(variable) else None


def _existing(place: str, what: str) -> Path:
    folder = Path(os.path.expandvars(place)).expanduser()
    if not folder.is_dir():
        raise DataError(f"{what}: expected a folder, found none at {folder}; correct the path, or unset it")
    return folder

"""What the ``datasets`` library reads - hub, parquet, image folders - turned into image sets."""

from __future__ import annotations

import contextlib
import glob
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from coldforge.data.arrays import numbered_classes
from coldforge.data.cache import cached_sets, source_key
from coldforge.data.images import ImageSet
from coldforge.errors import DataError

LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "y")
"""Which column holds the labels where several could; the first one found."""
TEST_SPLITS = ("test", "validation", "valid", "val")
"""Names of the split that is tested on; a set without "test" usually publishes its test part under the others."""
MODES = {"L": 1, "RGB": 3}


def hub_sets(
    name: str, *, cache: Path, classes: Sequence[str] = (), config: str = "", hint: str = ""
) -> tuple[ImageSet, ImageSet]:
    """Train and test part of a data set on the Hugging Face hub (downloaded once).

    Args:
        name: name on the hub, such as "uoft-cs/cifar10".
        cache: folder for what is prepared and decoded.
        classes: class names; empty takes them from the data set.
        config: configuration, for data sets that have several.
        hint: what else a user can do where the hub cannot be reached; ends the message.

    Raises:
        DataError: where the hub cannot be reached, or the data set does not fit.
    """
    with _quiet() as datasets:
        try:
            splits = datasets.load_dataset(name, config or None, cache_dir=str(cache / "huggingface"))
        except Exception as error:  # the hub client raises many kinds; the user needs one message
            raise DataError(f"cannot get data set {name!r} from the Hugging Face hub: {_brief(error)}{hint}") from error
        files = [Path(item["filename"]) for part in splits.values() for item in part.cache_files]
        if not files:  # held in memory: nothing to tell a newer version from
            return _sets(datasets, splits, name, classes)
        key = source_key(f"hub {name} {config} {list(classes)}", files)
        return cached_sets(cache, key, name, lambda: _sets(datasets, splits, name, classes))


def parquet_files(folder: Path, name: str) -> dict[str, list[Path]]:
    """``train*.parquet`` and ``test*.parquet`` of a folder, by part.

    Raises:
        DataError: there are none.
    """
    files = {part: sorted(folder.glob(f"{part}*.parquet")) for part in ("train", "test")}
    for part, found in files.items():
        if not found:
            raise DataError(f"{name}: expected {part}*.parquet in {folder}, found none")
    return files


def parquet_sets(folder: Path, *, cache: Path, name: str, classes: Sequence[str] = ()) -> tuple[ImageSet, ImageSet]:
    """Train and test set from ``train*.parquet`` and ``test*.parquet`` in a folder.

    Raises:
        DataError: where files are missing or damaged, or do not hold one image and one label per row.
    """
    files = parquet_files(folder, name)
    key = source_key(f"parquet {list(classes)}", [file for found in files.values() for file in found])

    def decode() -> tuple[ImageSet, ImageSet]:
        # Streaming reads the files in place; the library would otherwise write a second copy of all of them.
        with _quiet() as datasets, tempfile.TemporaryDirectory(prefix="coldforge-") as scratch:
            try:
                paths = {part: [glob.escape(str(path)) for path in found] for part, found in files.items()}
                splits = datasets.load_dataset("parquet", data_files=paths, streaming=True, cache_dir=scratch)
            except Exception as error:  # the library and pyarrow raise many kinds
                raise DataError(f"{name}: cannot read the files: {_brief(error)}") from error
            return _sets(datasets, splits, name, classes)

    return cached_sets(cache, key, name, decode)


def folder_sets(folder: Path, *, cache: Path, name: str) -> tuple[ImageSet, ImageSet]:
    """Train and test set from ``train/CLASS/*`` and ``test/CLASS/*``; names with a dot in front are left out.

    Raises:
        DataError: where a folder is missing or empty, a file is no image, or the images differ in size or mode.
    """
    files = {part: _visible(folder / part) for part in ("train", "test")}
    names = {part: sorted({path.parent.name for path in found}) for part, found in files.items()}
    for part in files:
        if not names[part]:
            raise DataError(f"{name}: expected images in {folder / part}/CLASS/, found none")
    if unknown := sorted(set(names["test"]) - set(names["train"])):
        raise DataError(
            f"{name}: expected the classes of train/ ({', '.join(names['train'])}) in test/ too, "
            f"got {', '.join(unknown)}"
        )
    classes = tuple(names["train"])

    def decode() -> tuple[ImageSet, ImageSet]:
        pairs = []
        for found in files.values():
            rows = ({"image": _picture(path), "label": classes.index(path.parent.name)} for path in found)
            pairs.append(_decode(rows, "image", "label", name, [str(path) for path in found]))
        return _image_sets(pairs, classes, name)

    key = source_key("image folder", [file for found in files.values() for file in found])
    return cached_sets(cache, key, name, decode)


def _visible(folder: Path) -> list[Path]:
    """Files of all classes, but those that file managers hide."""
    found = (path for path in folder.glob("*/*") if path.is_file())
    return sorted(path for path in found if not path.name.startswith(".") and not path.parent.name.startswith("."))


def _picture(path: Path) -> PIL.Image.Image:
    with PIL.Image.open(path) as picture:
        picture.load()
        return PIL.ImageOps.exif_transpose(picture)


def _sets(datasets: Any, splits: Mapping[str, Any], name: str, classes: Sequence[str]) -> tuple[ImageSet, ImageSet]:
    test = next((part for part in TEST_SPLITS if part in splits), None)
    if "train" not in splits or test is None:
        raise DataError(f"{name}: expected the splits train and test, got {', '.join(sorted(splits))}")
    image, label = _columns(datasets, splits["train"].features, name)
    pairs = []
    for part in ("train", test):
        rows = splits[part].select_columns([image, label])
        if not isinstance(rows.features[image], datasets.Image):
            rows = rows.cast_column(image, datasets.Image())
        pairs.append(_decode(rows, image, label, f"{name} {part}"))
    names = tuple(classes) or _class_names(
        datasets, splits["train"].features[label], name, *(found for _, found in pairs)
    )
    return _image_sets(pairs, names, name)


def _image_sets(
    pairs: Sequence[tuple[torch.Tensor, list[Any]]], names: tuple[str, ...], name: str
) -> tuple[ImageSet, ImageSet]:
    place = {text: index for index, text in enumerate(names)}
    sets = []
    for part, (images, found) in zip(("train", "test"), pairs, strict=True):
        numbers = [place[text] for text in found] if found and isinstance(found[0], str) else found
        sets.append(ImageSet(images, torch.tensor(numbers, dtype=torch.int64), names, f"{name} {part}"))
    return sets[0], sets[1]


def _columns(datasets: Any, features: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Names of the image and the label column, found by their types."""

    def is_image(feature: Any) -> bool:
        encoded = isinstance(feature, Mapping) and set(feature) == {"bytes", "path"}
        return encoded or isinstance(feature, datasets.Image)

    def is_number(feature: Any) -> bool:
        return isinstance(feature, datasets.Value) and ("int" in feature.dtype or "string" in feature.dtype)

    described = ", ".join(f"{column}: {_type_name(feature)}" for column, feature in features.items())
    images = [column for column, feature in features.items() if is_image(feature)]
    if len(images) != 1:
        raise DataError(f"{name}: expected exactly one image column, got {len(images)} among ({described})")
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [column for column, feature in features.items() if is_number(feature)]
    chosen = labels[0] if len(labels) == 1 else next((column for column in LABEL_NAMES if column in labels), None)
    if chosen is None:
        raise DataError(
            f"{name}: expected one label column (a class label, whole numbers or texts, or one named "
            f"{', '.join(LABEL_NAMES)}), got {len(labels)} candidates among ({described})"
        )
    return images[0], chosen


def _decode(
    rows: Iterable[Mapping[str, Any]], image: str, label: str, name: str, files: Sequence[str] = ()
) -> tuple[torch.Tensor, list[Any]]:
    """Images ``(N, C, H, W)`` and labels of all rows; ``files`` name the images in messages."""

    def what() -> str:
        return files[len(arrays)] if files else f"image {len(arrays)}"

    arrays: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    labels: list[Any] = []
    first: tuple[str, tuple[int, int]] | None = None
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator, None)
            picture = None if row is None else row[image]
            array = None if picture is None else np.asarray(picture, dtype=np.uint8)
        except Exception as error:  # decoders raise many kinds
            raise DataError(f"{name}: {what()} cannot be decoded: {_brief(error)}") from error
        if row is None:
            break
        if picture is None or array is None or row[label] is None:
            raise DataError(f"{name}: expected an image and a label in row {len(arrays)}, got an empty cell")
        found = (picture.mode, picture.size)
        if first is None:
            if picture.mode not in MODES:
                raise DataError(
                    f"{name}: expected images of mode {' or '.join(MODES)}, got {picture.mode} for {what()}; "
                    "convert them first"
                )
            first = found
        elif found != first:
            raise DataError(
                f"{name}: expected all images alike, mode {first[0]} and {_size(first[1])} as the first, "
                f"got {found[0]} and {_size(found[1])} for {what()}; convert or resize them first"
            )
        arrays.append(array)
        labels.append(row[label])
    if first is None:
        raise DataError(f"{name}: expected at least one image, found none")
    images = torch.from_numpy(np.stack(arrays))  # (N, H, W) or (N, H, W, C)
    images = images.unsqueeze(1) if MODES[first[0]] == 1 else images.permute(0, 3, 1, 2).contiguous()
    return images, labels


def _class_names(datasets: Any, feature: Any, name: str, train: Sequence[Any], test: Sequence[Any]) -> tuple[str, ...]:
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    values = {*train, *test}
    if any(isinstance(value, str) for value in values):
        return tuple(sorted(values))
    return numbered_classes(train, test, name=name)


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """The ``datasets`` module with its progress bars off (and back as they were afterwards)."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        if shown:
            datasets.enable_progress_bars()


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _type_name(feature: Any) -> str:
    return str(getattr(feature, "dtype", type(feature).__name__))


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"

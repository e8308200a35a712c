from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from coldforge.data import ImageSet, load_data, sources
from coldforge.data.arrays import mixed
from coldforge.errors import DataError
from coldforge.recipe import DataSpec

MakeSet = Callable[..., ImageSet]


def spec(source: str, **options: Any) -> DataSpec:
    return DataSpec(source=source, **options)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach 'it' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


# --- the embedded set --------------------------------------------------------------------------------------------


def test_mini_is_balanced_and_split(tmp_path: Path) -> None:
    splits = load_data(cache=tmp_path / "cache")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (11000, 1000, 2000)
    assert splits.image_shape == (1, 28, 28)
    assert splits.augment == "none"
    labels = torch.cat([splits.train.labels, splits.validation.labels])
    assert torch.bincount(labels).tolist() == [1200] * 10
    assert torch.bincount(splits.test.labels).tolist() == [200] * 10
    assert splits.classes[9] == "Ankle boot"
    assert not (tmp_path / "cache").exists()


def test_mini_ships_with_its_notice_and_is_small() -> None:
    folder = resources.files("coldforge.data") / "fashion_mnist_mini"
    files = {item.name: len(item.read_bytes()) for item in folder.iterdir()}
    assert set(files) == {"LICENSE", *(f"{name}.gz" for name in sources.IDX_FILES)}
    assert sum(files.values()) <= 8_000_000
    notice = (folder / "LICENSE").read_text(encoding="utf-8")
    assert "Zalando SE" in notice
    assert "Permission is hereby granted" in notice


def test_train_n_and_test_n_cut_from_the_front_before_the_split(tmp_path: Path) -> None:
    small = load_data(spec("fashion-mnist-mini", train_n=120, test_n=50), cache=tmp_path)
    assert (len(small.train), len(small.validation), len(small.test)) == (110, 10, 50)
    full = load_data(spec("fashion-mnist-mini", validation=1), cache=tmp_path)
    assert torch.equal(small.test.images, full.test.images[:50])
    known = {image.numpy().tobytes() for image in full.train.take(slice(120)).images}
    assert sum(image.numpy().tobytes() in known for image in small.train.images) >= 109


# --- names -------------------------------------------------------------------------------------------------------


def test_loaded_data_know_what_was_asked_for_until_they_are_other_images(tmp_path: Path) -> None:
    asked = spec("fashion-mnist-mini", train_n=240, test_n=50)
    data = load_data(asked, cache=tmp_path)
    assert data.named == asked
    assert replace(data, test=data.validation).named is None
    assert load_data(cache=tmp_path).named == DataSpec()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("fashion-mnits", "unknown data set 'fashion-mnits'; did you mean 'fashion-mnist'?"),
        ("cifar100", "did you mean 'cifar10'?"),
        ("zzz:x", "valid: cifar10, fashion-mnist"),
        ("hf:", "expected hf:NAME, got 'hf:'"),
        ("folder", "expected folder:DIR, got 'folder'"),
        ("fashion-mnist-mini:/tmp", "without a folder"),
        ("parquet:/nowhere/at/all", "expected a folder, found none at /nowhere/at/all"),
        ("fashion-mnist:/nowhere/at/all", "expected a folder, found none at /nowhere/at/all"),
        ("cifar10:/nowhere/at/all", "expected a folder, found none at /nowhere/at/all"),
    ],
)
def test_bad_sources(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        load_data(spec(source), cache=tmp_path)


def test_missing_fashion_mnist_names_the_ways_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    monkeypatch.delenv("COLDFORGE_FASHION_MNIST", raising=False)
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    with pytest.raises(DataError) as caught:
        load_data(spec("fashion-mnist"), cache=tmp_path)
    for part in ("apt-get install dataset-fashion-mnist", "$COLDFORGE_FASHION_MNIST", "fashion-mnist-mini", "Couldn't"):
        assert part in str(caught.value)
    assert "second line" not in str(caught.value)


def test_missing_cifar10_names_the_ways_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    monkeypatch.delenv("COLDFORGE_CIFAR10", raising=False)
    with pytest.raises(DataError, match=r"train\.parquet and test\.parquet of https://.*or \$COLDFORGE_CIFAR10"):
        load_data(spec("cifar10"), cache=tmp_path)


def test_environment_variable_with_a_wrong_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFORGE_CIFAR10", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"\$COLDFORGE_CIFAR10: expected a folder, found none at"):
        load_data(spec("cifar10"), cache=tmp_path)


def test_fashion_mnist_folder_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFORGE_FASHION_MNIST", str(tmp_path))
    with pytest.raises(DataError, match=r"expected train-images-idx3-ubyte or train-images-idx3-ubyte\.gz in"):
        load_data(spec("fashion-mnist"), cache=tmp_path)
    mini = resources.files("coldforge.data") / "fashion_mnist_mini"
    for name in sources.IDX_FILES:
        (tmp_path / f"{name}.gz").write_bytes((mini / f"{name}.gz").read_bytes())
    with pytest.raises(DataError, match=f"expected sha256 {sources.FASHION_MNIST_SHA256[0]}"):
        load_data(spec("fashion-mnist"), cache=tmp_path)


# --- parquet -----------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path: Path, make_set: MakeSet, write_parquet: Callable[..., None]) -> Path:
    folder = tmp_path / "parquet"
    folder.mkdir()
    train = make_set(20)
    write_parquet(folder / "train-00000-of-00002.parquet", train.take(slice(12)))
    write_parquet(folder / "train-00001-of-00002.parquet", train.take(slice(12, 20)))
    write_parquet(folder / "test.parquet", make_set(8, seed=1))
    return folder


def all_train_images(splits: Any) -> set[bytes]:
    return {image.numpy().tobytes() for part in (splits.train, splits.validation) for image in part.images}


def test_parquet_is_decoded_and_remembered(parquet: Path, tmp_path: Path, make_set: MakeSet) -> None:
    cache = tmp_path / "cache"
    splits = load_data(spec(f"parquet:{parquet}"), cache=cache)
    assert splits.classes == ("0", "1", "2", "3")
    assert splits.augment == "crop-flip"
    assert torch.equal(splits.test.images, mixed(make_set(8, seed=1)).images)
    assert all_train_images(splits) == {image.numpy().tobytes() for image in make_set(20).images}
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def test_the_second_time_nothing_is_decoded(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_data(spec(f"parquet:{parquet}"), cache=tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", None)
    second = load_data(spec(f"parquet:{parquet}"), cache=tmp_path / "cache")
    assert second.fingerprint == first.fingerprint


def test_a_changed_file_is_decoded_again(
    parquet: Path, tmp_path: Path, make_set: MakeSet, write_parquet: Callable[..., None]
) -> None:
    load_data(spec(f"parquet:{parquet}"), cache=tmp_path / "cache")
    write_parquet(parquet / "test.parquet", make_set(9, seed=2))
    splits = load_data(spec(f"parquet:{parquet}"), cache=tmp_path / "cache")
    assert torch.equal(splits.test.images, mixed(make_set(9, seed=2)).images)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_cache_is_decoded_again(damage: str, parquet: Path, tmp_path: Path) -> None:
    first = load_data(spec(f"parquet:{parquet}"), cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    content = bytearray(entry.read_bytes())
    content[-100] ^= 1
    entry.write_bytes(content if damage == "flipped" else content[:-50])
    assert load_data(spec(f"parquet:{parquet}"), cache=tmp_path / "cache").fingerprint == first.fingerprint
    assert hashlib.sha256(entry.read_bytes()).digest() != hashlib.sha256(content).digest()


def test_an_unwritable_cache_only_costs_time(parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder is needed")
    assert len(load_data(spec(f"parquet:{parquet}"), cache=tmp_path / "cache").test) == 8


def test_cifar10_has_its_class_names_and_its_order(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_set: MakeSet
) -> None:
    monkeypatch.setenv("COLDFORGE_CIFAR10", str(parquet))
    assert load_data(spec("cifar10"), cache=tmp_path / "cache").classes == sources.CIFAR10_CLASSES
    splits = load_data(spec(f"cifar10:{parquet}"), cache=tmp_path / "cache")
    assert splits.classes[3] == "cat"
    assert torch.equal(splits.test.images, make_set(8, seed=1).images)  # in the order of the file


def test_missing_and_damaged_parquet(parquet: Path, tmp_path: Path) -> None:
    (parquet / "test.parquet").write_bytes((parquet / "test.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cannot read the files|cannot be decoded"):
        load_data(spec(f"parquet:{parquet}"), cache=tmp_path / "cache")
    (parquet / "test.parquet").unlink()
    with pytest.raises(DataError, match=r"expected test\*\.parquet in .*, found none"):
        load_data(spec(f"parquet:{parquet}"), cache=tmp_path / "cache")


def test_images_must_be_alike(
    parquet: Path, tmp_path: Path, make_set: MakeSet, write_parquet: Callable[..., None]
) -> None:
    write_parquet(parquet / "train-00001-of-00002.parquet", make_set(4, shape=(1, 8, 8)))
    with pytest.raises(
        DataError, match="expected all images alike, mode RGB and 8x8 as the first, got L and 8x8 for image 12"
    ):
        load_data(spec(f"parquet:{parquet}"), cache=tmp_path)
    write_parquet(parquet / "train-00001-of-00002.parquet", make_set(4, shape=(3, 4, 6)))
    with pytest.raises(DataError, match="got RGB and 6x4 for image 12; convert or resize"):
        load_data(spec(f"parquet:{parquet}"), cache=tmp_path)


def test_columns_that_cannot_be_told_apart(
    tmp_path: Path, make_set: MakeSet, write_parquet: Callable[..., None], encode: Callable[..., bytes]
) -> None:
    data = make_set(4)
    second = [{"bytes": encode(image), "path": None} for image in data.images]
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", data, mask=second)
    with pytest.raises(DataError, match="expected exactly one image column, got 2 among"):
        load_data(spec(f"parquet:{tmp_path}"), cache=tmp_path / "cache")
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", data, age=[1, 2, 3, 4])
    splits = load_data(spec(f"parquet:{tmp_path}"), cache=tmp_path / "cache")  # "label" wins by its name
    assert torch.equal(splits.test.labels, mixed(data).labels)


def test_texts_as_labels(tmp_path: Path, make_set: MakeSet, write_parquet: Callable[..., None]) -> None:
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", make_set(4), label=["dog", "cat", "dog", "eel"])
    splits = load_data(spec(f"parquet:{tmp_path}"), cache=tmp_path / "cache")
    assert splits.classes == ("cat", "dog", "eel")
    written = replace(make_set(4), labels=torch.tensor([1, 0, 1, 2]))
    assert torch.equal(splits.test.labels, mixed(written).labels)
    assert torch.equal(splits.test.images, mixed(written).images)


# --- image folders and the hub -----------------------------------------------------------------------------------


def test_image_folder(tmp_path: Path, make_set: MakeSet, encode: Callable[..., bytes]) -> None:
    data = make_set(12, shape=(1, 6, 5), classes=2)
    for part in ("train", "test"):
        for i, image in enumerate(data.images):
            folder = tmp_path / "set" / part / ("yes" if data.labels[i] else "no")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:02}.png").write_bytes(encode(image))
    splits = load_data(spec(f"folder:{tmp_path / 'set'}"), cache=tmp_path / "cache")
    assert splits.classes == ("no", "yes")
    assert splits.image_shape == (1, 6, 5)
    assert splits.augment == "none"
    order = sorted(range(12), key=lambda i: (int(data.labels[i]), i))
    expected = mixed(data.take(torch.tensor(order)))
    assert torch.equal(splits.test.images, expected.images)
    assert torch.equal(splits.test.labels, expected.labels)
    assert splits.test.labels.tolist() != sorted(splits.test.labels.tolist())

    (tmp_path / "set" / "test" / "maybe").mkdir()
    (tmp_path / "set" / "test" / "maybe" / "x.png").write_bytes(encode(data.images[0]))
    with pytest.raises(DataError, match=re.escape("expected the classes of train/ (no, yes) in test/ too, got maybe")):
        load_data(spec(f"folder:{tmp_path / 'set'}"), cache=tmp_path / "cache")


def test_every_file_of_an_image_folder_is_an_image_once(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    """Names that are patterns elsewhere, and names without an ending."""
    names = ["img[0-9].png", "img0.png", "copy [x].png", "odd.name", "bare", "*.png"]
    images = torch.arange(len(names), dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    root = tmp_path / "set [v2]"
    for part in ("train", "test"):
        for i, name in enumerate(names):
            folder = root / part / ("a" if i % 2 else "b")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(encode(images[i]))
    (root / "train" / "a" / ".DS_Store").write_bytes(b"of a file manager")
    (root / "train" / ".thumbnails").mkdir()
    (root / "train" / ".thumbnails" / "img0.png").write_bytes(b"small")
    splits = load_data(spec(f"folder:{root}", validation=1), cache=tmp_path / "cache")
    assert sorted(splits.test.images[:, 0, 0, 0].tolist()) == list(range(len(names)))
    assert len(splits.train) + len(splits.validation) == len(names)
    assert splits.classes == ("a", "b")
    (root / "test" / "a" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"test/a/notes\.txt cannot be decoded: UnidentifiedImageError"):
        load_data(spec(f"folder:{root}"), cache=tmp_path / "cache")
    (root / "test" / "a" / "notes.txt").unlink()
    (root / "test" / "b" / "wide.png").write_bytes(encode(torch.zeros(1, 4, 6, dtype=torch.uint8)))
    with pytest.raises(DataError, match=r"got L and 6x4 for .*test/b/wide\.png; convert or resize"):
        load_data(spec(f"folder:{root}"), cache=tmp_path / "cache")


def test_parquet_in_a_folder_whose_name_is_a_pattern(
    tmp_path: Path, make_set: MakeSet, write_parquet: Callable[..., None]
) -> None:
    folder = tmp_path / "set [v2]"
    folder.mkdir()
    for part in ("train", "test"):
        write_parquet(folder / f"{part}.parquet", make_set(8))
    assert len(load_data(spec(f"parquet:{folder}"), cache=tmp_path / "cache").test) == 8


def test_image_folder_without_a_part(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected images in .*train/CLASS/, found none"):
        load_data(spec(f"folder:{tmp_path}"), cache=tmp_path / "cache")


def hub_part(data: ImageSet, encode: Callable[..., bytes]) -> datasets.Dataset:
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=list(data.classes)),
            "id": datasets.Value("int64"),
        }
    )
    rows = {
        "picture": [{"bytes": encode(image), "path": None} for image in data.images],
        "kind": data.labels.tolist(),
        "id": list(range(len(data))),
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_hub_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_set: MakeSet, encode: Callable[..., bytes]
) -> None:
    calls: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, *, cache_dir: str) -> datasets.DatasetDict:
        calls.append((name, config, cache_dir, datasets.are_progress_bars_disabled()))
        parts = {"train": hub_part(make_set(16), encode), "validation": hub_part(make_set(6, seed=1), encode)}
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    shown = not datasets.are_progress_bars_disabled()
    splits = load_data(spec("hf:someone/shapes:small", augment="none"), cache=tmp_path)
    assert calls == [("someone/shapes", "small", str(tmp_path / "huggingface"), True)]
    assert shown is not datasets.are_progress_bars_disabled()
    assert splits.classes == ("a", "b", "c", "d")
    assert splits.augment == "none"
    expected = mixed(make_set(6, seed=1))
    assert torch.equal(splits.test.images, expected.images)
    assert torch.equal(splits.test.labels, expected.labels)


def test_hub_set_without_a_test_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_set: MakeSet, encode: Callable[..., bytes]
) -> None:
    only = datasets.DatasetDict({"train": hub_part(make_set(4), encode)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: only)
    with pytest.raises(DataError, match="expected the splits train and test, got train"):
        load_data(spec("hf:someone/shapes"), cache=tmp_path)


# --- the real sets, where they are -------------------------------------------------------------------------------


@pytest.mark.skipif(
    not sources.DEBIAN_FASHION_MNIST.is_dir(), reason="run `apt-get install dataset-fashion-mnist` for this test"
)
def test_full_fashion_mnist(tmp_path: Path) -> None:
    splits = load_data(spec(f"fashion-mnist:{sources.DEBIAN_FASHION_MNIST}"), cache=tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (55000, 5000, 10000)
    assert splits.mean == pytest.approx([0.2860406], abs=1e-6)
    assert splits.std == pytest.approx([0.3530242], abs=1e-6)
    mini = load_data(cache=tmp_path)
    chosen = torch.cat([torch.nonzero(splits.test.labels == k).flatten()[:200] for k in range(10)]).sort().values
    assert torch.equal(mini.test.images, splits.test.images[chosen])
    assert torch.equal(mini.test.labels, splits.test.labels[chosen])


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("COLDFORGE_CIFAR10"), reason="set COLDFORGE_CIFAR10 to a folder with train.parquet, test.parquet"
)
def test_real_cifar10_bit_for_bit(tmp_path: Path) -> None:
    splits = load_data(spec("cifar10", validation=5000), cache=tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (45000, 5000, 10000)
    decoded = splits.test.images.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    assert hashlib.sha256(decoded).hexdigest() == "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04"
    train, _ = sources._sets("cifar10", tmp_path)
    decoded = train.images.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    assert hashlib.sha256(decoded).hexdigest() == "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a"
    assert splits.mean == pytest.approx([0.49139968, 0.48215841, 0.44653091], abs=1e-7)
    assert splits.std == pytest.approx([0.24703223, 0.24348513, 0.26158784], abs=1e-7)
    assert splits.classes[:2] == ("airplane", "automobile")

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from coldforge.data import ImageSet, crop_flip, epoch_batches, steps_per_epoch
from coldforge.data.batches import PADDING
from coldforge.errors import DataError

MakeSet = Callable[..., ImageSet]


@pytest.mark.parametrize(("n", "batch_size", "steps"), [(100, 32, 3), (96, 32, 3), (31, 32, 1), (32, 32, 1)])
def test_steps_per_epoch(n: int, batch_size: int, steps: int, make_set: MakeSet) -> None:
    assert steps_per_epoch(n, batch_size) == steps
    sizes = [len(labels) for _, labels, _ in epoch_batches(make_set(n), batch_size=batch_size, seed=0, epoch=0)]
    assert sizes == [min(n, batch_size)] * steps


def test_an_epoch_sees_every_image_once(make_set: MakeSet) -> None:
    data = make_set(24)
    batches = list(epoch_batches(data, batch_size=8, seed=3, epoch=0))
    order = torch.cat([indices for _, _, indices in batches])
    assert order.sort().values.tolist() == list(range(24))
    assert order.tolist() != list(range(24))
    for pixels, labels, indices in batches:
        assert torch.equal(pixels, data.pixels(indices))
        assert torch.equal(labels, data.labels[indices])


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_resuming_gives_the_same_bits(augment: str, make_set: MakeSet) -> None:
    data = make_set(50)

    def batches(start: int) -> list[tuple[torch.Tensor, ...]]:
        options = {"batch_size": 8, "seed": 7, "epoch": 2, "augment": augment, "start": start}
        return list(epoch_batches(data, **options))  # type: ignore[arg-type]

    torch.manual_seed(0)
    whole = batches(0)
    torch.rand(13)  # the global state must not matter
    rest = batches(4)
    assert len(whole) == 6
    assert len(rest) == 2
    for left, right in zip(whole[4:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert batches(6) == []


def test_seed_and_epoch_change_the_order(make_set: MakeSet) -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batches = epoch_batches(make_set(40), batch_size=8, seed=seed, epoch=epoch)
        return tuple(torch.cat([indices for _, _, indices in batches]).tolist())

    assert len({order(0, 0), order(0, 1), order(1, 0), order(1, 1)}) == 4


def test_wrong_calls_fail_at_once(make_set: MakeSet) -> None:
    with pytest.raises(DataError, match="batch_size: expected at least 1, got 0"):
        epoch_batches(make_set(), batch_size=0, seed=0, epoch=0)
    with pytest.raises(DataError, match=r"start: expected a step in 0 \.\.\. 3, got 4"):
        epoch_batches(make_set(), batch_size=8, seed=0, epoch=0, start=4)
    with pytest.raises(DataError, match="expected one of none, crop-flip, got 'auto'"):
        epoch_batches(make_set(), batch_size=8, seed=0, epoch=0, augment="auto")  # type: ignore[arg-type]


def slow_crop_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The obvious twin: one image after the other, mirrored after the crop."""
    batch, channels, height, width = images.shape
    offsets = torch.randint(2 * PADDING + 1, (2, batch, 1), generator=generator)
    flip = torch.rand(batch, 1, generator=generator) < 0.5
    results = []
    for i in range(batch):
        padded = torch.zeros(channels, height + 2 * PADDING, width + 2 * PADDING, dtype=images.dtype)
        padded[:, PADDING : PADDING + height, PADDING : PADDING + width] = images[i]
        top, left = int(offsets[0, i]), int(offsets[1, i])
        crop = padded[:, top : top + height, left : left + width]
        results.append(crop.flip(-1) if flip[i] else crop)
    return torch.stack(results)


def test_crop_flip_equals_its_slow_twin(make_set: MakeSet) -> None:
    images = make_set(64, shape=(3, 6, 9)).images
    before = images.clone()
    fast = crop_flip(images, torch.Generator().manual_seed(5))
    assert torch.equal(fast, slow_crop_flip(images, torch.Generator().manual_seed(5)))
    assert torch.equal(images, before)
    assert fast.is_contiguous()


def test_crop_flip_draws_every_offset_and_both_mirrors() -> None:
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[..., 4, 4], image[..., 4, 5] = 200, 100
    found = crop_flip(image.expand(2000, -1, -1, -1), torch.Generator().manual_seed(0))
    rows = (found == 200).any(3).float().argmax(2).flatten()
    assert set(rows.tolist()) == set(range(9))
    mirrored = torch.tensor([bool((part[0, :, :-1].int() - part[0, :, 1:].int() == -100).any()) for part in found])
    assert 0.35 < mirrored.float().mean() < 0.65

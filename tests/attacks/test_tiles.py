"""Tiles of other sizes: used where they save time, and only where they change nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from coldforge.attacks import AttackResult, ThreatModel, parse_attack
from coldforge.attacks.query import TILE, Classifier
from coldforge.attacks.tiles import LARGEST, MULTIPLE, Tiles

LINF = ThreatModel("linf", 0.2)
Task = tuple[nn.Module, Tensor, Tensor]
COLUMNS = ("fooled", "adversarial", "step", "restart", "queries", "margin")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if larger tiles were always faster, which is up to the machine."""
    monkeypatch.setattr(Tiles, "_is_faster", lambda *_: True)


def shapes_of(attack: str, model: Classifier, images: Tensor, labels: Tensor) -> tuple[Counter[int], AttackResult]:
    """How often tiles of each size were asked about."""
    seen: Counter[int] = Counter()

    def spy(x: Tensor) -> Tensor:
        seen[len(x)] += 1
        return model(x)

    return seen, parse_attack(attack)(spy, images, labels, LINF)


def uneven(model: nn.Module) -> Classifier:
    """Rounds differently for tiles of another size than the usual one."""
    return lambda x: model(x) * (1.0 if len(x) == TILE else 1.0 + 1e-6)


def uneven_gradients(model: nn.Module) -> Classifier:
    """The same logits, but other gradients."""
    return lambda x: model(x if len(x) == TILE else x + (x - x.detach()) * 1e-3)


@pytest.mark.parametrize("attack", ["pgd-40", "apgd-ce-40", "apgd-t-20-3", "fab-t-20-3", "square-300"])
def test_many_images_are_attacked_in_large_tiles_and_the_last_in_small_ones(task: Task, attack: str) -> None:
    model, images, labels = task
    many, truth = images.repeat(6, 1, 1, 1), labels.repeat(6)
    seen, found = shapes_of(attack, model, many, truth)
    assert max(seen) > 2 * TILE
    assert len(set(seen) - {TILE}) > 1, "the last images were not moved into a smaller tile"
    always, expected = shapes_of(attack, uneven(model), many, truth)
    assert all(n == 1 for size, n in always.items() if size != TILE), "asked in other sizes than to try them out"
    for what in COLUMNS:
        assert torch.equal(getattr(found, what), getattr(expected, what)), what


def test_a_few_images_do_not_fill_a_whole_tile(task: Task) -> None:
    model, images, labels = task
    seen, _ = shapes_of("square-300", model, images[:3], labels[:3])
    assert seen[MULTIPLE] > 200
    assert seen[TILE] <= 1


def test_gradients_decide_too(task: Task) -> None:
    model, _, _ = task
    shape = (1, 8, 8)
    assert Tiles(model, shape, gradients=True).fits(2 * TILE)
    assert Tiles(uneven_gradients(model), shape, gradients=False).fits(2 * TILE)
    assert not Tiles(uneven_gradients(model), shape, gradients=True).fits(2 * TILE)
    assert not Tiles(uneven(model), shape, gradients=False).fits(MULTIPLE)


def test_a_network_whose_images_see_each_other_keeps_its_tile(task: Task) -> None:
    model, _, _ = task

    def crowded(x: Tensor) -> Tensor:
        return model(x) + model(x).mean(0)

    tiles = Tiles(crowded, (1, 8, 8), gradients=False)
    assert tiles.first(1000, 1000) == TILE
    assert tiles.next(TILE, 3, 1000) == TILE
    assert tiles.next(TILE, 3, 1000) == TILE


def test_sizes_that_are_worth_it(task: Task) -> None:
    tiles = Tiles(task[0], (1, 8, 8), gradients=True)
    assert tiles.first(1000, 100) == LARGEST
    assert tiles.first(100, 100) == 104
    assert tiles.first(100, 20) == TILE, "2,000 images in all do not pay for trying"
    assert tiles.first(1000, 1) == TILE, "one pass each does not pay for trying"
    assert tiles.first(3, 1000) == TILE
    assert (tiles.of(3), tiles.of(32), tiles.of(33)) == (MULTIPLE, MULTIPLE, TILE)
    assert tiles.next(64, 60, 1000) == 64
    assert tiles.next(64, 3, 1000) == MULTIPLE
    assert tiles.next(64, 3, 2) == MULTIPLE, "known by now"
    assert Tiles(task[0], (1, 8, 8), gradients=True).next(64, 3, 2) == 64, "trying takes longer than what is left"


def test_large_images_do_not_fill_the_memory() -> None:
    def model(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :4]

    assert Tiles(model, (3, 224, 224), gradients=False).first(1000, 1000) == TILE
    assert Tiles(model, (3, 64, 64), gradients=False).first(70, 1000) == 72
    assert Tiles(model, (3, 64, 64), gradients=False).first(1000, 1000) == TILE


def test_a_larger_tile_that_is_slower_is_not_taken(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(Tiles, "_is_faster", lambda _, size: bool(tried.append(size)))
    assert Tiles(task[0], (1, 8, 8), gradients=True).first(1000, 1000) == TILE
    assert tried == [LARGEST]

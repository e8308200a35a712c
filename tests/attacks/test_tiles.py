"""Smaller tiles: used where they save time, and only where they change nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from coldforge.attacks import AttackResult, ThreatModel, parse_attack
from coldforge.attacks.query import TILE, Classifier
from coldforge.attacks.tiles import MULTIPLE, Tiles

LINF = ThreatModel("linf", 0.2)
SHAPE = (1, 8, 8)
Task = tuple[nn.Module, Tensor, Tensor]
COLUMNS = ("fooled", "adversarial", "step", "restart", "queries", "margin")


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


@pytest.mark.parametrize(
    ("attack", "count"),
    [("pgd-40", 150), ("apgd-ce-40", 150), ("apgd-t-80-3", 140), ("fab-t-100-3", 130), ("square-300", 150)],
)
def test_the_last_images_are_attacked_in_small_tiles(task: Task, attack: str, count: int) -> None:
    model, images, labels = task
    images, labels = images[:count], labels[:count]
    seen, found = shapes_of(attack, model, images, labels)
    assert max(seen) == TILE
    small = [size for size, asked in seen.items() if size < TILE and asked > 2]
    assert small, "the last images were not moved into a smaller tile"
    always, expected = shapes_of(attack, uneven(model), images, labels)
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
    for size in range(MULTIPLE, TILE + 1, MULTIPLE):
        assert Tiles(model, SHAPE, gradients=True).alike(size)
    assert Tiles(uneven_gradients(model), SHAPE, gradients=False).alike(MULTIPLE)
    assert not Tiles(uneven_gradients(model), SHAPE, gradients=True).alike(MULTIPLE)
    assert not Tiles(uneven(model), SHAPE, gradients=False).alike(MULTIPLE)


def test_every_size_is_tried_by_itself(task: Task) -> None:
    model, _, _ = task

    def picky(x: Tensor) -> Tensor:
        return model(x) * (1.0 + 1e-6 * (len(x) == 24))

    tiles = Tiles(picky, SHAPE, gradients=False)
    assert tiles.next(TILE, 23, 10_000) == TILE
    assert tiles.next(TILE, 9, 10_000) == 16
    assert (tiles.of(17), tiles.of(16), tiles.of(25)) == (TILE, 16, 32)


def test_a_judge_is_shown_a_few_at_a_time() -> None:
    even = Tiles(lambda x: x.flatten(1)[:, :4], SHAPE, gradients=False)
    assert [even.of(count) for count in (1, 2, 3, 5, 9, 1000)] == [2, 2, 4, MULTIPLE, 16, TILE]
    picky = Tiles(lambda x: x.flatten(1)[:, :4] * (1.0 + 1e-6 * (len(x) == 4)), SHAPE, gradients=False)
    assert [picky.of(count) for count in (1, 3, 4)] == [2, MULTIPLE, MULTIPLE], (
        "where a size answers otherwise, the next"
    )


def test_a_network_whose_images_see_each_other_keeps_its_tile(task: Task) -> None:
    model, _, _ = task

    def crowded(x: Tensor) -> Tensor:
        return model(x) + model(x).mean(0)

    tiles = Tiles(crowded, SHAPE, gradients=False)
    assert (tiles.next(TILE, 3, 1000), tiles.next(TILE, 3, 1000), tiles.of(3)) == (TILE, TILE, TILE)


def test_a_network_that_takes_one_size_only_keeps_it(task: Task) -> None:
    model, images, labels = task

    def strict(x: Tensor) -> Tensor:
        if len(x) != TILE:
            raise ValueError("wants 64")
        return model(x)

    _, found = shapes_of("pgd-40", strict, images[:3], labels[:3])
    assert torch.equal(found.adversarial, parse_attack("pgd-40")(model, images[:3], labels[:3], LINF).adversarial)


def test_sizes_that_are_worth_it(task: Task) -> None:
    tiles = Tiles(task[0], SHAPE, gradients=True)
    assert tiles.next(TILE, 3, 2) == TILE, "trying takes longer than what is left"
    assert (tiles.of(33), tiles.of(1000)) == (40, TILE)
    assert tiles.next(TILE, 60, 1000) == TILE
    assert tiles.next(TILE, 33, 1000) == 40
    assert tiles.next(TILE, 3, 2) == MULTIPLE, "known by now"


def test_torchscript_networks_are_attacked_too(task: Task) -> None:
    model, images, labels = task
    _, found = shapes_of("pgd-6", torch.jit.script(model), images[:9], labels[:9])
    assert torch.equal(found.fooled, parse_attack("pgd-6")(model, images[:9], labels[:9], LINF).fooled)


def test_trying_leaves_the_network_as_it_was(task: Task) -> None:
    model, _, _ = task
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        assert Tiles(model, SHAPE, gradients=True).alike(MULTIPLE)
        assert all(module.training for module in model.modules())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    finally:
        model.eval()

"""Square: windows, schedule, and that it asks for nothing but answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coldforge.attacks import Square, ThreatModel
from coldforge.attacks.square import _corner, _inside

LINF = ThreatModel("linf", 0.2)


def test_sides_follow_the_published_schedule() -> None:
    sides = Square(steps=5000).sides(32, 32)
    for step, part in [
        (0, 0.8),
        (10, 0.8),
        (11, 0.4),
        (51, 0.2),
        (201, 0.1),
        (501, 0.05),
        (1001, 0.025),
        (4999, 0.00625),
    ]:
        assert int(sides[step]) == max(round((part * 32 * 32) ** 0.5), 1)
    assert Square(steps=20).sides(4, 9).max() <= 4


def test_pitfall_22_every_window_can_be_drawn_the_last_row_too() -> None:
    uniform = torch.arange(0, 1, 1 / 4096)
    corners = _corner(uniform, 28, torch.full((4096,), 5))
    assert corners.unique().tolist() == list(range(24))
    assert corners.bincount().min() > 4096 / 24 - 2
    rows = _inside(28, corners, torch.full((4096,), 5))
    assert (rows.sum(1) == 5).all()
    assert rows[:, 27].any()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 6, 11), (1, 3, 3)])
@pytest.mark.parametrize("threat_model", [LINF, ThreatModel("l2", 0.7)], ids=["linf", "l2"])
def test_pitfall_22_oblong_and_small_images(shape: tuple[int, int, int], threat_model: ThreatModel) -> None:
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(images[0].numel(), generator=torch.Generator().manual_seed(1))

    def answers(points: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        scores = (points.flatten(1).detach() @ weight).numpy()
        return torch.stack([torch.zeros(len(points)), torch.from_numpy(scores) - 100], 1)  # never fooled

    labels = torch.zeros(5, dtype=torch.int64)
    found = Square(steps=60)(answers, images, labels, threat_model, keep_last=True)
    assert not found.fooled.any()
    assert (found.queries == 61).all()
    threat_model.verify(found.last, images)
    clean = answers_margin(images, weight)
    assert (found.margin < clean).all(), "random search must come nearer to the boundary"


def answers_margin(images: Tensor, weight: Tensor) -> Tensor:
    return 100 - images.flatten(1) @ weight


def test_on_a_linear_model_it_reaches_the_corner_of_the_ball() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, generator=generator).abs()  # the best corner is +eps everywhere: found by one square
    images = 0.3 + 0.3 * torch.rand(12, 1, 4, 4, generator=generator)
    best = LINF.eps * float(weight.sum())
    for share, expected in ((0.9, True), (1.02, False)):
        gap = images.flatten(1) @ weight + share * best

        def model(points: Tensor, gap: Tensor = gap) -> Tensor:
            nearest = torch.cdist(points.flatten(1), images.flatten(1), p=float("inf")).argmin(1)
            return torch.stack([gap[nearest], points.flatten(1) @ weight], 1)

        found = Square(steps=400)(model, images, torch.zeros(12, dtype=torch.int64), LINF)
        assert bool(found.fooled.all()) == expected
        assert bool(found.fooled.any()) == expected


def test_gradients_are_never_asked_for(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task

    def spy(points: Tensor) -> Tensor:
        assert not points.requires_grad
        with torch.inference_mode():
            return model(points).clone()

    assert Square(steps=30)(spy, images[:4], labels[:4], LINF).finished.all()

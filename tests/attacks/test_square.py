"""Square: against a slow twin, its windows and schedule, and that it asks for nothing but answers."""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from coldforge.attacks import Square, ThreatModel, margins, predict
from coldforge.attacks.base import Slots
from coldforge.attacks.randomness import uniforms
from coldforge.attacks.square import _corner, _inside
from coldforge.attacks.tiles import Tiles
from coldforge.spec import seed_of

LINF, L2 = ThreatModel("linf", 0.25), ThreatModel("l2", 1.5)


# --- schedule and windows


def published_part(step: int) -> float:
    """Part of the image that a square covers, section 4 of the paper (10,000 queries), from github.com/max-andr."""
    for first, part in [(8001, 512), (6001, 256), (4001, 128), (2001, 64), (1001, 32), (501, 16), (201, 8), (51, 4)]:
        if step >= first:
            return 0.8 / part
    return 0.8 / 2 if step >= 11 else 0.8


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (4, 9)])
def test_sides_follow_the_published_schedule(height: int, width: int) -> None:
    sides = Square(steps=10_000).sides(height, width).tolist()
    assert len(sides) == 10_000
    for step in (0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 6000, 6001, 8001, 9999):
        side = round(math.sqrt(published_part(step) * height * width))
        assert sides[step] == min(max(side, 1), height, width), step
    assert sides == sorted(sides, reverse=True)


@pytest.mark.parametrize("side", [1, 5, 27, 28])
def test_pitfall_22_every_window_can_be_drawn_the_last_row_too(side: int) -> None:
    uniform = torch.cat([torch.arange(0, 1, 1 / 4096), torch.tensor([1 - 2**-24])])
    lengths = torch.full((4097,), side)
    corners = _corner(uniform, 28, lengths)
    assert corners.unique().tolist() == list(range(28 - side + 1))
    assert corners.bincount().min() > 4096 / (28 - side + 1) - 2, "about equally often"
    rows = _inside(28, corners, lengths)
    assert (rows.sum(1) == side).all()
    assert rows.any(0).all(), "every row, the last one too"


class Recorded(Square):
    """Writes down the margin of the best point of every image after every step, and where the windows were."""

    best: ClassVar[dict[int, list[float]]] = {}
    changed: ClassVar[list[Tensor]] = []

    def advance(self, slots: Slots, threat_model: ThreatModel) -> Tensor:
        moved = super().advance(slots, threat_model)
        for key, margin in zip(slots.key.tolist(), slots.memory["best"].tolist(), strict=True):
            self.best.setdefault(key, []).append(margin)
        self.changed.append((moved != slots.memory["best_points"]).any(1))
        return moved


@pytest.mark.parametrize("tm", [LINF, L2], ids=["linf", "l2"])
def test_pitfall_22_every_pixel_is_searched_alike(tm: ThreatModel) -> None:
    Recorded.changed.clear()
    images = torch.full((64, 3, 12, 12), 0.5)
    Recorded(steps=150, p_init=0.08)(
        lambda x: torch.stack([x.flatten(1).sum(1), torch.zeros(len(x))], 1),
        images,
        torch.zeros(64, dtype=torch.int64),
        tm,
    )
    often = torch.stack(Recorded.changed).float().mean((0, 1))  # (12, 12): how often each pixel was in a window
    assert often.min() > 0
    for edge, opposite in ((often[0], often[-1]), (often[:, 0], often[:, -1])):
        assert float(edge.mean() / opposite.mean()) == pytest.approx(1, abs=0.25)
        assert opposite.mean() > 0.2 * often[4:8, 4:8].mean(), "at the border fewer windows cover a pixel, not none"


@pytest.mark.parametrize("tm", [LINF, L2], ids=["linf", "l2"])
def test_the_loss_of_accepted_points_never_rises(task: tuple[nn.Module, Tensor, Tensor], tm: ThreatModel) -> None:
    model, images, labels = task
    Recorded.best.clear()
    attack = Recorded(steps=80)
    found = attack(model, images[:40], labels[:40], tm)
    standing = (~found.fooled).nonzero()[:, 0].tolist()
    assert len(standing) > 5
    for image in standing:
        margin = Recorded.best[seed_of(0, attack.name, image, 0)][:81]
        assert margin == sorted(margin, reverse=True)
        assert margin[-1] == float(found.margin[image]) < margin[0]


# --- the slow twin


def slow_square(
    model: nn.Module, image: Tensor, label: int, key: int, steps: int, eps: float
) -> tuple[int, list[float]]:
    """Algorithms 1 and 2 of arXiv 1912.00049 for one image, pixel by pixel: first success or -1, margins accepted."""
    channels, height, width = image.shape

    def draw(counter: int, count: int) -> list[float]:
        return uniforms(torch.tensor([key]), torch.tensor([counter]), count)[0].tolist()

    def put(point: Tensor, c: int, i: int, j: int, uniform: float) -> None:
        shifted = image[c, i, j] + torch.tensor(-eps if uniform < 0.5 else eps)
        point[c, i, j] = shifted.clamp(image[c, i, j] - eps, image[c, i, j] + eps).clamp(0, 1)

    def margin_of(point: Tensor) -> float:
        return float(margins(predict(model, point[None]), torch.tensor([label])))

    best = image.clone()
    stripes = draw(-1, channels * width)
    for c in range(channels):
        for j in range(width):
            for i in range(height):
                put(best, c, i, j, stripes[c * width + j])
    margin = margin_of(best)
    accepted = [margin]
    for step in range(steps):
        if margin < 0:
            return step, accepted
        side = min(max(round(math.sqrt(published_part(step) * height * width)), 1), height, width)
        down, right, *sign = draw(step, 2 + channels)
        tried = best.clone()
        top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
        for c in range(channels):
            for i in range(top, top + side):
                for j in range(left, left + side):
                    put(tried, c, i, j, sign[c])
        if margin_of(tried) < margin:
            best, margin = tried, margin_of(tried)
            accepted.append(margin)
    return steps if margin < 0 else -1, accepted


def test_equals_its_slow_twin(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    attack = Square(steps=60)
    rows = (predict(model, images).argmax(1) == labels).nonzero()[:12, 0]
    wide = ThreatModel("linf", 0.33)
    found = attack(model, images[rows], labels[rows], wide, indices=rows)
    for row, which in enumerate(rows.tolist()):
        key = seed_of(0, attack.name, which, 0)
        step, accepted = slow_square(model, images[which], int(labels[which]), key, 60, wide.eps)
        assert int(found.step[row]) == step
        assert float(found.margin[row]) == accepted[-1]
    assert (found.step > 0).any()
    assert (found.step < 0).any()


@functools.cache
def slow_patch(side: int, turned: bool) -> Tensor:
    """Equation 2: two pyramids of opposite signs, one below the other or side by side; float64 of unit norm."""

    def pyramid(rows: int, columns: int) -> Tensor:
        heights = torch.zeros(rows, columns, dtype=torch.float64)
        for i in range(rows):
            for j in range(columns):
                ring = max(abs(i - rows // 2), abs(j - columns // 2))
                heights[i, j] = sum(1 / (k + 1) ** 2 for k in range(ring, max(rows, columns) // 2 + 1))
        return heights / heights.norm()

    if side == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    upper = side // 2
    patch = torch.cat([pyramid(upper, side), -pyramid(side - upper, side)]) / math.sqrt(2)
    return patch.t() if turned else patch


def slow_square_l2(
    model: nn.Module, image: Tensor, label: int, key: int, attack: Square, eps: float
) -> tuple[int, list[float]]:
    """Algorithms 1 and 3 of arXiv 1912.00049 for one image, in float64: first success or -1, margins accepted."""
    image = image.double()
    channels, height, width = image.shape

    def draw(counter: int, count: int) -> list[float]:
        return uniforms(torch.tensor([key]), torch.tensor([counter]), count)[0].tolist()

    def on_the_sphere(delta: Tensor) -> Tensor:
        return (image + eps * delta / delta.norm()).clamp(0, 1)

    def margin_of(point: Tensor) -> float:
        return float(margins(predict(model, point[None].float()), torch.tensor([label])))

    side = max(min(height, width) // 5, 1)
    down, right = height // side, width // side
    delta = torch.zeros_like(image)
    uniform = iter(draw(-1, down * right * (channels + 1)))
    for i in range((height - down * side) // 2, height - side + 1, side):
        for j in range((width - right * side) // 2, width - side + 1, side):
            patch = slow_patch(side, next(uniform) > 0.5)
            for c in range(channels):
                delta[c, i : i + side, j : j + side] = -patch if next(uniform) < 0.5 else patch
    best = on_the_sphere(delta)
    margin = margin_of(best)
    accepted = [margin]
    for step in range(attack.steps):
        if margin < 0:
            return step, accepted
        side = max(round(math.sqrt(published_part(step) * attack.p_init / 0.8 * height * width)), 3)
        side = min(side + 1 - side % 2, height, width)
        *corners, turned = draw(step, 5)
        rows, columns = (
            [slice(top := int(u * (length - side + 1)), top + side) for u in corners[first::2]]
            for first, length in ((0, height), (1, width))
        )  # of the window that gets a patch, and of the one that gives its norm
        delta = best - image
        left = max(eps**2 - float(delta.square().sum()), 0.0) / channels
        tried = delta.clone()
        tried[:, rows[1], columns[1]] = 0
        for c, uniform_c in enumerate(draw(step, 5 + channels)[5:]):
            either = delta[c].clone()
            either[rows[0], columns[0]] = either[rows[1], columns[1]] = 0
            given = float(delta[c].square().sum() - either.square().sum())
            old = delta[c, rows[0], columns[0]]
            new = old / (old.norm() + 1e-12) + slow_patch(side, turned > 0.5) * (-1 if uniform_c < 0.5 else 1)
            tried[c, rows[0], columns[0]] = new / (new.norm() + 1e-12) * math.sqrt(given + left)
        point = on_the_sphere(tried)
        if (found := margin_of(point)) < margin:
            best, margin = point, found
            accepted.append(margin)
    return attack.steps if margin < 0 else -1, accepted


@pytest.mark.parametrize(
    ("shape", "eps", "p_init"), [((1, 8, 8), 2.5, 0.8), ((3, 9, 7), 0.9, 0.02), ((2, 4, 10), 0.8, 0.8)]
)
def test_equals_its_slow_twin_in_l2(
    task: tuple[nn.Module, Tensor, Tensor], shape: tuple[int, int, int], eps: float, p_init: float
) -> None:
    """The trained network; oblong images of several channels, with the smallest squares, and with even ones."""
    model, images, labels = task
    if shape[0] > 1:
        model = nn.Sequential(nn.Conv2d(shape[0], 6, 3, padding=1), nn.ReLU(), nn.Flatten())
        model = model.append(nn.Linear(6 * shape[1] * shape[2], 4)).eval()
        images = torch.rand(12, *shape, generator=torch.Generator().manual_seed(2))
        labels = predict(model, images).argmax(1)
    attack, ball = Square(steps=55, p_init=p_init), ThreatModel("l2", eps)
    rows = (predict(model, images).argmax(1) == labels).nonzero()[:10, 0]
    found = attack(model, images[rows], labels[rows], ball, indices=rows)
    same = 0
    for row, which in enumerate(rows.tolist()):
        key = seed_of(0, attack.name, which, 0)
        step, accepted = slow_square_l2(model, images[which], int(labels[which]), key, attack, eps)
        assert accepted == sorted(accepted, reverse=True)
        same += int(found.step[row]) == step and float(found.margin[row]) == pytest.approx(accepted[-1], abs=1e-3)
    assert same >= len(rows) - 1  # of two margins that are equal but for rounding, either may be the smaller one
    assert (found.step > 0).any()
    assert (found.step < 0).any()


# --- shapes, ball, models


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 6, 11), (2, 9, 5), (1, 3, 3), (1, 1, 1)])
@pytest.mark.parametrize("threat_model", [LINF, L2], ids=["linf", "l2"])
def test_pitfall_22_oblong_and_small_images(
    shape: tuple[int, int, int], threat_model: ThreatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tiles, "alike", lambda *_: False)  # no size of tile is tried: all points are attacks
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(images[0].numel(), generator=torch.Generator().manual_seed(1))
    outside = 0

    def answers(points: Tensor) -> Tensor:
        nonlocal outside
        assert not torch.is_grad_enabled()
        outside += int((~threat_model.contains(points[:5], images)).sum())
        scores = (points.flatten(1).detach() @ weight).numpy()
        return torch.stack([torch.zeros(len(points)), torch.from_numpy(scores) - 100], 1)  # never fooled

    labels = torch.zeros(5, dtype=torch.int64)
    found = Square(steps=60)(answers, images, labels, threat_model, keep_last=True)
    assert not found.fooled.any()
    assert outside == 0, "no point may leave the ball by more than rounding, not even one that is only tried"
    assert (found.queries == 61).all()
    threat_model.verify(found.last, images)
    clean = 100 - images.flatten(1) @ weight
    assert (found.margin < clean).all(), "random search must come nearer to the boundary"


def test_l2_perturbations_use_the_whole_ball_where_the_box_lets_them() -> None:
    images = torch.full((6, 3, 9, 9), 0.5)
    found = Square(steps=40)(
        lambda x: torch.stack([1e4 + x.flatten(1).sum(1), torch.zeros(len(x))], 1),
        images,
        torch.zeros(6, dtype=torch.int64),
        ThreatModel("l2", 0.7),
        keep_last=True,
    )
    sizes = ThreatModel("l2", 0.7).size(found.last.double() - images.double())
    assert torch.allclose(sizes, torch.full((6,), 0.7, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("signed", [False, True], ids=["one sign", "both signs"])
def test_on_a_linear_model_it_reaches_the_corner_of_the_ball(signed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, generator=generator)
    weight = weight if signed else weight.abs()  # then the best corner is +eps everywhere: found by one square
    images = 0.3 + 0.3 * torch.rand(12, 1, 4, 4, generator=generator)
    best = LINF.eps * float(weight.abs().sum())
    for share, expected in ((0.9, True), (1.02, False)):
        gap = images.flatten(1) @ weight + share * best

        def model(points: Tensor, gap: Tensor = gap) -> Tensor:
            nearest = torch.cdist(points.flatten(1), images.flatten(1), p=float("inf")).argmin(1)
            return torch.stack([gap[nearest], points.flatten(1) @ weight], 1)

        found = Square(steps=800)(model, images, torch.zeros(12, dtype=torch.int64), LINF)
        assert bool(found.fooled.all()) == expected
        assert bool(found.fooled.any()) == expected


def test_gradients_are_never_asked_for(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task

    def spy(points: Tensor) -> Tensor:
        assert not points.requires_grad
        with torch.inference_mode():
            return model(points).clone()

    for tm in (LINF, L2):
        assert Square(steps=30)(spy, images[:4], labels[:4], tm).finished.all()


def test_an_untraceable_program_can_be_attacked(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    """As a file in a runtime: arrays in, arrays out, hard rounding inside."""
    model, images, labels = task

    def program(points: Tensor) -> Tensor:
        gray = torch.from_numpy((points.numpy() * 255).round() / 255)
        return torch.from_numpy(model(gray.float()).numpy().round(2))

    found = Square(steps=100)(program, images, labels, LINF)
    assert found.fooled.any()
    assert torch.equal(predict(program, found.adversarial).argmax(1) != labels, found.fooled)

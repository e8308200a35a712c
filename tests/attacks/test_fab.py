"""FAB: the projection against a slow twin, and what is known exactly of linear classifiers."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from coldforge.attacks import ThreatModel, parse_attack, predict
from coldforge.attacks.fab import FAB, project_linf
from coldforge.errors import AttackError

VALUES = st.floats(-3, 3, width=32).map(lambda v: 0.0 if abs(v) < 0.05 else v)
PIXELS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])


# --- the projection


def slow_projection(point: Tensor, weight: Tensor, rise: float) -> Tensor:
    """By bisection in float64."""
    uphill = weight * (-1 if rise < 0 else 1)
    room = torch.where(uphill > 0, 1 - point, point) * (uphill != 0)
    if float((uphill.abs() * room).sum()) <= abs(rise):
        return uphill.sign() * room
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if float((uphill.abs() * room.clamp_max(middle)).sum()) < abs(rise):
            low = middle
        else:
            high = middle
    return uphill.sign() * room.clamp_max(high)


@given(
    st.integers(1, 12).flatmap(lambda d: st.tuples(*[st.lists(s, min_size=d, max_size=d) for s in (PIXELS, VALUES)])),
    VALUES,
)
@example(([0.5, 0.5], [0.0, 0.0]), 1.0)  # no direction at all
@example(([0.0, 1.0], [-1.0, 1.0]), 0.5)  # no room: both pixels stand at the wall that they are pushed against
@example(([0.0, 1.0], [1.0, -1.0]), 0.5)
@example(([0.25, 0.5], [1.0, 2.0]), 99.0)  # out of reach
@example(([0.25, 0.5], [1.0, 2.0]), 1.75)  # just in reach: only at the corner of the box
@example(([0.9, 0.1, 0.5], [1.0, 1.0, 0.0]), 0.0)  # there already
def test_projection_equals_its_slow_twin(drawn: tuple[list[float], list[float]], rise: float) -> None:
    point, weight = (torch.tensor(values) for values in drawn)
    found = project_linf(point[None], weight[None], torch.tensor([rise]))[0]
    expected = slow_projection(point.double(), weight.double(), rise)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert (point + found).min() >= -1e-6
    assert (point + found).max() <= 1 + 1e-6


@pytest.mark.parametrize("spread", [0, 3], ids=["alike", "from 0.001 to 1000"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999, 1.001])
def test_projection_of_many_pixels_reaches_the_hyperplane(spread: float, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(20, 784, generator=generator) ** 2
    weights = torch.randn(20, 784, generator=generator)
    weights *= 10 ** (spread * (2 * torch.rand(20, 784, generator=generator) - 1))
    reachable = (weights.abs() * torch.where(weights > 0, 1 - points, points)).sum(1)
    steps = project_linf(points, weights, share * reachable)
    for point, weight, step, most in zip(points, weights, steps, reachable, strict=True):
        expected = slow_projection(point.double(), weight.double(), share * float(most))
        assert abs(float(step.abs().max() - expected.abs().max())) < 1e-3
        assert float(weight.double() @ step.double()) == pytest.approx(min(share, 1.0) * float(most), rel=1e-4)


def test_rows_do_not_disturb_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    points, weights = torch.rand(9, 50, generator=generator), torch.randn(9, 50, generator=generator)
    rise = torch.tensor([0.0, 0.1, -0.1, 5.0, -5.0, 1e9, torch.nan, 1.0, 2.0])
    together = project_linf(points, weights, rise)
    for row in range(9):
        alone = project_linf(points[row : row + 1], weights[row : row + 1], rise[row : row + 1])[0]
        assert torch.equal(together[row].nan_to_num(7), alone.nan_to_num(7))


# --- linear classifiers


class Linear(nn.Module):
    """Two classes; the gap is ``w x + b``. Remembers where it was asked."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        gap = x.flatten(1) @ self.weight + self.bias
        return torch.stack([torch.zeros_like(gap), gap], 1)


@pytest.mark.parametrize("slack", [1.02, 0.98])
def test_on_a_linear_classifier_success_is_what_geometry_says(slack: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, generator=generator)
    images = 0.4 + 0.2 * torch.rand(20, 1, 4, 4, generator=generator)
    gaps = images.flatten(1) @ weight
    for image, gap in zip(images, gaps, strict=True):
        model = Linear(weight, float(-gap - 0.3))  # every image has the gap -0.3: class 0
        distance = 0.3 / float(weight.abs().sum())
        tm = ThreatModel("linf", distance * slack)
        found = FAB(steps=20)(model, image[None], torch.zeros(1, dtype=torch.int64), tm)
        assert bool(found.fooled) == (slack > 1)


def test_the_smallest_perturbation_is_the_analytic_one_at_the_walls_of_the_box_too() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(36, generator=generator)
    for _ in range(8):
        image = (2 * torch.rand(1, 1, 6, 6, generator=generator) - 0.5).clamp(0, 1)  # half of it black or white
        model = Linear(weight, -float(image.flatten() @ weight) - 5.0)
        analytic = float(slow_projection(image.flatten().double(), weight.double(), 5.0).abs().max())
        assert analytic > 1.15 * 5.0 / float(weight.abs().sum()), "the box must be in the way"
        found = FAB(steps=30)(model, image, torch.zeros(1, dtype=torch.int64), ThreatModel("linf", analytic / 2))
        assert not found.fooled, "nothing that small exists"
        seen = torch.cat([points[:1] for points in model.asked])
        adversarial = seen[seen.flatten(1) @ weight + model.bias > 0]
        smallest = float((adversarial - image).flatten(1).abs().amax(1).min())
        assert analytic * (1 - 1e-5) <= smallest <= 1.01 * analytic


# --- networks


def test_pitfall_23_a_hit_outside_eps_does_not_count(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    small = ThreatModel("linf", 0.02)
    crossed = torch.zeros(len(images), dtype=torch.bool)

    def spy(points: Tensor) -> Tensor:
        logits: Tensor = model(points)
        distance, nearest = torch.cdist(points.detach().flatten(1), images.flatten(1), p=float("inf")).min(1)
        crossed[nearest[(logits.argmax(1) != labels[nearest]) & (distance > small.eps)]] = True
        return logits

    found = FAB(steps=10)(spy, images, labels, small)
    right = predict(model, images).argmax(1) == labels
    assert crossed[right].sum() > 100, "the search must have left the ball for the test to mean something"
    assert not (found.fooled & right).any()
    small.verify(found.adversarial, images)


def test_a_judge_with_another_boundary_is_fooled_too(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task

    def stricter(points: Tensor) -> Tensor:
        logits = predict(model, points)
        nearest = torch.cdist(points.flatten(1), images.flatten(1), p=float("inf")).argmin(1)
        logits[torch.arange(len(points)), labels[nearest]] += 0.5
        return logits.argmax(1)

    tm = ThreatModel("linf", 0.3)
    found = FAB(steps=30)(model, images[:40], labels[:40], tm, judge=stricter)
    assert found.fooled.float().mean() > 0.9
    assert (stricter(found.adversarial[found.fooled]) != labels[:40][found.fooled]).all()


def test_a_second_network_as_judge_is_fooled_too(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    shifted = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in shifted.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    both = (predict(model, images).argmax(1) == labels) & (predict(shifted, images).argmax(1) == labels)
    images, labels, tm = images[both], labels[both], ThreatModel("linf", 0.22)

    def judge(points: Tensor) -> Tensor:
        return predict(shifted, points).argmax(1)

    found = FAB(steps=30)(model, images, labels, tm, judge=judge)
    alone = FAB(steps=30)(model, images, labels, tm)
    replayed = alone.fooled & (judge(alone.adversarial) != labels)
    assert (judge(found.adversarial[found.fooled]) != labels[found.fooled]).all()
    tm.verify(found.adversarial, images)
    assert found.disputed.any(), "the judge must have contradicted for the test to mean something"
    assert found.fooled.sum() >= replayed.sum() + 10, "going on must beat replaying what fools the network"
    assert found.fooled.sum() >= 0.85 * alone.fooled.sum()


def test_a_judge_who_falls_before_the_network_is_asked_inside_the_ball() -> None:
    """The network's boundary is just outside the ball, the judge's just inside, and FAB steps back in between."""
    generator = torch.Generator().manual_seed(0)
    weight, tm = torch.randn(64, generator=generator), ThreatModel("linf", 0.05)
    image = 0.4 + 0.2 * torch.rand(1, 1, 8, 8, generator=generator)

    def boundary_at(distance: float, points: Tensor) -> Tensor:
        gap = (points - image).flatten(1) @ weight - distance * tm.eps * weight.abs().sum()
        return torch.stack([torch.zeros_like(gap), gap, gap - 500], 1)

    found = FAB(steps=20)(
        lambda x: boundary_at(1.02, x),
        image,
        torch.zeros(1, dtype=torch.int64),
        tm,
        judge=lambda x: boundary_at(0.9, x).argmax(1),
    )
    assert found.fooled.all()


def test_one_pixel_without_gradient_does_not_stop_the_search(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task

    def broken(x: Tensor) -> Tensor:
        logits: Tensor = model(x)
        return logits + 0 * x[:, 0, 0, :1].clamp_max(0).sqrt()  # the root's slope at 0 is infinite, times 0: NaN

    tm = ThreatModel("linf", 0.2)
    plain, found = (FAB(steps=20, n_targets=1)(network, images, labels, tm) for network in (model, broken))
    assert found.fooled.sum() >= plain.fooled.sum() - 3


def test_no_gradient_is_computed_where_it_would_not_be_used(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Two passes a step, one of them without; and the same result as where every pass has one."""
    model, images, labels = task
    seeing, blind = [], []

    def spy(x: Tensor) -> Tensor:
        (seeing if x.requires_grad else blind).append(len(x))
        return model(x)

    def uneven(x: Tensor) -> Tensor:  # rounds differently without gradients: must not be asked without
        return model(x) * (1.0 if x.requires_grad else 1.0 + 1e-6)

    fab = FAB(steps=30, n_targets=3)
    found, expected = (fab(each, images, labels, ThreatModel("linf", 0.2)) for each in (spy, uneven))
    assert 0.4 < len(blind) / (len(seeing) + len(blind)) < 0.6
    for what in ("fooled", "adversarial", "step", "restart", "queries", "margin", "finished", "disputed"):
        assert torch.equal(getattr(found, what), getattr(expected, what)), what


@pytest.mark.parametrize("threat_model", [ThreatModel("l2", 1.0), ThreatModel("linf", 0.1, box=False)])
@pytest.mark.parametrize("name", ["fab-t", "autoattack"])
def test_other_threat_models_are_refused(
    task: tuple[nn.Module, Tensor, Tensor], name: str, threat_model: ThreatModel
) -> None:
    model, images, labels = task
    with pytest.raises(AttackError, match=r"expected linf perturbations inside the box .* take apgd-ce"):
        parse_attack(name)(model, images, labels, threat_model)

"""FAB: the projection against a slow twin, and what is known exactly of linear classifiers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from coldforge.attacks import ThreatModel, parse_attack, predict
from coldforge.attacks.fab import FAB, project_linf
from coldforge.errors import AttackError

VALUES = st.floats(-3, 3, width=32).map(lambda v: 0.0 if abs(v) < 0.05 else v)
PIXELS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])


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


@settings(deadline=None)
@given(
    st.integers(1, 12).flatmap(lambda d: st.tuples(*[st.lists(s, min_size=d, max_size=d) for s in (PIXELS, VALUES)])),
    VALUES,
)
def test_projection_equals_its_slow_twin(drawn: tuple[list[float], list[float]], rise: float) -> None:
    point, weight = (torch.tensor(values) for values in drawn)
    found = project_linf(point[None], weight[None], torch.tensor([rise]))[0]
    expected = slow_projection(point.double(), weight.double(), rise)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert (point + found).min() >= -1e-6
    assert (point + found).max() <= 1 + 1e-6


class Linear(nn.Module):
    """Two classes; the gap is ``w x + b``."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
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


def test_pitfall_23_a_hit_outside_eps_does_not_count(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    small = ThreatModel("linf", 0.02)
    found = FAB(steps=10)(model, images, labels, small)
    right = predict(model, images).argmax(1) == labels
    assert found.margin[right].min() < 0, "the search must have left the ball for the test to mean something"
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


@pytest.mark.parametrize("threat_model", [ThreatModel("l2", 1.0), ThreatModel("linf", 0.1, box=False)])
@pytest.mark.parametrize("name", ["fab-t", "autoattack"])
def test_other_threat_models_are_refused(
    task: tuple[nn.Module, Tensor, Tensor], name: str, threat_model: ThreatModel
) -> None:
    model, images, labels = task
    with pytest.raises(AttackError, match=r"expected linf perturbations inside the box .* take apgd-ce"):
        parse_attack(name)(model, images, labels, threat_model)

"""Ball and box, for all inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coldforge.attacks import ThreatModel

models = st.builds(ThreatModel, st.sampled_from(["linf", "l2"]), st.floats(1e-3, 0.9), st.booleans())


def images(seed: int, spread: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(6, 2, 5, 5, generator=generator)
    clean[0], clean[1] = 0.0, 1.0
    return clean + spread * torch.randn(clean.shape, generator=generator)


@given(models, st.integers(0, 2**31), st.floats(0, 5))
def test_projection_lands_inside_and_is_idempotent(tm: ThreatModel, seed: int, spread: float) -> None:
    clean, points = images(seed), images(seed, spread)
    projected = tm.project(points, clean)
    tm.verify(projected, clean)
    torch.testing.assert_close(tm.project(projected, clean), projected, atol=2e-7, rtol=1e-6)


@given(models, st.integers(0, 2**31))
def test_points_already_inside_stay(tm: ThreatModel, seed: int) -> None:
    clean = images(seed)
    assert torch.equal(tm.project(clean, clean), clean)


@given(models, st.integers(0, 2**31))
def test_random_starts_are_inside_and_seeded(tm: ThreatModel, seed: int) -> None:
    clean = images(seed)
    start = tm.random_start(clean, torch.Generator().manual_seed(seed))
    tm.verify(start, clean)
    assert torch.equal(start, tm.random_start(clean, torch.Generator().manual_seed(seed)))
    assert not torch.equal(start, clean)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball(norm: str) -> None:
    tm = ThreatModel(norm, 0.3, box=False)  # type: ignore[arg-type]
    clean = torch.zeros(4000, 1, 1, 2)
    sizes = tm.size(tm.random_start(clean, torch.Generator().manual_seed(0)))
    assert 0.29 < sizes.max() <= 0.3 + 1e-6
    assert abs(float((sizes < 0.15).float().mean()) - 0.25) < 0.03  # a quarter of the area lies within half the radius


@given(models, st.integers(0, 2**31), st.floats(0, 0.5))
def test_8_bit_points_are_inside_and_for_linf_the_nearest(tm: ThreatModel, seed: int, spread: float) -> None:
    clean = (images(seed) * 255).round() / 255
    points = tm.project(images(seed, spread), clean)
    rounded = tm.rounded(points, clean)
    steps = rounded * 255
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert steps.min() >= 0
    assert steps.max() <= 255
    assert tm.contains(rounded, clean).all()
    assert torch.equal(tm.rounded(rounded, clean), rounded)
    distance = (rounded - points.clamp(0, 1)).abs()
    if tm.norm == "linf":  # slow twin: of all 256 levels, those inside the ball, the nearest
        levels = torch.arange(256) / 255
        apart = (points.clamp(0, 1)[..., None] - levels).abs()
        apart[(levels - clean[..., None]).abs() > tm.eps + 1e-6] = torch.inf
        torch.testing.assert_close(distance, apart.amin(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("short", [0.0, 2e-6, 1e-5])
def test_8_bit_points_are_inside_a_ball_that_ends_a_hair_before_a_level(norm: str, short: float) -> None:
    tm = ThreatModel(norm, 8 / 255 - short)  # type: ignore[arg-type]
    clean = torch.full((1, 1, 2, 2), 100 / 255)
    points = tm.project(clean + torch.tensor([1.0, -1.0, 0.0, 0.0]).view(1, 1, 2, 2), clean)
    rounded = tm.rounded(points, clean)
    assert tm.contains(rounded, clean).all()
    assert tm.size(rounded - clean) > 0.8 * tm.eps, "most of the perturbation is left"


@pytest.mark.parametrize(("side", "eps", "left"), [(32, 0.5, 0.9), (32, 0.25, 0.9), (224, 0.5, 0.5)])
def test_8_bit_points_in_l2_keep_most_of_small_perturbations(side: int, eps: float, left: float) -> None:
    """Where each pixel moves by less than half a level, rounding towards the clean one would leave nothing."""
    generator = torch.Generator().manual_seed(0)
    tm = ThreatModel("l2", eps)
    clean = torch.randint(0, 256, (2, 3, side, side), generator=generator) / 255
    points = tm.project(clean + torch.randn(clean.shape, generator=generator), clean)
    rounded = tm.rounded(points, clean)
    assert tm.contains(rounded, clean).all()
    along = ((rounded - clean) * (points - clean)).flatten(1).sum(1) / (points - clean).flatten(1).square().sum(1)
    assert along.min() > left


def test_8_bit_points_are_rounded_and_not_cut_off() -> None:
    tm = ThreatModel("linf", 8 / 255)
    clean = torch.full((1, 1, 1, 3), 100 / 255)
    points = torch.tensor([[[[107.6, 92.4, 107.99999]]]]) / 255
    assert (tm.rounded(points, clean) * 255).round().flatten().tolist() == [108, 92, 108]
    between = ThreatModel("linf", 0.1)  # 25.5 steps: the ball ends between two levels
    edges = clean + torch.tensor([0.1, -0.1, 0.0])
    assert (between.rounded(edges, clean) * 255).round().flatten().tolist() == [125, 75, 100]


@given(models, st.integers(0, 2**31), st.floats(1e-3, 1))
def test_a_step_has_its_length(tm: ThreatModel, seed: int, length: float) -> None:
    gradient = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(tm.size(tm.step(gradient, length)), torch.full((3,), length))

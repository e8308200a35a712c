"""The binarization test: what is planted is there, strong attacks find it, broken gradients and chance do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coldforge.attacks import ThreatModel
from coldforge.compress import quantize
from coldforge.evaluate.binarization import (
    INNER_POINTS,
    LEAST_FOUND,
    PIXELS_PER_FEATURE,
    RANDOM_POINTS,
    Binarization,
    _feature_source,
    _plant,
    binarization_check,
    binarization_test,
    surface_points,
)
from coldforge.recipe import QuantizeSpec

BALLS = [ThreatModel("linf", 0.1), ThreatModel("l2", 1.0)]


class Stopped(nn.Module):
    """The same network; gradients lead to one row of pixels only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(torch.cat([images[:, :, :1], images[:, :, 1:].detach()], 2))


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_the_attack_finds_what_is_planted_and_chance_does_not(ball, robust, data):
    found = binarization_test(robust, data.test[:40], ball)
    assert found.attempted == 40
    assert found.images >= 36
    assert found.found > 0.9
    assert found.found_at_random < 0.4
    assert found.layer == "network.7"
    assert found.features == min(32, 196 // PIXELS_PER_FEATURE)
    assert binarization_check(found).passed


def test_stopped_gradients_do_not_find_it(robust, data):
    found = binarization_test(Stopped(robust).eval(), data.test[:40], BALLS[0])
    assert found.images == 40
    assert found.found < LEAST_FOUND / 2
    said = binarization_check(found)
    assert not said.passed
    assert "what is certainly there is not found; the attack is too weak" in said.meaning


def test_a_quantized_network_is_hooked_too(robust, data):
    quantized = quantize(robust, QuantizeSpec(), data.train[:256])
    found = binarization_test(quantized, data.test[:30], BALLS[0], backwards=("pass_through", "clipped"))
    assert found.found > 0.9
    assert found.layer
    assert found.features == 32


def test_the_same_seed_gives_the_same_result(robust, data):
    first, again, other = (
        binarization_test(robust, data.test[:10], BALLS[0], seed=seed).found_at_random for seed in (0, 0, 1)
    )
    assert first == again
    assert 0 <= other <= 1


def test_heads_separate_the_planted_point_from_every_inner_one(robust, data):
    """The slow twin: draw the points again from the same generator, and ask each head about each of them."""
    ball, images = BALLS[0], data.test[:5]
    seen = []

    def features(points):
        seen.append(points.clone())
        return robust.network[:7](robust.normalize(points))

    heads = _plant(features, images, ball, torch.Generator().manual_seed(3), lambda fraction: None)
    assert heads.usable.all()
    for number, (image, points) in enumerate(zip(images, list(seen), strict=True)):
        assert len(points) == 1 + INNER_POINTS + 1 + RANDOM_POINTS
        assert torch.equal(points[0], image)
        assert ball.contains(points, image.expand_as(points)).all()
        inner, planted = points[: INNER_POINTS + 1], points[INNER_POINTS + 1 : INNER_POINTS + 2]
        assert ball.size(inner - image).max() < 0.951 * ball.eps
        assert ball.size(planted - image) > 0.999 * ball.eps
        with torch.no_grad():
            which = torch.tensor([number])
            assert (heads.score(features(planted), which) >= 0).all()
            assert (heads.score(features(inner), which.expand(len(inner))) < 0).all()


def test_planted_points_lie_on_the_surface():
    images = torch.full((6, 3, 8, 8), 0.5)
    for ball in BALLS:
        points = surface_points(images, ball, torch.Generator().manual_seed(0))
        assert torch.allclose(ball.size(points - images), torch.tensor(ball.eps), atol=1e-5)
        assert ball.contains(points, images).all()


def test_features_are_what_the_linear_layer_that_ran_last_reads():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(5, 3), nn.Linear(16, 5)  # defined in the other order

        def forward(self, images):
            return self.last(self.first(images.flatten(1)))

    network, image = Network(), torch.rand(1, 1, 4, 4)
    name, features = _feature_source(network, image)
    assert name == "last"
    assert torch.equal(features, network.first(image.flatten(1)))
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_without_a_linear_layer_the_logits_are_the_features():
    network = nn.Sequential(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.Conv2d(10, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = binarization_test(network.eval(), torch.rand(8, 1, 8, 8), BALLS[0])
    assert found.layer == "logits"
    assert found.features == 10
    assert found.found > 0.9


def test_many_features_are_projected():
    """With as many features as pixels a head would know the planted point alone, and no attack could find it."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 500), nn.ReLU(), nn.Linear(500, 4)).eval()
    found = binarization_test(network, torch.rand(20, 1, 8, 8) * 0.6 + 0.2, BALLS[0])
    assert found.features == 64 // PIXELS_PER_FEATURE
    assert found.found > 0.9


def test_where_nothing_can_be_planted_the_test_says_nothing():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 4)

        def forward(self, images):
            return self.linear(0 * images.flatten(1))

    found = binarization_test(Dead().eval(), torch.rand(6, 1, 4, 4), BALLS[0])
    assert (found.images, found.attempted) == (0, 6)
    said = binarization_check(found)
    assert said.passed
    assert said.meaning.startswith("not conclusive, so not counted (0 of 6 images could be used)")


@pytest.mark.parametrize(("found", "at_random", "passed"), [(0.76, 0.1, True), (0.74, 0.1, False), (0.1, 0.6, True)])
def test_thresholds(found, at_random, passed):
    assert binarization_check(Binarization(60, 64, found, at_random, 32, "logits")).passed is passed


class Unforeseen(nn.Module):
    """Beside its features, a code that jumps where no gradient says so, as activations of few bits do."""

    def __init__(self, weight: float, layer: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.seen = torch.randn(256, 32, generator=generator)
        self.unseen = torch.randn(256, 32, generator=generator)
        self.weight = weight
        self.last = nn.Linear(64, 3)
        self.layer = layer  # only there

    def forward(self, images):
        flat = images.flatten(1)
        codes = torch.round(3 * (flat @ self.unseen).detach())
        return self.last(torch.cat([flat @ self.seen, self.weight * codes], 1))


@pytest.mark.parametrize(
    ("weight", "bits", "closeness", "passed"),
    [
        (0.0, (4, 4), 0.999, True),
        (1.0, (4, 4), 0.5, True),
        (1.0, (8, 4), 0.5, True),
        (1.0, (4, 8), 0.999, False),
        (1.0, (8, 8), 0.999, False),
        (3.0, (4, 4), 0.999, False),
    ],
)
def test_few_bits_whose_grain_hides_the_last_part_of_the_way_are_tried_half_way(
    weight, bits, closeness, passed, robust, data
):
    layer = quantize(robust, QuantizeSpec(weight_bits=bits[0], activation_bits=bits[1]), data.train[:64])
    images = torch.rand(30, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    found = binarization_test(Unforeseen(weight, layer).eval(), images, BALLS[0])
    assert found.closeness == closeness
    said = binarization_check(found)
    assert said.passed is passed
    assert ("with the border half way to them (all of the way the attack found" in said.meaning) == (closeness == 0.5)

"""Muon: the orthogonal step against the SVD, what it leaves to SGD, and what it must not move."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coldforge.compress import QuantizedLayer
from coldforge.recipe import TrainSpec
from coldforge.train import train
from coldforge.train.muon import STRETCH, WIDE, Muon, macs_of_a_step, orthogonal
from coldforge.train.optimizer import filter_norms, follow, make_optimizer, turned


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.floats(1e-3, 1e3), st.integers(0, 999))
def test_orthogonal_is_near_the_polar_factor(rows, columns, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    k = min(rows, columns)
    u, _ = torch.linalg.qr(torch.randn(rows, k, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(columns, k, generator=generator))
    values = 10 ** torch.empty(k).uniform_(-2, 0, generator=generator)
    values[0] = 1
    found = orthogonal(scale * (u * values) @ v.T)
    assert found.shape == (rows, columns)
    turned = u.T @ found @ v  # diagonal if the singular vectors stayed
    diagonal = turned.diagonal()
    assert (turned - diagonal.diag()).abs().max() < 1e-3
    assert diagonal.min() > 0.5
    assert diagonal.max() < 1.3


def test_of_nothing_nothing():
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))
    assert torch.equal(orthogonal(torch.zeros(3, 5), dtype=torch.bfloat16), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(64, 100), (100, 64)])
def test_in_bfloat16_the_factor_is_as_orthogonal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact, found = orthogonal(matrix), orthogonal(matrix, dtype=torch.bfloat16)
    assert found.dtype == matrix.dtype
    assert 0 < (found - exact).norm() / exact.norm() < 0.03
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize(("filters", "same"), [(WIDE, False), (WIDE - 1, True)])
def test_only_large_matrices_are_made_orthogonal_in_bfloat16(filters, same):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(8, filters, 3), nn.Flatten(), nn.Linear(filters, 2))
    weight = layers[0].weight
    start, gradient, found = weight.detach().clone(), torch.randn_like(weight), []
    for precision in ("fp32", "bf16"):
        weight.data.copy_(start)
        weight.grad = gradient.clone()
        make_optimizer(layers, TrainSpec(optimizer="muon", lr=0.1), precision).step()
        found.append(weight.detach().clone())
    assert torch.equal(*found) == same
    assert torch.allclose(*found, atol=1e-2 * float(start.norm()) / start.numel() ** 0.5)


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)
    )


def stepped(layers, optimizer, times=3, weight_decay=0.0):
    spec = TrainSpec(optimizer=optimizer, lr=0.1, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    optimizer = make_optimizer(layers, spec)
    for index in range(times):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(index)
        for parameter in layers.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in layers.named_parameters()}


def test_the_last_layer_and_what_is_no_weight_is_left_to_sgd(layers):
    start = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    by_muon = stepped(layers, "muon", weight_decay=0.1)
    layers.load_state_dict(start)
    by_sgd = stepped(layers, "sgd", weight_decay=0.1)
    differ = {name for name in by_muon if not torch.equal(by_muon[name], by_sgd[name])}
    assert differ == {"0.weight", "3.weight"}
    assert len(by_muon) == 8
    for name in differ:  # whose norm stays, with any weight decay
        assert by_muon[name].norm() == pytest.approx(float(start[name].norm()), rel=1e-5)


def test_of_a_quantized_network_the_same_weights_turn(build):
    def shapes(network):
        return [weight.shape for weight in turned(network)]

    assert shapes(build("quantized")) == shapes(build("float"))
    network = build("float")
    weights = [p for p in network.parameters() if p.ndim > 1]
    assert len(turned(network)) == len(weights) - 1
    weights[0].requires_grad_(False)
    assert len(turned(network)) == len(weights) - 2


def test_a_step_turns_filters_by_lr_and_keeps_their_norm(layers):
    before = layers[0].weight.detach().clone()
    after = stepped(layers, "muon", times=1)["0.weight"]
    assert after.norm() == pytest.approx(float(before.norm()), rel=1e-5)
    assert (after - before).norm() / before.norm() == pytest.approx(0.1, rel=0.15)


def test_computed_and_shared_weights(layers):
    hidden, last = layers[3], layers[5]
    nn.utils.parametrizations.weight_norm(hidden)
    assert [weight is layers[0].weight for weight in turned(layers)] == [True]
    twice = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), last)
    twice[1].weight = twice[0].weight
    assert [weight is twice[0].weight for weight in turned(twice)] == [True]
    assert all(torch.isfinite(found).all() for found in stepped(layers, "muon").values())


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_a_gradient_does_not_matter(scale):
    torch.manual_seed(0)
    gradient, start = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    found = []
    for factor in (1.0, scale):
        weight = nn.Parameter(start.clone())
        weight.grad = gradient * factor
        Muon([{"params": [weight], "turns": True}], lr=0.1, momentum=0.9, nesterov=True).step()
        found.append(weight.detach())
    assert torch.allclose(*found, atol=1e-4)


def test_a_step_goes_downhill():
    torch.manual_seed(0)
    target = torch.randn(6, 2, 3, 3)
    weight = nn.Parameter(torch.randn(6, 2, 3, 3))
    optimizer = Muon([{"params": [weight], "turns": True}], lr=0.1, momentum=0.5, nesterov=True)
    cosines = []
    for _ in range(60):
        optimizer.zero_grad()
        cosine = nn.functional.cosine_similarity(weight.flatten(), target.flatten(), 0)
        (-cosine).backward()
        cosines.append(float(cosine.detach()))
        optimizer.step()
    assert cosines[0] < 0.3
    assert cosines[-1] > 0.9


def test_its_arithmetic_is_counted(build, splits, threat):
    network = build("float")
    each = macs_of_a_step(turned(network))
    shapes = [(len(p), p[0].numel()) for p in network.parameters() if p.ndim > 1][:-1]
    assert shapes
    by_hand = 0
    for rows, columns in shapes:
        short, long = min(rows, columns), max(rows, columns)
        square, cube, product = short * long * short, short**3, short * short * long
        by_hand += 5 * (square + cube + product)
    assert each == by_hand
    spec = {"epochs": 1, "batch_size": 33, "lr": 0.01}
    plain = train(network, splits, TrainSpec(**spec), threat).macs
    assert train(network, splits, TrainSpec(optimizer="muon", **spec), threat).macs == plain + 2 * each


def quantizer_of(network):
    return next(part for part in network.modules() if isinstance(part, QuantizedLayer))


@pytest.mark.parametrize("learned", [True, False])
def test_steps_follow_their_filters(build, learned):
    """Whatever a turn did to the norm of a filter, its codes stay."""
    network = build("quantized")
    for layer in (part for part in network.modules() if isinstance(part, QuantizedLayer)):
        layer.weight_step.requires_grad_(learned)
    layer, name = quantizer_of(network), next(iter(filter_norms(network)))
    factors = torch.logspace(-4, 2, len(layer.weight))
    codes, before, start = layer.weight_codes(), filter_norms(network), layer.weight_step.detach().clone()
    with torch.no_grad():
        layer.weight.mul_(factors.view(-1, 1, 1, 1))
    assert not torch.equal(layer.weight_codes(), codes)
    grown = follow(network, before)
    assert torch.equal(layer.weight_codes(), codes)
    assert torch.allclose(layer.weight_step, start * factors)
    assert torch.allclose(grown[name], factors)
    assert all(torch.equal(other, torch.ones_like(other)) for key, other in grown.items() if key != name)


def test_a_filter_of_zeros_keeps_its_step(build):
    network = build("quantized")
    layer = quantizer_of(network)
    with torch.no_grad():
        layer.weight[0] = 0
        before, start = filter_norms(network), layer.weight_step.detach().clone()
        layer.weight[0] = 1
    follow(network, before)
    assert torch.equal(layer.weight_step, start)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.floats(-6, 6), st.floats(-25, 6), st.integers(0, 999))
def test_steps_move_by_factors(n, size, scale, seed):
    """By the same ones, whatever their size and that of the gradient; against the gradient; and stay positive."""
    generator = torch.Generator().manual_seed(seed)
    start, gradient = torch.rand(n, generator=generator) + 0.1, torch.randn(n, generator=generator)
    found = []
    for unit, loss in ((1.0, 1.0), (10.0**size, 10.0**scale)):
        steps = nn.Parameter(start * unit)
        steps.grad = gradient * loss / unit
        Muon([{"params": [steps], "stretches": True}], lr=0.5, momentum=0.9, nesterov=True).step()
        found.append((steps.detach() / (start * unit)).log())
    assert torch.allclose(*found, atol=1e-5)
    assert found[0].square().mean().sqrt() == pytest.approx(0.5 * STRETCH, rel=1e-3)
    assert (found[0] * gradient <= 0).all()


def test_steps_without_a_gradient_stay():
    steps = nn.Parameter(torch.tensor([0.5, 2.0]))
    optimizer = Muon([{"params": [steps], "stretches": True}], lr=0.5, momentum=0.9)
    optimizer.step()
    steps.grad = torch.zeros(2)
    optimizer.step()
    assert torch.equal(steps.detach(), torch.tensor([0.5, 2.0]))


def test_filters_keep_their_codes_through_a_training(build, splits, threat):
    """8 bits are 8 bits afterwards, too: left to SGD, steps ended at the border of their range, and filters at 0."""
    network = build("quantized")
    spec = TrainSpec(epochs=4, batch_size=33, lr=0.1, optimizer="muon", objective="adversarial", attack="fgsm-rs")
    trained = train(network, splits, spec, threat).model
    for layer in (part for part in trained.modules() if isinstance(part, QuantizedLayer)):
        largest = (layer.weight.detach().flatten(1).abs().amax(1) / layer.weight_step.detach()).median()
        assert 0.5 * layer.qmax < largest < 2 * layer.qmax

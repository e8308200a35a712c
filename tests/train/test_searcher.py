"""The copy on which inner attacks search follows the network that is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.attacks import ThreatModel, loss_direction, parse_inner, perturb, predict
from coldforge.compress import quantize
from coldforge.data import from_arrays
from coldforge.models import normalized
from coldforge.models.zoo import resnet20
from coldforge.recipe import QuantizeSpec
from coldforge.train.searcher import Searcher

SHAPE = (3, 12, 12)
IMAGES = torch.rand(80, *SHAPE, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(80) % 10
SET = from_arrays(IMAGES, LABELS, IMAGES, LABELS, name="noise", validation=10).test


class Odd(nn.Module):
    """A BatchNorm without parameters, one in front, one behind a layer that others read, one behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.hidden, self.norm3, self.act = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.PReLU()
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(self.first(x))))
        y = self.conv2(x)
        x = F.relu(self.norm2(y)) + y
        return self.fc(self.act(self.norm3(self.hidden(x.mean((2, 3))))))


class Drawing(nn.Module):
    """Makes a tensor of its own in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)) + 5 * torch.randn(1, 8, 1, 1))
        return self.fc(x.mean((2, 3)))


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.fc((x if x.sum() > 0 else -x).mean((2, 3)))


def with_batchnorm(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return normalized(make(), [0.5] * 3, [0.25] * 3)


@torch.no_grad()
def move(network: nn.Module) -> None:
    """As training does: weights, then statistics of a batch; scales of both signs."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter += 0.3 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    network.train()
    network(IMAGES)
    network.eval()


@pytest.mark.parametrize("make", [resnet20, Odd])
def test_the_copy_follows(make: Callable[[], nn.Module]) -> None:
    network = with_batchnorm(make)
    searcher = Searcher(network, "fp32", SET)
    assert searcher.now() is not network
    torch.testing.assert_close(predict(searcher.now(), IMAGES), predict(network, IMAGES), rtol=1e-3, atol=1e-4)
    for _ in range(2):
        before = predict(network, IMAGES)
        move(network)
        expected = predict(network, IMAGES)
        assert (expected - before).abs().max() > 0.1
        torch.testing.assert_close(predict(searcher.now(), IMAGES), expected, rtol=1e-3, atol=1e-3)


def test_its_batchnorm_is_gone_and_it_needs_no_gradients() -> None:
    found = Searcher(with_batchnorm(resnet20), "bf16", SET).now()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in found.modules())
    assert not any(parameter.requires_grad for parameter in found.parameters())
    rough = predict(found, IMAGES)
    assert 0 < (rough - predict(with_batchnorm(resnet20), IMAGES)).abs().max() < 0.2


def test_inner_attacks_find_the_same() -> None:
    network = with_batchnorm(resnet20)
    searcher = Searcher(network, "fp32", SET)
    move(network)
    state = copy.deepcopy(network.state_dict())
    found = [
        perturb(
            where, IMAGES, lambda logits: loss_direction(logits, LABELS, "ce"), ThreatModel("linf", 8 / 255),
            parse_inner("fgsm-rs"), torch.Generator().manual_seed(0),
        )
        for where in (network, searcher.now())
    ]  # fmt: skip
    assert float((found[0] == found[1]).float().mean()) > 0.99
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("make", [Drawing, Branching, lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 10))])
def test_other_networks_are_searched_on_themselves(make: Callable[[], nn.Module]) -> None:
    network = with_batchnorm(make)
    assert Searcher(network, "fp32", SET).now() is network


def test_rounded_networks_are_searched_on_themselves_and_so_are_those_without_an_attack() -> None:
    network = with_batchnorm(resnet20)
    assert Searcher(network, "bf16", None).now() is network
    rounded = quantize(network.eval(), QuantizeSpec(weight_bits=4, activation_bits=4), IMAGES, keep_batchnorm=True)
    assert Searcher(rounded, "bf16", SET).now() is rounded

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coldforge.errors import ModelError
from coldforge.models import check_classifier, cnn8, normalized, resnet20
from coldforge.models.checks import refuse_probabilities

SHAPE = (1, 8, 8)


class Head(nn.Module):
    """Logits (N, K), then whatever ``after`` makes of them."""

    def __init__(self, after: Callable[[Tensor], Any] = lambda logits: logits, classes: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(64, classes)
        self.after = after

    def forward(self, inputs: Tensor) -> Any:
        return self.after(self.linear(inputs.flatten(1)))


def poisoned(kind: str) -> nn.Module:
    network = nn.Sequential(nn.BatchNorm2d(1), Head())
    with torch.no_grad():
        tensor = network[1].linear.weight if kind == "weight" else network[0].running_var
        tensor.view(-1)[0] = float("nan")
    return network


def test_good_classifiers_pass() -> None:
    check_classifier(Head(), SHAPE, 5)
    check_classifier(normalized(resnet20(3, 5), [0.5] * 3, [0.2] * 3), (3, 32, 32), 5)
    check_classifier(Head(lambda logits: logits.log_softmax(1)), SHAPE, 5)  # log-probabilities are logits
    check_classifier(Head(lambda logits: logits.abs()), SHAPE, 5)
    check_classifier(Head(lambda logits: logits.bfloat16()), SHAPE, 5)


def test_nothing_is_changed() -> None:
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), Head())
    network[0].eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    check_classifier(network, SHAPE, 5)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert [module.training for module in (network, network[0], network[1])] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            Head(lambda logits: logits.softmax(1)),
            "the network returns probabilities; expected logits; remove the softmax",
        ),
        (Head(classes=7), "expected 5 classes, as the data have, got logits for 7"),
        (
            Head(lambda logits: logits[:, :, None]),
            "expected logits as floating point (N, 5), got torch.float32 ('N', 5, 1)",
        ),
        (Head(lambda logits: logits.mean(0)), "expected logits as floating point (N, 5)"),
        (Head(lambda logits: logits.argmax(1)), "got torch.int64"),
        (Head(lambda logits: (logits, logits)), "expected logits as one tensor (N, 5), got tuple"),
        (Head(lambda logits: logits / 0), "expected finite logits, got NaN or infinity"),
        (poisoned("weight"), "expected finite weights, found NaN or infinity in '1.linear.weight'"),
        (poisoned("buffer"), "found NaN or infinity in '0.running_var'"),
        (
            nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()),
            "the network expects images with 3 channels, got images with 1",
        ),
        (cnn8(1, 5, 28), "does not fit images of 8x8 pixels: a linear layer expects 2048 features, got 128"),
        (normalized(Head(), [0.5] * 3, [0.2] * 3), "normalize: expected mean and std of 1 channels"),
        (nn.Sequential(nn.BatchNorm1d(4)), "the network cannot take images of (C, H, W) = (1, 8, 8)"),
    ],
)
def test_bad_classifiers(network: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        check_classifier(network, SHAPE, 5)


def test_one_mean_for_three_channels_is_refused() -> None:
    with pytest.raises(ModelError, match="expected mean and std of 3 channels, as the images have, got 1"):
        check_classifier(normalized(resnet20(3, 5), [0.5], [0.2]), (3, 32, 32), 5)


def test_modes_come_back_after_an_error() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())
    with pytest.raises(ModelError):
        check_classifier(network, SHAPE, 5)
    assert network[0].training


@pytest.mark.parametrize("classes", [2, 10])
def test_a_dead_network_returns_no_probabilities(classes: int) -> None:
    """Its logits hardly move, so neither does their sum."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.rand(classes, generator=generator)
    for size in (1e-2, 1e-4, 1e-6, 0.0):
        logits = ends + size * torch.rand(64, classes, generator=generator)
        refuse_probabilities(logits)
        refuse_probabilities(torch.stack([0.1 + size * torch.rand(64, generator=generator), torch.zeros(64)], 1))
    soft = (10 * torch.rand(64, classes, generator=generator)).softmax(1)
    for probabilities in (soft, 1e-4 * soft, soft.half().float(), torch.eye(classes)[torch.arange(64) % classes]):
        with pytest.raises(ModelError, match="returns probabilities"):
            refuse_probabilities(probabilities)
    refuse_probabilities(soft[:1])


def test_probabilities_of_a_sigmoid_are_refused_and_logits_between_0_and_1_are_not() -> None:
    logits = 4 * torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    for answers in (logits.sigmoid(), logits.sigmoid().half().float(), (logits > 0).float()):
        with pytest.raises(ModelError, match="as after a sigmoid; expected logits; remove the sigmoid"):
            refuse_probabilities(answers)
    near_the_middle = (0.2 * logits).sigmoid()
    assert near_the_middle.max() - near_the_middle.min() < 0.9
    for answers in (logits, logits.relu(), near_the_middle, logits.tanh(), 2 * logits.sigmoid()):
        refuse_probabilities(answers)

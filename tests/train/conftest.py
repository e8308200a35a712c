"""Small networks of every kind that the loop trains, and two data sets on which training is told from not training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from coldforge.attacks import ThreatModel
from coldforge.compress import quantize
from coldforge.data import DataSplits, from_arrays
from coldforge.models import normalized
from coldforge.recipe import QuantizeSpec


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def threat() -> ThreatModel:
    return ThreatModel("linf", 0.1)


@pytest.fixture(scope="session")
def splits() -> DataSplits:
    """Three classes of patterns (1, 8, 8) with noise: 66 train, 30 validation, 30 test."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(3, 1, 8, 8, generator=generator).round() * 0.6 + 0.2

    def part(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(3, (n,), generator=generator)
        noise = 0.15 * torch.randn(n, 1, 8, 8, generator=generator)
        return (patterns[labels] + noise).clamp(0, 1), labels

    return from_arrays(*part(96), *part(30), validation=30)


@pytest.fixture(scope="session")
def tempting() -> DataSplits:
    """Two classes: nine strong pixels that are right nine times in ten, and 48 weak ones that are right together but
    are worth less than eps = 0.1 each (Tsipras et al. 2019, section 2.1). Natural training falls for the weak ones.
    """
    generator = torch.Generator().manual_seed(1)

    def part(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(2, (n,), generator=generator)
        sign = labels.float() * 2 - 1
        honest = torch.where(torch.rand(n, generator=generator) < 0.9, sign, -sign)
        images = 0.5 + 0.04 * sign.view(-1, 1, 1, 1) + 0.08 * torch.randn(n, 1, 8, 8, generator=generator)
        images[:, :, 2:5, 2:5] = 0.5 + 0.3 * honest.view(-1, 1, 1, 1)
        return images.clamp(0, 1), labels

    return from_arrays(*part(600), *part(120), validation=120)


def _float() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 3),
    )


def _batchnorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 3),
    )


@pytest.fixture(scope="session")
def build(splits: DataSplits) -> Callable[[str], nn.Module]:
    """A fresh network: "float", "batchnorm" or "quantized"; the same weights each time."""

    def build_network(kind: str) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = _batchnorm() if kind == "batchnorm" else _float()
            for layer in network:
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(layer.weight)  # so that different images get different answers
        network = normalized(network, splits.mean, splits.std).eval()
        if kind == "quantized":
            return quantize(network, QuantizeSpec(weight_bits=4, activation_bits=4), splits.train.pixels())
        return network

    return build_network

"""Small networks, really trained: on the embedded Fashion-MNIST images, pooled to 14x14 and kept at 8 bits."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.attacks import ThreatModel, loss_direction, parse_inner, perturb
from coldforge.compress import attacking
from coldforge.data import load_data
from coldforge.models import normalized

EPS = 0.1


@dataclass(frozen=True)
class Pooled:
    """(N, 1, 14, 14) in [0, 1], multiples of 1/255; labels (N,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ball() -> ThreatModel:
    return ThreatModel("linf", EPS)


@pytest.fixture(scope="session")
def data() -> Pooled:
    splits = load_data()
    train, test = ((F.avg_pool2d(part.pixels(), 2) * 255).round() / 255 for part in (splits.train, splits.test))
    return Pooled(train, splits.train.labels, test[:84], splits.test.labels[:84])  # some 64 are right: one tile


@pytest.fixture(scope="session")
def fresh() -> Callable[..., nn.Module]:
    """Builds an untrained network."""

    def build(activation: Callable[[], nn.Module] = nn.ReLU, *, norm: bool = False, channels: int = 1) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers: list[nn.Module] = []
            for i, (into, out) in enumerate(((channels, 8), (8, 16))):
                layers.append(nn.Conv2d(into, out, 4 - i, stride=2, padding=1))
                layers += [nn.BatchNorm2d(out)] if norm else []
                layers.append(activation())
            layers += [nn.Flatten(), nn.Linear(256, 32), activation(), nn.Linear(32, 10)]
            network = nn.Sequential(*layers)
        return normalized(network, (0.286,), (0.32,)) if channels == 1 else network

    return build


@pytest.fixture(scope="session")
def fit(data: Pooled) -> Callable[..., nn.Module]:
    """Trains a copy: SGD with a warm-up and a linear decay; adversarially with ``inner``."""

    def train(
        network: nn.Module,
        *,
        epochs: int,
        inner: str = "",
        lr: float = 0.05,
        temperature: float = 1.0,
        targets: Tensor | None = None,
    ) -> nn.Module:
        network = copy.deepcopy(network)
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        batches = len(data.train) // 128
        wanted = data.train_labels if targets is None else targets
        for epoch in range(epochs):
            for i, batch in enumerate(torch.randperm(len(data.train), generator=generator).split(128)[:batches]):
                images, done = data.train[batch], (epoch + i / batches) / epochs
                optimizer.param_groups[0]["lr"] = lr * min(1.0, 5 * done + 0.05, 1.25 * (1 - done))
                if inner:
                    ball = ThreatModel("linf", EPS * min(1.0, 2 * done + 0.2))
                    with attacking(network, ("pass_through", "clipped")[i % 2]):
                        labels = data.train_labels[batch]
                        ascend = functools.partial(loss_direction, labels=labels, loss="ce")
                        images = perturb(network, images, ascend, ball, parse_inner(inner), generator)
                network.train()
                loss = F.cross_entropy(network(images) / temperature, wanted[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 5.0)
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return network.eval()

    return train


@pytest.fixture(scope="session")
def natural(fresh, fit) -> nn.Module:
    return fit(fresh(), epochs=3)


@pytest.fixture(scope="session")
def robust(fresh, fit) -> nn.Module:
    return fit(fresh(), epochs=6, inner="pgd-2")

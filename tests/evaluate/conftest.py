"""A small network that is right on most images and fooled on some of them: every row of a ledger occurs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coldforge.attacks import ThreatModel
from coldforge.data import ImageSet


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def threat() -> ThreatModel:
    return ThreatModel("linf", 0.06)


@pytest.fixture(scope="session")
def task() -> tuple[nn.Module, ImageSet]:
    """(network with BatchNorm, trained a little; 40 images (1, 8, 8) of 4 classes)."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(4, 1, 8, 8, generator=generator)
    labels = torch.randint(4, (340,), generator=generator)
    images = (0.5 * patterns[labels] + 0.4 * torch.rand(340, 1, 8, 8, generator=generator)).clamp(0, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
        )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(images[:300]), labels[:300])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    pixels = (images[300:] * 255).round().to(torch.uint8)
    return model.eval(), ImageSet(pixels, labels[300:], ("a", "b", "c", "d"))

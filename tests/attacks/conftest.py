"""A small network that was really trained, and images it gets right: enough for every attack to show its work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(scope="session")
def task() -> tuple[nn.Module, Tensor, Tensor]:
    """(network with BatchNorm in evaluation mode, 150 images (1, 8, 8) with many black pixels, labels)."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(4, 1, 8, 8, generator=generator) * (torch.rand(4, 1, 8, 8, generator=generator) > 0.5)
    labels = torch.randint(4, (150,), generator=generator)
    noise = 0.25 * torch.randn(150, 1, 8, 8, generator=generator) * (patterns[labels] > 0)
    images = (patterns[labels] + noise).clamp(0, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 4),
        )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    assert (model(images).argmax(1) == labels).float().mean() > 0.95
    return model, images, labels

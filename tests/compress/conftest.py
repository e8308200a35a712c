"""Small networks with every structure that compression must understand. All take (N, 3, 8, 8) and return 10 logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

IMAGE_SHAPE = (3, 8, 8)


class Residual(nn.Module):
    """Two blocks with identity and projection shortcuts, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv1 = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.project = nn.Conv2d(16, 32, 1, stride=2)
        self.fc = nn.Linear(32, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.stem(inputs)
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        x = torch.relu(self.conv3(x) + self.project(x))
        return self.fc(x.mean((2, 3)))


class Concatenation(nn.Module):
    """Two branches of different width, joined, then flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 16, 3, padding=1)
        self.right = nn.Conv2d(3, 24, 1)
        self.join = nn.Conv2d(40, 16, 3, stride=2, padding=1)
        self.hidden = nn.Linear(16 * 16, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        x = torch.cat([torch.relu(self.left(inputs)), torch.relu(self.right(inputs))], 1)
        x = torch.relu(self.join(x)).flatten(1)
        return self.fc(torch.relu(self.hidden(x)))


def plain() -> nn.Module:
    """Convolutions without BatchNorm, flattened into a hidden linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )


def separable() -> nn.Module:
    """Depthwise-separable, as in MobileNet."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def grouped() -> nn.Module:
    """A grouped convolution between two dense ones, as in ResNeXt."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(32, 16, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def fully_convolutional() -> nn.Module:
    """The classifier is a convolution."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "residual": Residual,
    "concatenation": Concatenation,
    "separable": separable,
    "grouped": grouped,
    "fully_convolutional": fully_convolutional,
}


def _wake(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def wake() -> Callable[..., nn.Module]:
    """A function that sets random weights and BatchNorm statistics, as if trained; evaluation mode."""
    return _wake


@pytest.fixture(scope="session")
def build() -> Callable[..., nn.Module]:
    """A function from the name of a small network and a seed to that network, awake."""

    def build_network(name: str, seed: int = 0) -> nn.Module:
        return _wake(NETWORKS[name](), seed)

    return build_network


@pytest.fixture(params=sorted(NETWORKS))
def network_name(request: pytest.FixtureRequest) -> str:
    """Each of the small networks in turn."""
    return str(request.param)


@pytest.fixture
def images() -> Tensor:
    """Eight random images. # (8, 3, 8, 8)"""
    return torch.rand((8, *IMAGE_SHAPE), generator=torch.Generator().manual_seed(1))

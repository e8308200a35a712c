"""Small quantized networks and the files made from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coldforge.compress import quantize
from coldforge.deploy.onnx import export_onnx
from coldforge.models import normalized
from coldforge.recipe import QuantizeSpec

SIDE, CHANNELS = 10, 2
CLASSES = ("shirt", "trouser", "Bär")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def some_images(n: int, seed: int = 0, channels: int = CHANNELS, side: int = SIDE) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def images() -> Tensor:
    """(64, 2, 10, 10)"""
    return some_images(64)


@pytest.fixture(scope="session")
def plain_network() -> Callable[..., nn.Module]:
    """Factory: convolutions of the given widths and strides, ReLU, two linear layers; normalization first."""

    def make(widths: Sequence[int] = (8, 12), strides: Sequence[int] = (1, 2), seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        channels, side = CHANNELS, SIDE
        for width, stride in zip(widths, strides, strict=True):
            layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.ReLU()]
            channels, side = width, -(-side // stride)
        layers += [nn.Flatten(), nn.Linear(channels * side * side, 16), nn.ReLU(), nn.Linear(16, len(CLASSES))]
        return normalized(nn.Sequential(*layers), [0.5, 0.4], [0.2, 0.3]).eval()

    return make


@pytest.fixture(scope="session")
def quantized(images: Tensor) -> Callable[..., nn.Module]:
    """Factory: a calibrated fake-quantized copy of a network."""

    def make(
        model: nn.Module,
        *,
        bits: int = 8,
        activation_bits: int | None = None,
        edge_bits: int = 8,
        ternary: bool = False,
    ) -> nn.Module:
        spec = QuantizeSpec(
            weight_bits=bits, activation_bits=activation_bits or bits, edge_bits=edge_bits, ternary=ternary
        )
        return quantize(model, spec, images)

    return make


@dataclass(frozen=True)
class Exported:
    twin: nn.Module
    path: Path


@pytest.fixture(scope="session")
def int8(
    plain_network: Callable[..., nn.Module],
    quantized: Callable[..., nn.Module],
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    """An int8 network and its file; read only."""
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    twin = quantized(plain_network())
    export_onnx(twin, path, image_shape=(CHANNELS, SIDE, SIDE), classes=CLASSES, metadata={"box": "[0, 1]"})
    return Exported(twin, path)


@pytest.fixture(scope="session")
def float32(plain_network: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A float network and its file; read only."""
    path = tmp_path_factory.mktemp("float32") / "model.onnx"
    model = plain_network()
    export_onnx(model, path, image_shape=(CHANNELS, SIDE, SIDE), classes=CLASSES)
    return Exported(model, path)

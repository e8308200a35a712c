"""From a float network over training through the rounding to the file: it must answer what the twin answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.compress.quantize import quantize
from coldforge.deploy import OnnxSession, export_onnx
from coldforge.models import normalized
from coldforge.recipe import QuantizeSpec

SHAPE = (3, 8, 8)
N = 2000


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """8-bit images of ten kinds, which differ in colour, (N, 3, 8, 8) in [0, 1]; and their kinds."""
    colours = torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=generator)
    images = 0.7 * colours[labels] + 0.3 * torch.rand(n, *SHAPE, generator=generator)
    return images.mul(255).round() / 255, labels


def train_a_little(network: nn.Module, steps: int = 30) -> None:
    images, labels = pictures(64 * steps, seed=1)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    network.train()
    for batch, kinds in zip(images.split(64), labels.split(64), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(network(batch), kinds).backward()
        optimizer.step()
    network.eval()


@pytest.mark.parametrize(
    ("name", "weight_bits", "activation_bits"),
    [
        ("residual", 8, 8),
        ("concatenation", 8, 8),
        ("separable", 4, 4),
        ("residual", 4, 4),
        ("plain", 2, 4),
        ("concatenation", 2, 4),
    ],
)
def test_the_file_answers_what_its_twin_answers(
    build: Callable[..., nn.Module], tmp_path: Path, name: str, weight_bits: int, activation_bits: int
) -> None:
    """Logits within 1e-4 for 99 % of the images, labels on 99.5 %: the rest may have a value that lies, up to the
    order of adding, midway between two codes.
    """
    model = normalized(build(name, seed=weight_bits), [0.45, 0.5, 0.4], [0.25, 0.2, 0.3])
    train_a_little(model)
    spec = QuantizeSpec(weight_bits=weight_bits, activation_bits=activation_bits)  # type: ignore[arg-type]
    twin = quantize(model, spec, pictures(128, seed=2)[0])
    train_a_little(twin)
    path = tmp_path / "model.onnx"
    export_onnx(twin, path, image_shape=SHAPE, classes=tuple("abcdefghij"))
    anything = torch.rand(N // 2, *SHAPE, generator=torch.Generator().manual_seed(4))  # not 8-bit pixels
    images = torch.cat([pictures(N // 2, seed=3)[0], anything])
    with torch.no_grad():
        expected = twin(images)
    session = OnnxSession(path, threads=1)
    found = session.logits(images)
    assert session.uses_integer_kernels(), session.operators()
    assert len(expected.argmax(1).unique()) > 3  # equal labels mean something
    apart = (found - expected).abs().amax(1) / expected.abs().amax(1)
    assert float((apart < 1e-4).float().mean()) >= 0.99
    assert float((found.argmax(1) == expected.argmax(1)).float().mean()) >= 0.995

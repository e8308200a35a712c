from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from coldforge.errors import UsageError
from coldforge.measure.cost import count_macs, count_params, packed_bytes


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.down = nn.Conv2d(8, 12, (1, 3), stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.norm(self.stem(inputs)).relu()
        x = self.down(x + self.body(x))
        return self.head(x.mean((2, 3)))


def macs_by_hooks(module: nn.Module, image_shape: tuple[int, ...]) -> int:
    """The slow, obvious twin: output elements times the multiply-adds of each, layer by layer."""
    total = 0

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += (
                output.numel() * (layer.in_channels // layer.groups) * layer.weight.shape[2] * layer.weight.shape[3]
            )
        elif isinstance(layer, nn.Linear):
            total += output.numel() * layer.in_features

    network = copy.deepcopy(module).eval()
    for layer in network.modules():
        layer.register_forward_hook(hook)
    with torch.no_grad():
        network(torch.zeros(1, *image_shape))
    return total


@pytest.mark.parametrize("image_shape", [(3, 8, 8), (3, 13, 7)])
def test_macs_equal_the_slow_twin(image_shape: tuple[int, ...]) -> None:
    assert count_macs(Residual(), image_shape) == macs_by_hooks(Residual(), image_shape) > 0


def test_macs_of_one_convolution_by_hand() -> None:
    assert count_macs(nn.Conv2d(2, 4, 3, padding=1), (2, 5, 5)) == 5 * 5 * 4 * 2 * 9


class Patches(nn.Module):
    """A convolution, and attention among its 16 places."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Conv2d(3, 32, 2, stride=2), attention, nn.Linear(32, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.embed(inputs).flatten(2).transpose(1, 2)  # (N, 16, 32)
        x = self.attention(x, x, x)[0] if isinstance(self.attention, nn.MultiheadAttention) else self.attention(x)
        return self.head(x.mean(1))


def test_attention_is_counted() -> None:
    """Its fused kernels hide from the counter."""
    rest = 16 * 32 * 3 * 4 + 32 * 5
    attention = 16 * 32 * (3 * 32) + 2 * 16 * 16 * 32 + 16 * 32 * 32
    assert count_macs(Patches(nn.MultiheadAttention(32, 4, batch_first=True)), (3, 8, 8)) == rest + attention
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)
    assert count_macs(Patches(layer), (3, 8, 8)) == rest + attention + 2 * 16 * 32 * 64
    assert torch.backends.mha.get_fastpath_enabled()


def test_counting_macs_leaves_the_module_alone() -> None:
    model = Residual().train()
    before = copy.deepcopy(model.state_dict())
    count_macs(model, (3, 8, 8))
    assert model.training
    assert model.norm.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(28, 28), (0, 28, 28)])
def test_macs_want_a_channels_height_width_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"expected \(channels, height, width\), got \("):
        count_macs(nn.Identity(), shape)


def test_params_count_frozen_ones_but_no_buffers() -> None:
    model = Residual()
    expected = 3 * 8 * 9 + 2 * 8 + 8 * 2 * 9 + 8 + 8 * 12 * 3 + 12 + 12 * 5 + 5
    assert count_params(model) == expected
    model.stem.requires_grad_(False)
    assert count_params(model) == expected


def test_params_count_a_shared_tensor_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert count_params(nn.Sequential(first, second)) == 16


def test_packed_bytes_pad_each_tensor_to_a_byte() -> None:
    assert packed_bytes([]) == 0
    assert packed_bytes([(3, 8)]) == 3
    assert packed_bytes([(3, 3), (3, 3)]) == 4
    assert packed_bytes([(5, 4), (2, 32)]) == 11
    with pytest.raises(UsageError, match=r"got \(4, 0\)"):
        packed_bytes([(4, 0)])

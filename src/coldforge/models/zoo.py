"""Small image classifiers, without normalization (see :mod:`coldforge.models.normalize`).

All are traceable by ``torch.fx``, use one ReLU module per use, and add residuals as ``out + shortcut``, so that
pruning and quantization see every operation as a layer of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

NetworkT = TypeVar("NetworkT", bound=nn.Module)
ImageSize = int | tuple[int, int]
"""Side of a square image, or (H, W); pixels."""


def cnn8(in_channels: int = 1, num_classes: int = 10, image_size: ImageSize = 28) -> nn.Sequential:
    """The 8-layer network of Thorsteinsson et al. (arXiv 2403.09441): 0.55 M parameters at 1x28x28.

    Six 3x3 convolutions, 32-32-64-64-128-128 channels, padding 1, stride 2 on every second; two linear layers,
    128 and K. ReLU after all but the last; no BatchNorm.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    layers = OrderedDict[str, nn.Module]()
    channels = in_channels
    for i, out in enumerate((32, 32, 64, 64, 128, 128), start=1):
        stride = 2 if i % 2 == 0 else 1
        layers[f"conv{i}"] = nn.Conv2d(channels, out, 3, stride=stride, padding=1)
        layers[f"relu{i}"] = nn.ReLU()
        height, width, channels = -(-height // stride), -(-width // stride), out
    layers["flatten"] = nn.Flatten()
    layers["linear1"] = nn.Linear(channels * height * width, 128)
    layers["relu7"] = nn.ReLU()
    layers["linear2"] = nn.Linear(128, num_classes)
    return _initialize(nn.Sequential(layers), output="linear2")


def resnet20(in_channels: int = 3, num_classes: int = 10, image_size: ImageSize = 32) -> ResNet:
    """The ResNet-20 of He et al. 2015 (arXiv 1512.03385, section 4.2), option A shortcuts: 0.27 M parameters.

    Names of modules and parameters are those of github.com/akamaster/pytorch_resnet_cifar10, whose checkpoints load
    with ``key_prefix="module."``.
    """
    del image_size  # any: global average pooling
    return ResNet(in_channels, num_classes, widths=(16, 32, 64), blocks=3, downsample=_option_a)


def resnet18(in_channels: int = 3, num_classes: int = 10, image_size: ImageSize = 32) -> ResNet:
    """ResNet-18 for 32x32 images: 3x3 stem, no max-pooling, 64-128-256-512 channels, projection shortcuts: 11.2 M."""
    del image_size  # any: global average pooling
    return ResNet(in_channels, num_classes, widths=(64, 128, 256, 512), blocks=2, downsample=_projection)


ZOO: dict[str, Callable[..., nn.Module]] = {"cnn8": cnn8, "resnet20": resnet20, "resnet18": resnet18}
"""Factories by name; each takes ``in_channels``, ``num_classes`` and ``image_size``."""


class OptionAShortcut(nn.Conv2d):
    """Option A of He et al. 2015: every second pixel, new channels zero, half of them on each side.

    Written as a 1x1 convolution of stride 2 whose weight is the fixed 0/1 matrix of the padding: it computes exactly
    option A (a product with 0 or 1 is exact), can be pruned like any convolution, and runs as an integer one.
    The weight never requires gradients, not even after a pruning library has replaced it, and checkpoints of other
    people need not hold it.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, stride=2, bias=False)
        offset = (out_channels - in_channels) // 2
        with torch.no_grad():
            self.weight.zero_()
            self.weight[offset : offset + in_channels, :, 0, 0] = torch.eye(in_channels)

    def reset_parameters(self) -> None:
        """Keep the weight: it is fixed, also where a network is initialized again."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, frozen."""
        if param is not None:
            param.requires_grad_(False)
        super().register_parameter(name, param)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut
        self.relu2 = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(inputs)))))
        shortcut = self.shortcut(inputs)
        result: Tensor = self.relu2(out + shortcut)
        return result


class ResNet(nn.Module):
    """A ResNet for small images: 3x3 stem, groups of basic blocks (stride 2 from the second on), global pooling.

    Args:
        in_channels: C of the images.
        num_classes: K.
        widths: channels of each group.
        blocks: blocks per group.
        downsample: builds the shortcut of a block that changes the shape, from its old and new width.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        widths: Sequence[int],
        blocks: int,
        downsample: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.groups = tuple(f"layer{i}" for i in range(1, len(widths) + 1))
        channels = widths[0]
        for name, width in zip(self.groups, widths, strict=True):
            stride = 1 if name == "layer1" else 2
            first = BasicBlock(channels, width, stride, nn.Identity() if stride == 1 else downsample(channels, width))
            rest = [BasicBlock(width, width, 1, nn.Identity()) for _ in range(blocks - 1)]
            self.add_module(name, nn.Sequential(first, *rest))
            channels = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels, num_classes)
        _initialize(self, output="linear")

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, K)."""
        out = self.relu(self.bn1(self.conv1(inputs)))
        for name in self.groups:
            out = self.get_submodule(name)(out)
        logits: Tensor = self.linear(self.flatten(self.pool(out)))
        return logits


def _option_a(in_channels: int, out_channels: int) -> nn.Module:
    return OptionAShortcut(in_channels, out_channels)


def _projection(in_channels: int, out_channels: int) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def _initialize(network: NetworkT, *, output: str) -> NetworkT:
    """Normal with fan-in (He et al. 2015, arXiv 1502.01852); no ReLU gain on the output layer; biases 0."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not isinstance(layer, OptionAShortcut):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if name == output else "relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network

"""How many times faster than a plain loop could anybody be here?

    python benchmarks/limits.py [--only cnn8 "training step"] [--seconds 2]
    python benchmarks/limits.py --table

The work that cannot be left out, beside whole steps of a plain loop, in turns. That work is the convolutions and linear
layers alone, as torch computes them in bf16 (where the CPU has it), channels-last, one after the other on tensors that
are ready: forward passes, gradients by activations, and by weights where they are trained. Nothing else is counted: no
ReLU, BatchNorm, rounding, loss, steps of an attack or of an optimizer, no casts, and no gradient by the pixels.

- training step: FGSM-RS and a step of the optimizer on the pruned float network, 64 images; the plain loop is that of
  training_speed.py, in fp32;
- attack step: one step of PGD on the dense network, 128 images, in fp32 and for the pixels only, as torchattacks has
  it.

*At the peak* is the same bound for kernels that are as fast as a large product of matrices in bf16 on these cores.

The whole takes about a minute on two quiet cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import tables
import torch
from networks import CLASSES, SHAPES, untrained
from plain import plain_train
from torch import Tensor, nn
from torch.nn import functional as F
from turns import Record, Run, arguments_of, chosen

from coldforge.attacks import ThreatModel, parse_inner
from coldforge.compress import fold_batchnorm
from coldforge.measure import count_macs, measure_latency
from coldforge.models import channels_last
from coldforge.provenance import has_bf16

STEPS = {"training step": 64, "attack step": 128}
"""Kind of step: images."""
RATIO, EPS = 0.5, 0.1
PEAK_SIZE = 2048


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, with tensors to compute it on."""

    inputs: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor  # of its output
    geometry: tuple[tuple[int, ...], ...] | None  # stride, padding, dilation of a convolution
    reads_pixels: bool

    def forward(self) -> Tensor:
        if self.geometry is None:
            return F.linear(self.inputs, self.weight, self.bias)
        return F.conv2d(self.inputs, self.weight, self.bias, *self.geometry)

    def backward(self, *, weights: bool) -> None:
        activations = not self.reads_pixels
        if self.geometry is None:
            if activations:
                self.grad @ self.weight
            if weights:
                self.grad.T @ self.inputs
        elif activations or weights:
            stride, padding, dilation = self.geometry
            wanted = (activations, weights, weights)
            torch.ops.aten.convolution_backward(
                self.grad, self.inputs, self.weight, [len(self.weight)], stride, padding, dilation, False, (0, 0), 1,
                wanted,
            )  # fmt: skip


def layers_of(network: nn.Module, images: Tensor) -> list[Layer]:
    """The convolutions and linear layers, in the order in which they are computed."""
    kind = torch.bfloat16 if has_bf16() else torch.float32
    found: list[Layer] = []

    def note(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        geometry = (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None
        bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
        tensors = [_laid_out(tensor).to(kind) for tensor in (inputs[0], layer.weight, bias, output)]
        found.append(Layer(*tensors, geometry, reads_pixels=not found))  # type: ignore[arg-type]

    folded = channels_last(fold_batchnorm(network))
    for module in folded.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)  # type: ignore[arg-type]
    with torch.no_grad():
        folded(channels_last(images))
    return found


def _laid_out(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.channels_last if tensor.ndim == 4 else torch.contiguous_format)


def necessary(step: str, layers: list[Layer]) -> Callable[[], None]:
    """What a step computes at least."""

    def once(weights: bool) -> None:
        for layer in layers:
            layer.forward()
        for layer in reversed(layers):
            layer.backward(weights=weights)

    @torch.no_grad()
    def run() -> None:
        once(weights=False)
        if step == "training step":
            once(weights=True)

    return run


def plain(step: str, network: nn.Module, images: Tensor) -> Callable[[], None]:
    """The whole step of the plain loop."""
    labels = torch.arange(len(images)) % CLASSES
    if step == "training step":
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9)
        attack, threat_model = parse_inner("fgsm-rs"), ThreatModel("linf", EPS)
        return lambda: plain_train(network, [(images, labels)], optimizer, attack, threat_model)
    network.eval()

    def run() -> None:
        points = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(points), labels), points)
        (images + torch.clamp(points.detach() + 0.01 * gradient.sign() - images, -EPS, EPS)).clamp(0, 1)

    return run


def macs_of(step: str, network: nn.Module, name: str) -> int:
    """Multiply-adds an image of a step; those of the gradient by the pixels, which is not counted, included."""
    passes = {"training step": 5, "attack step": 2}
    return passes[step] * count_macs(network, SHAPES[name])


def measured(name: str, step: str, seconds: float) -> Run:
    """Both in turns, and the peak."""
    networks = untrained(name, RATIO)
    network = networks.parent if step == "training step" else networks.dense
    images = networks.images[: STEPS[step]]
    kind = torch.bfloat16 if has_bf16() else torch.float32
    matrix = torch.randn(PEAK_SIZE, PEAK_SIZE).to(kind)
    calls: dict[str, Callable[[], Any]] = {
        "plain": plain(step, network, images),
        "necessary": necessary(step, layers_of(network, images)),
        "peak": lambda: matrix @ matrix,
    }
    found = {what: timing.median for what, timing in measure_latency(calls, seconds=seconds).items()}
    peak = PEAK_SIZE**3 / found["peak"]
    macs = macs_of(step, network, name) * len(images)
    row = {
        "plain_s": found["plain"],
        "necessary_s": found["necessary"],
        "most": found["plain"] / found["necessary"],
        "peak_macs_per_s": peak,
        "share_of_peak": macs / found["necessary"] / peak,
        "most_at_peak": found["plain"] / (macs / peak),
    }
    return {"network": name, "step": step, "images": len(images), "macs": macs, "rows": [row]}


def main() -> None:
    """Run what is asked for, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="timed seconds for each call")
    arguments = arguments_of(parser, "results/limits.json", tables.limits)
    names, steps = chosen(arguments.only, SHAPES, STEPS)
    record = Record(arguments.out, "network", "step")
    measure = partial(measured, seconds=arguments.seconds)
    record.keep_each(product(names, steps), measure, missing=arguments.missing)
    print(tables.limits(record.content))


if __name__ == "__main__":
    main()

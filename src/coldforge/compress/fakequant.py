"""Fake-quantized layers: floating point that takes only the values an integer kernel can take.

Weights are symmetric per output channel, activations affine per tensor with a fixed integer zero point (0 after a
ReLU), biases integers of the accumulator's step. Rounding is half to even, as in ONNX ``QuantizeLinear``, so that the
network equals its exported file. Step sizes are learned as in LSQ (Esser et al., *Learned Step Size Quantization*,
ICLR 2020, eq. 3 and section 2.2); gradients pass the rounding straight through (Bengio et al. 2013).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.compress.kernels import dense, gradients, is_fused, round_to_grid, takes
from coldforge.compress.lowbits import binarize, odd_codes, round_to_odd, sign_codes
from coldforge.errors import ModelError

Backward = Literal["pass_through", "clipped", "unrounded"]
"""How attacks see the rounding: gradients pass everywhere, or only inside the range; or as if it were not there (the
float twin: the same weights, nothing rounded or clipped), which is another network, for transfer."""

SMALLEST_STEP = 1e-8


@dataclass(frozen=True)
class _Grid:
    """What rounding does besides its step; see :func:`fake_quantize`."""

    low: int
    """Smallest code less the code of 0."""
    high: int
    grad_scale: float
    backward: Backward
    rectify: bool

    @property
    def clips(self) -> bool:
        """Whether gradients pass only inside the range."""
        return self.backward == "clipped"

    @property
    def inside(self) -> tuple[float, float]:
        """Between which codes, both excluded, a value counts as not clipped."""
        return 0.0 if self.rectify else self.low - 0.5, self.high + 0.5


class _FakeQuantize(torch.autograd.Function):
    """``step * (clamp(round(x / step) + zero, qmin, qmax) - zero)`` with straight-through and LSQ gradients.

    A value is inside the range if it rounds to a code without being clipped: half a step beyond the outermost codes
    still counts. (Black pixels lie exactly on the lowest code; with a hard border they could not move under attack.)
    With ``rectify`` the range ends at 0, as that of the ReLU whose work this does. Written in few passes over memory,
    which is what this costs on a CPU: ``hardtanh_backward`` is a masked copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, grid: _Grid) -> Tensor:
        step = step.clamp_min(SMALLEST_STEP)
        scaled = x / step.to(x.dtype)
        ctx.grid = grid
        ctx.learns_step = ctx.needs_input_grad[1]
        ctx.masks = ctx.needs_input_grad[0] and (grid.rectify or grid.clips)
        if ctx.learns_step:
            codes = torch.round(scaled).clamp_(grid.low, grid.high)
            ctx.save_for_backward(scaled, codes, step)
            return codes * step.to(x.dtype)
        if ctx.masks:
            ctx.save_for_backward(scaled)
            return torch.round(scaled).clamp_(grid.low, grid.high).mul_(step.to(x.dtype))
        return scaled.round_().clamp_(grid.low, grid.high).mul_(step.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), grid = grads, ctx.grid
        if not (ctx.learns_step or ctx.masks):
            return grad, None, None
        scaled = ctx.saved_tensors[0]
        passed = grid.inside if grid.clips else (0.0, torch.inf)
        grad_x = torch.ops.aten.hardtanh_backward(grad, scaled, *passed) if ctx.masks else grad
        grad_step = None
        if ctx.learns_step:
            _, codes, step = ctx.saved_tensors
            slope = codes - torch.ops.aten.hardtanh_backward(scaled, scaled, *grid.inside)
            product = slope.mul_(grad)
            total = product.sum() if step.numel() == 1 else product.flatten(1).sum(1)
            grad_step = (total.float() * grid.grad_scale).view_as(step)
        return grad_x, grad_step, None


class _FusedFakeQuantize(torch.autograd.Function):
    """The same in one pass over memory each way (:mod:`coldforge.compress.kernels`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, grid: _Grid) -> Tensor:
        x, step = dense(x), step.clamp_min(SMALLEST_STEP)
        ctx.grid = grid
        if grid.clips or grid.rectify or ctx.needs_input_grad[1]:
            ctx.save_for_backward(x, step)
        return round_to_grid(x, step, grid.low, grid.high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), grid = grads, ctx.grid
        learns_step = ctx.needs_input_grad[1]
        if not (grid.clips or grid.rectify or learns_step):
            return grad, None, None
        x, step = ctx.saved_tensors
        grad_x = grad_step = None
        if grid.clips or learns_step:
            grad_x, grad_step = gradients(grad, x, step, (grid.low, grid.high, *grid.inside), by_x=grid.clips)
        if not grid.clips:
            grad_x = torch.ops.aten.threshold_backward(grad, x, 0) if grid.rectify else grad
        if grad_step is not None:
            grad_step = grad_step * grid.grad_scale if learns_step else None
        return grad_x, grad_step, None


class _RoundBias(torch.autograd.Function):
    """``grid * round(bias / grid)``; the gradient passes straight through to the bias."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, grid: Tensor) -> Tensor:
        return torch.round(bias / grid).mul_(grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def fake_quantize(
    x: Tensor,
    step: Tensor,
    *,
    zero: int = 0,
    qmin: int,
    qmax: int,
    grad_scale: float = 1.0,
    backward: Backward = "clipped",
    rectify: bool = False,
) -> Tensor:
    """Round ``x`` to the grid ``step * (code - zero)``, ``qmin <= code <= qmax``, half to even.

    Args:
        x: any shape.
        step: grid spacing, of shape () or broadcastable to ``x`` along its first dimension; one that has become
            negligible or negative counts as tiny, with the gradient of a positive one.
        zero: the code of the value 0.
        qmin: smallest code.
        qmax: largest code.
        grad_scale: factor of the gradient of ``step`` (LSQ section 2.2).
        backward: ``"clipped"`` lets gradients pass only where ``x`` is inside the range (the straight-through
            estimator); ``"pass_through"`` lets them pass everywhere (BPDA, Athalye et al. 2018), for attacks.
        rectify: ``x`` is what a ReLU would have read, whose work is done here, too, with its gradient of 0 at and below
            0; for a lowest code of ``zero``.

    Returns:
        A tensor like ``x``.
    """
    function = _FusedFakeQuantize if is_fused() and takes(x, step) else _FakeQuantize
    grid = _Grid(qmin - zero, qmax - zero, grad_scale, backward, rectify)
    result: Tensor = function.apply(x, step, grid)  # type: ignore[no-untyped-call]
    return result


class ActivationQuantizer(nn.Module):
    """Rounds an activation to ``bits`` bits: unsigned codes with a fixed zero point and a learned step.

    Until :meth:`set_range` (or loading a checkpoint) fixes the grid it refuses to run, with a ModelError.
    """

    zero_point: Tensor

    def __init__(self, bits: int, *, reads_image: bool = False) -> None:
        super().__init__()
        self.bits = self.final_bits = bits  # more than final_bits while bits are lowered step by step
        self.reads_image = reads_image  # rounds the network's input; its range is that of the box
        self.step = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.backward_mode: Backward = "clipped"
        self.observing = False
        self.rectifies = False
        """Reads what a ReLU would read, and does its work (:mod:`coldforge.compress.rectify`)."""
        self._zero = -1  # zero_point as a Python number, read once

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def set_range(self, low: float, high: float) -> None:
        """Choose step and zero point so that [low, high], which must hold 0, maps onto the codes."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = max((high - low) / (self.qmax - self.qmin), SMALLEST_STEP)
        with torch.no_grad():
            self.step.fill_(step)
            self.zero_point.fill_(min(max(round(-low / step), self.qmin), self.qmax))
        self._zero = -1

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._zero = -1

    @property
    def zero(self) -> int:
        """Code of the value 0."""
        if self._zero < 0:
            if float(self.step.detach()) == 0:
                raise ModelError(
                    "expected a calibrated quantizer, got one whose range was never set; "
                    "call coldforge.compress.calibrate(network, images, method), or load a checkpoint"
                )
            self._zero = int(self.zero_point)
        return self._zero

    def forward(self, x: Tensor) -> Tensor:
        """``(N, ...)`` to the same shape."""
        if self.observing or self.backward_mode == "unrounded":
            return F.relu(x) if self.rectifies else x
        features = max(x.numel() // max(len(x), 1), 1)
        return fake_quantize(
            x,
            self.step,
            zero=self.zero,
            qmin=self.qmin,
            qmax=self.qmax,
            grad_scale=(features * self.qmax) ** -0.5,
            backward=self.backward_mode,
            rectify=self.rectifies,
        )

    def extra_repr(self) -> str:
        """Bits, for ``print(model)``."""
        return f"bits={self.bits}"


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with fake-quantized weight and bias.

    ``source`` is the float layer it replaces; its input is rounded by ``input_quantizer``, whose step sets the grid of
    the bias (int32 in the accumulator's units, as integer kernels add it).
    """

    def __init__(
        self,
        source: nn.Conv2d | nn.Linear,
        bits: int,
        input_quantizer: ActivationQuantizer,
        *,
        ternary: bool = False,
    ) -> None:
        super().__init__()
        self.bits = self.final_bits = bits  # more than final_bits while bits are lowered step by step
        self.ternary = ternary  # two bits have the codes -1, 0 and 1 only
        self.weight = nn.Parameter(source.weight.detach().clone(), requires_grad=source.weight.requires_grad)
        bias = torch.zeros(len(self.weight)) if source.bias is None else source.bias.detach().clone()
        self.bias = nn.Parameter(bias, requires_grad=source.bias is not None)
        self.weight_step = nn.Parameter(torch.ones(len(self.weight)), requires_grad=self.weight.requires_grad)
        self.is_conv = isinstance(source, nn.Conv2d)
        if isinstance(source, nn.Conv2d):
            self.stride, self.padding = source.stride, source.padding
            self.dilation, self.groups = source.dilation, source.groups
        self._input_quantizer = [input_quantizer]  # in a list: a reference, not a child
        self._cached: tuple[Tensor, Tensor] | None = None
        self.offset: Tensor | None = None
        """Added to the rounded weight, for training under weight perturbation."""

    @property
    def has_odd_codes(self) -> bool:
        """Whether the codes are -3, -1, 1 and 3: two bits that are not ternary."""
        return self.bits == 2 and not self.ternary

    @property
    def has_zero(self) -> bool:
        """Whether 0 has a code."""
        return self.bits > 1 and not self.has_odd_codes

    @property
    def qmax(self) -> int:
        """Largest code; the smallest is its negative. One bit has the codes -1 and 1, ternary weights also 0."""
        return 3 if self.has_odd_codes else max((1 << self.bits - 1) - 1, 1)

    @property
    def input_quantizer(self) -> ActivationQuantizer:
        """The quantizer that rounds this layer's input."""
        return self._input_quantizer[0]

    def _column(self, step: Tensor) -> Tensor:
        return step.view(-1, *[1] * (self.weight.ndim - 1))

    def quantized_weight(self) -> Tensor:
        """The weight on its grid, of the weight's shape."""
        step = self._column(self.weight_step)
        grad_scale = (self.weight.numel() // len(self.weight) * self.qmax) ** -0.5
        if self.bits == 1:
            return binarize(self.weight, step.clamp_min(SMALLEST_STEP), grad_scale=grad_scale)
        if self.has_odd_codes:
            return round_to_odd(self.weight, step.clamp_min(SMALLEST_STEP), grad_scale=grad_scale)
        return fake_quantize(self.weight, step, qmin=-self.qmax, qmax=self.qmax, grad_scale=grad_scale)

    def accumulator_step(self) -> Tensor:
        """Step of the integer accumulator for each output channel: input step times weight step, ``(C,)``."""
        input_step = self.input_quantizer.step.detach().clamp_min(SMALLEST_STEP)
        return input_step * self.weight_step.detach().clamp_min(SMALLEST_STEP)

    def quantized_bias(self) -> Tensor:
        """The bias on the accumulator's grid, ``(C,)``; gradients pass straight through."""
        result: Tensor = _RoundBias.apply(self.bias, self.accumulator_step())  # type: ignore[no-untyped-call]
        return result

    def weight_codes(self) -> Tensor:
        """Integer weights, int32, of the weight's shape."""
        step = self._column(self.weight_step.detach().clamp_min(SMALLEST_STEP))
        return self.nearest_codes(self.weight.detach() / step).to(torch.int32)

    def nearest_codes(self, scaled: Tensor) -> Tensor:
        """Codes of weights in units of their steps; any shape, floating point."""
        if self.bits == 1:
            return sign_codes(scaled)
        return odd_codes(scaled) if self.has_odd_codes else torch.round(scaled).clamp_(-self.qmax, self.qmax)

    def bias_codes(self) -> Tensor:
        """Integer biases in units of :meth:`accumulator_step`, int32, ``(C,)``."""
        limit = 2**31 - 1
        codes = torch.round(self.bias.detach() / self.accumulator_step()).double()
        return codes.clamp_(-limit, limit).to(torch.int32)

    def rounded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as they compute now: on their grids, or as :func:`attacking` keeps them."""
        weight, bias = self._cached or (self.quantized_weight(), self.quantized_bias())
        return (weight if self.offset is None else weight + self.offset), bias

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` or ``(N, F)`` to the layer's output."""
        weight, bias = self.rounded()
        if self.is_conv:
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return F.linear(x, weight, bias)

    def extra_repr(self) -> str:
        """Shape and bits, for ``print(model)``."""
        return f"{'conv' if self.is_conv else 'linear'} {tuple(self.weight.shape)}, bits={self.bits}"


def is_quantized(network: nn.Module) -> bool:
    """Whether gradients must be passed through rounding."""
    return any(isinstance(module, ActivationQuantizer) for module in network.modules())


@contextmanager
def attacking(model: nn.Module, backward: Backward = "pass_through") -> Iterator[None]:
    """Inside, weights are quantized once and kept, and activation quantizers let gradients through as asked.

    For attacks: the parameters must not change inside. A network without quantizers is left as it is.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    before = [quantizer.backward_mode for quantizer in quantizers]
    cached = [layer._cached for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                unrounded = (layer.weight.detach(), layer.bias.detach())
                rounded = (layer.quantized_weight(), layer.quantized_bias())
                layer._cached = unrounded if backward == "unrounded" else rounded
        for quantizer in quantizers:
            quantizer.backward_mode = backward
        yield
    finally:
        for layer, weight_and_bias in zip(layers, cached, strict=True):
            layer._cached = weight_and_bias
        for quantizer, mode in zip(quantizers, before, strict=True):
            quantizer.backward_mode = mode

"""The integer form of a fake-quantized network: what its ONNX file computes, written as a torch network.

Every rounding becomes QuantizeLinear and DequantizeLinear, every weight an integer constant. ONNX Runtime recognizes
the pattern (DequantizeLinear, Conv, Relu, QuantizeLinear) and runs it as one integer kernel.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.compress.fakequant import SMALLEST_STEP, ActivationQuantizer, QuantizedLayer
from coldforge.compress.graph import set_module
from coldforge.errors import ExportError

_BIAS_LIMIT = 2**30
"""Largest bias code: half of what int32 holds, the other half is the products'."""


def integer_form(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy of a network in evaluation mode whose fake-quantized layers hold integers; a float network stays float.

    Args:
        model: any network, with or without the layers of :mod:`coldforge.compress.fakequant`.

    Returns:
        The copy, on the CPU, and the largest number of bits of any code in it (32 for a float network).

    Raises:
        ExportError: where a quantizer was never calibrated or its codes do not fit 16 bits; names the layer.
    """
    network = copy.deepcopy(model).cpu().eval()
    replacements: dict[str, nn.Module] = {}
    bits = 0
    for name, module in network.named_modules():
        if isinstance(module, ActivationQuantizer | QuantizedLayer) and module.bits > 16:
            raise ExportError(f"layer {name!r}: expected at most 16 bits, got {module.bits}")
        if isinstance(module, ActivationQuantizer):
            replacements[name] = _Rounding(name, module)
            bits = max(bits, module.bits)
        elif isinstance(module, QuantizedLayer):
            replacements[name] = _IntegerLayer(module)
            bits = max(bits, module.bits)
    for name, module in replacements.items():
        set_module(network, name, module)
    return network.requires_grad_(False), bits or 32


class _Rounding(nn.Module):
    """Rounds to integer codes and back."""

    def __init__(self, name: str, source: ActivationQuantizer) -> None:
        super().__init__()
        step = source.step.detach().clone().to(torch.float32)
        if not bool(step > 0):
            raise ExportError(
                f"layer {name!r}: expected a calibrated quantizer with a step above 0, got {float(step):g}; "
                "calibrate the network before exporting it"
            )
        self.largest = source.qmax
        self.register_buffer("step", step)
        self.register_buffer("zero", torch.tensor(source.zero, dtype=torch.uint8 if source.bits <= 8 else torch.uint16))

    def forward(self, x: Tensor) -> Tensor:
        codes = _operators().quantize(x, self.step, self.zero, self.largest)
        return cast(Tensor, _operators().dequantize(codes, self.step, self.zero))


class _IntegerLayer(nn.Module):
    """A convolution or linear layer with integer weight and, where its input has 8-bit codes too, integer bias.

    With more bits no runtime has integer kernels, and the bias stays a float on the twin's grid. It must fit 32 bits,
    too: ONNX Runtime rounds it to the accumulator's step on its own (WeightBiasQuantization), whatever its size.
    """

    def __init__(self, source: QuantizedLayer) -> None:
        super().__init__()
        eight = max(source.bits, source.input_quantizer.bits) <= 8
        dtype = torch.int8 if source.bits <= 8 else torch.int16
        grid, bias = source.accumulator_step().double(), source.bias.detach().double()
        # A channel of negligible weights has a tiny step, in which its bias would overflow: give it a coarser one,
        # which moves its output by less than a millionth of the bias for each weight.
        coarser = (bias.abs() / (grid * _BIAS_LIMIT)).ceil().clamp_min(1)
        codes = source.weight_codes().double() / coarser.view(-1, *[1] * (source.weight.ndim - 1))
        self.register_buffer("weight", codes.round().to(dtype))
        self.register_buffer("weight_step", (source.weight_step.detach().clamp_min(SMALLEST_STEP) * coarser).float())
        self.register_buffer("weight_zero", torch.zeros(len(bias), dtype=dtype))
        self.integer_bias = eight
        if eight:
            exact = torch.where(coarser > 1, (bias / (grid * coarser)).round(), source.bias_codes())
            self.register_buffer("bias", exact.to(torch.int32))
            self.register_buffer("bias_step", (grid * coarser).float())
            self.register_buffer("bias_zero", torch.zeros(len(bias), dtype=torch.int32))
        else:
            self.register_buffer("bias", source.quantized_bias().detach())
        self.is_conv = source.is_conv
        if source.is_conv:
            self.settings: Any = (source.stride, source.padding, source.dilation, source.groups)

    def forward(self, x: Tensor) -> Tensor:
        dequantize = _operators().dequantize
        weight = dequantize(self.weight, self.weight_step, self.weight_zero)
        bias = cast(Tensor, self.bias)
        if self.integer_bias:
            bias = dequantize(bias, self.bias_step, self.bias_zero)
        if self.is_conv:
            return F.conv2d(x, weight, bias, *self.settings)
        return F.linear(x, weight, bias)


@functools.cache
def _operators() -> Any:
    """The two ONNX operators as torch operators, registered with torch at the first export."""

    def quantize(x: Tensor, scale: Tensor, zero: Tensor, largest: int) -> Tensor:
        codes = torch.clamp(torch.round(x / scale) + zero.to(torch.float32), 0, largest)
        return codes.to(torch.int32).to(zero.dtype)

    def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        shape = [-1] + [1] * (codes.ndim - 1) if scale.ndim else []
        return (codes.to(torch.float32) - zero.to(torch.float32).view(shape)) * scale.view(shape)

    def quantized_like(x: Tensor, scale: Tensor, zero: Tensor, largest: int) -> Tensor:
        return torch.empty_like(x, dtype=zero.dtype)

    def dequantized_like(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.empty_like(codes, dtype=torch.float32)

    for function, like in ((quantize, quantized_like), (dequantize, dequantized_like)):
        # the schema is written out: torch cannot read annotations that are strings
        schema = "(Tensor x, Tensor scale, Tensor zero, int largest) -> Tensor"
        if function is dequantize:
            schema = "(Tensor codes, Tensor scale, Tensor zero) -> Tensor"
        operator = torch.library.custom_op(
            f"coldforge::{function.__name__}", function, mutates_args=(), schema=schema, device_types="cpu"
        )
        operator.register_fake(like)
    return torch.ops.coldforge


def translations() -> dict[Callable[..., object], Callable[..., object]]:
    """How torch's exporter writes the two operators (``custom_translation_table``, opset 21)."""
    from onnx import TensorProto, helper
    from onnxscript import opset21 as op

    def quantize(x: Any, scale: Any, zero: Any, largest: int) -> Any:
        codes = op.QuantizeLinear(x, scale, zero)
        if largest in (255, 65535):
            return codes
        # fewer than 8 bits: the kernels know only 8, the clip takes the codes away that the grid does not have
        bounds = [op.Constant(value=helper.make_tensor("bound", TensorProto.UINT8, [], [n])) for n in (0, largest)]
        return op.Clip(codes, *bounds)

    def dequantize(codes: Any, scale: Any, zero: Any) -> Any:
        return op.DequantizeLinear(codes, scale, zero, axis=0)

    operators = _operators()
    return {operators.quantize.default: quantize, operators.dequantize.default: dequantize}

"""Copies of a network that compute the same faster, for attacks to search on. What they find is verified elsewhere."""

from __future__ import annotations

import copy
import functools
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from coldforge.compress import QuantizedLayer, fold_batchnorm
from coldforge.errors import TraceError
from coldforge.models import channels_last

Precision = Literal["exact", "fp32", "bf16"]
"""How attacks search: on the network as it is; on a copy with BatchNorm folded; on that copy in bfloat16. Every success
on a copy is verified on the network itself in float32."""


def fast_copy(network: nn.Module, precision: Precision) -> nn.Module:
    """A copy that computes the same faster, to search on: BatchNorm folded where it can be, channels-last, ReLU as part
    of the convolution before it, and in bfloat16 if asked for.
    """
    try:
        copied: nn.Module = fold_batchnorm(network)
        if _draws_at_tracing(copied):
            copied = copy.deepcopy(network)
    except TraceError:
        copied = copy.deepcopy(network)
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    copied = channels_last(copied).eval()
    _hasten(copied)
    return _Bfloat16(copied) if precision == "bf16" else copied


def _draws_at_tracing(network: nn.Module) -> bool:
    """Whether the graph holds tensors that its forward made while it was traced, such as noise."""
    return isinstance(network, fx.GraphModule) and any(
        node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in network.graph.nodes
    )


class _Bfloat16(nn.Module):
    """A network in bfloat16, its last linear layer in float32: steps of a loss are smaller than bfloat16 can tell."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for layer in network.modules():
            if type(layer) is nn.Conv2d:
                layer.to(torch.bfloat16)  # once, not in every pass
        last = [m for m in network.modules() if _is_linear(m)][-1:]
        for layer in last:
            layer.forward = partial(_in_float32, layer.forward)

    def forward(self, images: Tensor) -> Tensor:
        """As the network."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits: Tensor = self.network(images)
        return logits.float()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, QuantizedLayer) and not module.is_conv)


def _in_float32(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return forward(inputs.float())


# --- convolutions


class _Convolution(torch.autograd.Function):
    """A convolution, with the sum and the ReLU behind it if there are any: one pass over memory instead of three.

    The gradient by an image of one channel is a product of matrices and a sum of shifted images: in the usual form one
    channel fills no vector.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, how: _How) -> Tensor:
        given, (x, weight, bias) = x.dtype, _as_wanted(x, weight, bias)
        result = _compute(x, weight, bias, other, how)
        ctx.save_for_backward(x, weight, result if how.rectified else None)
        ctx.how, ctx.given, ctx.added = how, given, None if other is None else other.dtype
        ctx.set_materialize_grads(False)  # no gradient is not one of zeros: it must be refused
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight, result), how = grads, ctx.saved_tensors, ctx.how
        if grad is None:
            return None, None, None, None, None
        if result is not None:
            grad = torch.ops.aten.threshold_backward(grad, result, 0)
        if how.reads_one_channel:
            image = _gradient_of_one_channel(grad, weight, how.padding, x.shape)
        else:
            image, _, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, how.stride, how.padding, how.dilation, False, (0, 0), how.groups, _BY_INPUT
            )
        return image.to(ctx.given), None, None, None if ctx.added is None else grad.to(ctx.added), None


def _as_wanted(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the type in which autocast wants convolutions."""
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)


def _compute(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, how: _How) -> Tensor:
    result: Tensor
    if not how.rectified:
        result = F.conv2d(x, weight, bias, how.stride, how.padding, how.dilation, how.groups)
    elif other is None:
        result = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, how.padding, how.stride, how.dilation, how.groups, "relu", [], ""
        )
    else:
        other = other.to(x.dtype)
        result = torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, weight, bias, how.padding, how.stride, how.dilation, how.groups, "add", 1.0, "relu", [], ""
        )
    return result


_BY_INPUT = (True, False, False)
_MOST_TAPS = 25
"""Of a convolution over one channel: so many images are held in memory for its gradient."""


@dataclass(frozen=True)
class _How:
    """What a convolution does besides its weights."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    reads_one_channel: bool
    rectified: bool = False
    """Whether the ReLU behind it is part of it."""


def _gradient_of_one_channel(grad: Tensor, weight: Tensor, padding: tuple[int, ...], shape: torch.Size) -> Tensor:
    """Of a convolution of stride 1, by its input ``(N, 1, H, W)``."""
    count, outputs, rows, columns = grad.shape
    down, across = weight.shape[2:]
    taps = weight.reshape(outputs, down * across)
    parts = (grad.permute(0, 2, 3, 1).reshape(-1, outputs) @ taps).view(count, rows, columns, down * across)
    kind = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros(count, rows + down - 1, columns + across - 1, dtype=kind)
    for tap in range(down * across):
        i, j = divmod(tap, across)
        total[:, i : i + rows, j : j + columns] += parts[..., tap]
    above, left = padding
    return total[:, None, above : above + shape[2], left : left + shape[3]]


def _hasten(network: nn.Module) -> None:
    """Let the convolutions of a copy compute as :class:`_Convolution` does, where that is faster; in place."""
    rectified = _fuse(network) if isinstance(network, fx.GraphModule) and _can_fuse() else set()
    for name, layer in network.named_modules():
        if (how := _how(layer)) and (how.reads_one_channel or name in rectified):
            layer.forward = partial(_convolve, layer, replace(how, rectified=name in rectified))


def _how(layer: nn.Module) -> _How | None:
    """None: not a convolution of the plain kind."""
    if type(layer) not in (nn.Conv2d, QuantizedLayer) or "forward" in vars(layer):  # others compute something else
        return None
    assert isinstance(layer, nn.Conv2d | QuantizedLayer)
    if isinstance(layer, QuantizedLayer) and not layer.is_conv:
        return None
    if isinstance(layer.padding, str) or getattr(layer, "padding_mode", "zeros") != "zeros":
        return None
    simple = (layer.stride, layer.dilation, layer.groups) == ((1, 1), (1, 1), 1)
    gray = simple and layer.weight.shape[1] == 1 and layer.weight[0, 0].numel() <= _MOST_TAPS
    return _How(layer.stride, layer.padding, layer.dilation, layer.groups, gray)


def _convolve(layer: nn.Conv2d | QuantizedLayer, how: _How, x: Tensor, other: Tensor | None = None) -> Tensor:
    """``other`` is added before the ReLU."""
    weight, bias = layer.rounded() if isinstance(layer, QuantizedLayer) else (layer.weight, layer.bias)
    if other is not None and other.shape != _shape(x, weight, how):
        return torch.relu(F.conv2d(x, weight, bias, how.stride, how.padding, how.dilation, how.groups) + other)
    if not torch.is_grad_enabled():
        return _compute(*_as_wanted(x, weight, bias), other, how)
    result: Tensor = _Convolution.apply(x, weight, bias, other, how)  # type: ignore[no-untyped-call]
    return result


def _shape(x: Tensor, weight: Tensor, how: _How) -> tuple[int, ...]:
    """Of what a convolution makes of ``x``."""
    sides = zip(x.shape[2:], weight.shape[2:], how.stride, how.padding, how.dilation, strict=True)
    return len(x), len(weight), *((n + 2 * pad - reach * (k - 1) - 1) // step + 1 for n, k, step, pad, reach in sides)


def _fuse(network: fx.GraphModule) -> set[str]:
    """Take out each ReLU that alone reads a convolution, or that alone reads a sum of one and something else; the names
    of these convolutions, which must do that work.
    """
    modules = dict(network.named_modules())
    calls = Counter(str(node.target) for node in network.graph.nodes if node.op == "call_module")
    found = set()

    def is_free(node: fx.Node) -> bool:
        """Whether this is a convolution that is called once, in the plain way, and read once."""
        if node.op != "call_module" or str(node.target) in found or len(node.args) != 1 or node.kwargs:
            return False
        return _how(modules[str(node.target)]) is not None and len(node.users) == 1 == calls[str(node.target)]

    for node in list(network.graph.nodes):
        if not _is_relu(node, modules) or not node.args or not isinstance(read := node.args[0], fx.Node):
            continue
        parts = read.all_input_nodes if _is_sum(read) and len(read.users) == 1 else [read]
        conv = next((part for part in parts if is_free(part)), None)
        if conv is None:
            continue
        rest = [part for part in parts if part is not conv]
        with network.graph.inserting_before(node):
            fused = network.graph.call_module(str(conv.target), (*conv.args, *rest))
        node.replace_all_uses_with(fused)
        for old in dict.fromkeys((node, read, conv)):
            network.graph.erase_node(old)
        found.add(str(conv.target))
    network.recompile()
    return found


def _is_sum(node: fx.Node) -> bool:
    """Of two tensors, as far as can be seen."""
    plain = node.op == "call_function" and node.target in (operator.add, torch.add) and not node.kwargs
    return plain and len(node.all_input_nodes) == 2 == len(node.args)


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    return (node.op == "call_function" and node.target in (F.relu, torch.relu)) or (
        node.op == "call_method" and node.target == "relu"
    )


@functools.cache
def _can_fuse() -> bool:
    """Whether this machine's torch has the fused kernels, with the result of the single operators, to the bit."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 16, 5, 5, generator=generator), torch.randn(16, 16, 3, 3, generator=generator)
    plain, how = F.conv2d(x, weight, padding=1), _How((1, 1), (1, 1), (1, 1), 1, False, rectified=True)
    try:
        with torch.no_grad():
            fused, added = (_compute(x, weight, None, other, how) for other in (None, x))
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
    return torch.equal(fused, plain.relu()) and torch.equal(added, (plain + x).relu())

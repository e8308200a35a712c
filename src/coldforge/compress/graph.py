"""Networks as graphs: tracing with errors that name the layer, and BatchNorm folded into the layer before it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections import Counter
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from coldforge.errors import TraceError
from coldforge.models import Normalize


class _Tracer(fx.Tracer):
    """Keeps layers with weights and the normalization whole, and remembers where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []
        self.failed_at = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.Linear | Normalize) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.path.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_at = self.failed_at or self.path[-1]
            raise
        finally:
            self.path.pop()


def trace(model: nn.Module) -> fx.GraphModule:
    """A graph of a copy of ``model`` in evaluation mode.

    Raises:
        TraceError: names the layer whose code cannot be traced (control flow that depends on values, for example).
    """
    model = copy.deepcopy(model).eval()
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        where = tracer.failed_at or type(model).__name__
        layer = type(dict(model.named_modules()).get(where, model)).__name__
        raise TraceError(
            f"expected a network whose forward can be traced; layer {where!r} ({layer}) cannot: {error}. "
            "Rewrite it without control flow that depends on tensor values, or turn quantization off "
            "(quantize.weight_bits = 32, quantize.activation_bits = 32)"
        ) from error
    return fx.GraphModule(model, graph)


def network_digest(model: nn.Module) -> str:
    """SHA-256 (hex) of what a network computes in evaluation mode: layers, weights, and the code between them.

    The code is that of the traced graph, with the tensors it reads; where a layer of foreign code stays whole, or
    nothing can be traced, the text of its class.
    """
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        _add(digest, name, tensor)
    try:
        graph = trace(model)
    except TraceError:
        whole = list(model.modules())
    else:
        digest.update(graph.code.encode())
        for target in sorted({str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}):
            _add(digest, target, reduce(getattr, target.split("."), graph))
        whole = [graph.get_submodule(str(node.target)) for node in graph.graph.nodes if node.op == "call_module"]
    for kind in sorted({type(module) for module in whole}, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}"):
        if kind.__module__.partition(".")[0] not in ("torch", "coldforge"):
            with contextlib.suppress(OSError, TypeError):  # made at run time: there is no text
                digest.update(inspect.getsource(kind).encode())
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, value: object) -> None:
    digest.update(name.encode())
    if isinstance(value, Tensor):
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)


def fold_batchnorm(model: nn.Module) -> fx.GraphModule:
    """A traced copy of ``model`` whose BatchNorm layers are part of the convolution or linear layer before them.

    A BatchNorm that does not directly follow such a layer, whose layer feeds others too, or that keeps no statistics,
    stays.
    """
    graph_module = trace(model)
    fold_into(graph_module, _folded)
    return graph_module


def scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm with statistics multiplies by and adds in evaluation mode; each ``(C,)``."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    shift = -norm.running_mean * scale
    return (scale * norm.weight, shift * norm.weight + norm.bias) if norm.affine else (scale, shift)


def _folded(layer: nn.Module, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module | None:
    if isinstance(layer, nn.Conv2d):
        return fuse_conv_bn_eval(layer, norm)
    return fuse_linear_bn_eval(layer, norm) if isinstance(layer, nn.Linear) else None


def fold_into(
    network: fx.GraphModule, folded: Callable[[nn.Module, nn.BatchNorm1d | nn.BatchNorm2d], nn.Module | None]
) -> None:
    """Take out each BatchNorm that directly follows a layer which feeds nothing else; in place.

    Args:
        network: in evaluation mode.
        folded: what takes the place of the layer and of the BatchNorm behind it; None: both stay.
    """
    modules = dict(network.named_modules())
    for before, node in followed(network):
        both = folded(modules[before.target], modules[node.target])
        if both is None:
            continue
        set_module(network, before.target, both)
        node.replace_all_uses_with(before)
        network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()


def batchnorm_behind(model: nn.Module) -> dict[str, str]:
    """Names of the convolutions and linear layers into which :func:`fold_batchnorm` folds, and of what it folds.

    Raises:
        TraceError: as of :func:`trace`.
    """
    network = trace(model)
    modules = dict(network.named_modules())
    pairs = ((str(before.target), str(node.target)) for before, node in followed(network))
    return {layer: norm for layer, norm in pairs if isinstance(modules[layer], nn.Conv2d | nn.Linear)}


def followed(network: fx.GraphModule) -> list[tuple[Any, Any]]:
    """Calls of modules that a BatchNorm with statistics alone reads, and of that BatchNorm."""
    modules = dict(network.named_modules())
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    found = []
    for node in network.graph.nodes:
        norm = modules[node.target] if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d) or norm.running_mean is None:
            continue
        before = node.args[0]
        once = before.op == "call_module" and calls[before.target] == calls[node.target] == 1
        if once and len(before.users) == 1:
            found.append((before, node))
    return found

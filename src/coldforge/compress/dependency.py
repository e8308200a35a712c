"""What pruning must know about a network: which channels hang together, and whether they still do afterwards.

The dependency graph is that of torch-pruning (DepGraph, Fang et al., CVPR 2023, https://arxiv.org/abs/2301.12900); it
follows the autograd graph, and takes an operation that it does not know for an element-wise one. So two things are
added: errors that name the layer, and :func:`check_function`, which compares the pruned network with the dense one
whose removed channels are multiplied by zero, layer by layer. A network that mixes channels in a way that the graph
does not understand is refused, not damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from coldforge.errors import TraceError

BATCH = 2
"""Images of a probe; more than one, so that squeezing the batch away is noticed."""

_CROSS_CHANNEL_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
_TOLERANCE = 1e-3  # relative to the largest output; float32 sums in another order stay two digits below


def is_filter_layer(module: object) -> bool:
    """True for layers that have filters, one for each output channel: convolutions and linear layers."""
    return isinstance(module, _ConvNd | nn.Linear)


def probe_images(model: nn.Module, image_shape: Sequence[int]) -> Tensor:
    """Random images in [0, 1] on the device and in the precision of ``model``, always the same. # (2, C, H, W)"""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise TraceError(f"expected an image shape (channels, height, width), got {tuple(image_shape)}")
    images = torch.rand((BATCH, *image_shape), generator=torch.Generator().manual_seed(0))
    weight = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.to(device=weight.device, dtype=weight.dtype)


def run_named(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Run ``model`` and keep what each filter layer put out.

    Returns:
        The logits ``(N, classes)``, and layer name to output, in the order of execution.

    Raises:
        TraceError: names the layer that failed; or the network does not return logits.
    """
    running: list[str] = []
    outputs: dict[str, Tensor] = {}
    hooks = []
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, inputs: Any) -> None:
        running.append(names[module])

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()
        if is_filter_layer(module):
            outputs[names[module]] = output

    for module, name in names.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(f"expected a network in Python, layer {name!r} is TorchScript; prune it before scripting")
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        logits = model(images)
    except Exception as error:
        name = running[-1] if running else ""
        layer = f"layer {name!r}" if name else "its own forward"
        raise TraceError(
            f"expected a network that takes images of shape {tuple(images.shape)}; {layer} "
            f"({type(model.get_submodule(name)).__name__}) failed: {error}. Check the image shape and the layer's width"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TraceError(f"expected logits of shape (images, classes), got {got}; wrap the network to return them")
    return logits, outputs


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with gradients for all weights; both are put back afterwards, by name."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    training = {name for name, module in model.named_modules() if module.training}
    model.eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(name not in frozen)
        for name, module in model.named_modules():
            module.training = name in training


def dependency_graph(model: nn.Module, images: Tensor) -> Any:
    """The ``torch_pruning.DependencyGraph`` of ``model``; call it inside :func:`traceable`.

    Raises:
        TraceError: names a layer that fails, or whose channels cannot be followed.
    """
    _, outputs = run_named(model, images)
    graph = torch_pruning.DependencyGraph()
    try:
        # The default of torch-pruning unpacks a tensor along its batch first; a forward_fn leaves it whole.
        graph.build_dependency(model, images, forward_fn=lambda network, batch: network(batch), verbose=False)
    except Exception as error:
        raise TraceError(f"expected a network whose channels can be followed, torch-pruning says: {error}") from error
    for name in outputs:
        if model.get_submodule(name) not in graph.module2node:
            raise TraceError(
                f"expected gradients to reach every layer; layer {name!r} runs, but its output is cut off from the "
                "logits (detach, no_grad, argmax or numpy in a forward?), so its channels cannot be followed"
            )
    return graph


def output_layers(graph: Any) -> set[nn.Module]:
    """The layers that produce the logits: the last ones with filters on each path to the output."""
    root = next(iter(graph.module2node.values()))  # tracing starts at the logits
    found: set[nn.Module] = set()
    stack, seen = [root], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_filter_layer(node.module):
            found.add(node.module)
        else:
            stack.extend(node.inputs)
    return found


def check_function(
    dense: nn.Module,
    pruned: nn.Module,
    images: Tensor,
    removed_in: Mapping[str, Sequence[int]],
    removed_out: Mapping[str, Sequence[int]],
) -> None:
    """Check that ``pruned`` computes what ``dense`` computes without the removed channels.

    Args:
        dense: the network before pruning; **its weights are changed**: columns of removed input channels become zero.
        pruned: the network after pruning, both in evaluation mode.
        images: what to run. # (N, C, H, W)
        removed_in: layer name to its removed input channels, counted in the dense network.
        removed_out: layer name to its removed output channels, likewise.

    Raises:
        TraceError: names the first layer that differs. Networks that normalize over channels (GroupNorm, LayerNorm)
            change with their width, so of them only that they run and stay finite is asked.
    """
    for name, indices in removed_in.items():
        _silence_inputs(dense.get_submodule(name), indices)
    with torch.no_grad():
        try:
            logits, outputs = run_named(pruned, images)
        except TraceError as error:
            raise TraceError(f"the pruned network does not run, its channels cannot be followed: {error}") from error
        _, wanted = run_named(dense, images)
    if not bool(logits.isfinite().all()):
        raise TraceError("expected finite logits after pruning, got NaN or infinity")
    if any(isinstance(module, _CROSS_CHANNEL_NORMS) for module in dense.modules()):
        return
    for name, output in outputs.items():
        dim = output.dim() - 1 if isinstance(dense.get_submodule(name), nn.Linear) else 1
        gone = set(removed_out.get(name, ()))
        kept = [channel for channel in range(wanted[name].shape[dim]) if channel not in gone]
        target = wanted[name].index_select(dim, torch.tensor(kept, device=output.device))
        same_shape = output.shape == target.shape
        if not same_shape or not torch.allclose(output, target, rtol=0, atol=_TOLERANCE * max(1.0, _peak(target))):
            raise TraceError(
                f"expected layer {name!r} to compute the same without the removed channels, got something else: an "
                "operation before it mixes channels in a way that cannot be followed (a shuffle, a split, a mean over "
                "channels, features joined to the image). Write it with torch.cat and layers, or set prune.ratio = 0"
            )


def _peak(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _silence_inputs(layer: nn.Module, indices: Sequence[int]) -> None:
    """Zero the weights that read the given input channels."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        if isinstance(layer, _ConvNd) and layer.groups > 1:
            inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
            for index in indices:
                group, local = divmod(index, inputs)
                weight[group * outputs : (group + 1) * outputs, local] = 0
        elif isinstance(layer, _ConvNd) and layer.transposed:
            weight[list(indices)] = 0
        else:
            weight[:, list(indices)] = 0

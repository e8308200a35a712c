"""Quantization of a whole network: where the quantizers go, how their ranges are calibrated.

The input image (after normalization) and every value that a convolution, a linear layer, an addition, a
concatenation or an average pooling reads is rounded; what these compute in between (a ReLU, a maximum) is done on the
accumulator, as integer kernels do. The logits stay in floating point. Where layers have fewer bits than sums, a value
that both read is rounded for the sums, and once more in front of the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from coldforge.compress.fakequant import SMALLEST_STEP, ActivationQuantizer, QuantizedLayer
from coldforge.compress.fold import round_shifts
from coldforge.compress.graph import fold_batchnorm, set_module, trace
from coldforge.compress.reads import is_image, layers_of, origin, trained_layers, values_read
from coldforge.errors import TraceError
from coldforge.recipe import QuantizeSpec

_CALIBRATION_BATCH = 128
_SAMPLES_PER_BATCH = 65536
_MSE_CANDIDATES = 80


def quantize(
    model: nn.Module, spec: QuantizeSpec, images: Tensor, *, beyond_box: float = 0.0, keep_batchnorm: bool = False
) -> nn.Module:
    """Fold BatchNorm, insert quantizers and calibrate them; the argument stays as it is.

    Args:
        model: a float classifier whose first layer is the normalization.
        spec: bits and calibration.
        images: calibration images in [0, 1], ``(N, C, H, W)``.
        beyond_box: how far pixels may leave [0, 1] (a literal threat model).
        keep_batchnorm: leave BatchNorm where it is, with its statistics measured anew on ``images``, for a network that
            is trained next. :func:`coldforge.compress.fold_quantized` makes it what it would be without.

    Returns:
        A new network in evaluation mode with the same weights, rounded in its forward pass; the argument itself (a
        copy) where ``spec`` turns quantization off.

    Raises:
        TraceError: the network cannot be traced; names the layer.
    """
    quantized = insert_quantizers(model, spec, keep_batchnorm=keep_batchnorm)
    if spec.enabled:
        if keep_batchnorm:  # rounded weights make other activations
            with _observing(quantized):
                _measure_batchnorm(quantized, images)
        calibrate(quantized, images, spec.calibration, beyond_box=beyond_box)
        if keep_batchnorm:
            _measure_batchnorm(quantized, images)
    return quantized


def insert_quantizers(
    model: nn.Module,
    spec: QuantizeSpec,
    *,
    keep_batchnorm: bool = False,
    last_input_at_edge: bool = True,
    sums_at_edge: bool = True,
    sums_apart: bool = True,
) -> nn.Module:
    """A copy of ``model`` with BatchNorm folded and quantizers inserted, not yet calibrated.

    Loading a checkpoint calls this, then fills in the trained state.

    Args:
        model: as in :func:`quantize`.
        spec: as in :func:`quantize`.
        keep_batchnorm: as in :func:`quantize`.
        last_input_at_edge: what the last layer reads has ``spec.edge_bits``, too, like its weights; False for
            checkpoints from before that was so.
        sums_at_edge: so has what no trained layer reads, only additions, concatenations and poolings; False as above.
            Bits of activations are those of what is multiplied, as in LSQ (Esser et al. 2020), where sums are not
            rounded at all.
        sums_apart: so have sums of a value that a trained layer reads, too, such as the stream between residual blocks:
            it is stored with ``spec.edge_bits``, and rounded once more in front of the layer. False as above: it has
            one grid for all, that of the layer.
    """
    if not spec.enabled:
        return copy.deepcopy(model)
    network = trace(model) if keep_batchnorm else fold_batchnorm(model)
    modules = dict(network.named_modules())
    trained = trained_layers(network)
    edges = [trained[0], trained[-1]] if trained else []
    last_input = origin(edges[-1].all_input_nodes[0], modules) if edges and last_input_at_edge else None
    multiplying = trained if trained and sums_apart else layers_of(network)
    multiplied = {origin(layer.all_input_nodes[0], modules) for layer in multiplying}
    summed = {value for node in network.graph.nodes if node not in multiplying for value in values_read(node, modules)}
    edge_bits = max(spec.activation_bits, spec.edge_bits)
    wide: set[fx.Node] = set()
    for node in list(network.graph.nodes):
        for source in values_read(node, modules):
            if isinstance(modules.get(str(source.target)), ActivationQuantizer):
                continue
            reads_image = is_image(source, modules)
            at_edge = reads_image or source is last_input or (sums_at_edge and source not in multiplied)
            apart = sums_apart and not at_edge and source in summed and edge_bits > spec.activation_bits
            quantizer = ActivationQuantizer(
                edge_bits if at_edge or apart else spec.activation_bits, reads_image=reads_image
            )
            rounded = _insert(network, modules, quantizer, source, learned=spec.learned_steps)
            source.replace_all_uses_with(rounded)
            rounded.args = (source,)
            wide |= {rounded} if apart else set()
    narrow: dict[fx.Node, fx.Node] = {}
    for layer in multiplying:
        value = layer.all_input_nodes[0]
        if origin(value, modules) in wide:
            if value not in narrow:
                quantizer = ActivationQuantizer(spec.activation_bits)
                narrow[value] = _insert(network, modules, quantizer, value, learned=spec.learned_steps)
            layer.replace_input_with(value, narrow[value])
    _replace_layers(network, spec, edges)
    round_shifts(network)
    network.graph.lint()
    network.recompile()
    return network.eval()


def _insert(
    network: fx.GraphModule,
    modules: dict[str, nn.Module],
    quantizer: ActivationQuantizer,
    value: fx.Node,
    *,
    learned: bool,
) -> fx.Node:
    """The node that rounds ``value``; nothing reads it yet."""
    quantizer.step.requires_grad_(learned and not quantizer.reads_image)
    name = f"quantizer_{sum(isinstance(module, ActivationQuantizer) for module in modules.values())}"
    modules[name] = quantizer
    network.add_submodule(name, quantizer)
    with network.graph.inserting_after(value):
        return network.graph.call_module(name, (value,))


def _replace_layers(network: fx.GraphModule, spec: QuantizeSpec, edges: Sequence[fx.Node]) -> None:
    modules = dict(network.named_modules())
    done: set[str] = set()
    for node in layers_of(network):
        name = str(node.target)
        if name in done:
            raise TraceError(
                f"layer {name!r} is used more than once in the forward pass; "
                "expected each convolution and linear layer used once, so that its input has one grid"
            )
        done.add(name)
        source = origin(node.all_input_nodes[0], modules)
        quantizer = modules[str(source.target)]
        assert isinstance(quantizer, ActivationQuantizer)
        layer = modules[name]
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            raise TraceError(f"layer {name!r}: expected padding_mode 'zeros' to quantize, got {layer.padding_mode!r}")
        bits = max(spec.weight_bits, spec.edge_bits) if node in edges else spec.weight_bits
        frozen = not layer.weight.requires_grad  # such as a shortcut of zeros and ones, which needs zeros
        ternary = spec.ternary or frozen or bits == 1  # on the way to one bit
        replacement = QuantizedLayer(layer, max(bits, 2 if frozen else 1), quantizer, ternary=ternary)
        if not spec.learned_steps:
            replacement.weight_step.requires_grad_(False)
        _fit_weight_step(replacement, "minmax" if not layer.weight.requires_grad else spec.calibration)
        set_module(network, name, replacement)


# --- calibration -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _fit_weight_step(layer: QuantizedLayer, method: str) -> None:
    """Choose the step of each output channel: the largest weight, or the least squared rounding error."""
    rows = layer.weight.flatten(1)  # (C, K)
    if layer.bits == 1:  # the mean of the magnitudes has the least squared error
        layer.weight_step.copy_(rows.abs().mean(1).clamp_min(SMALLEST_STEP))
        return
    peak = rows.abs().amax(1)
    without = SMALLEST_STEP if layer.has_odd_codes else 1.0  # of zeros alone, which have no code if all are odd
    peak = torch.where(peak > 0, peak, torch.full_like(peak, without))
    best = peak / layer.qmax
    if method == "mse":
        best_error = torch.full_like(peak, torch.inf)
        for part in torch.linspace(0.2, 1.0, _MSE_CANDIDATES):
            step = (peak * part / layer.qmax)[:, None]
            error = (layer.nearest_codes(rows / step).mul_(step) - rows).square().sum(1)
            better = error < best_error
            best, best_error = torch.where(better, step[:, 0], best), torch.where(better, error, best_error)
    layer.weight_step.copy_(best)


@contextmanager
def _observing(network: nn.Module) -> Iterator[None]:
    """Inside, activation quantizers let everything pass as it is."""
    quantizers = [module for module in network.modules() if isinstance(module, ActivationQuantizer)]
    try:
        for quantizer in quantizers:
            quantizer.observing = True
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observing = False


@torch.no_grad()
def _measure_batchnorm(network: nn.Module, images: Tensor) -> None:
    """Let BatchNorm's statistics be those of ``images``, in place."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over batches
            norm.train()
        for batch in images.split(_CALIBRATION_BATCH) if norms else ():
            network(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


@torch.no_grad()
def calibrate(network: nn.Module, images: Tensor, method: str, *, beyond_box: float = 0.0) -> None:
    """Fix the range of every activation quantizer of ``network`` from ``images``, in place.

    Observers exist only inside this call: a calibrated network never moves its ranges by itself. The range of the
    image is that of the box, whatever the calibration images show.

    Args:
        network: result of :func:`insert_quantizers`.
        images: ``(N, C, H, W)`` in [0, 1].
        method: ``"minmax"``; ``"percentile"`` (0.01 % and 99.99 %); ``"mse"``, the range with the least squared
            rounding error (Banner et al. 2019 solve the same problem under a distribution; this searches).
    """
    quantizers = [module for module in network.modules() if isinstance(module, ActivationQuantizer)]
    samples: dict[ActivationQuantizer, list[Tensor]] = {quantizer: [] for quantizer in quantizers}
    black_and_white = torch.stack([torch.zeros_like(images[0]) - beyond_box, torch.ones_like(images[0]) + beyond_box])

    def observer(quantizer: ActivationQuantizer) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            flat = inputs[0].detach().float().flatten()
            stride = max(flat.numel() // _SAMPLES_PER_BATCH, 1)
            ends = torch.stack([flat.min(), flat.max()])
            samples[quantizer].append(torch.cat([flat[::stride], ends]))

        return record

    handles = [quantizer.register_forward_hook(observer(quantizer)) for quantizer in quantizers]
    try:
        with _observing(network):
            network(black_and_white)
            extremes = {quantizer: torch.cat(seen) for quantizer, seen in samples.items()}
            for seen in samples.values():
                seen.clear()
            for batch in images.split(_CALIBRATION_BATCH):
                network(batch)
    finally:
        for handle in handles:
            handle.remove()
    for quantizer in quantizers:
        if quantizer.reads_image:  # an adversary uses the whole box, and 8-bit pixels must stay exact
            quantizer.set_range(*_image_range(*_range(extremes[quantizer], quantizer.bits, "minmax"), quantizer.qmax))
        else:
            quantizer.set_range(*_range(torch.cat(samples[quantizer]), quantizer.bits, method))


def refit(layer: QuantizedLayer) -> None:
    """Choose the weight steps anew for the bits that the layer has now: least squared rounding error."""
    _fit_weight_step(layer, "mse")


def set_bits(network: nn.Module, bits: int, *, keep_steps: bool = False) -> bool:
    """Let every quantizer have ``bits`` bits, or as many as it ends with if these are more; in place.

    For networks whose bits are lowered step by step. Ranges of activations stay, steps of weights are fitted anew.

    Args:
        network: fake-quantized.
        bits: how many for now.
        keep_steps: leave all steps alone, because trained ones are loaded next.

    Returns:
        Whether anything changed.
    """
    changed = False
    for module in network.modules():
        if not isinstance(module, ActivationQuantizer | QuantizedLayer):
            continue
        wanted = max(bits, module.final_bits)
        if wanted == module.bits:
            continue
        changed = True
        if isinstance(module, QuantizedLayer):
            module.bits = wanted
            if not keep_steps:
                refit(module)
            continue
        step, zero = float(module.step.detach()), int(module.zero_point)
        low, high = -zero * step, (module.qmax - zero) * step
        module.bits = wanted
        if not keep_steps:
            module.set_range(low, high)
    return changed


def _image_range(low: float, high: float, levels: int) -> tuple[float, float]:
    """The range of the image, wider by one step where black would lie midway between two codes.

    With a mean of 0.5 every 8-bit pixel would be a tie, rounded up or down by the last bit of a float: neighbours
    would share a code, and runtimes would not agree which. A step wider by 1/254 costs one of 256 gray values.
    """
    tie = abs(-low / (high - low) * levels % 1 - 0.5) < 0.01
    widened = levels / (levels - 1) if tie else 1.0
    return low * widened, high * widened


def _range(values: Tensor, bits: int, method: str) -> tuple[float, float]:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if method == "minmax" or high == low:
        return low, high
    if method == "percentile":
        ordered = values.sort().values
        last = len(ordered) - 1
        return min(float(ordered[int(last * 0.0001)]), 0.0), max(float(ordered[round(last * 0.9999)]), 0.0)
    if len(values) > 4 * _SAMPLES_PER_BATCH:
        values = values[:: len(values) // (4 * _SAMPLES_PER_BATCH)]
    best, best_error = (low, high), torch.inf
    levels = 2**bits - 1
    for part in torch.linspace(0.1, 1.0, _MSE_CANDIDATES).tolist():
        step = (high - low) * part / levels
        zero = round(-low * part / step)
        codes = (values / step).round_().clamp_(-zero, levels - zero)
        error = float((codes.mul_(step) - values).square_().mean())
        if error < best_error:
            best, best_error = (low * part, high * part), error
    return best


def weight_bit_widths(network: nn.Module) -> list[tuple[int, int]]:
    """(number of values, bits) of every parameter as it would be packed: weights at their bits, the rest at 32."""
    sizes = []
    packed: set[int] = set()
    for module in network.modules():
        if isinstance(module, QuantizedLayer):
            sizes.append((module.weight.numel(), module.bits))
            packed.add(id(module.weight))
    sizes += [(parameter.numel(), 32) for parameter in network.parameters() if id(parameter) not in packed]
    return sizes

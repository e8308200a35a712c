"""Writes a network as one ONNX file that needs neither this package nor torch: QDQ integers, or float."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import onnx
import torch
from torch import Tensor, fx, nn

from coldforge._version import __version__
from coldforge.compress import QuantizedLayer
from coldforge.deploy.graph import miscounts, tidy
from coldforge.deploy.integer import integer_form, translations
from coldforge.deploy.torchlib import decompose_if_need_be, kept_table
from coldforge.errors import ExportError, UsageError
from coldforge.sealed import write_atomic

OPSET = 21
"""The first with 16-bit QuantizeLinear."""

_OWN_KEYS = ("coldforge_version", "classes", "input", "image_shape", "largest_bits", "largest_weight_bits")


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    image_shape: Sequence[int],
    classes: Sequence[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``model`` as ``path``: input ``image`` (batch, C, H, W) float32, output ``logits`` (batch, K).

    A fake-quantized network becomes QuantizeLinear/DequantizeLinear pairs with int8 weights (int16 above 8 bits) and
    int32 biases; ONNX Runtime runs it with integer kernels. Below 8 bits the codes are the clipped values of 8-bit
    kernels: smaller steps in accuracy and packed size, no speed. A float network becomes a float file. Equal arguments
    give equal bytes, and no byte tells where the file was written.

    Args:
        model: a classifier in the box [0, 1] with its normalization inside; stays as it is.
        path: the file, replaced whole or not at all.
        image_shape: (C, H, W).
        classes: name of each logit.
        metadata: further facts for the file (threat model, normalization, ...), beside coldforge_version, classes
            (JSON), input, image_shape (JSON), largest_bits (of any code; 32: float) and largest_weight_bits, which are
            always there.

    Raises:
        ExportError: where a layer cannot be exported (names it) or integer kernels would compute it wrong, a weight is
            not finite, the number of logits is not that of the classes, or the file cannot be written.
        UsageError: for a wrong shape or a reserved metadata key.
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or any(size < 1 for size in shape):
        raise UsageError(f"image_shape: expected (channels, height, width), got {shape}")
    taken = sorted(set(metadata or {}) & set(_OWN_KEYS))
    if taken:
        raise UsageError(f"metadata: expected keys other than {', '.join(_OWN_KEYS)}, got {', '.join(taken)}")
    network, bits = integer_form(model)
    _check_finite(network)
    with kept_table(), _quiet(), torch.no_grad():
        program = _traced(network, shape, len(classes))
        result = tidy(_translated(network, program, fold=bits == 32))
    if bits <= 8 and miscounts(result.graph):
        raise ExportError(
            "expected an average pooling that integer kernels compute, got one with padding, ceil_mode=True and "
            "count_include_pad=True, where ONNX Runtime's is wrong; set one of the two to False"
        )
    result.producer_name, result.producer_version = "coldforge", __version__
    facts = {
        "coldforge_version": __version__,
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "input": "pixels in [0, 1], NCHW float32",
        "image_shape": json.dumps(shape),
        "largest_bits": str(bits),
        "largest_weight_bits": str(_largest_weight_bits(model)),
        **(metadata or {}),
    }
    onnx.helper.set_model_props(result, facts)
    onnx.checker.check_model(result, full_check=True)
    try:
        write_atomic(Path(path), result.SerializeToString(deterministic=True))
    except OSError as error:
        raise ExportError(
            f"cannot write {path}: {error.strerror or error}; choose another folder or free space"
        ) from error


def _largest_weight_bits(model: nn.Module) -> int:
    return max((layer.bits for layer in model.modules() if isinstance(layer, QuantizedLayer)), default=32)


def _check_finite(network: nn.Module) -> None:
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ExportError(
                f"expected finite weights, got NaN or infinity in {name!r}; train or load the model again"
            )


def _traced(network: nn.Module, image_shape: tuple[int, ...], classes: int) -> torch.export.ExportedProgram:
    """The network as a torch.export graph with a free batch size."""
    images = torch.full((2, *image_shape), 0.5)
    with _naming_the_layer(network):
        logits = network(images)
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ExportError(f"expected logits of shape (N, {classes}), one for each class, got {got} for N = 2")
    with _naming_the_layer(network), redirect_stderr(io.StringIO()):  # torch prints the graph of a failure
        return torch.export.export(
            network, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
        )


@contextmanager
def _naming_the_layer(network: nn.Module) -> Iterator[None]:
    """Turn an exception inside ``network`` into an ExportError that names the layer in which it was raised."""
    path: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: path.append(name)

    def leave(*_: object) -> None:
        path.pop()

    handles = []
    for name, module in network.named_modules():
        if not isinstance(module, fx.GraphModule):  # its call is a wrapper of its own
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield
    except Exception as error:
        raise ExportError(_cannot(network, path[-1] if path else "", error)) from error
    finally:
        for handle in handles:
            handle.remove()


def _translated(network: nn.Module, program: torch.export.ExportedProgram, *, fold: bool) -> onnx.ModelProto:
    try:
        result = torch.onnx.export(
            decompose_if_need_be(program),
            dynamo=True,
            opset_version=OPSET,
            optimize=fold,  # an integer network keeps the pattern as it is written
            input_names=["image"],
            output_names=["logits"],
            custom_translation_table=translations(),
            verbose=False,
        )
    except Exception as error:
        raise ExportError(_cannot(network, _layer_of(program, error), error)) from error
    assert result is not None
    return result.model_proto


def _layer_of(program: torch.export.ExportedProgram, error: BaseException) -> str:
    """Name of the layer whose operator has no ONNX form, "" where it cannot be found.

    The exporter names a node of its own, decomposed graph, and the values that it reads. What is not a node of our
    graph under the same name reads one that is.
    """
    found = re.search(r"translating node (.*)", " ".join(map(str, _causes(error))))
    nodes = {node.name: node for node in program.graph.nodes}
    name, *reads = re.findall(r"%(\w+)", found[1]) if found else [""]
    candidates = (
        [nodes[name]] if name in nodes else [user for read in reads if read in nodes for user in nodes[read].users]
    )
    stacks = [node.meta["nn_module_stack"] for node in candidates if node.meta.get("nn_module_stack")]
    return str(list(stacks[0].values())[-1][0]) if stacks else ""


def _causes(error: BaseException) -> list[BaseException]:
    """The exception and what it was raised from, outermost first."""
    inner = error.__cause__ or error.__context__
    return [error] if inner is None else [error, *_causes(inner)]


def _cannot(network: nn.Module, layer: str, error: BaseException) -> str:
    kind = type(dict(network.named_modules()).get(layer, network)).__name__
    where = f"layer {layer!r} ({kind})" if layer else kind
    root = _causes(error)[-1]
    reason = next((line.strip() for line in str(root).splitlines() if line.strip()), type(root).__name__)
    return (
        f"{where} cannot be exported to ONNX: {reason.rstrip('.')}. Expected operations that have an ONNX form, "
        "work on any batch size, and do not depend on the values of a tensor"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own warnings and log lines (about torchvision, deprecated internals) from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

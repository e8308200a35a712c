"""Tidies an exported ONNX graph, so that runtimes find the patterns they run on integers and bytes are reproducible.

torch's exporter writes a flatten as a chain that computes a shape, an average over the image as ReduceMean, and leaves
stack traces and paths of this machine in the file. None of that changes a result; all of it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

_MOVES_CODES = ("Flatten", "MaxPool", "Reshape", "Squeeze", "Identity")
"""Operators that give the same when they work on integer codes, provided that the step is one for the tensor."""

_GATHERED = 4
"""Channels that integer convolution kernels gather at once."""


def tidy(model: ModelProto) -> ModelProto:
    """A smaller, equivalent copy of an exported model whose input is ``image`` (its batch dimension: ``batch``)."""
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    kinds = {item.name: item.type.tensor_type.elem_type for item in graph.value_info}
    _constants_to_initializers(graph, kinds)
    _plain_average_pool(graph)
    shapes = {item.name: _shape(item) for item in (*graph.value_info, *graph.input, *graph.output)}
    _restore_flatten(graph, shapes)
    _restore_average_pool(graph, shapes)
    while _move_rounding(graph):
        pass
    _widen_image(graph)
    _sort(graph)
    _drop_unused(graph)
    _strip(result)
    return result


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...] | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)


def _replace(graph: GraphProto, change: Callable[[NodeProto], list[NodeProto] | None]) -> None:
    """Rewrite nodes one by one: ``change`` gives the new nodes, or None to keep the old one."""
    nodes: list[NodeProto] = []
    for node in graph.node:
        new = change(node)
        nodes += [node] if new is None else new
    _set_nodes(graph, nodes)


def _set_nodes(graph: GraphProto, nodes: list[NodeProto]) -> None:
    copies = []
    for node in nodes:  # the elements of a repeated field die with it
        copies.append(NodeProto())
        copies[-1].CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def _constants_to_initializers(graph: GraphProto, kinds: dict[str, int]) -> None:
    """Constant nodes, and constants that are reshaped or cast to the type of a value, become initializers."""
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer if len(item.dims) < 2}

    def change(node: NodeProto) -> list[NodeProto] | None:
        if node.op_type == "Constant":
            value = _constant(node)
        elif node.op_type == "Reshape" and node.input[0] in values and node.input[1] in values:
            value = values[node.input[0]].reshape(values[node.input[1]].tolist())
        elif node.op_type == "CastLike" and node.input[0] in values and kinds.get(node.input[1]) == TensorProto.FLOAT:
            value = values[node.input[0]].astype(np.float32)  # the bounds of a Clip, such as ReLU6
        else:
            return None
        values[node.output[0]] = value
        graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        return []

    _replace(graph, change)


def _constant(node: NodeProto) -> np.ndarray[Any, Any]:
    value = helper.get_attribute_value(node.attribute[0])
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value, np.float32 if "float" in node.attribute[0].name else np.int64)


def _restore_flatten(graph: GraphProto, shapes: dict[str, tuple[int | str, ...] | None]) -> None:
    """A Reshape to two dimensions, of which the first stays the symbolic batch, is a Flatten."""

    def change(node: NodeProto) -> list[NodeProto] | None:
        if node.op_type != "Reshape":
            return None
        before, after = shapes.get(node.input[0]), shapes.get(node.output[0])
        if not before or not after or len(after) != 2 or before[0] != after[0] or not isinstance(after[0], str):
            return None
        return [helper.make_node("Flatten", [node.input[0]], list(node.output), axis=1)]

    _replace(graph, change)


def _restore_average_pool(graph: GraphProto, shapes: dict[str, tuple[int | str, ...] | None]) -> None:
    """The mean over height and width is a GlobalAveragePool, which has an integer kernel."""
    constants = {item.name: item for item in graph.initializer}

    def change(node: NodeProto) -> list[NodeProto] | None:
        if node.op_type != "ReduceMean" or len(node.input) != 2 or node.input[1] not in constants:
            return None
        before = shapes.get(node.input[0])
        axes = numpy_helper.to_array(constants[node.input[1]]).ravel().tolist()
        if not before or len(before) != 4 or sorted(axis % 4 for axis in axes) != [2, 3]:
            return None
        if _attribute(node, "keepdims", 1):
            return [helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output))]
        pooled = f"{node.output[0]}_pooled"
        return [
            helper.make_node("GlobalAveragePool", [node.input[0]], [pooled]),
            helper.make_node("Flatten", [pooled], list(node.output), axis=1),
        ]

    _replace(graph, change)


def _plain_average_pool(graph: GraphProto) -> None:
    """Without padding, counting the padding means nothing, and ONNX Runtime's integer kernel gets it wrong where the
    last window is cut off (ceil_mode).
    """
    for node in graph.node:
        if node.op_type == "AveragePool" and not any(_attribute(node, "pads", ())):
            for item in node.attribute:
                if item.name == "count_include_pad":
                    item.i = 0


def miscounts(graph: GraphProto) -> bool:
    """Whether ONNX Runtime's integer kernels would divide the last windows of an average pooling by a wrong number."""
    return any(
        node.op_type == "AveragePool" and _attribute(node, "ceil_mode", 0) and _attribute(node, "count_include_pad", 0)
        for node in graph.node
    )


def _widen_image(graph: GraphProto) -> None:
    """Give images of fewer than four channels empty ones up to four, right after they are rounded.

    Integer convolution kernels gather their inputs four bytes at a time; for one or three channels ONNX Runtime gathers
    single bytes, and the first layer, which computes little, takes half of the time of a small network. The new
    channels hold the code of 0 and meet weights of 0: not one bit of the result changes.
    """
    makers = {name: node for node in graph.node for name in node.output}
    constants = {item.name: item for item in graph.initializer}

    def change(node: NodeProto) -> list[NodeProto] | None:
        if node.op_type != "Conv" or _attribute(node, "group", 1) != 1:
            return None
        image, weight = makers.get(node.input[0]), makers.get(node.input[1])
        if image is None or weight is None or {image.op_type, weight.op_type} != {"DequantizeLinear"}:
            return None
        kernel = constants.get(weight.input[0])
        if kernel is None or kernel.dims[1] >= _GATHERED or kernel.data_type != TensorProto.INT8:
            return None
        if constants[image.input[2]].data_type != TensorProto.UINT8:  # 16-bit codes have no integer kernels
            return None
        missing = _GATHERED - kernel.dims[1]
        values = numpy_helper.to_array(kernel)
        wide = np.concatenate([values, np.zeros((len(values), missing, *values.shape[2:]), np.int8)], axis=1)
        kernel.CopyFrom(numpy_helper.from_array(wide, kernel.name))
        name = node.output[0]
        pads = np.array([0, 0, 0, 0, 0, missing, 0, 0], np.int64)
        graph.initializer.append(numpy_helper.from_array(pads, f"{name}_pads"))
        return [
            helper.make_node("Pad", [image.input[0], f"{name}_pads", image.input[2]], [f"{name}_wide_codes"]),
            _rewired(image, f"{name}_wide_codes", f"{name}_wide"),
            _rewired(node, f"{name}_wide", name),
        ]

    _replace(graph, change)


def _move_rounding(graph: GraphProto) -> bool:
    """Let operators that only move values work on codes: DequantizeLinear sinks below them, QuantizeLinear rises.

    Runtimes fuse a layer with the rounding right before and right after it and look no further.

    Returns:
        Whether anything moved.
    """
    makers = {name: node for node in graph.node for name in node.output}
    readers = dict.fromkeys(makers, 0)
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    eight_bit = (TensorProto.UINT8, TensorProto.INT8)  # MaxPool has no 16-bit form
    per_tensor = {item.name for item in graph.initializer if len(item.dims) == 0 and item.data_type in eight_bit}
    nodes: list[NodeProto] = []
    moved = False
    for node in graph.node:
        below = makers.get(node.input[0]) if node.input else None
        sinks = (
            below is not None
            and below.op_type == "DequantizeLinear"
            and below.input[2] in per_tensor
            and node.op_type in _MOVES_CODES
            and len(node.output) == 1
        )
        rises = (
            below is not None
            and below.op_type in ("Flatten", "Reshape", "Squeeze")
            and readers[below.output[0]] == 1
            and node.op_type == "QuantizeLinear"
            and node.input[2] in per_tensor
        )
        if below is not None and (sinks or rises):
            codes = f"{node.output[0]}_codes"
            nodes += [_rewired(node, below.input[0], codes), _rewired(below, codes, node.output[0])]
            moved = True
        else:
            nodes.append(node)
    _set_nodes(graph, nodes)
    _drop_unused(graph)
    return moved


def _rewired(node: NodeProto, source: str, target: str) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[0], copy.output[0] = source, target
    return copy


def _sort(graph: GraphProto) -> None:
    """Producers before consumers, otherwise in the order they are in."""
    known = {item.name for item in (*graph.initializer, *graph.input)} | {""}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = next(node for node in waiting if known.issuperset(node.input))
        waiting.remove(ready)
        ordered.append(ready)
        known.update(ready.output)
    _set_nodes(graph, ordered)


def _drop_unused(graph: GraphProto) -> None:
    """Remove nodes and constants that no output needs."""
    needed = {item.name for item in graph.output}
    kept = []
    for node in reversed(list(graph.node)):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    _set_nodes(graph, kept[::-1])
    initializers = [item for item in graph.initializer if item.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def _strip(model: ModelProto) -> None:
    """Drop what describes the exporting machine, and give short names; weights keep theirs."""
    graph = model.graph
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:], model.functions[:]
    model.doc_string = graph.doc_string = ""
    graph.name = "coldforge"
    fixed = {item.name for item in (*graph.input, *graph.output, *graph.initializer)} | {""}
    names: dict[str, str] = {}
    counts: Iterator[int] = iter(range(len(graph.node) * 4 + 4))
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for index, name in enumerate(node.output):
            if name not in fixed:
                names[name] = f"v{next(counts)}"
                node.output[index] = names[name]
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        node.name = f"{node.op_type}_{node.output[0]}"
    for item in (*graph.input, *graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
        item.type.tensor_type.shape.dim[0].dim_param = "batch"
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]

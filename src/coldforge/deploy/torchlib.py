"""What torch.onnx.export does anew for each file, though it need not.

It parses the source of some 500 ONNX functions, which takes about as long as the rest of a small network's export; and
it traces the network a second time, to take operators without an ONNX form apart, where all of them have one.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_TABLES: dict[str, Any] = {}
_EXPORTING = threading.RLock()
_WHOLE = {f"aten.{name}" for name in ("conv2d.default", "linear.default", "flatten.using_ints", "reshape.default")}
_WHOLE |= {"aten.max_pool2d.default", "aten.sym_size.int"}
"""Operators that are made of others and yet have an ONNX form of their own."""


@contextmanager
def kept_table() -> Iterator[None]:
    """Inside, torch.onnx.export takes copies of the first table that it built in this process.

    The table is no public part of torch: with a version that has another one each file takes its own, as without this.
    One thread at a time is inside.
    """
    with _EXPORTING:
        try:
            from torch.onnx._internal.exporter._registration import ONNXRegistry as Registry

            own, build = Registry.__dict__["from_torchlib"], Registry.from_torchlib
        except (ImportError, AttributeError, KeyError):
            yield
            return

        def from_torchlib(*args: Any, **kwargs: Any) -> Any:
            key = repr((args, kwargs))
            if key not in _TABLES:
                _TABLES[key] = build(*args, **kwargs)
            functions = getattr(_TABLES[key], "functions", None)
            if not isinstance(functions, dict) or not all(isinstance(each, list) for each in functions.values()):
                return build(*args, **kwargs)
            table = copy.copy(_TABLES[key])  # own translations are inserted into its lists
            table.functions = {operator: list(each) for operator, each in functions.items()}
            return table

        Registry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[method-assign]
        try:
            yield
        finally:
            Registry.from_torchlib = own  # type: ignore[method-assign]


def decompose_if_need_be(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Let ``program`` answer that it is decomposed already if no operator of it is to be.

    It is traced again where a node is not an operator, or one that torch takes apart, by the table it is asked with or
    of itself, or that changes a tensor in place, or that nobody reads. The file computes the same; reshapes, which
    torch turns into views and copies, can be written in other words.
    """
    decompose = program.run_decompositions

    def run_decompositions(table: Any = None, **options: Any) -> torch.export.ExportedProgram:
        called = [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]
        done = table is not None and all(node.users and _is_whole(node.target, table) for node in called)
        return program if done else decompose(table, **options)

    program.run_decompositions = run_decompositions
    return program


def _is_whole(target: object, table: Container[object]) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or target in table:
        return False
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return not composite or str(target) in _WHOLE

"""Keeps the exporter's table of ONNX functions: torch parses the source of some 500 of them anew for each file, which
takes about as long as the rest of a small network's export.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TABLES: dict[str, Any] = {}


@contextmanager
def kept_table() -> Iterator[None]:
    """Inside, torch.onnx.export takes copies of the first table that it built in this process.

    The table is no public part of torch: a version that calls it otherwise exports as it does, only slower.
    """
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
        table = copy.copy(_TABLES[key])  # own translations are inserted into its lists
        table.functions = {operator: list(functions) for operator, functions in table.functions.items()}
        return table

    Registry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Registry.from_torchlib = own  # type: ignore[method-assign]

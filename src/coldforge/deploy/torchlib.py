"""Keeps the exporter's table of ONNX functions: torch parses the source of some 500 of them anew for each file, which
takes about as long as the rest of a small network's export.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TABLES: dict[str, Any] = {}
_EXPORTING = threading.RLock()


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

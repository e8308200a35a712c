"""coldforge: a trained image classifier in, a small, tough, proven ONNX file out.

    recipe -> data -> baseline -> prune -> quantize -> fine-tune -> export -> evaluate + measure -> record -> report

The network is compressed first (structured channel pruning, quantization) and fine-tuned adversarially after it: the
small network is cheaper to attack and to train. Size, speed and robustness are then found on the exported file. See
Thorsteinsson, Henriksen, Chen, Selvan, arXiv 2403.09441.

    import coldforge
    forged = coldforge.forge(model, "fashion-mnist", settings={"threat_model.eps": 0.1})
    forged.session().labels(images)

Names are loaded on first use: ``import coldforge`` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldforge._version import __version__ as __version__

if TYPE_CHECKING:
    from coldforge.api import Forged as Forged
    from coldforge.api import forge as forge
    from coldforge.data import from_arrays as from_arrays
    from coldforge.data import load_data as load_data
    from coldforge.errors import ColdforgeError as ColdforgeError
    from coldforge.pipeline import run as run
    from coldforge.progress import Progress as Progress
    from coldforge.recipe import Recipe as Recipe
    from coldforge.recipe import load_recipe as load_recipe
    from coldforge.records import Record as Record
    from coldforge.records import load_record as load_record
    from coldforge.store import Store as Store

_HOMES = {
    "ColdforgeError": "errors",
    "Progress": "progress",
    "Recipe": "recipe",
    "Record": "records",
    "Store": "store",
    "Forged": "api",
    "forge": "api",
    "from_arrays": "data",
    "load_data": "data",
    "load_recipe": "recipe",
    "load_record": "records",
    "run": "pipeline",
}

__all__ = [
    "ColdforgeError",
    "Forged",
    "Progress",
    "Recipe",
    "Record",
    "Store",
    "__version__",
    "forge",
    "from_arrays",
    "load_data",
    "load_recipe",
    "load_record",
    "run",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'coldforge' has no attribute {name!r}")
    return getattr(import_module(f"coldforge.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

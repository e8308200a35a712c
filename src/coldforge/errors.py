"""The exception tree. Every message says what was expected, what was found and what to do.

ColdforgeError
├── RecipeError        a key or a value of a recipe (also a ValueError); the CLI exits with 2
├── UsageError         a wrong call of a command or a function; the CLI exits with 2
├── DataError          a data set is missing, damaged or does not fit
├── ModelError         a network or a checkpoint cannot be used
│   └── TraceError     a network cannot be traced; names the layer
├── AttackError        an attack would give a number that means nothing
├── TrainingError      training failed and could not be saved by a retry
│   └── CollapseError  the network fell to a constant answer
├── ExportError        the ONNX file could not be written or does not match its twin
└── StoreError         the store cannot be read or written
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ColdforgeError(Exception):
    """Root of all errors that coldforge raises on purpose."""


class RecipeError(ColdforgeError, ValueError):
    """A key or a value of a recipe is wrong."""


class UsageError(ColdforgeError, ValueError):
    """A command or a function was called in a way that cannot work."""


class DataError(ColdforgeError):
    """A data set is missing, damaged or does not fit the network."""


class ModelError(ColdforgeError):
    """A network or a checkpoint cannot be used."""


class TraceError(ModelError):
    """A network cannot be traced; the message names the layer."""


class AttackError(ColdforgeError):
    """An attack was asked for something that would give a meaningless number."""


class TrainingError(ColdforgeError):
    """Training failed and could not be saved by a retry."""


class CollapseError(TrainingError):
    """The network fell to a constant answer."""


class ExportError(ColdforgeError):
    """The ONNX file could not be written, or does not match its twin."""


class StoreError(ColdforgeError):
    """The store cannot be read or written."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """A half-sentence that names the closest valid word, or lists all of them.

    >>> nearest("epoch", ["epochs", "lr"])
    "did you mean 'epochs'?"
    >>> nearest("zzz", ["epochs", "lr"])
    'valid: epochs, lr'
    """
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(names)}"

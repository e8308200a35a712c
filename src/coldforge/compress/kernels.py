"""The arithmetic of fake quantization in one pass over memory each way: a small C++ library, compiled on first use.

In plain PyTorch it takes several passes each way, each of which reads and writes a whole activation, and compiled by
torch.compile each call costs more than the arithmetic of a small network. The kernels (``kernels.cpp``)
compute in float32 whatever the type of the activation, so the sum in a step's gradient is exact where that of bfloat16
is not. They are called with ctypes, need a C++ compiler and no headers of torch, and share its OpenMP.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from coldforge.provenance import cpp_compiler, cpu_flags
from coldforge.sealed import write_atomic
from coldforge.store import default_root

_SOURCE = Path(__file__).with_name("kernels.cpp")
_ALWAYS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_WAYS = (("-march=native", "-fopenmp"), ("-fopenmp",), ())
"""Flags, the fastest first; a compiler may refuse some."""
_COMPILE_SECONDS = 120.0

_fused = False


@contextmanager
def fused(wanted: bool = True) -> Iterator[bool]:
    """Inside, the kernels are used, if they can be compiled here (a moment, the first time on a machine).

    Yields:
        Whether they are used.
    """
    global _fused
    before = _fused
    _fused = wanted and _library() is not None
    try:
        yield _fused
    finally:
        _fused = before


def is_fused() -> bool:
    """Whether the kernels are to be used now."""
    return _fused


# --- the kernels -----------------------------------------------------------------------------------------------------


def takes(x: Tensor, step: Tensor) -> bool:
    """Whether there is a kernel for these: one step, or float32 with one step for each row."""
    if step.ndim == 0:
        return x.dtype in _NAMES
    return x.dtype == torch.float32 and x.ndim > 0 and step.numel() == len(x) == step.shape[0]


def round_to_grid(x: Tensor, step: Tensor, low: float, high: float) -> Tensor:
    """``step * clamp(round(x / step), low, high)``, half to even, like ``x``.

    Args:
        x: any shape, dense (:func:`dense`).
        step: shape (), or one step for each row of ``x``.
        low: smallest code less the code of 0.
        high: largest code less the code of 0.
    """
    result = torch.empty_like(x)
    library, threads = _library(), torch.get_num_threads()
    assert library is not None
    if step.ndim:
        rows, steps = len(x), step.detach().contiguous()
        library.round_rows(
            x.data_ptr(), result.data_ptr(), rows, x.numel() // max(rows, 1), steps.data_ptr(), low, high, threads
        )
    else:
        kernel = getattr(library, f"round_{_NAMES[x.dtype]}")
        kernel(x.data_ptr(), result.data_ptr(), x.numel(), step.item(), low, high, threads)
    return result


def gradients(
    grad: Tensor, x: Tensor, step: Tensor, borders: tuple[float, float, float, float], *, by_x: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Gradients of :func:`round_to_grid`: by ``x``, straight through inside the range; by ``step``, as in LSQ.

    Args:
        grad: of the result.
        x: as given to it, like ``step``.
        step: the same.
        borders: ``low`` and ``high`` as given to it; and between which values of ``x / step``, both excluded, ``x`` is
            inside the range.
        by_x: whether the first one is wanted.

    Returns:
        None or like ``x``; and of the shape of ``step``.
    """
    if grad.dtype != x.dtype or grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    library, threads = _library(), torch.get_num_threads()
    assert library is not None
    grad_x = torch.empty_like(x) if by_x or step.ndim else None
    if step.ndim:
        assert grad_x is not None
        rows, steps = len(x), step.detach().contiguous()
        grad_step = torch.empty_like(steps)
        library.gradients_rows(
            grad.data_ptr(), x.data_ptr(), grad_x.data_ptr(), rows, x.numel() // max(rows, 1),
            steps.data_ptr(), _array(borders), grad_step.data_ptr(), threads,
        )  # fmt: skip
        return grad_x, grad_step
    kernel = getattr(library, f"gradients_{_NAMES[x.dtype]}")
    target = None if grad_x is None else grad_x.data_ptr()
    total = kernel(grad.data_ptr(), x.data_ptr(), target, x.numel(), step.item(), _array(borders), threads)
    return grad_x, torch.tensor(total, dtype=step.dtype)


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy of it whose numbers lie in memory without gaps, row after row."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x.detach()
    return x.detach().contiguous()


_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


@functools.cache
def _array(numbers: tuple[float, ...]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(numbers))(*numbers)


# --- compiling -------------------------------------------------------------------------------------------------------


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The kernels; None where there is no compiler, or none that can compile them, which is said."""
    compiler = cpp_compiler()
    if compiler is None:
        return None
    try:
        return _typed(ctypes.CDLL(str(_compiled(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        warnings.warn(f"fake quantization runs uncompiled, more slowly: {said.strip()[:200]}", stacklevel=3)
        return None


def _compiled(compiler: str) -> Path:
    """The library's file, in the store's folder; compiled if it is not there for this source, compiler and CPU."""
    source = _SOURCE.read_bytes()
    facts = [compiler, *_ALWAYS, *map(str, _WAYS), *sorted(cpu_flags())]
    name = hashlib.sha256(source + "\n".join(facts).encode()).hexdigest()[:16]
    path = default_root() / "kernels" / f"{name}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda target: _compile(compiler, target))
    return path


def _compile(compiler: str, target: Path) -> None:
    for number, flags in enumerate(_WAYS, 1):
        command = [compiler, *_ALWAYS, *flags, "-o", str(target), str(_SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        except subprocess.CalledProcessError:
            if number == len(_WAYS):
                raise
        else:
            return


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    for name in _NAMES.values():
        rounding, grading = getattr(library, f"round_{name}"), getattr(library, f"gradients_{name}")
        rounding.argtypes = (pointer, pointer, count, number, number, number, threads)
        rounding.restype = None
        grading.argtypes = (pointer, pointer, pointer, count, number, pointer, threads)
        grading.restype = ctypes.c_double
    library.round_rows.argtypes = (pointer, pointer, count, count, pointer, number, number, threads)
    library.round_rows.restype = None
    library.gradients_rows.argtypes = (
        pointer, pointer, pointer, count, count, pointer, pointer, pointer, threads,
    )  # fmt: skip
    library.gradients_rows.restype = None
    return library

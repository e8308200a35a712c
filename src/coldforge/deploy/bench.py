"""Files side by side: latency, throughput, size and energy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coldforge.deploy.runtime import Session, open_session
from coldforge.errors import ModelError, UsageError
from coldforge.measure.energy import energy_per_image
from coldforge.measure.latency import measure_latency

_DEFAULT_SIDE = 32


@dataclass(frozen=True)
class BenchRow:
    """One file, in one runtime, at one batch size."""

    name: str
    runtime: str
    batch: int
    """Images per call."""
    threads: int
    median: float
    """Seconds per call; so are p10 and p90."""
    p10: float
    p90: float
    images_per_s: float
    """At the median."""
    ratio: float
    """How many times as fast as the first file in the first runtime, at the same batch size."""
    size_bytes: int
    energy_j_per_image: float
    energy_method: str
    """Begins with "measured" or "estimated"."""


def bench(
    paths: Sequence[Path],
    *,
    batches: Sequence[int] = (1, 64),
    threads: int = 0,
    seconds: float = 1.0,
    runtimes: Sequence[str] = ("onnxruntime",),
) -> list[BenchRow]:
    """Measure the latency of files in turns (A B A B ...), so that their ratios hold on a noisy machine, and then the
    energy of each.

    Args:
        paths: ONNX files, or folders that hold a ``model.onnx``.
        batches: images per call.
        threads: threads of a runtime; 0 takes the physical cores.
        seconds: for the latency, and again for the energy, of each row.
        runtimes: "onnxruntime", "openvino".

    Returns:
        Rows by batch size, then in the order of ``paths``, then of ``runtimes``.

    Raises:
        UsageError: for nothing to measure, a missing file, or a batch size that a file does not accept.
        ModelError: for a file that cannot be used.
    """
    if not paths or not batches or not runtimes or min(batches) < 1:
        raise UsageError(
            "bench: expected at least one file, batch size (1 or more) and runtime, "
            f"got {len(paths)} files, batches {list(batches)}, runtimes {list(runtimes)}"
        )
    files = [_onnx_file(Path(path)) for path in paths]
    names = _names([Path(path) for path in paths])
    sessions = [
        (name, open_session(file, runtime, threads=threads))
        for name, file in zip(names, files, strict=True)
        for runtime in runtimes
    ]
    return [row for batch in batches for row in _rows(sessions, batch, seconds)]


def _rows(sessions: Sequence[tuple[str, Session]], batch: int, seconds: float) -> list[BenchRow]:
    calls = {str(index): _call(session, batch) for index, (_, session) in enumerate(sessions)}
    timings = measure_latency(calls, seconds=seconds)
    rows = []
    for index, (name, session) in enumerate(sessions):
        timing = timings[str(index)]
        joules, method = energy_per_image(calls[str(index)], batch, seconds=seconds)
        rows.append(
            BenchRow(
                name=name,
                runtime=session.runtime,
                batch=batch,
                threads=session.threads,
                median=timing.median,
                p10=timing.p10,
                p90=timing.p90,
                images_per_s=batch / timing.median,
                ratio=timings["0"].median / timing.median,
                size_bytes=session.path.stat().st_size,
                energy_j_per_image=joules,
                energy_method=method,
            )
        )
    return rows


def _call(session: Session, batch: int) -> Callable[[], Tensor]:
    if session.header.batch not in (0, batch):
        raise UsageError(
            f"{session.path}: expected batches of {session.header.batch}, which it was exported for, got {batch}"
        )
    channels, height, width = session.header.image_shape
    if channels == 0:
        raise ModelError(f"{session.path}: expected a fixed number of channels, got an open one; export it with one")
    shape = (batch, channels, height or _DEFAULT_SIDE, width or _DEFAULT_SIDE)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return lambda: session.run(images)


def _onnx_file(path: Path) -> Path:
    file = path / "model.onnx" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"expected an ONNX file, or a folder that holds model.onnx, found nothing at {file}")
    return file


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names; whole paths where the short ones do not tell the files apart."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]

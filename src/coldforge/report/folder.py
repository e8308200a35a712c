"""The report of a folder: drawn from the records and the gallery in it, and from nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from coldforge.errors import UsageError
from coldforge.records import Record, load_record
from coldforge.report.evaluation import draw_evaluation
from coldforge.report.examples import Examples
from coldforge.report.html import write_report
from coldforge.report.sweep import draw_sweep

GALLERY = "gallery.safetensors"


def draw(folder: str | Path) -> Path:
    """Write ``report.html`` and ``adversarial.png`` into the folder of a run; returns the path of the page.

    Raises:
        UsageError: the folder holds no record, or its gallery is damaged.
        StoreError: the folder cannot be written.
    """
    folder = Path(folder)
    record = load_record(folder)
    return write_report(record, folder, _examples(folder / GALLERY, record))


def draw_any(folder: str | Path) -> Path:
    """Draw the page of whatever the folder holds: a run, an evaluation, or a sweep; returns its path.

    Raises:
        UsageError: it holds none of them.
        StoreError: the folder cannot be written.
    """
    folder = Path(folder)
    if (folder / "record.json").is_file():
        return draw(folder)
    if (folder / "evaluation.json").is_file():
        return draw_evaluation(folder)
    if (folder / "sweep.json").is_file():
        return draw_sweep(folder)
    return draw(folder)  # says what it expected


def _examples(path: Path, record: Record) -> Examples | None:
    if not path.is_file():
        return None
    try:
        arrays = load_file(path)
        if arrays["clean"].shape[1] not in (1, 3):  # no picture
            return None
        networks = [name.removesuffix("/adversarial") for name in sorted(arrays) if name.endswith("/adversarial")]
        return Examples(
            clean=arrays["clean"].astype(np.float32),
            labels=arrays["labels"].astype(np.int64),
            classes=tuple(record.provenance["classes"]),
            adversarial={name: arrays[f"{name}/adversarial"].astype(np.float32) for name in reversed(networks)},
            predictions={
                name: (arrays[f"{name}/clean_answer"], arrays[f"{name}/adversarial_answer"])
                for name in reversed(networks)
            },
            eps=record.threat_model.eps,
            norm=record.threat_model.norm,
        )
    except (SafetensorError, KeyError) as error:
        raise UsageError(f"{path} is not a gallery of coldforge (damaged?): {error}") from None

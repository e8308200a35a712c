"""How much memory does each recipe take at its peak, stage by stage?

    COLDFORGE_CIFAR10=DIR python benchmarks/memory.py [--only fashion-mnist] [--full]
    python benchmarks/memory.py --table

Every built-in recipe is run in a process of its own, with an empty store. The peak of a stage is that of the process
as Linux counts it (VmHWM, set back at the start of each stage), or, if that is more, that of the process and all its
children together, asked for twenty times a second, where what they share counts once (PSS). Without --full trainings
take one epoch over few images and few images are attacked: neither batches nor tiles get smaller by that, and training
images that are left out of memory are added to every peak.

The whole takes about 12 minutes on two quiet cores, most of it for the two recipes with ResNet-18; many hours with
--full. --only takes names of recipes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import tables
from turns import Record, Run, arguments_of, chosen, judged

from coldforge.data import load_data
from coldforge.pipeline import run
from coldforge.progress import Progress
from coldforge.recipe import Recipe, load_recipe, preset_names
from coldforge.report.folder import draw
from coldforge.store import Store

GOAL_BYTES = 4e9
TRAIN_N, VALIDATION, EVALUATE_N = 2304, 256, 64
EVERY_S = 0.05


def short(recipe: Recipe) -> dict[str, object]:
    """What is changed without --full."""
    epochs, in_float = recipe.finetune.epochs, recipe.finetune.epochs_in_float(recipe.quantize.fewest_bits)
    return {
        "data.train_n": TRAIN_N,
        "data.validation": VALIDATION,
        "model.train.epochs": 1,
        "finetune.epochs": 2 if 0 < in_float < epochs else 1,
        "finetune.float_epochs": min(in_float, 1),
        "evaluate.n": EVALUATE_N,
        "evaluate.masking_n": min(recipe.evaluate.masking_n, EVALUATE_N // 8),
    }


# --- the child: runs one recipe and says where it is ------------------------------------------------------------------


class Teller(Progress):
    """Prints each stage when it begins, and its peak when it ends."""

    def begin(self, label: str) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
        print(json.dumps({"stage": label}), flush=True)

    def end(self, label: str, *, cached: bool = False) -> None:
        print(json.dumps({"stage": label, "peak_bytes": own_peak()}), flush=True)


def own_peak() -> int:
    """VmHWM of this process, in bytes."""
    return _kilobytes(Path("/proc/self/status"), "VmHWM") * 1024


def _kilobytes(file: Path, name: str) -> int:
    """An entry such as `VmHWM:  1234 kB` of a file below /proc."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def child(recipe: Recipe) -> None:
    """Run it and draw its report."""
    teller = Teller()
    with tempfile.TemporaryDirectory() as folder:
        run(recipe, out=Path(folder, "out"), store=Store(Path(folder, "store")), progress=teller)
        teller.begin("report")
        draw(Path(folder, "out"))
        teller.end("report")


# --- the parent: watches it -------------------------------------------------------------------------------------------


def family(pid: int) -> Iterable[int]:
    """A process and all below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has just ended
            for below in task.read_text().split():
                yield from family(int(below))


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and of all below it."""
    total = 0
    for member in family(pid):
        with contextlib.suppress(OSError):
            total += _kilobytes(Path(f"/proc/{member}/smaps_rollup"), "Pss") * 1024
    return total


def measure(name: str, *, full: bool, threads: int) -> Run:
    """Run a recipe in a child and watch it."""
    recipe = load_recipe(name)
    changes = {"compute.threads": threads} | ({} if full else short(recipe))
    words = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    process = subprocess.Popen([sys.executable, __file__, "--child", name, *words], stdout=subprocess.PIPE, text=True)
    peaks: dict[str, int] = {}
    stage = "start"

    def listen() -> None:
        nonlocal stage
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            stage = said["stage"]
            peaks[stage] = max(peaks.get(stage, 0), said.get("peak_bytes", 0))

    listener = threading.Thread(target=listen)
    listener.start()
    while process.poll() is None:
        peaks[stage] = max(peaks.get(stage, 0), resident_bytes(process.pid))
        time.sleep(EVERY_S)
    listener.join()
    if process.returncode:
        raise SystemExit(f"{name}: expected the recipe to run, got exit code {process.returncode}")
    left_out = 0 if full else _left_out_bytes(recipe)
    rows = [{"stage": label, "peak_bytes": peak + left_out} for label, peak in peaks.items()]
    highest = max(rows, key=lambda row: row["peak_bytes"])
    print(f"{name:22} {highest['peak_bytes'] / 1e9:.2f} GB in {highest['stage']}", flush=True)
    return {
        "recipe": name,
        "full": full,
        "changes": changes,
        "left_out_bytes": left_out,
        "peak_bytes": highest["peak_bytes"],
        "peak_stage": highest["stage"],
        **judged(highest["peak_bytes"], GOAL_BYTES, at_most=True),
        "rows": rows,
    }


def _left_out_bytes(recipe: Recipe) -> int:
    """Training images of the whole recipe that are not in memory of the short one."""
    train = load_data(recipe.data).train.images
    return max(len(train) - TRAIN_N, 0) * train[0].numel()


def main() -> None:
    """Run what is asked for, and print."""
    if sys.argv[1:2] == ["--child"]:
        child(load_recipe(sys.argv[2], overrides=sys.argv[3:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the recipes as they are")
    arguments = arguments_of(parser, "results/memory.json", tables.memory)
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("memory.py: expected Linux, whose /proc it reads, got a system without /proc/self/clear_refs")
    (names,) = chosen(arguments.only, preset_names())
    record = Record(arguments.out, "recipe")
    for name in names:
        if arguments.missing and record.has(name):
            continue
        if load_recipe(name).data.source == "cifar10" and not os.environ.get("COLDFORGE_CIFAR10"):
            print(f"{name:22} left out: expected $COLDFORGE_CIFAR10, a folder with CIFAR-10, got none", flush=True)
            continue
        record.keep(measure(name, full=arguments.full, threads=arguments.threads))
    print(tables.memory(record.content))


if __name__ == "__main__":
    main()

"""Killed with SIGKILL at random moments and started again, a run ends with the same record and the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import coldforge

SCRIPT = '''
"""FOLDER SEED KILLS: one undisturbed run, then runs that are killed and started again until so many kills have landed.

A moment is a line of the undisturbed run's log and a short delay after it, so that it means the same on a slow machine.
Every run is a process, forked from one that has imported everything and has no threads: a start costs no time.
"""
import os, random, signal, sys, tempfile, time, traceback
from functools import partial
from pathlib import Path

import lightning_fabric, onnxruntime, torch, torch_pruning
from coldforge.data import from_arrays
from coldforge.deploy import export_onnx
from coldforge.measure import energy_per_image
from coldforge.pipeline import run
from coldforge.progress import Progress
from coldforge.recipe import load_recipe
from coldforge.stages import evidence
from coldforge.store import Store
from coldforge.train import loop

evidence.LATENCY_SECONDS = 0.0
evidence.energy_per_image = partial(energy_per_image, seconds=0.01)
loop.CHECKPOINT_SECONDS = -1.0  # after every step
torch.set_num_threads(1)

RECIPE = {
    "name": "killed",
    "model": {"train": {"epochs": 2, "batch_size": 32, "lr": 0.02}},
    "finetune": {"arms": ["adversarial"], "epochs": 2, "batch_size": 32, "lr": 0.01, "attack": "pgd-2"},
    "evaluate": {"attacks": ["pgd-5"], "masking_n": 8},  # so few that the panel attacks nothing
    "compute": {"threads": 1, "precision": "fp32"},
}


class Log(Progress):
    def __init__(self, path):
        self.path, self.label = path, ""

    def write(self, *words):
        with open(self.path, "a") as file:
            file.write("\\t".join(words) + "\\n")

    def begin(self, label):
        self.label = label
        self.write("begin", label)

    def advance(self, fraction, detail=""):
        if detail.startswith("epoch"):
            self.write("step", self.label, f"{fraction:.4f}")

    def end(self, label, *, cached=False):
        self.write("found" if cached else "built", label)


def data():
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(3, 1, 12, 12, generator=generator).round() * 0.5 + 0.25

    def part(n):
        labels = torch.randint(3, (n,), generator=generator)
        noise = 0.2 * torch.randn(n, 1, 12, 12, generator=generator)
        return (patterns[labels] + noise).clamp(0, 1), labels

    return from_arrays(*part(360), *part(40), validation=40)


def start(folder):
    process = os.fork()
    if process:
        return process
    try:
        log = Log(folder / "log")
        run(load_recipe(RECIPE), store=Store(folder / "store"), out=folder / "out", progress=log, data=data())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def lines_of(folder):
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


def kill_at(process, folder, known, target, order, delay):
    """SIGKILL once a line at or after ``target`` is logged, unless the run ends before; whether it was killed."""
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            assert status == 0, status
            return False
        if any(order.get(line, -1) >= target for line in lines_of(folder)[known:]):
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            return os.WIFSIGNALED(status)
        time.sleep(0.002)


def main(folder, seed, kills):
    with tempfile.TemporaryDirectory() as scratch:  # the first export imports much
        linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
        export_onnx(linear, Path(scratch) / "x.onnx", image_shape=(1, 2, 2), classes=("a", "b"))
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir()
    _, status = os.waitpid(start(undisturbed), 0)
    assert status == 0, status
    order = {line: place for place, line in enumerate(lines_of(undisturbed))}
    draw = random.Random(seed)
    landed = number = 0
    while landed < kills:
        killed = folder / f"killed-{number}"
        killed.mkdir()
        for target in sorted(draw.sample(range(len(order) - 1), kills - landed)):
            process = start(killed)
            known = len(lines_of(killed))
            delay = draw.choice([0.0, draw.uniform(0, 0.02), draw.uniform(0, 0.3)])
            if not kill_at(process, killed, known, target, order, delay):
                break
            landed += 1
            Log(killed / "log").write("killed")
        else:
            _, status = os.waitpid(start(killed), 0)
            assert status == 0, status
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
'''


def run_script(folder, seed, kills):
    script = folder / "killed.py"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(coldforge.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    words = [sys.executable, str(script), str(folder), str(seed), str(kills)]
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "undisturbed", sorted(folder.glob("killed-*"))


def comparable(out):
    """The record without what a clock decides."""
    plain = json.loads((out / "record.json").read_text())
    del plain["provenance"]["created"]
    for stage in plain["stages"]:
        for name in ("latency_s", "energy_j_per_image", "energy_method", "train_seconds"):
            del stage[name]
    return plain


def log(folder, word):
    return [line for line in (folder / "log").read_text().splitlines() if line.startswith(word)]


def check(folder, seed, kills):
    undisturbed, killed = run_script(folder, seed, kills)
    expected = undisturbed / "out"
    assert log(undisturbed, "killed") == []
    assert sum(len(log(each, "killed")) for each in killed) >= kills
    for each in killed:
        out = each / "out"
        assert comparable(out) == comparable(expected)
        assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}
        for name in ("model/model.safetensors", "model/structure.json", "model.onnx", "ledger.parquet", "recipe.toml"):
            assert (out / name).read_bytes() == (expected / name).read_bytes()
        assert sorted(set(log(each, "built"))) == sorted(log(undisturbed, "built"))
        times = len(log(each, "killed"))
        # a kill costs the step it hits (done, not yet saved), never the training; the same for stages
        assert len(log(each, "step")) <= len(log(undisturbed, "step")) + times
        assert len(log(each, "built")) <= len(log(undisturbed, "built")) + times
        assert list((each / "store" / "work").glob("*")) == []


def test_six_kills(tmp_path):
    check(tmp_path, seed=1, kills=6)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    check(tmp_path, seed=2, kills=20)

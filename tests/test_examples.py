"""The examples run, in a process of their own, with settings small enough for a test; they print what they promise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
HASTE = """
import runpy, sys
from functools import partial
from coldforge.evaluate import masking
from coldforge.stages import evidence
masking.FEWEST_RIGHT = 10**6
evidence.LATENCY_SECONDS, evidence.energy_per_image = 0.0, partial(evidence.energy_per_image, seconds=0.01)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script as Python would, but spends no seconds on precise timing or on attacks of the masking panel."""
FILES = {"adversarial.png", "model", "model.onnx", "recipe.toml", "record.json", "report.html"}


def run(name: str, folder: Path, *words: str) -> str:
    """Standard output of an example that writes into ``folder / "out"``."""
    environment = {
        **os.environ,
        "COLDFORGE_HOME": str(folder / "home"),
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", HASTE, str(EXAMPLES / name), "--out", str(folder / "out"), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (folder / "out").iterdir()} >= FILES
    return done.stdout


def percentages(line: str) -> list[float]:
    return [float(found) for found in re.findall(r"([\d.]+)%", line)]


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"quickstart.py", "own_model.py"}


def test_quickstart(tmp_path: Path) -> None:
    settings = [
        "data.train_n=900",
        "data.test_n=100",
        "threat_model.eps=0.02",
        "model.train.epochs=3",
        "model.train.batch_size=32",
        'finetune.arms=["adversarial"]',
        "finetune.epochs=1",
        "finetune.batch_size=32",
        "finetune.lr=0.02",
        'evaluate.attacks=["fgsm"]',
        "evaluate.masking_n=0",
        "compute.threads=1",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    printed = run("quickstart.py", tmp_path, *words)
    record = json.loads((tmp_path / "out" / "record.json").read_text(encoding="utf-8"))
    assert record["recipe"]["data"]["train_n"] == 900
    for stage in record["stages"]:
        line = next(line for line in printed.splitlines() if line.startswith(stage["label"]))
        expected = [100 * stage["clean_accuracy"], 100 * stage["robust_accuracy"]["worst_case"]]
        assert percentages(line) == pytest.approx(expected, abs=0.051)
        assert line.endswith(f"{stage['size_bytes'] / 1e3:.0f} KB")
    artifact = record["stages"][-1]
    assert artifact["name"] == "artifact"
    right = round(100 * artifact["clean_accuracy"])  # the very 100 test images
    assert f"model.onnx answers {right} of 100 test images correctly" in printed
    assert right > 40  # chance is 10
    assert "(from the store)" not in printed

    again = run("quickstart.py", tmp_path, *words)
    assert again.count("(from the store)") == len(re.findall(r"^  \S", printed, re.M)) > 10
    assert again.splitlines()[-1] == printed.splitlines()[-1]


def test_own_model(tmp_path: Path) -> None:
    printed = run("own_model.py", tmp_path, "--n", "2000", "--epochs", "1", "--threads", "1")
    lines = {line.partition(":")[0]: percentages(line) for line in printed.splitlines()}
    assert set(lines) >= {"before", "file", "record"}
    assert lines["before"][0] > 90
    assert lines["file"][0] == pytest.approx(lines["record"][0], abs=0.11)  # the last digit is rounded
    assert lines["file"][0] > 60  # chance is 33
    # The record takes every image that one of two gradients fools, the example tries one of them.
    assert lines["record"][1] - 2 <= lines["file"][1] <= lines["record"][1] + 10
    assert lines["file"][1] < lines["file"][0]

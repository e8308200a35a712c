"""``coldforge sweep`` and ``coldforge pick`` on real, tiny trials."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest

from coldforge.cli import main
from coldforge.measure import energy_per_image
from coldforge.records import load_record
from coldforge.stages import evidence
from coldforge.sweep import alone_in

SWEEP = """
name = "tiny"
description = "two widths"
recipe = "quickstart"

[set]
"data.train_n" = 400
"data.test_n" = 40
"model.train.epochs" = 1
"finetune.epochs" = 1
"finetune.arms" = ["adversarial"]
"evaluate.attacks" = ["fgsm"]
"evaluate.n" = 20
"evaluate.masking_n" = 0

[axes]
"prune.ratio" = [0.5, 0.75]
"""


@pytest.fixture(scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "LATENCY_SECONDS", 0.0)
        patch.setattr(evidence, "energy_per_image", partial(energy_per_image, seconds=0.01))
        yield


@pytest.fixture(scope="module")
def swept(quick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLDFORGE_HOME", str(folder / "home"))
        (folder / "tiny.toml").write_text(SWEEP, encoding="utf-8")
        words = ["sweep", str(folder / "tiny.toml"), "--out", str(folder / "out"), "--executor", "serial", "--quiet"]
        assert main(words) == 0
        yield folder, words


def test_the_plan_shows_what_is_shared(swept, capsys):
    _, words = swept
    assert main([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trials"] == ["prune.ratio=0.5 seed=0", "prune.ratio=0.75 seed=0"]
    assert plan["kinds"]["baseline"] == [1, 1]
    assert plan["kinds"]["finetune"] == [4, 4], "in floating point, and rounded"
    assert plan["finished"] == 2
    assert plan["macs"] < plan["macs_alone"]
    assert main([*words, "--dry-run", "--json", "--seeds", "3", "--seeds", "4"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trials"] == [f"prune.ratio={ratio} seed={seed}" for ratio in (0.5, 0.75) for seed in (3, 4)]
    assert main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "shared by 2 trials: baseline: train" in out
    assert "without sharing" in out


def test_the_same_call_again_computes_nothing(swept, capsys, monkeypatch):
    folder, words = swept
    from coldforge.sweep.workshop import RecipeWorkshop

    monkeypatch.setattr(RecipeWorkshop, "make", lambda *_: pytest.fail("computed again"))
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "prune.ratio" in out
    assert "of the multiply-adds that independent trials would take" in out
    assert f"Look at: {folder / 'out' / 'report.html'}" in out
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert "two widths" in page
    assert f"coldforge pick {folder / 'out'}" in page
    rows = (folder / "out" / "table.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 2 * 4  # baseline, compressed, tuned, artifact


def test_the_store_keeps_what_records_stand_on(swept, capsys):
    assert main(["store", "prune", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_picking_writes_a_folder_to_ship(swept, capsys):
    folder, _ = swept
    assert main(["pick", str(folder / "out"), "--max", "macs=1e9", "--minimize", "bytes", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["prune.ratio"] == "0.75"
    record = load_record(Path(row["folder"]))
    assert record.stages[-1].size_bytes == row["size_bytes"]
    assert (Path(row["folder"]) / "model.onnx").stat().st_size == row["size_bytes"]
    assert (Path(row["folder"]) / "report.html").is_file()
    assert main(["pick", str(folder / "out"), "--min", "robust=1.1", "--minimize", "bytes"]) == 2
    assert "no trial has robust of at least 1.1" in capsys.readouterr().err


def test_picking_does_not_make_another_network_in_silence(swept, capsys, monkeypatch, tmp_path):
    folder, _ = swept
    monkeypatch.setenv("COLDFORGE_HOME", str(tmp_path / "empty"))
    words = ["pick", str(folder / "out"), "--minimize", "bytes"]
    assert main(words) == 2
    said = re.search(
        r"lacks (\d+) of the (\d+) stages of this trial, such as 'baseline: train'", capsys.readouterr().err
    )
    assert said is not None
    assert said[1] == said[2]
    assert main([*words, "--rebuild"]) == 0
    said = capsys.readouterr()
    assert "baseline: train" in said.err, "its progress"
    assert "robust:worst_case" in said.out


def test_a_sweep_at_work_keeps_others_out_of_its_folder(swept, capsys):
    folder, words = swept
    with alone_in(folder / "out"):
        assert main(words) == 2
        assert "another sweep is at work" in capsys.readouterr().err
        assert main([*words, "--dry-run"]) == 0


def test_a_suspect_number_is_never_printed_without_its_flag(swept, capsys, monkeypatch):
    folder, words = swept
    paths = (folder / "out" / "records").glob("[!.]*.json")
    before = {path: path.read_text(encoding="utf-8") for path in paths}
    try:
        for path, content in before.items():
            record = json.loads(content)
            record["stages"][-1]["masking"]["verdict"] = "suspect"
            path.write_text(json.dumps(record), encoding="utf-8")
        assert main(words) == 0
        out = capsys.readouterr().out
        assert out.count("SUSPECT") == 2 + 1
        assert "does not believe" in out
    finally:
        for path, content in before.items():
            path.write_text(content, encoding="utf-8")


def test_a_file_that_is_not_there(capsys):
    assert main(["sweep", "nowhere.toml"]) == 2
    assert "expected a sweep file, found nothing at nowhere.toml" in capsys.readouterr().err

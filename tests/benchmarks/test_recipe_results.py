"""The rows of docs/results.md: differences are paired, goals are judged, and a real trial fills a row."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import recipe_results
import torch
from attacks_parity import to_hex
from recipe_results import REFERENCE, Found, difference, lite_table, paper_table, slug, table, wanted

from coldforge.compress import Structure, attacking, build, load_network, quantize, save_network
from coldforge.evaluate import paired_interval
from coldforge.evaluation.request import Request
from coldforge.recipe import QuantizeSpec

HALF, QUARTER = "half, 8 bits, 3 epochs", "quarter, 8 bits, 3 epochs"


def found(row: str, stands: list[bool], seed: int = 0, **more: object) -> Found:
    return {
        "data": "fashion-mnist",
        "row": row,
        "seed": seed,
        "n": len(stands),
        "stands": to_hex(torch.tensor(stands)),
        "clean_accuracy": 0.9,
        "robust_accuracy": float(np.mean(stands)),
        "broken_by": {"apgd-ce": 3, "square on the file": 1},
        "masking": "ok",
        "failed_checks": [],
        "train_macs": 1e12,
        "packed_bytes": 140_000,
        **more,
    }


def test_a_difference_is_that_of_paired_images() -> None:
    first, second = [True] * 6 + [False] * 4, [True] * 5 + [False] * 4 + [True]
    mean, low, high, seeds = difference([found("a", first)], [found("b", second)])
    assert (mean, seeds) == (0.0, 1)
    assert (low / 100, high / 100) == pytest.approx(paired_interval(1, 1, 10))


def test_several_seeds_widen_the_interval_by_their_spread() -> None:
    ours = [found("a", [True] * count + [False] * (100 - count), seed) for seed, count in enumerate((70, 72, 80))]
    theirs = [found("b", [True] * 75 + [False] * 25, seed) for seed in (0, 1, 2, 3)]
    mean, low, high, seeds = difference(ours, theirs)
    assert seeds == 3, "the fourth has no partner"
    assert mean == pytest.approx(-1.0)
    assert (high - low) / 2 > 4.30 * np.std([-5, -3, 5], ddof=1) / 3**0.5
    calm = difference([found("a", [True] * 74 + [False] * 26, seed) for seed in (0, 1, 2)], theirs)
    assert calm[2] - calm[1] < (high - low) / 2


def test_fewer_images_are_compared_with_the_same_ones() -> None:
    mean, *_ = difference([found("a", [True, True, False, False])], [found("b", [True, True] + [False] * 14)])
    assert mean == 0.0


@pytest.mark.parametrize(
    ("half", "met"), [(802, "yes"), (795, "yes, not decided"), (785, "no, not decided"), (700, "no")]
)
def test_the_table_judges_goals(half: int, met: str, tmp_path: Path) -> None:
    stands = {REFERENCE: 800, HALF: half, QUARTER: 700}
    for row, count in stands.items():
        record = found(row, [True] * count + [False] * (1000 - count), train_macs=2e14 if row == REFERENCE else 1e13)
        (tmp_path / f"{slug(row)}-0.json").write_text(json.dumps(record), encoding="utf-8")
    shown = table(tmp_path)
    assert shown.splitlines()[2].startswith(f"| {REFERENCE} | 1 | 90.0 | 80.0 | apgd-ce 3, square on the file 1 | ok |")
    assert f"| {HALF} | {REFERENCE} | ≥ −1 | {(half - 800) / 10:+.1f} [" in shown
    assert f"| 1 | {met} |  |" in shown
    assert f"| {QUARTER} | {REFERENCE} | ≥ −4 | -10.0 [" in shown
    assert "| 1 | no |  |" in shown
    assert "| half, 4 bits, 3 epochs | half, 8 bits, 3 epochs | ≥ −0.5 | not computed yet |" in shown
    assert f"| half, 8 bits, 5 epochs | {REFERENCE} |  | not computed yet |" in shown, "compared without a goal"
    assert "5.0 % of the reference's multiply-adds (goal: at most 10 %)" in shown
    assert table(tmp_path / "nothing") == "*Not computed yet.*"


def test_more_images_under_a_cheaper_attack_stand_beside(tmp_path: Path) -> None:
    few, many = [True] * 79 + [False] * 21, [True] * 7880 + [False] * 2120
    lite = {REFERENCE: [True] * 8000 + [False] * 2000, HALF: many}
    for row, stands in lite.items():
        record = found(row, few, lite={"n": len(stands), "stands": to_hex(torch.tensor(stands))})
        (tmp_path / f"{slug(row)}.json").write_text(json.dumps(record), encoding="utf-8")
    assert "| +0.0 [-2.7, +2.7] | 1 | yes, not decided | -1.2 [-1.4, -1.0]: no, not decided |" in table(tmp_path)
    other = found(HALF, few, seed=1, lite={"n": len(many), "stands": to_hex(torch.tensor(many))})
    (tmp_path / f"{slug(HALF)}.json").write_text(json.dumps(other), encoding="utf-8")
    (tmp_path / "r-1.json").write_text(json.dumps(found(REFERENCE, few, seed=1)), encoding="utf-8")
    assert "| +0.0 [-2.7, +2.7] | 1 | yes, not decided |  |" in table(tmp_path), "of no seed are both there"


def test_the_table_of_the_papers_attacks_has_the_rows_that_met_them(tmp_path: Path) -> None:
    robust = {"fgsm": 0.88, "pgd-20-paper": 0.85, "transfer": 0.9, "worst_case": 0.84}
    papers = [{"clean_accuracy": 0.9 + seed / 100, "robust_accuracy": robust} for seed in (0, 1)]
    rows = [found(HALF, [True], seed, paper=paper) for seed, paper in enumerate(papers)]
    for number, row in enumerate([*rows, found(QUARTER, [True])]):
        (tmp_path / f"{number}.json").write_text(json.dumps(row), encoding="utf-8")
    lines = paper_table(tmp_path).splitlines()
    assert lines[2:] == [f"| {HALF} | 2 | 90.5 ± 0.7 | 88.0 ± 0.0 | 85.0 ± 0.0 | 84.0 ± 0.0 |"]
    assert paper_table(tmp_path / "nothing") == "*Not computed yet.*"


def test_the_cheap_cascade_is_held_against_the_ensemble_on_the_same_images(tmp_path: Path) -> None:
    lite = {"n": 6, "stands": to_hex(torch.tensor([True] * 4 + [False, True]))}
    row = found(HALF, [True, True, False, False], lite=lite)  # the ensemble: the first four images
    (tmp_path / "row.json").write_text(json.dumps(row), encoding="utf-8")
    (tmp_path / "other.json").write_text(json.dumps(found(QUARTER, [True] * 4)), encoding="utf-8")
    low, high = (100 * end for end in paired_interval(2, 0, 4))
    (line,) = lite_table(tmp_path).splitlines()[2:]
    assert line == f"| {HALF} (seed 0) | 4 | 100.0 | 50.0 | +50.0 [{low:+.1f}, {high:+.1f}] |"
    assert lite_table(tmp_path / "nothing") == "*Not computed yet.*"


def test_what_is_made_of_suspect_accuracies_says_so(tmp_path: Path) -> None:
    paper = {
        "n": 10,
        "clean_accuracy": 0.9,
        "robust_accuracy": dict.fromkeys([*recipe_results.PAPER, "worst_case"], 0.8),
    }
    lite = {"n": 10, "stands": to_hex(torch.ones(10, dtype=torch.bool))}
    doubtful = {"masking": "suspect", "failed_checks": ["binarization"]}
    rows = [
        found(REFERENCE, [True] * 10, paper=paper, lite=lite),
        found(HALF, [True] * 10, paper=paper, lite=lite, **doubtful),
        found(QUARTER, [True] * 10, paper=paper, lite=lite),
    ]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.json").write_text(json.dumps(row), encoding="utf-8")
    lines = [*table(tmp_path).splitlines(), *paper_table(tmp_path).splitlines()]
    robust = [line for line in lines if line.startswith(f"| {HALF} |") and "not computed" not in line]
    assert [line.count("(suspect)") for line in robust] == [1, 2, 3], "accuracy; two differences; three attacks"
    sound = [line for line in lines if line.startswith((f"| {QUARTER} |", f"| {REFERENCE} |"))]
    assert not any("suspect" in line for line in sound)


@pytest.mark.parametrize("data", recipe_results.GOALS)
def test_goals_and_the_sweep_have_the_same_rows(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from coldforge.sweep import expand, load_sweep

    monkeypatch.delenv("COLDFORGE_RESNET20", raising=False)
    recipes = Path(__file__).parents[2] / "recipes"
    trials = [trial for path in sorted(recipes.glob("results-*.toml")) for trial in expand(load_sweep(path))]
    trials = [trial for trial in trials if trial.recipe.data.source == data]
    rows = {str(trial.point["row"]): trial.recipe for trial in trials}
    goals = recipe_results.GOALS[data]
    assert set(rows) == {REFERENCE} | {goal.row for goal in goals} | {
        goal.against for goal in goals if isinstance(goal, recipe_results.Goal)
    }
    reference = rows[REFERENCE]
    assert not reference.quantize.enabled
    assert "baseline" in reference.evaluate.stages, "whose multiply-adds are the reference's"
    assert reference.model.train.attack == "pgd-7"
    assert reference.model.train.epochs >= 15
    assert not reference.model.checkpoint
    for label, recipe in rows.items():
        if told := re.search(r"(\d+)(?:-bit weights, (\d+)-bit activations| bits)", label):
            bits = int(told[1]), int(told[2] or told[1])
            assert (recipe.quantize.weight_bits, recipe.quantize.activation_bits) == bits
        if told := re.search(r"(\d+) epochs$", label):
            trained = recipe.model.train if label == REFERENCE else recipe.finetune
            assert trained.epochs == int(told[1])


def test_a_comparison_without_a_goal_is_neither_met_nor_missed() -> None:
    stands = [True] * 70 + [False] * 30
    more = {"n": 100, "stands": to_hex(torch.tensor(stands))}
    rows = {name: [found(name, stands, lite=more)] for name in ("ours", "theirs")}
    same = "+0.0 [-2.7, +2.7]"
    assert _goal_line(rows, recipe_results.Goal("ours", "theirs")) == f"| ours | theirs |  | {same} | 1 |  | {same} |"


def test_a_floor_is_reached_by_both_accuracies() -> None:
    floor = recipe_results.Floor("net", robust=43.0, clean=77.0)
    rows = {"net": [found("net", [True] * 44 + [False] * 56, clean_accuracy=0.78)]}
    assert (
        _goal_line(rows, floor)
        == "| net | nothing | ≥ 43 % robust, 77 % clean | 44.0 % robust, 78.0 % clean | 1 | yes | |"
    )
    rows["net"][0] |= {"clean_accuracy": 0.76, "masking": "suspect"}
    assert "44.0 % robust (suspect), 76.0 % clean | 1 | no |" in _goal_line(rows, floor)
    rows["net"][0] |= {"clean_accuracy": 0.78, "robust_accuracy": 0.42}
    assert "| no |" in _goal_line(rows, floor)
    assert "| not computed yet |" in _goal_line({}, floor)


def _goal_line(rows: dict[str, list[Found]], goal: recipe_results.Goal | recipe_results.Floor) -> str:
    *_, line = recipe_results._verdicts(rows, [goal])
    return line


def test_labels_and_seeds_choose() -> None:
    assert wanted("half, 4 bits", 1, [])
    assert wanted("half, 4 bits", 1, ["half", "1"])
    assert not wanted("half, 4 bits", 1, ["quarter"])
    assert not wanted("half, 4 bits", 1, ["half", "0"])
    assert slug("R: dense, PGD-7, 15 epochs") == "r-dense-pgd-7-15-epochs"


SWEEP = """
name = "tiny"
recipe = "quickstart"
[set]
"data.train_n" = 700
"data.test_n" = 64
"model.train.epochs" = 1
"finetune.epochs" = 1
"finetune.arms" = ["adversarial"]
"compute.compile" = "off"
"evaluate.attacks" = ["fgsm"]
"evaluate.n" = 10
"evaluate.stages" = ["artifact"]
"evaluate.masking_n" = 0
"deploy.runtimes" = []
[axes]
row = [{ label = "half, 8 bits, 3 epochs", "prune.ratio" = 0.5 }]
"""


def test_a_trial_becomes_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from coldforge.cli import main

    monkeypatch.setenv("COLDFORGE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(recipe_results, "ATTACK", "square-5")
    also = {
        "paper": {"attack": "fgsm,pgd-20-paper", "eps": "0.05", "n": 6},
        "lite": {"attack": "square-3", "eps": None, "n": 0},
    }
    monkeypatch.setattr(recipe_results, "ALSO", also)
    for name in ("RESULTS", "ARTIFACTS"):
        monkeypatch.setattr(recipe_results, name, tmp_path / name.lower())
    (tmp_path / "tiny.toml").write_text(SWEEP, encoding="utf-8")
    words = ["sweep", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out"), "--executor", "serial", "--quiet"]
    assert main(words) == 0
    words = ["recipe_results.py", "--n", "12", "--lite", "--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", [*words, str(tmp_path / "out")])
    with monkeypatch.context() as stopped:
        stopped.setattr(recipe_results, "evaluate_path", interrupt)
        with pytest.raises(KeyboardInterrupt):
            recipe_results.main()
    (artifact,) = (tmp_path / "artifacts").iterdir()
    left = {str(path.relative_to(artifact)) for path in artifact.rglob("*") if path.is_file()}
    assert left == {*recipe_results.KEPT, recipe_results.WHICH}
    asked = []
    whole = recipe_results.evaluate_path

    def watched(path: Path, request: Request, **more: object) -> object:
        asked.append(request.attack)
        return whole(path, replace(request, masking_n=9), **more)  # type: ignore[arg-type]

    monkeypatch.setattr(recipe_results, "evaluate_path", watched)
    monkeypatch.setattr("sys.argv", words)  # without the sweep, which another machine has
    recipe_results.main()
    assert asked == [("square-5",), ("fgsm", "pgd-20-paper"), ("square-3",)]
    assert len(re.findall(r"attack: done in", capsys.readouterr().err)) == len(asked), "hours are not silent"
    asked.clear()
    (row,) = recipe_results.load(tmp_path / "results")
    stands = recipe_results.from_hex(row["stands"], row["n"])
    assert (row["row"], row["seed"], row["n"], row["n_clean"]) == (HALF, 0, 12, 64)
    assert stands.mean() == row["robust_accuracy"]
    assert row["train_macs"] > 0
    assert row["masking"] == "not_run", "nine images are too few for a verdict"
    assert (row["paper"]["n"], row["lite"]["n"]) == (6, 64)
    assert recipe_results.from_hex(row["lite"]["stands"], 64).mean() == row["lite"]["robust_accuracy"]["worst_case"]
    assert {*recipe_results.PAPER, "worst_case"} <= row["paper"]["robust_accuracy"].keys()
    words = ["evaluate", str(artifact), "--out", str(tmp_path / "evaluation"), "--attack", "square-5", "--n", "5"]
    assert main([*words, "--no-masking", "--quiet"]) == 0
    recipe_results.main()
    assert not asked, "all of it is there"
    monkeypatch.setitem(also, "paper", also["paper"] | {"n": 7})
    recipe_results.main()
    assert asked == [("fgsm", "pgd-20-paper")], "another question is asked again"
    monkeypatch.setattr("sys.argv", ["recipe_results.py", "--n", "13", "--work", str(tmp_path / "work")])
    recipe_results.main()
    assert asked[1:] == [("square-5",)]
    (more,) = recipe_results.load(tmp_path / "results")
    assert (more["n"], more["paper"]["n"], more["lite"]) == (13, 7, row["lite"]), "what was found otherwise is kept"


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_weights_made_small_compute_the_same(bits: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 1, 28, 28, generator=generator)
    structure = Structure(source="zoo:cnn8", image_shape=(1, 28, 28), classes=("a", "b", "c"), mean=(0.3,), std=(0.4,))
    rounding = QuantizeSpec.model_validate({"weight_bits": bits, "activation_bits": 8})
    network = quantize(build(structure), rounding, images)
    save_network(tmp_path, network, structure.rounded(rounding))
    path = tmp_path / "model.safetensors"
    before = path.stat().st_size
    recipe_results.make_small(path)
    assert path.stat().st_size < 0.52 * before
    small, _ = load_network(tmp_path)
    assert {tensor.dtype for tensor in small.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(small(images), network(images), rtol=1e-6, atol=1e-6)
    with attacking(small, "pass_through"):
        assert torch.equal(small(images).argmax(1), network(images).argmax(1))


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt

"""The paper's figure: its recipes, the values read off it, the claims, the figure."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import paper_figure
import pytest
from paper_claims import (
    FAILS,
    HOLDS,
    MISSING,
    OPEN,
    Case,
    at_least,
    at_most,
    both,
    claims,
    difference,
    judge,
    judged,
    readings,
)  # fmt: skip
from paper_points import Point, joined, load_paper, load_points, merged, points_of, read_sweeps, save_points

from coldforge.errors import UsageError
from coldforge.recipe import load_recipe
from coldforge.store import Store
from coldforge.sweep import Trial, expand, load_sweep
from coldforge.sweep.table import Sweep
from coldforge.sweep.workshop import RecipeWorkshop

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
FASHION = "paper-figure1-fashion-mnist"
RATIOS = [round(0.1 * number, 1) for number in range(1, 10)]
BITS = [16, 8, 4, 2, 1]
MODELS = {
    # base, arm -> (clean, robust)
    ("natural", "none"): (0.70, 0.01), ("natural", "natural"): (0.92, 0.06), ("natural", "adversarial"): (0.88, 0.80),
    ("adversarial", "none"): (0.80, 0.70), ("adversarial", "natural"): (0.91, 0.30),
    ("adversarial", "adversarial"): (0.89, 0.81),
}  # fmt: skip
DENSE = {"natural": (0.93, 0.10), "adversarial": (0.90, 0.82)}


def point(compression, level, base, arm, seed, clean, robust, **changes) -> Point:
    made = Point(
        "fashion-mnist", "corrected", "pgd-20", compression, float(level), base, arm, seed, clean, 10000, robust, 2000,
        "not_run", 500_000, 13_000_000, 2_000_000, 1e13,
    )  # fmt: skip
    small = {"macs": 3_000_000, "train_macs": 2e12} if arm != "dense" else {}
    return dataclasses.replace(made, **small | changes)


def synthetic(seeds=(0, 1, 2), levels=(RATIOS, BITS), **changes) -> list[Point]:
    """A sweep whose numbers are what the paper would like, but few bits cost nothing."""
    found = []
    for seed in seeds:
        shift = 0.004 * (seed - 1)
        for base, (clean, robust) in DENSE.items():
            found.append(point("none", 0, base, "dense", seed, clean + shift, robust + shift, **changes))
        for (base, arm), (clean, robust) in MODELS.items():
            for compression, steps in zip(("pruning", "quantization"), levels, strict=True):
                for level in steps:
                    fall = 0.1 * max(level - 0.5, 0) ** 2 if compression == "pruning" else 0.03 * (level < 4)
                    values = max(clean + shift - fall, 0), max(robust + shift - fall, 0)
                    found.append(point(compression, level, base, arm, seed, *values, **changes))
    return found


# --- recipes


def trials_of(name: str) -> list[Trial]:
    return expand(load_sweep(RECIPES / f"{name}.toml"))


def test_the_grid_of_fashion_mnist_is_the_whole_figure() -> None:
    trials = trials_of(FASHION)
    assert len(trials) == (9 + 5) * 2 * 3
    assert {trial.seed for trial in trials} == {0, 1, 2}
    pruned = [trial.recipe for trial in trials if trial.recipe.prune.ratio]
    quantized = [trial.recipe for trial in trials if trial.recipe.quantize.enabled]
    assert sorted({recipe.prune.ratio for recipe in pruned}) == RATIOS
    assert {(recipe.quantize.weight_bits, recipe.quantize.activation_bits) for recipe in quantized} == {
        (bits, bits) for bits in BITS
    }
    assert not [recipe for recipe in pruned if recipe in quantized], "the paper does one or the other"
    for trial in trials:
        recipe = trial.recipe
        assert recipe.finetune.arms == ("none", "natural", "adversarial")
        assert recipe.threat_model.eps == 0.05
        assert not recipe.threat_model.literal
        assert recipe.evaluate.n >= 2000
        assert recipe.model.train.objective == trial.point["base"]


def test_the_grid_of_cifar10_has_every_second_level() -> None:
    trials = trials_of("paper-figure1-cifar10")
    ratios = {trial.recipe.prune.ratio for trial in trials}
    assert ratios == {0.0, *RATIOS[::2], 0.6}
    assert {trial.recipe.quantize.weight_bits for trial in trials} >= {32, *BITS[::2]}
    for trial in trials:
        recipe = trial.recipe
        assert recipe.model.source == "zoo:resnet20"
        assert bool(recipe.model.checkpoint) == (trial.point["base"] == "natural")
        assert recipe.threat_model.eps == 4 / 255
        assert (recipe.finetune.optimizer, recipe.finetune.ema) == ("muon", 0.0), "its rates are those of Muon"
        assert recipe.finetune.epochs_in_float(recipe.quantize.fewest_bits) == (
            3 if recipe.quantize.fewest_bits >= 8 else 1
        )


def test_the_literal_protocol_is_the_paper_s() -> None:
    for trial in trials_of("paper-figure1-literal-fashion-mnist"):
        recipe = trial.recipe
        assert recipe.threat_model.literal
        assert recipe.finetune.attack == "pgd-20-paper"
        assert recipe.finetune.float_epochs == recipe.finetune.epochs == 3
        assert (recipe.finetune.lr, recipe.finetune.schedule, recipe.finetune.batch_size) == (0.01, "constant", 64)
        assert recipe.evaluate.attacks == ("pgd-20-paper",)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A function from a sweep's name to its stages; declared on embedded images, a fifth as many as there are."""
    workshop = RecipeWorkshop(Store(tmp_path_factory.mktemp("store")))

    def declared(name: str) -> tuple[dict[str, set[str]], float, float]:
        spec = load_sweep(RECIPES / f"{name}.toml", overrides=["data.source=fashion-mnist-mini", "evaluate.n=400"])
        distinct, alone = {}, 0.0
        for trial in expand(spec):
            for task in workshop.tasks(trial):
                distinct[task.key] = task
                alone += task.macs
        kinds: dict[str, set[str]] = {}
        for key, task in distinct.items():
            kinds.setdefault(task.kind, set()).add(key)
        return kinds, sum(task.macs for task in distinct.values()), alone

    return declared


def test_trials_share_their_trunk(stages) -> None:
    kinds, macs, alone = stages(FASHION)
    assert len(kinds["baseline"]) == 2 * 3, "one for each base and seed"
    assert len(kinds["finetune"]) == (9 + 5 + 1) * 2 * 3 * 2, "16 and 8 bits are rounded from one more"
    assert "measure" not in kinds
    assert macs <= alone / 3


def test_autoattack_is_run_on_networks_that_are_there_already(stages) -> None:
    kinds, _, _ = stages(FASHION)
    again, _, _ = stages("paper-figure1-autoattack-fashion-mnist")
    for kind in ("baseline", "prune", "quantize", "finetune"):
        assert again[kind] <= kinds[kind], kind
    assert not again["evaluate"] & kinds["evaluate"]


# --- the paper's values


def test_the_values_read_off_the_paper() -> None:
    found = load_paper()
    assert len(found) == 2 * 2 * (9 + 5) * 2
    assert {read.level for read in found if read.compression == "quantization"} == set(BITS)
    (value,) = [
        read.value
        for read in found
        if (read.data, read.compression, read.level) == ("cifar10", "quantization", 8.0)
        and (read.setting, read.measure) == ("standard", "robust")
    ]
    assert value == 0.601
    assert "2403.09441" in (ROOT / "results" / "paper" / "figure1.csv").read_text(encoding="utf-8").splitlines()[0]


# --- differences and verdicts


def test_a_difference_has_an_interval_of_seeds_and_images() -> None:
    first = [
        point("pruning", 0.5, "natural", "none", seed, 0.9, value) for seed, value in enumerate((0.50, 0.52, 0.54))
    ]
    second = [point("none", 0, "natural", "dense", seed, 0.9, 0.40) for seed in (0, 1, 2, 7)]
    found = difference(first, second, "robust")
    assert found.value == pytest.approx(0.12), "seed 7 has no partner"
    images = 1.96 * math.sqrt((0.52 * 0.48 + 0.4 * 0.6) / 2000)
    assert found.high - found.value == pytest.approx(math.hypot(images, 4.30 * 0.02 / math.sqrt(3)))
    one = difference(first[:1], second, "robust")
    assert one.high - one.value == pytest.approx(1.96 * math.sqrt((0.5 * 0.5 + 0.4 * 0.6) / 2000))
    assert str(one) == "+10.0 [+6.9, +13.1] points"
    assert (found.seeds, one.seeds) == (3, 1)
    assert (at_least(one, 0.05), at_least(one, 0.10), at_least(one, 0.15)) == (HOLDS, OPEN, FAILS)
    assert (at_most(one, 0.05), at_most(one, 0.10), at_most(one, 0.15)) == (FAILS, OPEN, HOLDS)
    assert [both(HOLDS, HOLDS), both(HOLDS, OPEN), both(OPEN, FAILS)] == [HOLDS, OPEN, FAILS]


def changed(points: list[Point], compression: str, base: str, arm: str, level: float | None = None, **values: float):
    """The same with other accuracies of one kind of networks."""
    return [
        dataclasses.replace(p, **values)
        if (p.compression, p.base, p.arm) == (compression, base, arm) and level in (None, p.level)
        else p
        for p in points
    ]


ALONE, COMPARABLE, GAIN, CLEAN, TRADE = range(5)
FLAT, FOUR, ONE, CHEAPER = range(10, 14)


@pytest.mark.parametrize(
    ("number", "change", "verdict"),
    [
        (ALONE, ("pruning", "adversarial", "none", 0.5, {"robust": 0.82}), HOLDS),
        (ALONE, ("pruning", "adversarial", "none", 0.5, {"robust": 0.77}), OPEN),
        (ALONE, ("pruning", "adversarial", "none", 0.5, {"robust": 0.70}), FAILS),
        (COMPARABLE, None, HOLDS),
        (COMPARABLE, ("pruning", "natural", "adversarial", 0.5, {"robust": 0.77}), OPEN),
        (COMPARABLE, ("pruning", "natural", "adversarial", 0.5, {"robust": 0.60}), FAILS),
        (GAIN, None, HOLDS),
        (GAIN, ("pruning", "natural", "adversarial", 0.5, {"robust": 0.26}), OPEN),
        (GAIN, ("pruning", "natural", "adversarial", 0.5, {"robust": 0.1}), FAILS),
        (GAIN, ("pruning", "natural", "natural", 0.5, {"robust": 0.7}), FAILS),
        (CLEAN, None, HOLDS),
        (CLEAN, ("pruning", "natural", "natural", 0.5, {"clean": 0.88}), OPEN),
        (CLEAN, ("pruning", "natural", "natural", 0.5, {"clean": 0.7}), FAILS),
        (CLEAN, ("pruning", "natural", "natural", 0.5, {"robust": 0.5}), FAILS),
        (TRADE, None, HOLDS),
        (TRADE, ("pruning", "adversarial", "natural", 0.5, {"robust": 0.81}), OPEN),
        (TRADE, ("pruning", "adversarial", "natural", 0.5, {"clean": 0.6}), FAILS),
        (5 + ALONE, ("quantization", "adversarial", "none", 8.0, {"robust": 0.82}), HOLDS),
        (5 + ALONE, ("quantization", "adversarial", "none", 8.0, {"robust": 0.4}), FAILS),
        (FLAT, None, HOLDS),
        (FLAT, ("pruning", "natural", "adversarial", 0.8, {"robust": 0.75}), OPEN),
        (FLAT, ("pruning", "natural", "adversarial", 0.8, {"robust": 0.6}), FAILS),
        (FLAT, ("pruning", "natural", "adversarial", 0.4, {"robust": 0.6}), FAILS),
        (FOUR, None, FAILS),
        (FOUR, ("quantization", "natural", "adversarial", 4.0, {"clean": 0.68}), OPEN),
        (FOUR, ("quantization", "natural", "adversarial", 4.0, {"clean": 0.16, "robust": 0.136}), HOLDS),
        (ONE, ("quantization", "natural", "adversarial", 1.0, {"clean": 0.1, "robust": 0.1}), HOLDS),
        (CHEAPER, None, HOLDS),
        (CHEAPER, ("pruning", "natural", "adversarial", 0.5, {"macs": 12_000_000}), FAILS),
        (CHEAPER, ("pruning", "natural", "adversarial", 0.5, {"robust": 0.5}), FAILS),
    ],
)
def test_each_claim_can_hold_fail_and_stay_open(number, change, verdict) -> None:
    points = synthetic()
    if change is not None:
        *which, values = change
        points = changed(points, *which, **values)
    finding = judge(claims("fashion-mnist")[number], points)
    assert finding.verdict == verdict, finding.sentence
    assert " %" in finding.sentence, "the numbers are in the sentence"


def test_compression_alone_says_how_far_it_holds() -> None:
    points = synthetic()
    for level in RATIOS[:3]:
        points = changed(points, "pruning", "adversarial", "none", level, robust=0.8)
    first, *_ = claims("fashion-mnist")
    assert "within 5 points up to 30 % of the channels removed." in judge(first, points).sentence
    assert "at no level that was computed" in judge(first, synthetic()).sentence
    quantized = changed(synthetic(), "quantization", "adversarial", "none", robust=0.82)
    assert "within 5 points down to 1 bit." in judge(claims("fashion-mnist")[5 + ALONE], quantized).sentence


def test_what_was_not_computed_is_not_judged() -> None:
    partly = [p for p in synthetic() if p.compression != "quantization"]
    verdicts = [judge(claim, partly).verdict for claim in claims("fashion-mnist")]
    assert verdicts[5:10] == [MISSING] * 5
    assert MISSING not in verdicts[:5]
    for levels in ([0.5], [0.5, 0.6], [0.1, 0.3, 0.5]):
        assert judge(claims("cifar10")[FLAT], synthetic(levels=(levels, BITS))).verdict == MISSING, levels
    assert judge(claims("cifar10")[FLAT], synthetic(levels=([0.1, 0.3, 0.6, 0.9], BITS))).verdict == HOLDS
    assert Case(synthetic()).levels("quantization", "natural", "none") == BITS
    rows = judged(partly, "fashion-mnist")
    assert len(rows) == len(claims("fashion-mnist"))
    assert rows[5]["findings"] == []


def test_a_network_that_is_not_there_yet_takes_no_other_claim_with_it() -> None:
    lost = ("quantization", 1.0, "adversarial")
    partly = [p for p in synthetic() if (p.compression, p.level, p.base) != lost]
    for number, (whole, part) in enumerate(
        zip(*(judged(p, "fashion-mnist") for p in (synthetic(), partly)), strict=True)
    ):
        assert [f["verdict"] for f in whole["findings"]] == [f["verdict"] for f in part["findings"]], number


def test_seeds_are_those_of_the_networks_that_a_claim_compares() -> None:
    points = [p for p in synthetic() if p.compression != "pruning" or p.seed == 0]
    rows = judged(points, "fashion-mnist")
    assert [row["findings"][0]["seeds"] for row in rows[:10]] == [1] * 5 + [3] * 5


def test_a_suspect_robustness_lets_no_claim_hold() -> None:
    def found(verdicts: tuple[str, ...]):
        points = [
            dataclasses.replace(p, masking=verdicts[p.seed]) if p.arm == "adversarial" else p for p in synthetic()
        ]
        return judge(claims("fashion-mnist")[COMPARABLE], points)

    assert (found(("ok", "ok", "ok")).verdict, found(("ok", "suspect", "ok")).verdict) == (HOLDS, OPEN)
    assert found(("ok", "ok", "ok")).sentence.endswith("Masking panel: ok.")
    assert found(("ok", "suspect", "ok")).sentence.endswith("Masking panel: suspect (1 of 3 networks).")
    assert "panel" not in found(("not_run",) * 3).sentence
    assert "panel" not in found(("ok", "not_run", "ok")).sentence


def test_a_checkpoint_was_not_trained_for_nothing() -> None:
    points = synthetic()
    assert "120.0 % with the natural training before it" in judge(claims("fashion-mnist")[CHEAPER], points).sentence
    given = changed(points, "none", "natural", "dense", train_macs=0.0)
    assert "not counted, as a checkpoint was given" in judge(claims("fashion-mnist")[CHEAPER], given).sentence


def test_protocols_stand_side_by_side() -> None:
    literal = synthetic(seeds=(0,), levels=([0.5, 0.8], [8, 4]), protocol="literal", attack="pgd-20-paper")
    stronger = synthetic(seeds=(0,), levels=([0.5, 0.8], [8, 4]), attack="autoattack-lite")
    rows = judged([*literal, *stronger, *synthetic()], "fashion-mnist")
    assert [(f["protocol"], f["attack"], f["seeds"]) for f in rows[0]["findings"]] == [
        ("corrected", "pgd-20", 3), ("corrected", "autoattack-lite", 1), ("literal", "pgd-20-paper", 1),
    ]  # fmt: skip
    assert len(rows[ONE]["findings"]) == 1, "the literal sweep has no 1 bit"
    assert judged(literal, "cifar10")[0]["findings"] == []


def test_the_legend_is_read_both_ways() -> None:
    paper = load_paper()
    exact = [
        point(r.compression, r.level, "natural", "adversarial", 0, r.value, r.value)
        for r in paper
        if (r.data, r.setting, r.measure) == ("fashion-mnist", "standard", "clean")
    ]
    (pruned, quantized) = readings(exact, paper, "fashion-mnist")
    assert (pruned["levels"], quantized["levels"]) == (9, 2), "8 bits and more"
    assert pruned["standard clean"] == quantized["standard clean"] == 0
    assert 0 < pruned["adversarial clean"] < 0.03 < pruned["standard robust"]
    literal = [dataclasses.replace(p, protocol="literal", attack="pgd-20-paper") for p in exact]
    assert readings(literal, paper, "fashion-mnist")[1]["levels"] == 5
    fewer = [dataclasses.replace(p, arm="none") for p in exact if p.level in (0.1, 0.2)]
    assert [row["levels"] for row in readings([*exact, *fewer], paper, "fashion-mnist")][:2] == [2, 2], "what both have"


# --- tables and figures


def test_points_come_back_from_their_table(tmp_path) -> None:
    points = synthetic()
    save_points(points, tmp_path / "x.csv")
    assert set(load_points(tmp_path / "x.csv")) == set(points)
    assert load_points(tmp_path / "none.csv") == []
    literal = synthetic(protocol="literal", attack="pgd-20-paper")
    fewer = [dataclasses.replace(p, robust=0.0) for p in points if p.seed == 0 and p.level != 8]
    others = [p for p in points if p.seed]
    assert set(merged([*points, *literal], fewer)) == {*literal, *others, *fewer}, "its kind and seed"


def test_the_figure_and_the_verdicts_are_written(tmp_path) -> None:
    more = synthetic(seeds=(0,), levels=([0.5], [8]), protocol="literal", attack="pgd-20-paper")
    more += synthetic(seeds=(0,), levels=([0.5], [8]), attack="autoattack-lite", masking="suspect")
    told = {"a": {"recipe": FASHION, "seeds": [0], "trials": 28}}
    paper_figure.write("fashion-mnist", [*synthetic(), *more], told, tmp_path)
    png, svg = (tmp_path / f"fashion-mnist.{kind}" for kind in ("png", "svg"))
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_text(encoding="utf-8").startswith("<?xml")
    record = json.loads((tmp_path / "fashion-mnist.json").read_text(encoding="utf-8"))
    assert record["sweeps"] == told
    assert record["not_computed"] == {
        FASHION: [1, 2], f"{FASHION.replace('figure1', 'figure1-literal')}": [0],
        f"{FASHION.replace('figure1', 'figure1-autoattack')}": [0],
    }  # fmt: skip
    assert [len(row["findings"]) for row in record["claims"]][:2] == [3, 3]
    before = svg.read_bytes()
    paper_figure.write("fashion-mnist", [*synthetic(), *more], {}, tmp_path)
    assert svg.read_bytes() == before
    paper_figure.write("cifar10", [dataclasses.replace(p, data="cifar10") for p in more], {}, tmp_path)


def test_the_caption_tells_how_many_seeds_a_point_has() -> None:
    def said(points: list[Point]) -> str:
        return next(text.get_text() for text in paper_figure.figure_of("fashion-mnist", points, []).texts[1:])

    assert "mean and standard deviation over 3 seeds." in said(synthetic())
    assert "with 1 seed." in said(synthetic(seeds=(0,)))
    partly = [p for p in synthetic() if p.compression != "pruning" or p.seed == 0]
    assert "over 1 to 3 seeds." in said(partly)
    more = synthetic(seeds=(0,), levels=([0.5], [8]), attack="autoattack-lite", n_attacked=1000)
    assert "over 3 seeds (dashes: 1 seed, 1,000 images)." in said([*synthetic(), *more])


def test_a_sweep_takes_the_place_of_its_seeds_and_refuses_other_settings() -> None:
    def told(*seeds: int, settings: str = "a", recipe: str = "r") -> dict[str, dict[str, object]]:
        return {f"{recipe}, {seeds}": {"recipe": recipe, "seeds": list(seeds), "settings": settings}}

    both_seeds = told(0) | told(1)
    assert joined(told(0), told(1)) == both_seeds
    assert joined(both_seeds, told(0, 1, 2)) == told(0, 1, 2)
    assert joined(told(0) | told(0, recipe="other"), told(0, settings="b")) == {
        **told(0, settings="b"), **told(0, recipe="other"),
    }  # fmt: skip
    with pytest.raises(UsageError, match="expected the same settings, got different ones; give all seeds anew"):
        joined(told(0), told(1, settings="b"))


def test_points_of_a_sweep(tmp_path) -> None:
    head = {"trial": "t", "seed": 3, "base": "natural", "threat_model:box": True, "masking": "not_run"}
    numbers = {"n": 100, "n_attacked": 50, "params": 5, "macs": 7, "packed_bytes": 9, "train_macs": 0.0}
    small = {"pruning_ratio:requested": 0.5, "weight_bits": 32}
    rows = [
        {
            "name": "baseline",
            "exported": False,
            "pruning_ratio:requested": 0.0,
            "weight_bits": 32,
            "robust:worst_case": 0.1,
        },
        {"name": "compressed", "exported": False, **small, "robust:worst_case": 0.2},
        {"name": "tuned", "label": "naturally tuned", "exported": False, **small, "robust:worst_case": 0.3},
        {"name": "tuned", "label": "adversarially tuned", "exported": True, **small, "robust:worst_case": 0.4},
        {"name": "artifact", "exported": False, **small, "robust:worst_case": 0.5, "masking": "ok"},
    ]
    rows = [head | numbers | {"clean_accuracy": 0.9} | row for row in rows]
    rows[3]["train_macs"] = 11.0
    record = json.loads((ROOT / "results" / "fashion-mnist" / "record.json").read_text(encoding="utf-8"))
    record["recipe"] = load_recipe("cifar10-paper").model_dump(mode="json")
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "t.json").write_text(json.dumps(record), encoding="utf-8")
    found = points_of(Sweep(tmp_path, "s", "", ("base",), tuple(rows), 1))
    assert [(p.arm, p.compression, p.level, p.robust) for p in found] == [
        ("dense", "none", 0.0, 0.1), ("none", "pruning", 0.5, 0.2), ("natural", "pruning", 0.5, 0.3),
        ("adversarial", "pruning", 0.5, 0.5),
    ]  # fmt: skip
    assert {(p.data, p.protocol, p.attack, p.seed) for p in found} == {("cifar10", "corrected", "autoattack-lite", 3)}
    assert (found[-1].train_macs, found[-1].masking) == (11.0, "ok"), "the file's verdicts, its network's training"
    rows[-1] |= {"agreement:clean": 0.17, "agreement:adversarial": 1.0}
    with pytest.raises(UsageError, match="trial t: the file and its twin disagree"):
        points_of(Sweep(tmp_path, "s", "", ("base",), tuple(rows), 1))

    with pytest.raises(UsageError, match="expected a sweep with the axis base, got bits"):
        points_of(Sweep(tmp_path, "s", "", ("bits",), tuple(rows), 1))
    with pytest.raises(UsageError, match="no trial is finished yet"):
        points_of(Sweep(tmp_path, "s", "", ("base",), (), 1))
    with pytest.raises(UsageError, match="expected a folder that `coldforge sweep` wrote"):
        read_sweeps([tmp_path / "nowhere"])


@pytest.fixture(scope="module")
def pages():
    """The script that writes the pages, as a module."""
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "scripts" / "update_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_verdicts_with_their_sentences(pages, tmp_path) -> None:
    points = [*synthetic(), *synthetic(seeds=(0,), levels=([0.5], [8]), protocol="literal", attack="pgd-20-paper")]
    told = {"distinct": 1146, "alone": 1428, "macs": 1.0, "macs_alone": 4.0, "trials": 84, "finished": 83}
    told["recipe"] = FASHION
    told["repeated"] = ["bits=2 base=natural seed=0: adversarially tuned: training with lr 0.05 collapsed"]
    told["failures"] = ["bits=1 base=natural seed=2: fine-tune: natural: training collapsed"]
    record = {
        "sweeps": {f"{FASHION}, seed 0": told},
        "not_computed": {FASHION: [1, 2]},
        "claims": judged(points, "fashion-mnist"),
        "readings": readings(points, load_paper(), "fashion-mnist"),
    }
    path = tmp_path / "fashion-mnist.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    claimed = pages.paper_claims(path)
    assert claimed.startswith("| claim | corrected, PGD-20 | literal, PGD-20 |\n")
    assert "| Quantization to 1 bit destroys the network. | does not hold (3 seeds) | – |" in claimed
    assert "   - corrected, PGD-20, 3 seeds: **holds.** Trained naturally, compressed (50 %" in claimed
    shown = pages.paper_figure(path)
    assert f"- `recipes/{FASHION}.toml`, seed 0: 83 of" in shown
    assert "83 of 84 trials, 1,146 stages in place of 1,428, 25 % of the multiply-adds" in shown
    assert "Not there: bits=1 base=natural seed=2: fine-tune: natural: training collapsed." in shown
    assert "Tried again: bits=2 base=natural seed=0: adversarially tuned: training with lr 0.05 collapsed." in shown
    assert f"- `recipes/{FASHION}.toml`, seeds 1, 2: not computed yet." in shown
    table = pages.paper_readings(path).splitlines()
    assert len(table) == 2 + 2 * 6 * 2
    assert all(
        "**" in "".join(line for line in table if f"| {which} |" in line) for which in ("pruning", "quantization")
    )
    for kind in (pages.paper_claims, pages.paper_figure, pages.paper_readings):
        assert kind(tmp_path / "none.json") == "*Not computed yet.*"


def test_the_page_names_what_is_there() -> None:
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    for recipe in RECIPES.glob("paper-figure1*.toml"):
        assert recipe.stem.removeprefix("paper-figure1") in text, f"{recipe.name} is not on the page"

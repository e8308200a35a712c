"""The benchmarks of speed run, as small as they can be, and their peers do the work that they are measured at."""

from __future__ import annotations

import functools
import importlib
import json
import os
from dataclasses import replace
from pathlib import Path

import latency
import limits
import main_job
import memory
import plain
import profiles
import pytest
import quantization_overhead
import startup
import tables
import torch
import training_cost
import training_speed
import training_watch
import turns
from networks import SHAPES, untrained
from recipe_results import REFERENCE
from torch.utils.flop_counter import FlopCounterMode

from coldforge.attacks import ThreatModel, parse_inner
from coldforge.compress import is_quantized
from coldforge.data import load_data, steps_per_epoch
from coldforge.measure import count_macs, measure_latency
from coldforge.provenance import has_bf16
from coldforge.recipe import DataSpec, load_recipe, preset_names
from coldforge.records import load_record

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own
ROOT = Path(__file__).parents[2]
HINT = "the peer is missing: pip install --no-deps -r benchmarks/requirements-peers.txt"


# --- turns and records ------------------------------------------------------------------------------------------------


def test_contenders_take_turns() -> None:
    order: list[tuple[str, int]] = []
    found = turns.in_turns("ab", 2, lambda who, turn: order.append((who, turn)) or 10 * turn)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert found == {"a": [0, 10], "b": [0, 10]}
    assert turns.median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0


def test_a_run_replaces_that_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "record.json"
    record = turns.Record(path, "network", "batch")
    for network, batch, value in (("a", 1, 1), ("b", 1, 2), ("a", 1, 3), ("a", 2, 4)):
        record.keep({"network": network, "batch": batch, "value": value})
    again = turns.Record(path, "network", "batch")
    assert [run["value"] for run in again.content["runs"]] == [2, 3, 4]
    assert again.has("a", 2)
    assert not again.has("b", 2)
    assert {"hardware", "versions", "git_commit"} <= set(again.content["runs"][0]["provenance"])


def test_names_choose_what_is_run() -> None:
    assert turns.chosen(["x", "b"], "abc", "xy") == [["b"], ["x"]]
    assert turns.chosen(["x"], "abc", "xy") == [["a", "b", "c"], ["x"]]
    with pytest.raises(SystemExit, match="expected any of a, b, c, x, y, got z"):
        turns.chosen(["z"], "abc", "xy")


def test_goals_are_judged_from_either_side() -> None:
    assert turns.judged(3.0, 2.5) == {"goal": 2.5, "met": True}
    assert turns.judged(3.0, 2.5, at_most=True) == {"goal": 2.5, "met": False}
    assert turns.judged(3.0, None) == {"goal": None, "met": None}


def test_without_a_record_there_are_no_goals() -> None:
    assert tables.goals({}) == tables.NOT_YET


# --- the plain peer ---------------------------------------------------------------------------------------------------


def test_the_table_of_what_layers_cost() -> None:
    def row(layer: str, how: str, loss: float) -> dict[str, object]:
        return {"layer": layer, "how": how, "robust_loss": loss, "robust_loss_ci95": (loss - 0.01, loss + 0.02)}

    first = [row("(none)", "", 0.0), row("network.a", "prune 50%", 0.2), row("network.a", "4 bits", -0.005)]
    second = [row("(none)", "", 0.0), row("network.a", "prune 50%", 0.1), row("network.b", "4 bits", 0.3)]
    assert tables.sensitivity({"l1": first, "taylor": second}).splitlines() == [
        "| layer | prune 50%, l1 | prune 50%, taylor | 4 bits |",
        "|---|---:|---:|---:|",
        "| a | 20.0 [19.0, 22.0] | 10.0 [9.0, 12.0] | -0.5 [-1.5, 1.5] |",
        "| b |  |  | 30.0 [29.0, 32.0] |",
    ]


def test_plain_fake_quantization_is_the_function_of_ours() -> None:
    networks = untrained("cnn8", 0.5)
    images = networks.images[:16]
    with torch.no_grad():
        ours, theirs = networks.twin(images), plain.plain_quantized(networks.twin)(images)
    assert (ours - theirs).norm() < 0.03 * ours.norm(), "only biases differ, which stay in float"


def test_the_plain_attack_stays_in_ball_and_box_and_leaves_gradients_on_weights() -> None:
    network = untrained("cnn8", 0.5).parent
    images, labels = torch.rand(4, 1, 28, 28), torch.arange(4)
    threat_model = ThreatModel("linf", 0.1)
    found = plain.plain_attack(network, images, labels, parse_inner("pgd-7"), threat_model)
    threat_model.verify(found, images)
    assert (found - images).abs().max() > 0.09
    assert all(parameter.grad is not None for parameter in network.parameters())


# --- each benchmark, once ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured here, so calls are not repeated."""
    once = functools.partial(measure_latency, min_repeats=1, warmup=0, settle=0.0, turn=0.0)
    for module in (latency, limits, main_job, profiles, quantization_overhead):
        monkeypatch.setattr(module, "measure_latency", lambda calls, seconds: once(calls, seconds=0.0))


def test_training_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("torchattacks", "art"):
        pytest.importorskip(module, reason=HINT)
    monkeypatch.setattr(training_speed, "NETWORKS", {"cnn8": "quickstart"})
    monkeypatch.setattr(training_speed, "FEW", 32)
    job = training_speed.prepare("cnn8", 0.5, 512)
    compute = job.recipe.compute.model_copy(update={"compile": "off"})  # seconds
    job = replace(job, recipe=job.recipe.model_copy(update={"compute": compute}), batch_size=8)
    record = turns.Record(tmp_path / "training_speed.json", "network", "attack")
    for attack in training_speed.ATTACKS:
        chosen = replace(job, attack=parse_inner(attack))
        run = training_speed.race("cnn8", chosen, list(training_speed.CONTENDERS), 1, 0.0, 32)
        record.keep(run)
        passes = {row["who"]: row["forward_passes_an_image"] for row in run["rows"]}
        assert {passes[who] for who in passes if who != "art"} == {chosen.attack.steps + 1}
        assert passes["art"] >= chosen.attack.steps + 1
    assert tables.training_speed(record.content).count("| cnn8 |") == 2 * (6 + 2)
    assert "adversarial training, cnn8, pgd-7" in tables.goals({"training_speed": record.content})


def test_a_ratio_between_trainings_that_came_apart_is_not_judged() -> None:
    ours = {"clean_accuracy": 0.7, "fgsm_accuracy": 0.4, "clean_loss": 1.0, "fgsm_loss": 2.0}
    assert training_speed.is_same_work(ours | {"fgsm_accuracy": 0.36, "fgsm_loss": 3.0}, ours)
    assert not training_speed.is_same_work(ours | {"fgsm_accuracy": 0.34}, ours)
    assert not training_speed.is_same_work(ours | {"clean_accuracy": 0.76}, ours)
    row = {"who": "art", "version": "art 1", "median_images_per_s": 5.0, "ours_times_faster": 9.0, "same_work": False}
    row |= {"ours_times_faster_with_watching": None, "forward_passes_an_image": 2.0, "after": ours, "goal": None}
    run = {"network": "cnn8", "attack": "pgd-7", "rows": [row | {"met": None}], "before": {}, "threads": 1}
    hardware = {"cpu": "x", "flags": []}
    record = {"runs": [run | {"provenance": {"hardware": hardware, "versions": {"torch": "2"}}}]}
    assert "| not the same work |" in tables.training_speed(record)
    assert "adversarial training" not in tables.goals({"training_speed": record})


def _small(training: training_cost.Training) -> training_cost.Training:
    """The same in batches of 8, with nothing compiled."""
    compute = training.recipe.compute.model_copy(update={"compile": "off"})
    parts = [replace(part, spec=part.spec.model_copy(update={"batch_size": 8})) for part in training.parts]
    return replace(training, parts=tuple(parts), recipe=training.recipe.model_copy(update={"compute": compute}))


def test_training_cost_times_each_part_of_what_a_recipe_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = load_data(DataSpec(source="fashion-mnist-mini", validation=64))
    monkeypatch.setattr(training_cost, "load_data", lambda spec: few)
    monkeypatch.setattr(training_cost, "LEAST_STEPS", 1)
    folders = dict(training_cost.artifacts())
    row = "half, 2-bit weights, 4-bit activations, 5 epochs"
    reference, other = (_small(training_cost.training_of(folders[name], name)) for name in (REFERENCE, row))
    assert [part.name for part in reference.parts] == ["from scratch"]
    assert reference.recipe.compute.precision == other.recipe.compute.precision == ("bf16" if has_bf16() else "fp32")
    assert [(part.name, part.spec.epochs) for part in other.parts] == [
        ("in floating point", 1),
        ("through the rounding", 4),
    ]
    assert [is_quantized(part.network) for part in other.parts] == [False, True]
    record = turns.Record(tmp_path / "training_cost.json", "row")
    record.keep(training_cost.race(reference, other, 1, 0.0))
    (run,) = record.content["runs"]
    epoch = steps_per_epoch(len(few.train), 8)
    assert [part["steps"] for part in run["rows"]] == [epoch, 4 * epoch]
    assert run["seconds"] == sum(part["steps"] * part["seconds_a_step"][0] for part in run["rows"])
    assert run["share_of_seconds"] == run["seconds"] / run["reference_seconds"]
    assert f"| {row} |" in tables.training_cost(record.content)


def test_the_watch_of_a_training_is_tried_on_networks_that_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = training_watch.networks()
    assert set(training_watch.SUSPECT) < set(found)
    assert REFERENCE in found
    assert all((folder / "model.safetensors").is_file() for folder in found.values())
    verdicts = {name: training_watch.panel(folder) for name, folder in found.items()}
    assert {name for name, verdict in verdicts.items() if verdict == "suspect"} == set(training_watch.SUSPECT)
    assert set(verdicts.values()) == {"ok", "suspect"}
    label = "quarter, 4 bits, 5 epochs, distilled"
    few = load_data(DataSpec(source="fashion-mnist-mini"))
    monkeypatch.setattr(training_watch, "load_data", lambda spec: few)
    monkeypatch.setattr(training_watch, "networks", lambda: {label: found[label]})
    out = tmp_path / "training_watch.json"
    monkeypatch.setattr("sys.argv", ["training_watch.py", "--n", "250", "--turns", "1", "--out", str(out)])
    training_watch.main()
    table = tables.training_watch(json.loads(out.read_text(encoding="utf-8")))
    assert table in capsys.readouterr().out
    assert f"| {label} | suspect |" in table
    assert "| yes |" in table


def test_training_speed_says_where_cifar10_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLDFORGE_CIFAR10", raising=False)
    with pytest.raises(SystemExit, match="expected \\$COLDFORGE_CIFAR10"):
        training_speed.prepare("resnet18", 0.5, 64)


def test_quantization_overhead(tmp_path: Path) -> None:
    there = [
        who
        for who in quantization_overhead.CONTENDERS
        if importlib.util.find_spec(quantization_overhead.CONTENDERS[who])
    ]
    record = turns.Record(tmp_path / "quantization_overhead.json", "network", "precision")
    record.keep(quantization_overhead.race("cnn8", 0.5, "fp32", there, 2, 0.0))
    assert tables.quantization_overhead(record.content).count("| cnn8 | fp32 |") == len(there)


def test_profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(profiles, "PROFILED", 1)
    monkeypatch.setattr(profiles, "BATCH", 2)
    record = turns.Record(tmp_path / "profiles.json", "network", "step")
    for step in profiles.STEPS:
        run = profiles.measured("cnn8", step, 0.0)
        record.keep(run)
        parts = {row["way"]: row["shares"] for row in run["rows"]}
        assert all(0 < sum(shares.values()) < 1 for shares in parts.values())
        assert parts["float"]["rounding"] == 0 < min(parts["ours"]["rounding"], parts["ours, before"]["rounding"])
        assert parts["ours"]["ReLU"] == 0 < parts["ours, before"]["ReLU"]
    assert tables.profiles(record.content).count("| cnn8 | attack step |") == len(profiles.WAYS)


def test_limits_count_every_product_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "PEAK_SIZE", 64)
    monkeypatch.setattr(limits, "STEPS", {"training step": 2, "attack step": 2})
    record = turns.Record(tmp_path / "limits.json", "network", "step")
    for step in limits.STEPS:
        record.keep(limits.measured("resnet20", step, 0.0))
    assert tables.limits(record.content).count("| resnet20 |") == 2
    networks = untrained("resnet20", 0.5)
    layers = limits.layers_of(networks.parent, networks.images[:2])
    assert [layer.reads_pixels for layer in layers].count(True) == 1
    counted = sum(layer.grad[0, 0].numel() * layer.weight.numel() for layer in layers)
    assert counted == count_macs(networks.parent, SHAPES["resnet20"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        limits.necessary("attack step", layers)()
    first = layers[0].grad[0, 0].numel() * layers[0].weight.numel()
    assert counter.get_total_flops() == 2 * 2 * (2 * counted - first)  # both images; two operations a multiply-add


def test_latency(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latency, "PEAK_SIZES", (64,))
    run = latency.compare("cnn8", 0.5, 1, 0.0)
    assert run["sizes"]["integer_kernels_only"]
    assert not set(run["sizes"]["operators"]) & {"Conv", "FusedConv", "Gemm", "MatMul"}
    record = turns.Record(tmp_path / "latency.json", "network", "ratio")
    record.keep(run)
    assert "QLinearConv" in tables.latency_whole(record.content)
    assert "share of the int8 peak" not in tables.goals({"latency": record.content}), "only resnet18 has that goal"


def test_main_job_by_hand(tmp_path: Path) -> None:
    for module in ("torchattacks", "torch_pruning"):
        pytest.importorskip(module, reason=HINT)
    changes = {"data.source": "fashion-mnist-mini", "data.train_n": 700, "data.test_n": 20, "compute.threads": 1}
    changes |= {"model.train.epochs": 1, "finetune.epochs": 1}
    found = main_job.by_hand(load_recipe(main_job.RECIPE, overrides=changes), tmp_path)
    ours = main_job.ours_of(load_record(ROOT / "results" / main_job.RECIPE))
    assert found["accuracies"].keys() == ours["accuracies"].keys()
    assert all(values.keys() == {"clean", *main_job.ATTACKS} for values in found["accuracies"].values())
    rows = [
        {"who": who, "median_s": 1.0, "ours_times_faster": 5.0, **turns.judged(5.0, 4.0), **result}
        for who, result in (("ours", ours), ("by hand", found))
    ]
    record = turns.Record(tmp_path / "main_job.json", "fraction")
    record.keep({"fraction": 0.1, "rows": rows})
    assert "| 10% | by hand |" in tables.main_job(record.content)
    assert "whole main job" in tables.goals({"main_job": record.content})


def test_startup() -> None:
    assert 0 < startup.seconds_of("an empty program") < 10


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="expected Linux, whose /proc is read")
def test_memory_of_processes_is_read() -> None:
    assert memory.own_peak() > 1e8, "torch alone takes more"
    assert 1e7 < memory.resident_bytes(os.getpid()) < 1e11


@pytest.mark.parametrize("name", preset_names())
def test_short_recipes_are_recipes(name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe(name, overrides=memory.short(recipe)).finetune.epochs <= recipe.finetune.epochs

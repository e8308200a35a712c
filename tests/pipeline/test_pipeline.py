"""One tiny run, many questions to it; then runs that share its store."""

import copy
import json
import math
import shutil

import onnx
import pyarrow.parquet as pq
import pytest
import torch

from coldforge.assemble import UNASKED
from coldforge.compress import QuantizedLayer, load_network
from coldforge.data import load_data
from coldforge.errors import RecipeError
from coldforge.evaluate import BACKWARDS
from coldforge.evaluation.compare import compare
from coldforge.models import model_source
from coldforge.pipeline import arrow, plan, resolve, run
from coldforge.recipe import load_recipe
from coldforge.records import Record, load_record
from coldforge.report.html import render_report
from coldforge.report.table import footnotes
from coldforge.stages import Shop
from coldforge.store import Store

TOP = {"schema_version", "coldforge_version", "recipe", "provenance", "threat_model", "stages"}
STAGE = {
    *("name", "label", "params", "macs", "size_bytes", "packed_bytes", "weight_bits", "activation_bits"),
    *("pruning_ratio", "n", "clean_accuracy", "clean_ci95", "robust_accuracy", "robust_n", "robust_ci95"),
    *("per_class", "latency_s", "energy_j_per_image", "energy_method", "train_seconds", "train_macs"),
    *("agreement", "masking"),
}
TINY_STAGES = [
    *("baseline: load", "prune 50% of channels", "quantize to 8/8 bits"),
    *("fine-tune: natural", "fine-tune: adversarial"),
    *("export: baseline", "export: parent", "export: compressed", "export: tuned: natural"),
    *("export: tuned: adversarial", "evaluate: baseline", "evaluate: compressed", "evaluate: tuned: natural"),
    *("evaluate: tuned: adversarial", "evaluate: artifact", "masking panel: artifact", "agreement of file and twin"),
    *("adversarial examples", "latency and energy"),
]
OUT_FILES = {
    *("record.json", "recipe.toml", "model.onnx", "model/model.safetensors", "model/structure.json"),
    *("probe.safetensors", "gallery.safetensors", "ledger.parquet"),
}
NOW = ("created", "git_commit", "git_dirty")
"""Of the provenance: the moment of the run, and the checkout around the tests."""


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def without_clock(record):
    """What two runs of the same recipe must share."""
    plain = record.model_dump(mode="json")
    for name in NOW:
        del plain["provenance"][name]
    for stage in plain["stages"]:
        for name in ("latency_s", "energy_j_per_image", "energy_method", "train_seconds"):
            del stage[name]
    return plain


# --- the record


def test_the_record_names_what_the_design_names(made):
    plain = json.loads((made.out / "record.json").read_text())
    assert set(plain) == TOP
    for stage in plain["stages"]:
        assert set(stage) >= STAGE
        assert set(stage["pruning_ratio"]) == {"requested", "achieved"}
        assert set(stage["masking"]) == {"verdict", "checks"}
        transfer = set() if stage["name"] == "baseline" else {"transfer"}
        names = {"fgsm", "pgd-5", "worst_case"} | transfer
        assert set(stage["robust_accuracy"]) == set(stage["robust_n"]) == names
        assert set(stage["robust_ci95"]) == set(stage["robust_accuracy"])
        assert set(stage["per_class"]) == {"cup", "hat", "key"}
    assert set(plain["threat_model"]) == {"norm", "eps", "eps_255", "box"}
    for name in ("command", "created", "seed", "git_commit", "versions", "hardware", "data", "stage_keys", "classes"):
        assert name in plain["provenance"]
    assert load_record(made.out) == made.record


def test_stages_of_the_record(made):
    assert [(stage.name, stage.label) for stage in made.record.stages] == [
        ("baseline", "baseline"),
        ("compressed", "compressed, not tuned"),
        ("tuned", "naturally tuned"),
        ("tuned", "adversarially tuned"),
        ("artifact", "artifact (model.onnx)"),
    ]


def test_threat_model_and_provenance(made, splits):
    threat, origin = made.record.threat_model, made.record.provenance
    assert (threat.norm, threat.eps, threat.box) == ("linf", 0.1, True)
    assert threat.eps_255 == pytest.approx(25.5)
    assert origin["command"] == "test"
    assert origin["seed"] == 3
    assert origin["classes"] == ["cup", "hat", "key"]
    assert origin["data"] == {
        "name": "patterns test", "fingerprint": splits.fingerprint, "train": 200, "validation": 40, "test": 60,
    }  # fmt: skip
    assert set(origin["attacks"]) == {"fgsm", "pgd-5", "transfer"}
    pgd = origin["attacks"]["pgd-5"]
    assert (pgd["steps"], pgd["restarts"], pgd["rel_step"], pgd["random_start"]) == (5, 1, 0.5, True)
    assert pgd["gradients_of_quantized_networks"] == list(BACKWARDS)
    assert len(origin["stage_keys"]) == len(TINY_STAGES)
    found = {entry.key for entry in made.store.entries()}
    assert set(origin["stage_keys"].values()) == found


def test_recipes_are_chosen_on_the_validation_part(made, copied, forge_again, recipe, splits, tmp_path):
    changed = recipe({"evaluate.part": "validation", "evaluate.masking_n": 0, "evaluate.attacks": ["fgsm"]})
    again = forge_again(changed, copied, tmp_path / "out")
    found = again.record
    assert not [label for label in again.spy.built if "fine-tune" in label or "export" in label]
    assert [label for label in again.spy.built if "evaluate" in label]
    assert {stage.n for stage in found.stages} == {len(splits.validation)}
    assert found.provenance["data"]["name"] == splits.validation.name
    assert footnotes(found)[0].endswith("40 validation images; 95 % Wilson intervals.")
    assert "On the validation part" in render_report(found)
    assert "On the validation part" not in render_report(made.record)
    assert footnotes(made.record)[0].endswith("60 test images, 50 of them attacked; 95 % Wilson intervals.")


def test_only_some_rows_are_evaluated(made, copied, forge_again, recipe, tmp_path):
    changed = recipe({"evaluate.stages": ["baseline", "artifact"]})
    again = forge_again(changed, copied, tmp_path / "out")
    assert again.spy.built == []
    baseline, artifact = again.record.stages
    tuned = made.record.stage("tuned", "adversarial")
    assert (artifact.train_macs, artifact.curve) == (tuned.train_macs, tuned.curve)  # of the network it was made from
    assert made.record.stage("artifact").train_macs == 0  # said of that network already
    assert artifact.robust_accuracy == made.record.stage("artifact").robust_accuracy
    assert baseline == made.record.stage("baseline")
    assert "artifact" in render_report(again.record)


def test_sizes_and_costs(made):
    baseline, compressed, natural, adversarial, artifact = made.record.stages
    assert (baseline.weight_bits, baseline.activation_bits) == (32, 32)
    assert baseline.pruning_ratio.requested == baseline.pruning_ratio.achieved == 0
    for stage in (compressed, natural, adversarial, artifact):
        assert (stage.weight_bits, stage.activation_bits) == (8, 8)
        assert stage.pruning_ratio.requested == 0.5
        assert stage.pruning_ratio.achieved == pytest.approx(0.5)  # 16 to 8 channels in both layers
        assert stage.params < baseline.params
        assert stage.macs == 6 * 6 * 8 * 9 + 3 * 3 * 8 * 8 * 9 + 72 * 3
        assert stage.size_bytes < baseline.size_bytes
        assert stage.packed_bytes < baseline.packed_bytes / 4
    assert baseline.macs == 6 * 6 * 16 * 9 + 3 * 3 * 16 * 16 * 9 + 144 * 3
    assert artifact.size_bytes == (made.out / "model.onnx").stat().st_size == adversarial.size_bytes


def test_accuracies_are_counts_of_the_attacked_images(made):
    for stage in made.record.stages:
        assert stage.n == 60
        assert (stage.clean_accuracy * 60) == pytest.approx(round(stage.clean_accuracy * 60))
        transfer = {} if stage.name == "baseline" else {"transfer": 50}  # there is nothing to transfer from
        assert stage.robust_n == {"fgsm": 50, "pgd-5": 50, "worst_case": 50} | transfer
        assert stage.clean_ci95[0] <= stage.clean_accuracy <= stage.clean_ci95[1]
        for name, value in stage.robust_accuracy.items():
            assert stage.robust_accuracy["worst_case"] <= value
            assert stage.robust_ci95[name][0] <= value <= stage.robust_ci95[name][1]
        assert sum(row["n"] for row in stage.per_class.values()) == 60
        assert sum(row["n_attacked"] for row in stage.per_class.values()) == 50
    assert made.record.stages[0].clean_accuracy > 0.9


def test_only_trained_rows_cost_training(made):
    for stage in made.record.stages:
        trained = stage.name == "tuned"
        assert (stage.train_macs > 0) == (stage.train_seconds > 0) == trained
        assert len(stage.curve) == (1 if trained else 0)
    natural, adversarial = made.record.stages[2:4]
    assert natural.train_macs == 192 * 3 * natural.macs  # 6 of 6.25 batches
    assert adversarial.train_macs == 192 * (3 + 2 * 4) * adversarial.macs  # pgd-4
    assert natural.curve[0].robust_accuracy == -1
    assert adversarial.curve[0].robust_accuracy >= 0


def test_the_artifact_is_measured_beside_the_dense_network(made):
    baseline, *_, artifact = made.record.stages
    assert [(row.runtime, row.batch, row.threads) for row in artifact.latency_s] == [
        ("onnxruntime", 1, 1),
        ("onnxruntime", 64, 1),
    ]
    assert {row.runtime for row in baseline.latency_s} == {"onnxruntime", "pytorch"}
    for row in (*artifact.latency_s, *baseline.latency_s):
        assert 0 < row.p10 <= row.median <= row.p90
    assert artifact.energy_j_per_image > 0
    assert artifact.energy_method.startswith(("measured", "estimated"))
    for stage in made.record.stages[1:4]:
        assert stage.latency_s == ()
        assert stage.energy_j_per_image is None


def test_the_file_answers_like_its_twin(made):
    artifact = made.record.stages[-1]
    assert artifact.agreement.clean >= 0.995
    assert artifact.agreement.adversarial >= 0.995
    assert all(stage.agreement is None for stage in made.record.stages[:-1])
    assert artifact.notes == (UNASKED,)


# --- the folder


def test_files_of_the_folder(made):
    assert files_in(made.out) == OUT_FILES


def test_the_recipe_is_resolved(made, recipe):
    written = load_recipe(made.out / "recipe.toml")
    assert written == load_recipe(made.record.recipe)
    resolved = resolve(recipe())
    objects = {"model": written.model, "data": written.data}  # which were given in memory, and are called so
    assert written == resolved.model_copy(update=objects)
    assert (written.model.source, written.data.source) == ("memory:Sequential", "memory:patterns train")
    machine = resolve(load_recipe({"name": "any"}))
    assert machine.compute.precision in ("bf16", "fp32")
    assert machine.compute.threads >= 1
    assert resolve(machine) == machine


def test_a_checkpoint_in_a_variable_that_is_not_set_is_none(monkeypatch):
    wanted = load_recipe({"model": {"checkpoint": "$MY_MODELS/a.pt"}})
    monkeypatch.delenv("MY_MODELS", raising=False)
    assert resolve(wanted).model.checkpoint == ""
    monkeypatch.setenv("MY_MODELS", "/models")
    assert resolve(wanted).model.checkpoint == "$MY_MODELS/a.pt"  # as written: no path of this machine in a record


def test_a_live_network_needs_no_checkpoint(made, recipe, forge_again, tmp_path, monkeypatch):
    monkeypatch.delenv("MY_MODELS", raising=False)
    for file in ("$MY_MODELS/a.pt", str(tmp_path / "nothing.pt")):
        again = forge_again(recipe({"model.checkpoint": file}), made.store, tmp_path / "out")
        assert again.spy.cached == TINY_STAGES
        assert again.spy.notes == []


def test_the_checkpoint_is_the_twin_of_the_file(made, model, splits):
    source = model_source(model, image_shape=(1, 12, 12), num_classes=3)
    network, structure = load_network(made.out / "model", source)
    assert structure.classes == ("cup", "hat", "key")
    with torch.no_grad():
        right = (network(splits.test.pixels()).argmax(1) == splits.test.labels).double().mean()
    assert float(right) == pytest.approx(made.record.stages[3].clean_accuracy)


def test_the_file_says_what_it_is(made):
    file = onnx.load(made.out / "model.onnx")
    facts = {item.key: item.value for item in file.metadata_props}
    assert json.loads(facts["classes"]) == ["cup", "hat", "key"]
    assert facts["recipe"] == "tiny"
    assert facts["threat_model"] == "linf 0.1"
    assert set(json.loads(facts["normalization"])) == {"mean", "std"}


def test_the_ledger_is_that_of_the_artifact(made):
    table = pq.read_table(made.out / "ledger.parquet").to_pydict()
    artifact = made.record.stages[-1]
    assert sum(table["clean_right"]) / 60 == artifact.clean_accuracy
    fooled = [value for value in table["pgd-5:fooled"] if value is not None]
    assert 1 - sum(fooled) / 50 == pytest.approx(artifact.robust_accuracy["pgd-5"])


# --- progress, and running again


def test_the_plan_is_what_happens(made):
    spy = made.spy
    assert [step.label for step in spy.steps] == spy.begun == spy.built == TINY_STAGES
    assert not any(step.cached for step in spy.steps)
    assert all(step.estimate_s > 0 for step in spy.steps if step.label.startswith(("fine", "eval", "exp", "lat")))
    assert all(0 <= fraction <= 1 for fraction in spy.fractions)
    assert spy.notes == []


def test_running_again_computes_nothing(made, recipe, forge_again, tmp_path):
    again = forge_again(recipe(), made.store, tmp_path / "out")
    assert again.spy.cached == TINY_STAGES
    assert again.spy.built == []
    assert all(step.cached and step.estimate_s == 0 for step in again.spy.steps)
    assert again.record.stages == made.record.stages  # times too: they are not measured again
    assert without_clock(again.record) == without_clock(made.record)
    for name in OUT_FILES - {"record.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (made.out / name).read_bytes()


def test_a_record_without_a_folder(made, recipe, splits, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = run(recipe(), store=made.store, model=model, data=splits)
    assert without_clock(record) | {"provenance": 0} == without_clock(made.record) | {"provenance": 0}
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == 1


def test_a_record_keeps_its_stages_in_the_store(copied, recipe, forge_again, tmp_path):
    shutil.rmtree(copied.root / "records")
    forge_again(recipe(), copied, tmp_path / "out")
    assert copied.prune().entries == ()
    (tmp_path / "out" / "record.json").unlink()
    assert len(copied.prune().entries) == len(TINY_STAGES)


def test_a_changed_rate_builds_only_what_stands_on_it(copied, recipe, forge_again, made, tmp_path):
    changes = {"finetune.lr": 0.011, "finetune.arms": ["adversarial"]}
    other = forge_again(recipe(changes), copied, tmp_path / "out")
    assert other.spy.cached == [
        *("baseline: load", "prune 50% of channels", "quantize to 8/8 bits"),
        *("export: baseline", "export: parent", "export: compressed", "evaluate: baseline", "evaluate: compressed"),
    ]
    assert other.spy.built == [
        *("fine-tune: adversarial", "export: tuned: adversarial", "evaluate: tuned: adversarial"),
        *("evaluate: artifact", "masking panel: artifact", "agreement of file and twin", "adversarial examples"),
        "latency and energy",
    ]
    assert [stage.label for stage in other.record.stages] == [
        *("baseline", "compressed, not tuned", "adversarially tuned", "artifact (model.onnx)"),
    ]
    assert other.record.stages[0] != made.record.stages[0]  # measured again, together with the new file
    assert without_clock(other.record)["stages"][:2] == without_clock(made.record)["stages"][:2]
    assert (tmp_path / "out" / "model.onnx").read_bytes() != (made.out / "model.onnx").read_bytes()


@pytest.mark.parametrize("damage", ["a flipped bit", "a missing file"])
def test_a_damaged_stage_is_rebuilt_and_said(damage, copied, recipe, forge_again, made, tmp_path):
    (stage,) = (copied.root / "stages" / "prune").iterdir()
    weights = stage / "model.safetensors"
    if damage == "a flipped bit":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 4
        weights.write_bytes(content)
    else:
        weights.unlink()
    again = forge_again(recipe(), copied, tmp_path / "out")
    (note,) = again.spy.notes
    what = "checksum differs" if damage == "a flipped bit" else "missing"
    assert f"stage 'prune 50% of channels' in the store was damaged (file model.safetensors: {what})" in note
    assert note.endswith("rebuilding")
    assert without_clock(again.record) == without_clock(made.record)
    assert all(not entry.problem for entry in copied.verify())


# --- several devices


def test_devices_need_something_to_train(copied, recipe, forge_again, tmp_path):
    nothing = {"compute.devices": 2, "finetune.arms": ["none"], "deploy.arm": "none"}
    with pytest.raises(RecipeError, match="expected a recipe that trains something"):
        forge_again(recipe(nothing), copied, tmp_path / "out")


def test_two_devices(recipe, copied, forge_again, made, tmp_path):
    changes = {"compute.devices": 2, "evaluate.masking_n": 0}
    shared = forge_again(recipe(changes), copied, tmp_path / "out")
    assert {"fine-tune: natural", "fine-tune: adversarial"} < set(shared.spy.built)
    assert "quantize to 8/8 bits" in shared.spy.cached
    assert shared.spy.notes == []
    for one, two in zip(made.record.stages, shared.record.stages, strict=True):
        assert two.clean_accuracy == pytest.approx(one.clean_accuracy, abs=0.05)
        assert two.train_macs == one.train_macs
    again = forge_again(recipe(changes), copied, tmp_path / "out")
    assert again.spy.notes == ["every training was in the store already: further devices had nothing to do"]


# --- other shapes of the arrow


def test_not_tuned_at_all(copied, recipe, forge_again, tmp_path):
    changes = {"finetune.arms": ["none"], "deploy.arm": "none"}
    other = forge_again(recipe(changes), copied, tmp_path / "out")
    assert [stage.name for stage in other.record.stages] == ["baseline", "compressed", "artifact"]
    assert other.spy.built == [
        *("evaluate: artifact", "masking panel: artifact", "agreement of file and twin", "adversarial examples"),
        "latency and energy",
    ]
    assert other.record.stages[1].size_bytes == other.record.stages[2].size_bytes
    assert files_in(other.out) == OUT_FILES


def test_four_bits_say_that_they_are_not_faster(copied, recipe, forge_again, tmp_path):
    changes = {
        "finetune.arms": ["none"], "deploy.arm": "none", "quantize.weight_bits": 4, "quantize.activation_bits": 4,
        "evaluate.attacks": ["fgsm", "square-10"],
    }  # fmt: skip
    other = forge_again(recipe(changes), copied, tmp_path / "out")
    compressed, artifact = other.record.stages[1:]
    assert "quantize to 4/4 bits" in other.spy.built
    assert UNASKED not in artifact.notes, "square asked it"
    assert (artifact.weight_bits, artifact.activation_bits) == (4, 4)
    assert compressed.packed_bytes == artifact.packed_bytes
    assert artifact.notes[-1] == "bits below 8 are stored as clipped 8-bit values: no speed is claimed for them"
    assert artifact.agreement.clean >= 0.995
    assert artifact.agreement.adversarial >= 0.995


def test_without_quantization_the_file_is_float(copied, recipe, forge_again, tmp_path):
    changes = {
        "finetune.arms": ["none"], "deploy.arm": "none", "quantize.weight_bits": 32, "quantize.activation_bits": 32,
    }  # fmt: skip
    other = forge_again(recipe(changes), copied, tmp_path / "out")
    assert "quantize (off)" in other.spy.built
    kinds = {node.op_type for node in onnx.load(other.out / "model.onnx").graph.node}
    assert "Conv" in kinds
    assert not {kind for kind in kinds if "Quantize" in kind}
    artifact = other.record.stages[-1]
    assert (artifact.weight_bits, artifact.activation_bits) == (32, 32)
    assert artifact.agreement.clean >= 0.995
    assert artifact.notes == (UNASKED,)


def test_the_natural_arm_is_the_one_of_both_arms(copied, recipe, forge_again, made, tmp_path):
    other = forge_again(recipe({"finetune.arms": ["natural"], "deploy.arm": "natural"}), copied, tmp_path / "out")
    assert without_clock(other.record)["stages"][2] == without_clock(made.record)["stages"][2]
    assert not {"fine-tune: natural", "evaluate: tuned: natural"} & set(other.spy.built)


def test_natural_arm_control_and_reference(recipe, forge_again, made, model, factory, tmp_path):
    """From a checkpoint and the code that builds the network: a live network has no fresh weights."""
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    changes = {
        "finetune.arms": ["natural"], "deploy.arm": "natural", "control.train": True, "reference.train": True,
        "model.source": factory, "model.checkpoint": str(tmp_path / "weights.pt"),
        "model.mean": [0.0], "model.std": [1.0],
    }  # fmt: skip
    other = forge_again(recipe(changes), Store(tmp_path / "store"), tmp_path / "out", model=None)
    assert [stage.name for stage in other.record.stages] == [
        *("baseline", "compressed", "tuned", "artifact", "control", "reference"),
    ]
    baseline, compressed, tuned, artifact, control, reference = other.record.stages
    assert "natural" in tuned.label
    assert tuned.size_bytes == artifact.size_bytes
    live = made.record.stages[2]
    assert (tuned.curve, tuned.robust_accuracy) == (live.curve, live.robust_accuracy)  # the same weights, loaded
    assert (control.params, control.macs) == (compressed.params, compressed.macs)
    assert (control.weight_bits, control.pruning_ratio) == (8, compressed.pruning_ratio)
    assert (reference.params, reference.macs) == (baseline.params, baseline.macs)
    assert (reference.weight_bits, reference.pruning_ratio.achieved) == (32, 0)
    assert reference.train_macs == 192 * (3 + 2 * 2) * reference.macs
    assert control.train_macs > 0
    assert control.curve[0].robust_accuracy >= 0
    assert math.isclose(reference.curve[-1].eps, 0.1)


# --- plan, without computing


def test_the_plan_says_what_is_in_the_store(tmp_path):
    recipe = load_recipe(
        {
            "data": {"train_n": 60, "test_n": 10},
            "model": {"train": {"epochs": 1}},
            "finetune": {"arms": ["none"]},
            "deploy": {"arm": "none"},
            "compute": {"threads": 1},
        }
    )
    store = Store(tmp_path)
    before = plan(recipe, store=store)
    assert [step.label for step in before[:4]] == [
        *("baseline: train", "prune 50% of channels", "quantize to 8/8 bits", "export: baseline"),
    ]
    assert not any(step.cached for step in before)
    assert before[0].estimate_s > 0
    assert store.entries() == []
    data = load_data(recipe.data)
    source = model_source(recipe.model.source, image_shape=data.image_shape, num_classes=10)
    shop = Shop(resolve(recipe), data, source, store)
    for stage in list(arrow(shop))[:2]:
        shop.make(stage)
    after = plan(recipe, store=store)
    assert [step.label for step in after if step.cached] == ["baseline: train", "prune 50% of channels"]
    assert [step.label for step in after] == [step.label for step in before]
    assert after[0].estimate_s == 0


def test_records_read_back(made):
    assert Record.model_validate_json(made.record.to_json()) == made.record


# --- networks of one's own


def test_what_was_frozen_is_said_and_learns(splits, model, recipe, spy, tmp_path):
    frozen = copy.deepcopy(model)
    frozen[0].requires_grad_(False)
    out = tmp_path / "out"
    run(recipe(), model=frozen, data=splits, store=Store(tmp_path / "store"), out=out, progress=spy)
    assert "2 parameters of Sequential were frozen, such as '0.weight'; all learn here" in spy.notes
    source = model_source(frozen, image_shape=splits.image_shape, num_classes=3)
    tuned, _ = load_network(out / "model", source)
    first = next(layer for layer in tuned.modules() if isinstance(layer, QuantizedLayer))
    kept = [any(torch.allclose(new, old, atol=1e-4) for old in frozen[0].weight) for new in first.weight.detach()]
    assert not all(kept)


def test_a_run_with_other_settings_says_what_it_replaces(made, recipe, splits, model, spy, tmp_path):
    shutil.copytree(made.out, tmp_path / "out")
    for changes, told in (({}, False), ({"description": "another"}, True)):
        spy.notes.clear()
        run(recipe(changes), model=model, data=splits, store=made.store, out=tmp_path / "out", progress=spy)
        assert any("holds a run with other settings, which this one replaces" in note for note in spy.notes) == told


def test_a_run_compares_with_itself(made):
    found = compare(made.out, made.out)
    artifact = made.record.stage("artifact")
    assert [each.what for each in found.differences] == ["clean", "fgsm", "pgd-5", "transfer", "worst_case"]
    for each in found.differences[1:]:
        assert each.first == each.second == artifact.robust_accuracy[each.what]
        assert (each.only_first, each.only_second, each.p) == (0, 0, 1.0)

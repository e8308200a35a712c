"""The choices of a recipe, all the way from the baseline to the file."""

import json

import pytest
import torch

from coldforge.compress import QuantizedLayer, load_network, read_structure
from coldforge.errors import RecipeError
from coldforge.models import model_source
from coldforge.recipe import FinetuneSpec
from coldforge.stages import networks
from coldforge.stages.training import train_into
from coldforge.store import Store

STRONG = {
    "prune.importance": "taylor-adversarial", "prune.scope": "global", "prune.steps": 2, "prune.ratio": 0.4,
    "prune.round_to": 4, "prune.min_width": 4, "finetune.objective": "distill", "finetune.soft": 0.5,
    "finetune.epochs": 3, "finetune.float_epochs": 1, "finetune.float_lr": 0.02,
    "finetune.float_attack": "fgsm-rs", "finetune.ema": 0.9,
    "finetune.awp": 0.005, "finetune.keep": "best", "finetune.attack": "n-fgsm", "finetune.bits_ramp": 0.5,
    "quantize.weight_bits": 1, "quantize.activation_bits": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def recipe(recipe):
    """The tiny recipe without the masking panel, which takes longer than all the rest."""
    return lambda changes=None: recipe({"evaluate.masking_n": 0, **(changes or {})})


def test_everything_at_once_ends_in_a_file_that_agrees(recipe, forge_again, model, tmp_path):
    made = forge_again(recipe(STRONG), Store(tmp_path / "store"), tmp_path / "out")
    rows = {stage.label: stage for stage in made.record.stages}
    tuned, compressed = rows["adversarially tuned"], rows["compressed, not tuned"]
    artifact = made.record.stages[-1]
    assert [point.epoch for point in tuned.curve] == [1, 2, 3]
    assert tuned.curve[0].lr < 0.02
    assert all(point.averaged_robust_accuracy >= 0 for point in tuned.curve)
    assert any(note.startswith("kept epoch") for note in tuned.notes)
    assert [point.epoch for point in compressed.curve] == [1], "trained between two steps of pruning"
    assert compressed.train_macs > 0
    assert artifact.notes[: len(tuned.notes)] == tuned.notes, "what is said of a network is said of its file"
    assert artifact.train_macs == 0
    only = recipe({**STRONG, "evaluate.stages": ["artifact"]})
    (alone,) = forge_again(only, Store(tmp_path / "store"), tmp_path / "only").record.stages
    assert alone.train_macs == compressed.train_macs + tuned.train_macs, "no row that is left out hides its cost"
    assert [point.epoch for point in alone.curve] == [1, 2, 3, 4]
    assert alone.notes[: len(tuned.notes)] == tuned.notes
    assert alone.notes[: len(compressed.notes)] == compressed.notes
    two = recipe({**STRONG, "evaluate.stages": ["tuned", "artifact"]})
    _, shown, file = forge_again(
        two, Store(tmp_path / "store"), tmp_path / "two"
    ).record.stages  # the natural arm first
    assert shown.train_macs == compressed.train_macs + tuned.train_macs
    assert (file.train_macs, file.curve) == (0, ()), "what a row before tells is told once"
    assert file.notes[: len(shown.notes)] == shown.notes == tuned.notes
    assert (artifact.weight_bits, artifact.activation_bits) == (1, 4)
    assert artifact.packed_bytes < compressed.size_bytes
    assert artifact.agreement.clean == artifact.agreement.adversarial == 1.0
    plan = read_structure(tmp_path / "out" / "model").pruning
    assert plan.requested == 0.4
    assert 0.2 < plan.achieved < 0.6
    source = model_source(model, image_shape=(1, 12, 12), num_classes=3)
    network, _ = load_network(tmp_path / "out" / "model", source)
    assert set(network.get_submodule("network.2").weight_codes().unique().tolist()) == {-1, 1}
    assert not [path for path in (tmp_path / "store").rglob("checkpoint*") if path.is_file()], "nothing is left behind"


def test_the_natural_arm_may_have_a_rate_of_its_own(recipe, forge_again, tmp_path):
    changes = {"finetune.arms": ["natural", "adversarial"], "finetune.epochs": 2, "finetune.float_epochs": 1}
    store = Store(tmp_path / "store")
    for natural, part in ((0.0, 1.0), (0.002, 0.2)):
        made = forge_again(recipe({**changes, "finetune.natural_lr": natural}), store, tmp_path / f"{natural}")
        slow, fast = (made.record.stage("tuned", arm).curve for arm in ("natural", "adversarial"))
        assert [point.lr for point in slow] == pytest.approx([part * point.lr for point in fast])
    assert not [label for label in made.spy.built if "adversarial" in label and "fine-tune" in label]


def test_every_layer_keeps_its_floor_in_several_steps_too(recipe, forge_again, tmp_path):
    changes = {
        "finetune.arms": ["none"], "deploy.arm": "none", "prune.ratio": 0.6, "prune.steps": 3, "prune.scope": "global",
        "prune.floor": 0.3, "prune.importance": "random", "prune.round_to": 1, "prune.min_width": 1,
    }  # fmt: skip
    forge_again(recipe(changes), Store(tmp_path / "store"), tmp_path / "out")
    plan = read_structure(tmp_path / "out" / "model").pruning
    assert plan.achieved > 0.4
    for before, after in plan.widths.values():
        assert after >= 0.3 * before


def test_a_robust_teacher_is_trained_if_need_be(recipe, forge_again, model, factory, tmp_path):
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    changes = {
        "finetune.objective": "distill", "finetune.teacher": "reference", "model.source": factory,
        "model.checkpoint": str(tmp_path / "weights.pt"), "model.mean": [0.0], "model.std": [1.0],
    }  # fmt: skip
    made = forge_again(recipe(changes), Store(tmp_path / "store"), tmp_path / "out", model=None)
    assert [stage.name for stage in made.record.stages] == [
        *("baseline", "compressed", "tuned", "tuned", "artifact", "reference"),
    ]
    natural, distilled = made.record.stages[2:4]
    assert natural.curve[0].robust_accuracy == -1
    assert distilled.curve[0].robust_accuracy >= 0
    reference = made.record.stage("reference")
    only = recipe({**changes, "evaluate.stages": ["artifact"]})
    (alone,) = forge_again(only, Store(tmp_path / "store"), tmp_path / "only", model=None).record.stages
    assert alone.train_macs == distilled.train_macs + reference.train_macs, "a teacher without a row is paid for, too"
    assert len(alone.curve) == len(distilled.curve)
    natural_only = recipe({**changes, "finetune.arms": ["natural"], "deploy.arm": "natural"})
    made = forge_again(natural_only, Store(tmp_path / "store"), tmp_path / "natural", model=None)
    assert "reference" not in [stage.name for stage in made.record.stages], "nobody asks it"


def test_a_hardened_network_is_pruned_and_teaches_and_is_paid_for(recipe, forge_again, tmp_path):
    store = Store(tmp_path / "store")
    plain = forge_again(recipe(), store, tmp_path / "plain").record
    hard = {"harden.train": True, "harden.epochs": 3, "harden.attack": "pgd-2", "harden.batch_size": 32}
    made = forge_again(recipe(hard), store, tmp_path / "hard")
    baseline, compressed, tuned = (made.record.stage(name) for name in ("baseline", "compressed", "tuned"))
    plainly = forge_again(recipe({**hard, "harden.optimizer": "sgd"}), store, tmp_path / "sgd").record
    passes = 192 * 3 * (3 + 2 * 2)  # images, epochs, PGD-2
    assert plainly.stage("compressed").train_macs == passes * baseline.macs
    assert compressed.train_macs > passes * baseline.macs, "the arithmetic of Muon"
    assert plain.stage("compressed").train_macs == 0
    assert [point.epoch for point in compressed.curve] == [1, 2, 3]
    assert "pruned from a dense network that was hardened: 3 epochs, adversarial, pgd-2" in compressed.notes
    assert tuned.train_macs == plain.stage("tuned").train_macs, "a hardening is told of once"
    assert compressed.notes[0] in tuned.notes
    assert compressed.notes[0] in made.record.stages[-1].notes
    assert compressed.robust_accuracy["worst_case"] > plain.stage("compressed").robust_accuracy["worst_case"]
    assert "baseline: load" in made.spy.cached, "which is not changed"
    distilled = {"finetune.objective": "distill", "finetune.teacher": "hardened", "finetune.arms": ["adversarial"]}
    taught = forge_again(recipe({**hard, **distilled}), store, tmp_path / "taught")
    assert "harden: train the dense network adversarially" in taught.spy.cached
    stage = taught.record.stage("tuned")
    answers = stage.train_macs - made.record.stage("tuned", "adversarial").train_macs
    clean = 3 * compressed.macs  # what the student says of them is learned from, too
    assert answers == pytest.approx(200 * baseline.macs + 192 * clean), "the teacher answers once an image"


def test_a_hardened_teacher_has_to_be_hardened(recipe):
    with pytest.raises(RecipeError, match=r"finetune.teacher = .hardened.: expected harden.train = true, got false"):
        recipe({"finetune.objective": "distill", "finetune.teacher": "hardened"})


def test_a_live_network_has_no_reference_to_learn_from(recipe, forge_again, tmp_path):
    changes = {"finetune.objective": "distill", "finetune.teacher": "reference"}
    with pytest.raises(RecipeError, match="fresh weights"):
        forge_again(recipe(changes), Store(tmp_path / "store"), tmp_path / "out")


def test_a_network_may_be_rounded_after_all_of_its_training(recipe, forge_again, tmp_path):
    changes = {"finetune.epochs": 2, "finetune.float_epochs": "all", "quantize.weight_bits": 4, "deploy.runtimes": []}
    store = Store(tmp_path / "store")
    made = forge_again(recipe(changes), store, tmp_path / "out")
    tuned, artifact = made.record.stage("tuned"), made.record.stage("artifact")
    assert [point.epoch for point in tuned.curve] == [1, 2]
    assert artifact.weight_bits == 4
    assert any("rounded to 4 bits after all of its training" in note for note in tuned.notes)
    assert artifact.agreement.clean == 1.0
    assert not any(stage.latency_s for stage in made.record.stages), "no runtime, nothing is timed"
    assert not (tmp_path / "store" / "stages" / "measure").exists()
    with pytest.raises(RecipeError, match=r"finetune\.float_epochs: expected at most finetune\.epochs = 2, got 3"):
        recipe({"finetune.epochs": 2, "finetune.float_epochs": 3})
    with pytest.raises(
        RecipeError,
        match=r"finetune\.float_epochs: expected a number of epochs, 0 or more, .all. or .auto., got .some.",
    ):
        recipe({"finetune.float_epochs": "some"})


@pytest.mark.parametrize(
    ("epochs", "bits", "in_float"), [(3, 8, 3), (3, 16, 3), (1, 8, 1), (3, 4, 1), (10, 2, 1), (2, 4, 0), (1, 1, 0)]
)
def test_how_many_epochs_are_in_floating_point_by_itself(epochs, bits, in_float, recipe):
    spec = recipe({"finetune.epochs": epochs, "finetune.float_epochs": "auto"}).finetune
    assert spec.epochs_in_float(bits) == in_float
    assert FinetuneSpec().float_epochs == "auto", "which is what a recipe gets that says nothing"


def test_networks_that_differ_in_their_bits_share_the_epochs_in_floating_point(recipe, forge_again, tmp_path):
    store = Store(tmp_path / "store")
    begin = {"finetune.epochs": 2, "finetune.float_epochs": 1, "finetune.arms": ["adversarial"], "deploy.runtimes": []}
    eight = forge_again(recipe(begin), store, tmp_path / "eight")
    four = forge_again(recipe({**begin, "quantize.weight_bits": 4}), store, tmp_path / "four")
    assert "fine-tune in float: adversarial" in four.spy.cached
    assert "fine-tune: adversarial" in four.spy.built
    begun, tuned = (made.record.stage("tuned").curve for made in (eight, four))
    assert [point.epoch for point in (*begun, *tuned)] == [1, 2, 1, 2]
    assert begun[0] == tuned[0]
    assert begun[1] != tuned[1]
    [first, *rounded] = sorted(
        (store.root / "stages" / "finetune").glob("*/result.json"), key=lambda path: path.stat().st_mtime
    )
    macs = [json.loads(path.read_text())["train_macs"] for path in (first, *rounded)]
    assert eight.record.stage("tuned").train_macs == macs[1] > macs[0], "what was shared belongs to the cost of both"


def test_batchnorm_stays_until_the_network_was_trained_through_its_rounding(recipe, forge_again, tmp_path, monkeypatch):
    def norms(network):
        return sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())

    seen = []

    def spied(shop, folder, network, *arguments, **keywords):
        seen.append((any(isinstance(module, QuantizedLayer) for module in network.modules()), norms(network)))
        train_into(shop, folder, network, *arguments, **keywords)

    monkeypatch.setattr(networks, "train_into", spied)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(8 * 36, 3),
    )  # fmt: skip
    changes = {
        "finetune.epochs": 2, "finetune.float_epochs": 1, "finetune.arms": ["adversarial"], "deploy.runtimes": [],
        "quantize.weight_bits": 2, "quantize.activation_bits": 3,
    }  # fmt: skip
    made = forge_again(recipe(changes), Store(tmp_path / "store"), tmp_path / "out", model=model)
    assert seen == [(False, 2), (True, 2)], "in floating point, then rounded"
    source = model_source(model, image_shape=(1, 12, 12), num_classes=3)
    network, _ = load_network(tmp_path / "out" / "model", source)
    assert norms(network) == 0
    assert made.record.stages[-1].agreement.clean == made.record.stages[-1].agreement.adversarial == 1.0

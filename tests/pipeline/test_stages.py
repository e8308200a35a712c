"""What a stage's key depends on: all that changes its bits, and nothing else. Hardly anything is computed here."""

import copy
import re
import sys
import types
from fnmatch import fnmatch

import pytest
import torch
from torch import nn

from coldforge import stages
from coldforge.data import from_arrays
from coldforge.errors import RecipeError
from coldforge.models import model_source
from coldforge.pipeline import arrow
from coldforge.progress import Progress
from coldforge.recipe import load_recipe
from coldforge.stages import Shop, networks
from coldforge.train import ranking

ON_THE_FILE = ["evaluate: artifact", "masking*", "agreement*", "adversarial examples", "latency*"]
AFTER_TUNING = ["fine-tune*", "*tuned*", *ON_THE_FILE]
AFTER_ROUNDING = ["quantize*", "*compressed", *AFTER_TUNING]
CHANGES = {
    "prune.ratio=0.25": ["prune*", "*parent", *AFTER_ROUNDING],
    "prune.importance=l2": ["prune*", "*parent", *AFTER_ROUNDING],
    "quantize.weight_bits=4": AFTER_ROUNDING,
    "quantize.calibration=minmax": AFTER_ROUNDING,
    "deploy.reduce_range=true": AFTER_ROUNDING,
    "finetune.lr=0.011": AFTER_TUNING,
    "finetune.epochs=2": AFTER_TUNING,
    "finetune.awp=0.01": ["fine-tune: adversarial", "*tuned: adversarial", *ON_THE_FILE],
    "finetune.ema=0.9": AFTER_TUNING,
    "finetune.float_attack=n-fgsm": [],  # no epoch in floating point
    "finetune.objective=trades": ["fine-tune: adversarial", "*tuned: adversarial", *ON_THE_FILE],
    "finetune.beta=3": ["fine-tune: adversarial", "*tuned: adversarial", *ON_THE_FILE],
    "prune.scope=global": ["prune*", "*parent", *AFTER_ROUNDING],
    "prune.step_epochs=2": ["prune*", "*parent", *AFTER_ROUNDING],
    "deploy.arm=natural": ON_THE_FILE,
    "evaluate.n=20": ["evaluate*", "agreement*"],
    "evaluate.part=validation": ["evaluate*", "agreement*", "masking*", "adversarial examples", "latency*"],
    'evaluate.attacks=["fgsm"]': ["evaluate*"],
    'evaluate.attacks=["fgsm", "pgd-5-2"]': ["evaluate*"],
    'deploy.runtimes=["onnxruntime", "openvino"]': ["latency*"],
    "threat_model.eps=8/255": ["fine-tune: adversarial", "export*", "evaluate*", *ON_THE_FILE],
    "threat_model.literal=true": ["export*", "evaluate*", *AFTER_ROUNDING],
    "seed=4": ["evaluate*", *AFTER_TUNING],
    "model.mean=[0.4] model.std=[0.3]": ["*"],
    "compute.threads=2": ["*"],
    "compute.precision=bf16": ["*"],
    "compute.devices=2": AFTER_TUNING,  # only trainings are shared
    "compute.num_nodes=2": AFTER_TUNING,
    "description=other words": [],
    "data.source=cifar10": [],  # the data are in memory; their fingerprint counts
    "reference.lr=0.3": [],  # not trained
    "model.train.lr=0.3": [],
    "harden.lr=0.3": [],
}
HARDENED = {"harden.train": True}


def matching(labels, patterns):
    return {label for label in labels if any(fnmatch(label, pattern) for pattern in patterns)}


def changed(before, after):
    """Labels of the stages whose key is another one, place by place."""
    pairs = zip(before.values(), after.values(), strict=True)
    return {old.label for old, new in pairs if old.key != new.key}


@pytest.fixture(scope="module")
def before(stages_of, recipe):
    return stages_of(recipe())


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_changes_what_stands_on_it(change, before, recipe, stages_of):
    after = stages_of(load_recipe(recipe().model_dump(mode="json"), overrides=re.split(r" (?=\w+\.)", change)))
    assert changed(before, after) == matching(before, CHANGES[change])


def test_the_epochs_in_floating_point_may_have_an_attack_of_their_own(recipe, stages_of):
    """Theirs, or that of the epochs after the rounding: each decides only its own part and what stands on it."""
    parts = {"finetune.epochs": 2, "finetune.float_epochs": 1}
    both = stages_of(recipe(parts | {"finetune.attack": "n-fgsm"}))
    same = stages_of(recipe(parts | {"finetune.attack": "n-fgsm", "finetune.float_attack": "n-fgsm"}))
    assert changed(both, same) == set()
    apart = stages_of(recipe(parts | {"finetune.attack": "pgd-2", "finetune.float_attack": "n-fgsm"}))
    later = ["fine-tune: adversarial", "*tuned: adversarial", *ON_THE_FILE]
    assert changed(both, apart) == matching(both, later), "the epochs in floating point are the same"
    cheap = stages_of(recipe(parts | {"finetune.attack": "n-fgsm", "finetune.float_attack": "fgsm-rs"}))
    assert changed(both, cheap) == matching(both, ["fine-tune in float: adversarial", *later])


def test_the_control_has_the_budget_of_a_tuning_with_two_attacks(recipe, stages_of):
    """PGD-2 passes forward and back once more than N-FGSM does."""
    whole = {"control.train": True, "finetune.epochs": 12, "finetune.optimizer": "sgd"}

    def cost(label, changes):
        made = stages_of(recipe(whole | changes), network="zoo:cnn8")
        return next((stage.macs for stage in made.values() if stage.label.startswith(label)), 0.0)

    for changes in (
        {"finetune.attack": "pgd-2", "finetune.float_attack": "n-fgsm", "finetune.float_epochs": 8},
        {"finetune.attack": "n-fgsm", "finetune.float_attack": "pgd-2", "finetune.float_epochs": 8},
        {"finetune.attack": "pgd-7", "finetune.float_attack": "n-fgsm", "finetune.float_epochs": "all"},
        {"finetune.attack": "pgd-2"},
    ):
        tuned = cost("fine-tune in float: adv", changes) + cost("fine-tune: adv", changes) / 1.5  # its time
        assert cost("control", changes) == pytest.approx(tuned, rel=0.05), changes


def test_a_hardening_decides_all_after_the_baseline(before, recipe, stages_of):
    hard, harder = stages_of(recipe(HARDENED)), stages_of(recipe(HARDENED | {"harden.epochs": 5}))
    assert set(hard) - set(before) == {"harden: train the dense network adversarially"}
    apart = {"baseline: load", "export: baseline", "evaluate: baseline"}
    assert changed(hard, harder) == set(hard) - apart
    assert changed(before, {label: hard[label] for label in before}) == set(before) - apart


def test_the_same_recipe_has_the_same_keys(before, recipe, stages_of):
    assert changed(before, stages_of(recipe())) == set()


def test_seeds_decide_only_what_is_drawn(recipe, stages_of):
    seeds = [{"prune.importance": "random", "seed": seed} for seed in (1, 2)]
    first, second = (stages_of(recipe(changes)) for changes in seeds)
    assert "prune 50% of channels" in changed(first, second)
    first, second = (stages_of(recipe({"seed": seed}), network="zoo:cnn8") for seed in (1, 2))
    assert changed(first, second) == set(first)  # a baseline that is trained here


def test_weights_decide(before, recipe, stages_of, model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].bias[0] += 1e-6
    assert changed(before, stages_of(recipe(), network=other)) == set(before)
    assert changed(before, stages_of(recipe(), network=copy.deepcopy(model))) == set()


@pytest.mark.parametrize(
    ("part", "what"),
    [("train", ["*"]), ("test", ["evaluate*", "masking*", "agreement*", "adversarial examples", "latency*"])],
)
def test_data_decide(part, what, before, recipe, stages_of, splits):
    images = {"train": splits.train.images.clone(), "test": splits.test.images.clone()}

    def again():
        return from_arrays(
            images["train"], splits.train.labels, images["test"], splits.test.labels, classes=splits.train.classes
        )

    same, as_before = stages_of(recipe(), data=again()), stages_of(recipe(), data=again())
    assert changed(same, as_before) == set()
    images[part][0, 0, 0, 0] ^= 1
    assert changed(same, stages_of(recipe(), data=again())) == matching(before, what)


def test_the_content_of_a_checkpoint_decides_and_not_its_name(recipe, shop, tmp_path, monkeypatch):
    def key(text):
        changes = {"model.checkpoint": text, "model.mean": [0.5], "model.std": [0.5]}
        return stages.baseline(shop(recipe(changes), network="zoo:cnn8")).key

    for name, content in (("a.pt", b"1"), ("b.pt", b"1"), ("c.pt", b"2")):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("MODELS", str(tmp_path))
    assert key(str(tmp_path / "a.pt")) == key(str(tmp_path / "b.pt")) == key("$MODELS/a.pt")
    assert key(str(tmp_path / "a.pt")) != key(str(tmp_path / "c.pt"))


def test_optional_rows_change_no_other(recipe, stages_of):
    before = stages_of(recipe(), network="zoo:cnn8")
    more = stages_of(recipe({"control.train": True, "reference.train": True}), network="zoo:cnn8")
    added = set(more) - set(before)
    assert added == {
        *("control: train the small network from scratch", "export: control", "evaluate: control"),
        *("reference: train adversarially", "export: reference", "evaluate: reference"),
    }
    assert all(more[label].key == stage.key for label, stage in before.items())
    fewer = stages_of(recipe({"finetune.arms": ["adversarial"]}), network="zoo:cnn8")
    gone = {"fine-tune: natural", "export: tuned: natural", "evaluate: tuned: natural"}
    assert set(before) - set(fewer) == gone
    assert changed({label: before[label] for label in fewer}, fewer) == {"adversarial examples"}  # one row less


@pytest.mark.parametrize("more", [{}, {"finetune.epochs": 2, "finetune.float_epochs": 1}])
def test_every_stage_is_made_once_and_after_what_it_reads(more, recipe, shop):
    changes = {"control.train": True, "reference.train": True, **HARDENED, **more}
    made = list(arrow(shop(recipe(changes), network="zoo:cnn8")))
    keys = [stage.key for stage in made]
    assert len(set(keys)) == len(keys)
    assert all(set(stage.inputs) <= set(keys[:index]) for index, stage in enumerate(made))
    assert ("fine-tune in float: adversarial" in [stage.label for stage in made]) == bool(more)
    kinds = [stage.kind for stage in made]
    assert kinds[:4] == ["baseline", "harden", "prune", "quantize"]
    assert kinds[-3:] == ["agree", "gallery", "measure"]
    assert max(index for index, kind in enumerate(kinds) if kind == "export") < kinds.index("evaluate")


def test_estimates_know_what_is_expensive(recipe, stages_of):
    plain = stages_of(recipe(), network="zoo:cnn8")
    assert plain["baseline: train"].macs > 0
    assert plain["fine-tune: adversarial"].macs > plain["fine-tune: natural"].macs > 0
    longer = stages_of(recipe({"finetune.epochs": 4}), network="zoo:cnn8")
    assert longer["fine-tune: natural"].macs == 4 * plain["fine-tune: natural"].macs
    assert plain["prune 50% of channels"].macs == 0


def test_what_changed_for_some_trainings_changes_their_keys_only(recipe, stages_of, monkeypatch):
    settings = {"finetune.optimizer": "sgd", "control.train": True, "reference.train": True, "reference.keep": "last"}
    for changes, affected in (
        ({}, []),
        ({"finetune.optimizer": "muon"}, ["fine-tune: natural", "fine-tune: adversarial"]),
        ({"finetune.awp": 0.01}, ["fine-tune: adversarial", "control: train the small network from scratch"]),
        ({"finetune.ema": 0.9}, ["fine-tune: adversarial", "control: train the small network from scratch"]),
        ({"reference.keep": "best"}, ["reference: train adversarially"]),
    ):
        now = stages_of(recipe(settings | changes), network="zoo:cnn8")
        with monkeypatch.context() as before:
            before.setattr("coldforge.stages.shop._CHANGED", {})
            then = stages_of(recipe(settings | changes), network="zoo:cnn8")
        trained = [label for label, stage in now.items() if stage.trains]
        assert "baseline: train" in trained
        assert [label for label in trained if now[label].key != then[label].key] == affected


@pytest.mark.parametrize(("optimizer", "bits", "said"), [("muon", 4, True), ("sgd", 4, False), ("muon", 32, False)])
def test_how_steps_are_learned_is_in_the_key(recipe, stages_of, optimizer, bits, said, monkeypatch):
    specs = {}
    declare = Shop.declare

    def watched(shop, kind, label, spec, *more, **options):
        specs[label] = spec
        return declare(shop, kind, label, spec, *more, **options)

    monkeypatch.setattr(Shop, "declare", watched)
    changes = {"quantize.weight_bits": bits, "quantize.activation_bits": bits, "finetune.optimizer": optimizer}
    stages_of(recipe(changes | {"finetune.epochs": 3, "finetune.float_epochs": 1}), network="zoo:cnn8")
    (label,) = [label for label in specs if label == "fine-tune: adversarial"]
    assert ("steps are stretched" in specs[label]) is said
    assert not any("steps are stretched" in spec for other, spec in specs.items() if " in float" in other)


def test_the_control_has_the_budget_of_the_hardening_too(recipe, stages_of):
    label = "control: train the small network from scratch"
    changes = {"control.train": True, "finetune.epochs": 1}
    plain = stages_of(recipe(changes), network="zoo:cnn8")
    hardened = stages_of(recipe(changes | HARDENED), network="zoo:cnn8")
    cost = hardened["harden: train the dense network adversarially"].macs
    assert cost > 2 * plain[label].macs  # an epoch of a network four times as large
    more = hardened[label].macs - plain[label].macs
    assert abs(more - cost) <= plain[label].macs / 2  # whole epochs


@pytest.mark.parametrize("checkpoint", [True, False])
def test_what_a_factory_builds_decides(checkpoint, recipe, stages_of, factory, bare, tmp_path, monkeypatch):
    changes = {"reference.train": True, "model.source": factory}
    if checkpoint:
        (tmp_path / "a.pt").write_bytes(b"1")
        changes |= {"model.checkpoint": str(tmp_path / "a.pt"), "model.mean": [0.5], "model.std": [0.5]}
    before = stages_of(recipe(changes), network=factory)
    assert changed(before, stages_of(recipe(changes), network=factory)) == set()
    edited = nn.Sequential(*bare()[:5], nn.Dropout(0.1), bare()[5])
    monkeypatch.setattr(sys.modules["a_users_module"], "factory", lambda: edited)
    assert changed(before, stages_of(recipe(changes), network=factory)) == set(before)


def test_a_network_at_chance_is_doubted_before_it_is_tuned(shop, recipe, bare, model, monkeypatch):
    """A wrong normalization, or classes in another order, costs hours otherwise."""
    constant = bare()
    with torch.no_grad():
        constant[5].weight.zero_()
        constant[5].bias.copy_(torch.tensor([0.0, 0.0, 5.0]))
    said = []
    monkeypatch.setattr(Progress, "note", lambda self, text: said.append(text))
    for network, doubts in ((model, 0), (constant, 1)):
        here = shop(recipe(), network=network)
        baseline = stages.baseline(here)
        here.make(baseline)
        assert here.result(baseline)["notes"] == said
        assert len(said) == doubts
    assert said[0].startswith("the clean accuracy is hardly above chance (33.3% for 3 classes): does this network take")


def test_what_the_code_of_a_live_network_does_decides(stages_of, recipe, model):
    """Its layers and weights are the same before and after an edit of its forward."""

    class Mine(nn.Module):
        squeeze = staticmethod(torch.relu)

        def __init__(self):
            super().__init__()
            self.layers = copy.deepcopy(model)

        def forward(self, inputs):
            return self.squeeze(self.layers(inputs))

    before = stages_of(recipe(), network=Mine())
    assert changed(before, stages_of(recipe(), network=Mine())) == set()
    Mine.squeeze = staticmethod(torch.tanh)
    assert changed(before, stages_of(recipe(), network=Mine())) == set(before)


def test_weights_from_a_checkpoint_need_no_seed(recipe, shop, bare, tmp_path, monkeypatch):
    module = types.ModuleType("a_users_module")
    module.factory = lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 3))  # other weights for each seed
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    (tmp_path / "a.pt").touch()
    changes = {"model.checkpoint": str(tmp_path / "a.pt"), "model.mean": [0.5], "model.std": [0.5]}
    keys = {
        stages.baseline(shop(recipe(changes | {"seed": seed}), network="a_users_module:factory")).key for seed in (1, 2)
    }
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("given", "mean", "std"),
    [
        ({}, (0.0,), (1.0,)),
        ({"model.mean": [0.4], "model.std": [0.3]}, (0.4,), (0.3,)),
    ],
)
def test_a_live_network_takes_pixels(given, mean, std, recipe, shop, tmp_path):
    """A live network wins over a checkpoint, which is not even looked for."""
    here = shop(recipe(given | {"model.checkpoint": str(tmp_path / "nothing.pt")}))
    baseline = stages.baseline(here)
    assert baseline.key == stages.baseline(shop(recipe(given))).key
    here.make(baseline)
    network, structure = here.network(baseline)
    assert (structure.mean, structure.std) == (mean, std)
    images = here.data.test.pixels()
    torch.testing.assert_close(network(images), here.source.build(0)((images - mean[0]) / std[0]))


@pytest.mark.parametrize("given", ["mean", "std"])
def test_half_a_normalization_is_none(given, recipe, shop):
    with pytest.raises(RecipeError, match=r"model\.mean and model\.std: expected both or none of them, got one"):
        stages.baseline(shop(recipe({f"model.{given}": [0.4]})))


@pytest.mark.parametrize("importance", ["taylor", "taylor-adversarial"])
def test_taylor_takes_the_gradients_it_is_called_after(importance, recipe, shop, model, splits, monkeypatch):
    seen = []
    monkeypatch.setattr(ranking, "taylor", lambda network, batches: seen.extend(batches))
    networks._taylor(shop(recipe({"prune.importance": importance, "prune.importance_n": 150})), model)
    assert [len(labels) for _, labels in seen] == [128, 22]
    images, labels = (torch.cat(part) for part in zip(*seen, strict=True))
    clean = splits.train.pixels(slice(0, 150))
    assert torch.equal(labels, splits.train.labels[:150])
    if importance == "taylor":
        assert torch.equal(images, clean)
        return
    assert float((images - clean).abs().max()) == pytest.approx(0.1)
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(each), labels, reduction="none") for each in (images, clean)]
    assert bool((losses[0] > losses[1]).all())


def test_a_literal_threat_widens_the_range_of_the_image(recipe, shop):
    ends = []
    for literal in (False, True):
        here = shop(recipe({"threat_model.literal": literal}))
        baseline = stages.baseline(here)
        parent = stages.prune(here, baseline)
        rounded = stages.quantize(here, parent)
        for stage in (baseline, parent, rounded):
            here.make(stage)
        network, _ = here.network(rounded)
        (image,) = [part for part in network.modules() if getattr(part, "reads_image", False)]
        step, zero = float(image.step), int(image.zero)
        ends.append((-zero * step, (image.qmax - zero) * step, step))
    (low, high, step), (wide_low, wide_high, wide_step) = ends
    assert (low, high) == pytest.approx((0, 1), abs=step)
    assert (wide_low, wide_high) == pytest.approx((-0.1, 1.1), abs=wide_step)


@pytest.mark.parametrize(
    ("bits", "edge_bits", "expected"),
    [(8, 8, (7, 7)), (4, 8, (4, 7)), (8, 4, (7, 4)), (4, 4, (4, 4)), (16, 8, (16, 8))],
)
def test_reduced_range_is_seven_bits_at_most(bits, edge_bits, expected, recipe, shop):
    quantize = {"quantize.weight_bits": bits, "quantize.edge_bits": edge_bits, "deploy.reduce_range": True}
    spec = networks._quantization(shop(recipe(quantize)))
    assert (spec.weight_bits, spec.edge_bits) == expected
    assert spec.activation_bits == 8
    assert networks._quantization(shop(recipe(quantize | {"deploy.reduce_range": False}))).edge_bits == edge_bits


@pytest.mark.parametrize("name", ["mean", "std"])
def test_one_mean_and_std_a_channel(name, recipe, shop):
    with pytest.raises(RecipeError, match=rf"model\.{name}: expected 1 numbers, one a channel, got 3"):
        stages.baseline(shop(recipe({"model.mean": [0.5], "model.std": [0.5], f"model.{name}": [0.5, 0.4, 0.3]})))


def test_eight_bits_of_a_real_network_take_less_than_a_third(recipe, shop):
    """cnn8 at ratio 0.5, as in issue 2: the int8 file against the float file of the same pruned network."""
    images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 10
    data = from_arrays(images, labels, images, labels)
    live = model_source("zoo:cnn8", image_shape=(1, 28, 28), num_classes=10).build(0)
    here = shop(recipe(), data=data, network=live)
    baseline = stages.baseline(here)
    parent = stages.prune(here, baseline)
    rounded = stages.quantize(here, parent)
    files = [stages.export(here, network, "x") for network in (parent, rounded)]
    for stage in (baseline, parent, rounded, *files):
        here.make(stage)
    float_bytes, int8_bytes = (here.result(file)["size_bytes"] for file in files)
    assert int8_bytes < 0.3 * float_bytes
    assert here.result(files[1])["packed_bytes"] < 0.27 * here.result(files[0])["packed_bytes"]
    assert here.result(files[0])["params"] == here.result(files[1])["params"] - extra_steps(here, rounded)


def extra_steps(shop, stage):
    """Parameters that quantization adds: its step sizes, and biases where there were none."""
    network, _ = shop.network(stage)
    return sum(parameter.numel() for name, parameter in network.named_parameters() if name.endswith("step"))

"""``coldforge.forge``: a live network and data in memory, in one call."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn

import coldforge
from coldforge.data import from_arrays
from coldforge.deploy import OnnxSession
from coldforge.errors import RecipeError
from coldforge.measure import energy_per_image
from coldforge.stages import evidence
from coldforge.store import Store

SETTINGS = {
    "threat_model.eps": "8/255",
    "finetune.arms": ["adversarial"],
    "finetune.epochs": 1,
    "finetune.batch_size": 32,
    "finetune.lr": 0.01,
    "evaluate.attacks": ["pgd-3"],
    "compute.threads": 1,
    "compute.precision": "fp32",
}


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (120,), generator=generator)
    images = 0.4 * torch.rand(120, 3, 8, 8, generator=generator) + 0.5 * labels.view(-1, 1, 1, 1)
    return from_arrays(images[:90], labels[:90], images[90:], labels[90:], classes=("dark", "light"), validation=20)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 2),
        )
    return network.train()


class Words(coldforge.Progress):
    def __init__(self):
        self.ended = []

    def end(self, label, *, cached=False):
        self.ended.append(label)


@pytest.fixture(scope="module")
def forged(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    before = copy.deepcopy(model.state_dict())
    progress = Words()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "LATENCY_SECONDS", 0.0)
        patch.setattr(evidence, "energy_per_image", partial(energy_per_image, seconds=0.01))
        result = coldforge.forge(
            model, data, out=folder / "out", settings=SETTINGS, store=Store(folder / "store"), progress=progress
        )
    assert torch.get_num_threads() == threads
    assert {"fine-tune in float: adversarial", "round after fine-tuning: adversarial"} <= set(progress.ended)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    return result


def test_the_folder_holds_everything(forged):
    found = {path.name for path in forged.folder.iterdir()}
    wanted = {"record.json", "report.html", "model.onnx", "model", "recipe.toml", "adversarial.png"}
    assert wanted <= found
    assert found - wanted <= {"probe.safetensors", "gallery.safetensors", "ledger.parquet"}
    assert not any(name.startswith(".") for name in found)


def test_the_record_is_the_one_on_disk(forged):
    assert coldforge.load_record(forged.folder) == forged.record
    assert forged.record.recipe["name"] == "forged"
    assert forged.record.threat_model.eps_255 == pytest.approx(8)
    plain = json.loads((forged.folder / "record.json").read_text())
    assert [stage["name"] for stage in plain["stages"]] == ["baseline", "compressed", "tuned", "artifact"]
    masking = plain["stages"][-1]["masking"]
    assert masking["verdict"] in ("ok", "suspect")
    checks = {check["name"] for check in masking["checks"]}
    assert {"square_beats_gradient", "transfer_beats_gradient", "binarization"} <= checks, "the whole panel"


def test_the_baseline_is_the_network_as_it_was_given(forged, model, data):
    """On pixels in [0, 1], without a normalization of ours."""
    network = copy.deepcopy(model).eval()
    with torch.no_grad():
        right = (network(data.test.pixels()).argmax(1) == data.test.labels).double().mean()
    assert forged.record.stages[0].clean_accuracy == float(right)


def test_session_and_network_agree(forged, data):
    session, network = forged.session(threads=1), forged.network()
    assert isinstance(session, OnnxSession)
    labels = session.labels(data.test.images)
    with torch.no_grad():
        assert torch.equal(network(data.test.pixels()).argmax(1), labels)
    assert float((labels == data.test.labels).double().mean()) == forged.record.stages[-1].clean_accuracy


def test_the_network_has_gradients(forged, data):
    network = forged.network()
    images = data.test.pixels().requires_grad_()
    network(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_name_needs_no_architecture(forged, model):
    again = coldforge.Forged(forged.record, forged.folder, model)
    first, second = (each.network().state_dict() for each in (forged, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(coldforge.ColdforgeError, match=r"model\.source: expected zoo:NAME"):
        coldforge.Forged(forged.record, forged.folder).network()  # a live network has no name to build it from


def test_starting_again_with_a_recipe(forged, model, data, tmp_path):
    """The same stages, found by the recipe that was written."""
    progress = Words()
    store = Store(forged.folder.parent / "store")
    recipe = coldforge.load_recipe(forged.folder / "recipe.toml")
    again = coldforge.forge(model, data, out=tmp_path / "out", recipe=recipe, store=store, progress=progress)
    assert again.record.stages == forged.record.stages
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (forged.folder / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune.ration": 0.5}, r"unknown key 'prune\.ration'; did you mean 'ratio'\?"),
        ({"eps": 0.1}, r"unknown key 'eps'"),
        ({"threat_model.eps": 8}, r"did you mean 8/255\?"),
        ({"finetune.attack": "pgd"}, r"unknown inner attack 'pgd'"),
    ],
)
def test_wrong_settings(settings, message, model, data, tmp_path):
    with pytest.raises(RecipeError, match=message):
        coldforge.forge(model, data, out=tmp_path / "out", settings=settings, store=Store(tmp_path / "store"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"data.train_n": 10},
        {"data.augment": "crop-flip"},
        {"model.checkpoint": "weights.pt"},
        {"model.source": "zoo:cnn8"},
        {"model.train.epochs": 3},
    ],
)
def test_settings_that_would_change_nothing_are_refused(settings, model, data, tmp_path):
    (key,) = settings
    with pytest.raises(RecipeError, match=rf"{key}: expected no such setting for (a network|images) in memory"):
        coldforge.forge(model, data, out=tmp_path / "out", settings=settings, store=Store(tmp_path / "store"))


def test_the_record_names_no_other_network_and_no_other_images(forged, tmp_path, data):
    recipe = coldforge.load_recipe(forged.folder / "recipe.toml")
    assert recipe.model.source == "memory:Sequential"
    assert recipe.data.source.startswith("memory:")
    with pytest.raises(coldforge.ColdforgeError, match="arrays in memory"):
        coldforge.run(recipe, out=tmp_path / "out", store=Store(tmp_path / "store"))
    with pytest.raises(coldforge.ColdforgeError, match="an object in memory, which no name can build"):
        coldforge.run(recipe, out=tmp_path / "out", data=data, store=Store(tmp_path / "store"))


def test_the_normalization_of_a_preset_is_that_of_its_own_network(model, data, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr("coldforge.api.run", lambda recipe, **_: begun.append(recipe))
    monkeypatch.setattr("coldforge.api.draw", lambda folder: None)
    coldforge.forge(model, data, out=tmp_path, recipe="cifar10-resnet20")
    own = {"model.mean": [0.4], "model.std": [0.3]}
    coldforge.forge(model, data, out=tmp_path, recipe="cifar10-resnet20", settings=own)
    coldforge.forge("zoo:resnet20", data, out=tmp_path, recipe="cifar10-resnet20")
    written = coldforge.load_recipe({"model": {"source": "memory:Sequential", "mean": [0.4], "std": [0.3]}})
    coldforge.forge(model, data, out=tmp_path, recipe=written)  # as an earlier forge() has written it
    preset = coldforge.load_recipe("cifar10-resnet20").model
    assert [recipe.model.mean for recipe in begun] == [(), (0.4,), preset.mean, (0.4,)]
    assert [recipe.model.std for recipe in begun] == [(), (0.3,), preset.std, (0.3,)]


def test_a_name_instead_of_a_network_is_part_of_the_recipe(data, tmp_path):
    with pytest.raises(coldforge.ColdforgeError, match=r"unknown network 'zoo:cnn9'; did you mean 'cnn8'\?"):
        coldforge.forge("zoo:cnn9", data, out=tmp_path / "out", store=Store(tmp_path / "store"))
    with pytest.raises(coldforge.ColdforgeError, match=r"unknown data set 'mnist'"):
        coldforge.forge("zoo:cnn8", "mnist", out=tmp_path / "out", store=Store(tmp_path / "store"))

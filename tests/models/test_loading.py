from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from coldforge.errors import ModelError
from coldforge.models import ModelSource, model_source, resnet20

GREY = (1, 28, 28)


def find(source: str | nn.Module, shape: tuple[int, int, int] = GREY, classes: int = 10) -> ModelSource:
    return model_source(source, image_shape=shape, num_classes=classes)


def weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in network.parameters()])


def test_building_depends_on_the_seed_alone() -> None:
    source = find("zoo:cnn8")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(source.build(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(weights(source.build(0)), first)
    assert not torch.equal(weights(source.build(1)), first)
    assert (source.name, source.rebuildable) == ("zoo:cnn8", True)


def test_zoo_networks_fit_the_images() -> None:
    assert find("zoo:cnn8", (3, 20, 12), 4).build(0)(torch.rand(2, 3, 20, 12)).shape == (2, 4)


def test_a_live_module_is_copied_and_keeps_its_weights() -> None:
    live = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    expected = weights(live).clone()
    source = find(live)
    with torch.no_grad():
        live[1].weight.zero_()
    built = source.build(0)
    assert torch.equal(weights(built), expected)
    assert built is not source.build(0)
    with torch.no_grad():
        built[1].weight.zero_()  # type: ignore[index]
    assert torch.equal(weights(source.build(3)), expected)
    assert (source.name, source.rebuildable) == ("Sequential", False)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("zoo:resnet21", "unknown network 'zoo:resnet21'; did you mean 'resnet20'?"),
        ("zoo:zzz", "valid: cnn8, resnet18, resnet20"),
        ("resnet20", "expected zoo:NAME, timm:NAME, torchvision:NAME or package.module:factory, got 'resnet20'; "
         "did you mean 'zoo:resnet20'?"),
        ("zoo:", "got 'zoo:'"),
        ("zooo:cnn8", "no module named 'zooo' in"),
        ("zooo:cnn8", "did you mean 'zoo'?"),
        ("coldforge.no_such_module:net", "no module named 'coldforge.no_such_module'"),
        ("coldforge.models.zoo:resnet81", "has no 'resnet81'; did you mean 'resnet18'?"),
        ("coldforge.models.zoo:ZOO", "expected a function or class that returns a network, got a dict object"),
    ],
)  # fmt: skip
def test_unknown_names(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        find(source)


FACTORIES = """
import torch
from torch import nn

live = nn.Linear(1, 1)

def all_three(*, in_channels, num_classes, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size * image_size, num_classes))

def only_classes(num_classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes))

def none():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

def anything(**options):
    return nn.Linear(len(options), options["num_classes"])

def late_import():
    import late_helper_of_the_user
    return late_helper_of_the_user.build()

def needs_more(depth): return nn.Identity()
def frozen():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.BatchNorm1d(10))
    return network.requires_grad_(False)
def picky(**options): return nn.Linear(**options)
def broken(): raise RuntimeError("out of ideas")
def not_a_network(): return {"weights": 1}
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_networks_for_test.py").write_text(FACTORIES)
    (tmp_path / "late_helper_of_the_user.py").write_text("from torch import nn\ndef build(): return nn.Identity()\n")
    (tmp_path / "fails_on_import.py").write_text("import a_package_that_is_missing\n")
    (tmp_path / "raises_on_import.py").write_text("raise RuntimeError('no GPU')\n")
    monkeypatch.chdir(tmp_path)
    for name in ("my_networks_for_test", "late_helper_of_the_user", "fails_on_import", "raises_on_import"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "my_networks_for_test"


@pytest.mark.parametrize(("factory", "classes"), [("all_three", 7), ("only_classes", 7), ("none", 10), ("anything", 7)])
def test_factories_get_what_they_accept(factory: str, classes: int, user_module: str) -> None:
    path = list(sys.path)
    network = find(f"{user_module}:{factory}", classes=7).build(0)
    assert list(network.modules())[-1].out_features == classes
    assert sys.path == path


def test_a_factory_may_import_its_neighbours_late(user_module: str) -> None:
    assert isinstance(find(f"{user_module}:late_import").build(0), nn.Identity)


def test_what_was_frozen_learns_here(user_module: str) -> None:
    source = find(f"{user_module}:frozen")
    assert source.frozen() == ("1.weight", "1.bias", "2.weight", "2.bias")
    assert all(parameter.requires_grad for parameter in source.build(0).parameters())
    live = resnet20()
    live.conv1.requires_grad_(False)
    kept = find(live)
    assert kept.frozen() == ("conv1.weight",)
    assert not live.conv1.weight.requires_grad
    still = [name for name, parameter in kept.build(0).named_parameters() if not parameter.requires_grad]
    assert len(still) == 2  # the fixed shortcuts
    assert find("zoo:resnet20").frozen() == ()


def test_what_was_in_memory_has_no_name() -> None:
    with pytest.raises(ModelError, match=r"Sequential was an object in memory, which no name can build"):
        find("memory:Sequential")


def test_factories_are_seeded(user_module: str) -> None:
    source = find(f"{user_module}:none")
    assert torch.equal(weights(source.build(5)), weights(source.build(5)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("needs_more", "the factory failed: TypeError: needs_more() missing 1 required positional argument: 'depth'"),
        ("broken", "the factory failed: RuntimeError: out of ideas"),
        ("picky", "it was called with (in_channels=1, num_classes=10, image_size=28)"),
        ("not_a_network", "expected a torch.nn.Module, got dict"),
        ("live", "expected a function or class that returns a network, got a Linear object"),
    ],
)
def test_factories_that_fail(source: str, message: str, user_module: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        find(f"{user_module}:{source}").build(0)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("fails_on_import", "importing fails_on_import failed: No module named 'a_package_that_is_missing'"),
        ("raises_on_import", "importing raises_on_import failed: RuntimeError: no GPU"),
    ],
)
@pytest.mark.usefixtures("user_module")
def test_modules_that_fail(module: str, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        find(f"{module}:net")


@pytest.mark.parametrize(("source", "package"), [("timm:resnet18", "timm"), ("torchvision:resnet18", "torchvision")])
def test_optional_packages_that_are_missing(source: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ModelError, match=rf"optional package {package}.*pip install 'coldforge\[timm\]'"):
        find(source)


def test_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_model(name: str, **options: Any) -> nn.Module:
        calls.append((name, options))
        return nn.Linear(2, 2)

    fake = types.ModuleType("timm")
    vars(fake).update(
        create_model=create_model,
        is_model=lambda name: name == "resnet26",
        list_models=lambda: ["resnet26", "vit_tiny"],
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    assert isinstance(find("timm:resnet26").build(0), nn.Linear)
    assert calls == [("resnet26", {"pretrained": False, "in_chans": 1, "num_classes": 10})]
    with pytest.raises(ModelError, match="timm has no network 'resnet62'; did you mean 'resnet26'"):
        find("timm:resnet62")
    with pytest.raises(ModelError, match="timm has no network 'zzz'; it knows 2 others"):
        find("timm:zzz")


def test_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def get_model(name: str, **options: Any) -> nn.Module:
        calls.append((name, options))
        return nn.Linear(2, 2)

    fake = types.ModuleType("torchvision.models")
    vars(fake).update(get_model=get_model, list_models=lambda module: ["mobilenet_v2"])
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", fake)
    assert isinstance(find("torchvision:mobilenet_v2", (3, 32, 32)).build(0), nn.Linear)
    assert calls == [("mobilenet_v2", {"weights": None, "num_classes": 10})]
    with pytest.raises(ModelError, match="expected images with 3 channels, got 1"):
        find("torchvision:mobilenet_v2")
    with pytest.raises(ModelError, match="did you mean 'mobilenet_v2'"):
        find("torchvision:mobilnet_v2", (3, 32, 32))

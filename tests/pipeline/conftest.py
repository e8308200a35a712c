"""One tiny run from the recipe to the folder, made once; and the means to make others from its store."""

from __future__ import annotations

import copy
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coldforge.data import DataSplits, from_arrays
from coldforge.measure import energy_per_image
from coldforge.models import model_source
from coldforge.pipeline import arrow, resolve, run
from coldforge.progress import Progress, Step
from coldforge.recipe import Recipe, load_recipe
from coldforge.records import Record
from coldforge.stages import Shop, Stage, evidence
from coldforge.store import Store

CLASSES = ("cup", "hat", "key")
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "threat_model": {"eps": 0.1},
    "prune": {"ratio": 0.5},
    "model": {"train": {"epochs": 1, "batch_size": 32, "lr": 0.02}},
    "finetune": {"epochs": 1, "float_epochs": 0, "optimizer": "sgd", "batch_size": 32, "lr": 0.01},
    "evaluate": {"attacks": ["fgsm", "pgd-5"], "n": 50, "masking_n": 8},  # so few that the panel attacks nothing
    "reference": {"epochs": 1, "batch_size": 32, "lr": 0.02, "attack": "pgd-2"},
    "compute": {"threads": 1, "precision": "fp32"},
}


class Spy(Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.steps: Sequence[Step] = ()
        self.begun: list[str] = []
        self.cached: list[str] = []
        self.built: list[str] = []
        self.notes: list[str] = []
        self.fractions: list[float] = []

    def plan(self, steps: Sequence[Step]) -> None:
        self.steps = list(steps)

    def begin(self, label: str) -> None:
        self.begun.append(label)

    def advance(self, fraction: float, detail: str = "") -> None:
        self.fractions.append(fraction)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self, label: str, *, cached: bool = False) -> None:
        (self.cached if cached else self.built).append(label)


@pytest.fixture
def spy() -> Spy:
    """A new one."""
    return Spy()


@dataclass
class Made:
    """One run."""

    record: Record
    out: Path
    store: Store
    spy: Spy = field(default_factory=Spy)


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    """One thread, and no seconds spent on precise timing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "LATENCY_SECONDS", 0.0)
        patch.setattr(evidence, "energy_per_image", partial(energy_per_image, seconds=0.01))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def splits() -> DataSplits:
    """Three classes of patterns (1, 12, 12) with noise: 200 train, 40 validation, 60 test."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(3, 1, 12, 12, generator=generator).round() * 0.5 + 0.25

    def part(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(3, (n,), generator=generator)
        noise = 0.2 * torch.randn(n, 1, 12, 12, generator=generator)
        return (patterns[labels] + noise).clamp(0, 1), labels

    return from_arrays(*part(240), *part(60), classes=CLASSES, name="patterns", validation=40)


@pytest.fixture(scope="session")
def bare() -> Callable[..., nn.Module]:
    """A function that builds the network, untrained and without normalization."""

    def build(channels: int = 1, classes: int = 3, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = nn.Sequential(
                nn.Conv2d(channels, 16, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(144, classes),
            )
            for layer in network:
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(layer.weight)
        return network.eval()

    return build


@pytest.fixture(scope="session")
def model(bare: Callable[..., nn.Module], splits: DataSplits) -> nn.Module:
    """The network, trained on pixels in [0, 1]: a live network takes these."""
    network = bare()
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9)
    for _ in range(15):
        loss = nn.functional.cross_entropy(network(splits.train.pixels()), splits.train.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return network


@pytest.fixture
def factory(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a function that builds a network like ``model``."""
    module = types.ModuleType("a_users_module")
    module.factory = lambda: copy.deepcopy(model)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    return "a_users_module:factory"


@pytest.fixture(scope="session")
def recipe() -> Callable[..., Recipe]:
    """A function from changes to the tiny recipe."""

    def build(changes: Mapping[str, object] | None = None) -> Recipe:
        return load_recipe(RECIPE, overrides=dict(changes or {}))

    return build


@pytest.fixture(scope="session")
def shop(splits: DataSplits, model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Shop]:
    """A function from a recipe to its shop, without making anything."""

    def build(recipe: Recipe, *, data: DataSplits = splits, network: nn.Module | str = model) -> Shop:
        source = model_source(network, image_shape=data.image_shape, num_classes=len(data.classes))
        return Shop(resolve(recipe), data, source, Store(tmp_path_factory.mktemp("shop")))

    return build


@pytest.fixture(scope="session")
def stages_of(shop: Callable[..., Shop]) -> Callable[..., dict[str, Stage]]:
    """A function from a recipe to its declared stages, by label."""

    def declare(recipe: Recipe, **others: Any) -> dict[str, Stage]:
        return {stage.label: stage for stage in arrow(shop(recipe, **others))}

    return declare


@pytest.fixture(scope="session")
def forge_again(splits: DataSplits, model: nn.Module) -> Callable[..., Made]:
    """A function that makes a recipe in a store."""

    def make(recipe: Recipe, store: Store, out: Path, **others: Any) -> Made:
        spy = Spy()
        chosen = {"model": model, "data": splits} | others
        record = run(recipe, out=out, store=store, progress=spy, command="test", **chosen)
        return Made(record, out, store, spy)

    return make


@pytest.fixture(scope="session")
def made(
    forge_again: Callable[..., Made], recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """The tiny run. Do not change its store or folder; see ``copied``."""
    folder = tmp_path_factory.mktemp("made")
    return forge_again(recipe(), Store(folder / "store"), folder / "out")


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Store:
    """A copy of the tiny run's store, to be changed at will."""
    shutil.copytree(made.store.root, tmp_path / "store")
    return Store(tmp_path / "store")

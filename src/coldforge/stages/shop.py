"""The shop: what the stages of one run share, and the making of a stage.

A stage is declared first: its key is known, nothing has been computed. :meth:`Shop.make` looks it up in the store, or
builds it into a folder that is there whole or not at all. The key is a hash of the stage's spec, of the keys of what it
reads, of the data's fingerprint, and of the compute settings that change bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from coldforge.attacks import ThreatModel
from coldforge.compress import Structure, load_network
from coldforge.data import DataSplits, ImageSet
from coldforge.measure import count_macs
from coldforge.models import ModelSource, channels_last
from coldforge.progress import Progress
from coldforge.provenance import own_git_state
from coldforge.recipe import Recipe, TrainSpec
from coldforge.store import Store
from coldforge.store import key as stage_key
from coldforge.train import Team

VERSION = 4
"""Raise it when the code of a stage, training and its rescue from collapse included, gives other results: old entries
of the store are then not found any more."""
_CHANGED: dict[str, Callable[[TrainSpec], object]] = {
    "muon turns linear layers, too": lambda spec: spec.optimizer == "muon",
    "BatchNorm does not count perturbed weights": lambda spec: spec.awp,
    "Square is asked, too": lambda spec: spec.objective != "natural" and (spec.keep == "best" or spec.ema),
}
"""What has changed for some trainings only; what others left in a store is still found."""

Report = Callable[[float, str], None]
Reads = Literal["training", "evaluated", "nothing"]


@dataclass(frozen=True, eq=False)
class Stage:
    """One declared stage."""

    kind: str
    label: str
    key: str
    build: Callable[[Path, Report], None]
    macs: float = 0.0
    """Multiply-adds it will take, roughly; for the estimate shown before work starts."""
    seconds: float = 0.0
    """Seconds it will take besides, roughly."""
    inputs: tuple[str, ...] = ()
    """Keys of the stages that it reads."""
    trains: bool = False
    """Whether it trains a network, which several processes can share."""


@dataclass(frozen=True, eq=False)
class Shop:
    """What the stages of one run share: the recipe, the data, the architecture, the store."""

    recipe: Recipe
    """Resolved: nothing is left at "auto" or 0 that changes bits."""
    data: DataSplits
    source: ModelSource
    store: Store
    progress: Progress = field(default_factory=Progress)
    team: Team = field(default_factory=Team)
    """The processes that trainings are shared by."""
    _loaded: dict[str, tuple[nn.Module, Structure]] = field(default_factory=dict)
    _macs: dict[str, int] = field(default_factory=dict)

    @property
    def threat_model(self) -> ThreatModel:
        """Ball and box of the recipe."""
        return ThreatModel.of(self.recipe.threat_model)

    @property
    def evaluated(self) -> ImageSet:
        """The images on which networks are judged."""
        return self.data.validation if self.recipe.evaluate.part == "validation" else self.data.test

    @property
    def live_source(self) -> ModelSource | None:
        """The architecture, where it is a live object that no name can rebuild."""
        return None if self.source.rebuildable else self.source

    def dense_macs(self) -> int:
        """Multiply-adds of one image in the dense network."""
        if "dense" not in self._macs:
            self._macs["dense"] = count_macs(self.source.build(0), self.data.image_shape)
        return self._macs["dense"]

    def small_macs(self) -> float:
        """The same for the pruned network, roughly, before it exists."""
        return self.dense_macs() * (1 - self.recipe.prune.ratio) ** 2

    def declare(
        self,
        kind: str,
        label: str,
        spec: Sequence[object],
        inputs: Sequence[Stage],
        build: Callable[[Path, Report], None],
        *,
        reads: Reads = "training",
        trains: bool = False,
        macs: float = 0.0,
        seconds: float = 0.0,
    ) -> Stage:
        """A stage with its key.

        Args:
            reads: which of the data; only that is in the key.
        """
        settings = self.recipe.compute
        compute = list(settings.in_every_key().values())
        if trains and settings.devices * settings.num_nodes > 1:
            compute += [settings.devices, settings.num_nodes]
        keys = tuple(stage.key for stage in inputs)
        fingerprints = {
            "training": [self.data.training_fingerprint],
            "evaluated": [self.evaluated.fingerprint],
            "nothing": [],
        }
        trainings = [part for part in spec if isinstance(part, TrainSpec)]
        changed = [what for what, concerns in _CHANGED.items() if any(map(concerns, trainings))]
        key = stage_key(kind, VERSION, [*spec, *changed, compute], [*keys, *fingerprints[reads]])
        return Stage(kind, label, key, build, macs, seconds, keys, trains)

    def has(self, stage: Stage) -> bool:
        """Whether the store holds it."""
        return self.store.has(stage.kind, stage.key)

    def make(self, stage: Stage) -> Path:
        """The stage's folder; built first if the store does not hold it."""
        cached = self.has(stage)
        self.progress.begin(stage.label)
        folder = self.store.stage(
            stage.kind,
            stage.key,
            lambda work: stage.build(work, self.progress.advance),
            describe={"label": stage.label, "recipe": self.recipe.name, "commit": own_git_state()[0]},
            progress=self.progress,
        )
        self.progress.end(stage.label, cached=cached)
        return folder

    def folder(self, stage: Stage) -> Path:
        """The folder of a stage that was made."""
        return self.store.path(stage.kind, stage.key)

    def network(self, stage: Stage) -> tuple[nn.Module, Structure]:
        """The network of a stage that was made, and its structure. Do not change it."""
        if stage.key not in self._loaded:
            network, structure = load_network(self.folder(stage), self.live_source)
            self._loaded[stage.key] = channels_last(network), structure
        return self._loaded[stage.key]

    def result(self, stage: Stage) -> dict[str, Any]:
        """What a stage that was made found out, as plain values."""
        return read_json(self.folder(stage) / "result.json")


@dataclass(frozen=True, eq=False)
class Arrow:
    """All stages of one run. ``networks``, ``files`` and ``evidence`` are keyed by the row of the record."""

    networks: dict[str, Stage] = field(default_factory=dict)
    files: dict[str, Stage] = field(default_factory=dict)
    evidence: dict[str, Stage] = field(default_factory=dict)
    artifact: str = ""
    """Which row of ``networks`` became the artifact: its twin."""
    begun: tuple[Stage, ...] = ()
    """Networks that others go on from, and that no row shows."""

    def __iter__(self) -> Iterator[Stage]:
        """In the order of making: each once, after what it reads."""
        shown = [stage for part in (self.networks, self.files, self.evidence) for stage in part.values()]
        known = {stage.key: stage for stage in (*self.begun, *shown)}
        found: dict[str, Stage] = {}

        def visit(stage: Stage) -> None:
            for key in stage.inputs:
                visit(known[key])
            found.setdefault(stage.key, stage)

        for stage in shown:
            visit(stage)
        return iter(found.values())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values into a stage's work folder, which the store brings to the disk."""
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read plain values."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values

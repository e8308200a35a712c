"""``forge``: the whole arrow for a network and data that are in memory, in one call."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from coldforge.compress import load_network, read_structure
from coldforge.data import DataSplits
from coldforge.deploy import OnnxSession
from coldforge.errors import RecipeError
from coldforge.models import MEMORY, model_source
from coldforge.pipeline import run
from coldforge.progress import Progress
from coldforge.recipe import Recipe, load_recipe
from coldforge.records import Record
from coldforge.report.folder import draw
from coldforge.store import Store


@dataclass(frozen=True)
class Forged:
    """What :func:`forge` made."""

    record: Record
    """All numbers."""
    folder: Path
    """record.json, report.html, model.onnx, model/, recipe.toml, adversarial.png; ``coldforge verify`` reads it."""
    architecture: nn.Module | None = None
    """The network given, where no name can rebuild it."""

    def session(self, *, threads: int = 0) -> OnnxSession:
        """The artifact, ready to answer: ``session.labels(images)``, ``session.logits(images)``."""
        return OnnxSession(self.folder / "model.onnx", threads=threads)

    def network(self) -> nn.Module:
        """The artifact's twin, a PyTorch module with gradients."""
        source = None
        if self.architecture is not None:
            structure = read_structure(self.folder / "model")
            source = model_source(
                self.architecture, image_shape=structure.image_shape, num_classes=len(structure.classes)
            )
        return load_network(self.folder / "model", source)[0]


def forge(
    model: nn.Module | str,
    data: DataSplits | str,
    *,
    out: str | Path = "forged",
    recipe: Recipe | str | Path | None = None,
    settings: Mapping[str, object] | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
) -> Forged:
    """Prune, quantize, fine-tune, export and prove a classifier.

    Args:
        model: a trained classifier that takes pixels in [0, 1], which stays untouched (if it expects normalized inputs,
            name ``model.mean`` and ``model.std`` in ``settings``); or a source such as ``"zoo:cnn8"``, which is trained
            first.
        data: result of :func:`coldforge.load_data` or :func:`coldforge.data.from_arrays`, or a source such as
            ``"fashion-mnist"``.
        out: folder to write.
        recipe: where to start from: a recipe, a preset or a file. Default: every default. Its normalization is that of
            its own network, and is not taken over for a classifier given as an object.
        settings: changes to it, such as ``{"prune.ratio": 0.5, "threat_model.eps": "8/255"}``.
        store: where stages are kept; default: the user's.
        progress: told of every stage.

    Returns:
        The record and the folder.

    Raises:
        RecipeError: a setting is wrong, or is about a network or images that were given as objects.
        ColdforgeError: the message says what was expected, what was found and what to do.
    """
    start = recipe if isinstance(recipe, Recipe) else load_recipe(recipe or {"name": "forged"})
    changes = dict(settings or {})
    if isinstance(model, str):
        changes["model.source"] = model
    else:
        _refuse(changes, "model.", "a network in memory", but=("model.mean", "model.std"))
        if not start.model.source.startswith(f"{MEMORY}:"):
            changes = {"model.mean": [], "model.std": []} | changes
    if isinstance(data, str):
        changes["data.source"] = data
    else:
        _refuse(changes, "data.", "images in memory")
    complete = load_recipe(start.model_dump(mode="json"), overrides=changes)
    folder = Path(out)
    record = run(
        complete,
        out=folder,
        store=store,
        progress=progress,
        model=model if isinstance(model, nn.Module) else None,
        data=data if isinstance(data, DataSplits) else None,
    )
    draw(folder)
    return Forged(record, folder, None if isinstance(model, str) else copy.deepcopy(model))


def _refuse(settings: Mapping[str, object], table: str, what: str, but: tuple[str, ...] = ()) -> None:
    """A setting without effect would let its reader believe that it had one."""
    if ignored := [key for key in settings if key.startswith(table) and key not in but]:
        raise RecipeError(f"{ignored[0]}: expected no such setting for {what}, which it would not change")

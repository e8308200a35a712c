"""What all stages that train have in common: one training with its curve and cost, and what it will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from coldforge.attacks import parse_inner
from coldforge.compress import Structure, save_network
from coldforge.recipe import TrainSpec
from coldforge.stages.shop import Report, Shop, write_json
from coldforge.train import Objective, TrainResult, train


def train_into(
    shop: Shop,
    folder: Path,
    network: nn.Module,
    structure: Structure,
    spec: TrainSpec,
    report: Report,
    *,
    teacher: nn.Module | None = None,
    finish: Callable[[nn.Module], nn.Module] = lambda network: network,
    earlier: Sequence[dict[str, Any]] = (),
) -> None:
    """Train ``network`` and write it with its curve, cost and notes.

    Args:
        shop: data, threat model, seed, precision.
        folder: of the stage.
        network: where training starts.
        structure: of the result.
        spec: how it is trained.
        report: told of the progress.
        teacher: for distillation.
        finish: applied to the result.
        earlier: outcomes of trainings that led to ``network``, which belong to it.
    """
    result = trained(shop, network, spec, folder, report, teacher=teacher)
    save_network(folder, finish(result.model), structure)
    write_json(folder / "result.json", joined_outcomes([*earlier, outcome_of(result)]))


def trained(
    shop: Shop, network: nn.Module, spec: TrainSpec, folder: Path, report: Report, *, teacher: nn.Module | None = None
) -> TrainResult:
    """One training, with what all trainings of a run share."""
    return shop.team.call(
        train,
        network,
        shop.data,
        spec,
        shop.threat_model,
        seed=shop.recipe.seed,
        precision=shop.recipe.compute.precision,
        compiled=shop.recipe.compute.compile,
        teacher=teacher,
        here={"folder": folder, "on_progress": report, "on_note": shop.progress.note},
    )


def outcome_of(result: TrainResult) -> dict[str, Any]:
    """What the record says of one training."""
    return {
        "train_seconds": result.seconds,
        "train_macs": result.macs,
        "curve": [point.model_dump() for point in result.curve],
        "notes": list(result.notes),
    }


UNTRAINED: dict[str, Any] = {"train_seconds": 0.0, "train_macs": 0.0, "curve": [], "notes": []}
"""The outcome of a network that was brought."""


def joined_outcomes(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One outcome of several trainings, one after the other."""
    curve = [point for outcome in outcomes for point in outcome["curve"]]
    return {
        "train_seconds": sum(outcome["train_seconds"] for outcome in outcomes),
        "train_macs": sum(outcome["train_macs"] for outcome in outcomes),
        "curve": [point | {"epoch": epoch} for epoch, point in enumerate(curve, 1)],
        "notes": [note for outcome in outcomes for note in outcome["notes"]],
    }


def threat_of(shop: Shop, spec: TrainSpec) -> object:
    """What the key of a training must know of the threat model: nothing, where no image is attacked."""
    return shop.recipe.threat_model if spec.objective != "natural" else None


def training_macs(shop: Shop, spec: TrainSpec, macs: float) -> float:
    """Multiply-adds that a training of a network with ``macs`` an image will take, roughly."""
    steps = 0 if spec.objective == "natural" else parse_inner(spec.attack).steps
    return len(shop.data.train) * spec.epochs * macs * Objective(spec).passes(steps)


def between_steps(shop: Shop) -> TrainSpec | None:
    """How a network is trained between two steps of pruning; None: not at all."""
    arm, whole = shop.recipe.deploy.arm, shop.recipe.finetune
    if arm == "none":
        return None
    settings = {name: getattr(whole, name) for name in TrainSpec.model_fields}
    settings |= {**whole.in_float, "epochs": shop.recipe.prune.step_epochs}
    settings["objective"] = "adversarial" if arm == "adversarial" else "natural"
    if arm == "natural":  # nothing is attacked
        settings["attack"] = whole.attack
    return TrainSpec(**settings)

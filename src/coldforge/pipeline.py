"""The arrow, from a recipe to a record:

    recipe -> data -> baseline -> prune -> quantize -> fine-tune -> export -> evaluate + measure -> record

:func:`arrow` declares the stages and what each reads; :func:`run` makes them in that order, finding in the store what
was made before, and writes the folder that a user takes away. The report is drawn from that folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from coldforge import assemble, stages
from coldforge.attacks import ThreatModel, parse_attack, parse_inner
from coldforge.data import DataSplits, load_data
from coldforge.errors import AttackError, RecipeError
from coldforge.models import MEMORY, check_classifier, model_source, torch_threads
from coldforge.progress import Progress, Step
from coldforge.provenance import cpp_compiler, has_bf16, physical_cores
from coldforge.recipe import DataSpec, Recipe, TrainSpec
from coldforge.records import Record
from coldforge.stages import Arrow, Shop
from coldforge.store import Store
from coldforge.train import Team, check_inner, gathered


def arrow(shop: Shop) -> Arrow:
    """Declare every stage of the recipe; nothing is computed."""
    recipe = shop.recipe
    baseline = stages.baseline(shop)
    hardened = stages.harden(shop, baseline) if recipe.harden.train else None
    parent = stages.prune(shop, hardened or baseline, earlier=hardened)
    compressed = stages.quantize(shop, parent)
    arms = [arm for arm in recipe.finetune.arms if arm != "none"]
    taught_by = recipe.finetune.teacher if recipe.finetune.objective == "distill" and "adversarial" in arms else ""
    reference = stages.reference(shop) if recipe.reference.train or taught_by == "reference" else None
    teacher = {"reference": reference, "hardened": hardened}.get(taught_by, baseline)
    begun = {arm: stages.finetune_in_float(shop, parent, arm, teacher=teacher) for arm in arms}
    tuned = {arm: stages.finetune(shop, compressed, arm, begun=begun[arm], teacher=teacher) for arm in arms}
    twin = compressed if recipe.deploy.arm == "none" else tuned[recipe.deploy.arm]

    networks = {"baseline": baseline, "parent": parent, "compressed": compressed}
    networks |= {"reference": reference} if reference is not None else {}
    networks |= {f"tuned: {arm}": stage for arm, stage in tuned.items()}
    if recipe.control.train:
        networks["control"] = stages.control(shop, compressed)
    files = {row: stages.export(shop, network, row) for row, network in networks.items()}
    artifact = next(row for row, network in networks.items() if network is twin)

    evidence = {
        f"evaluate: {row}": stages.evaluate(shop, network, row, parent=parent)
        for row, network in networks.items()
        if row != "parent" and assemble.LABELS[row][0] in recipe.evaluate.stages
    }
    evidence["evaluate: artifact"] = stages.evaluate(shop, twin, "artifact", parent=parent, file=files[artifact])
    if recipe.evaluate.masking_n:
        evidence["masking: artifact"] = stages.masking(shop, twin, "artifact", parent=parent, file=files[artifact])
    evidence["agree"] = stages.agree(shop, twin, files[artifact])
    shown = [row for row in ("tuned: natural", artifact) if row in networks]
    evidence["gallery"] = stages.gallery(shop, {assemble.LABELS[row][1]: networks[row] for row in shown})
    if recipe.deploy.runtimes:
        timed = {"baseline": files["baseline"], "artifact": files[artifact]}
        evidence["measure"] = stages.measure(shop, baseline, timed)
    unseen = (hardened, *begun.values())
    return Arrow(networks, files, evidence, artifact, tuple(stage for stage in unseen if stage is not None))


def run(
    recipe: Recipe,
    *,
    out: Path | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
    model: nn.Module | None = None,
    data: DataSplits | None = None,
    command: str = "",
) -> Record:
    """Make every stage of ``recipe`` and write the results.

    Args:
        recipe: what to do.
        out: folder for record.json, model.onnx, model/, recipe.toml and what the report draws; None: only the record
            is returned.
        store: where stages are kept; default: the user's.
        progress: told of the plan and of every stage.
        model: a trained classifier to start from, instead of ``[model]``.
        data: data in memory, instead of ``[data]``.
        command: the command line, for provenance.

    Returns:
        The record, as written to ``out``.

    Raises:
        ColdforgeError: the message says what was expected, what was found and what to do.
    """
    several = recipe.compute.devices * recipe.compute.num_nodes > 1
    with gathered(recipe.compute) as team, _shop(recipe, store, progress, model, data, team) as shop:
        made = arrow(shop)
        if several and not any(stage.trains for stage in made):
            raise RecipeError("compute.devices: expected a recipe that trains something, got one without any training")
        shop.progress.plan(_steps(shop, made))
        if out is not None:
            assemble.begin_folder(shop, made, out)
        for stage in made:
            shop.make(stage)
        if several and not team.used:
            shop.progress.note("every training was in the store already: further devices had nothing to do")
        record = assemble.record(shop, made, command)
        if out is not None:
            assemble.write_folder(shop, made, record, out)
        return record


def plan(recipe: Recipe, *, store: Store | None = None, progress: Progress | None = None) -> list[Step]:
    """What :func:`run` would do now, with estimates and with what the store already holds; notes go to ``progress``."""
    with _shop(recipe, store, progress, None, None, Team()) as shop:
        return _steps(shop, arrow(shop))


def resolve(recipe: Recipe) -> Recipe:
    """Replace every "auto" and 0 that depends on the machine by what it means here; check the names of attacks.

    Raises:
        RecipeError: an attack is not known, or an inner one does nothing for its objective.
        AttackError: its steps cannot cross the ball.
    """
    threat_model = ThreatModel.of(recipe.threat_model)
    for name in recipe.evaluate.attacks:
        parse_attack(name).check(threat_model)
    check_trainings(recipe)
    compute = recipe.compute
    threads = compute.threads or min(physical_cores(), 8)
    precision = compute.precision if compute.precision != "auto" else ("bf16" if has_bf16() else "fp32")
    compiled = compute.compile if compute.compile != "auto" else ("kernels" if cpp_compiler() else "off")
    return recipe.model_copy(
        update={
            "compute": compute.model_copy(update={"threads": threads, "precision": precision, "compile": compiled}),
            "model": recipe.model.model_copy(update={"checkpoint": _given(recipe.model.checkpoint)}),
        }
    )


def check_trainings(recipe: Recipe, augment: str | None = None) -> None:
    """Refuse inner attacks that cannot do their work, before anything is trained.

    Args:
        recipe: what will be trained.
        augment: how training images are augmented; None: not known yet.

    Raises:
        RecipeError: an attack is not known, or does nothing for its objective.
        AttackError: its steps cannot cross the ball.
    """
    trainings: dict[str, TrainSpec] = {
        "finetune.attack": recipe.finetune,
        "harden.attack": recipe.harden,
        "reference.attack": recipe.reference,
        "model.train.attack": recipe.model.train,
    }
    if recipe.finetune.float_attack:
        in_float = recipe.finetune.model_copy(update=recipe.finetune.in_float)
        trainings["finetune.float_attack"] = in_float
    for name, spec in trainings.items():
        try:
            parse_inner(spec.attack).check(ThreatModel.of(recipe.threat_model))
            check_inner(spec, augment)
        except (RecipeError, AttackError) as error:
            raise type(error)(f"{name}: {error}") from error


def _with_objects(recipe: Recipe, model: nn.Module | None, data: DataSplits | None) -> Recipe:
    """The recipe, which does not name what was given as an object: the record would name something else."""
    changes: dict[str, object] = {}
    if model is not None:
        named = {"source": f"{MEMORY}:{type(model).__name__}", "checkpoint": ""}
        changes["model"] = recipe.model.model_copy(update=named)
    if data is not None:
        changes["data"] = data.named or DataSpec(source=f"{MEMORY}:{data.train.name}", augment=data.augment)
    return recipe.model_copy(update=changes)


def _given(checkpoint: str) -> str:
    """The path as written, or nothing where it begins with an environment variable that is not set."""
    return "" if os.path.expandvars(checkpoint).startswith("$") else checkpoint


@contextmanager
def _shop(
    recipe: Recipe,
    store: Store | None,
    progress: Progress | None,
    model: nn.Module | None,
    data: DataSplits | None,
    team: Team,
) -> Iterator[Shop]:
    progress = progress or Progress()
    wanted, recipe = recipe.model.checkpoint, _with_objects(resolve(recipe), model, data)
    if model is None and wanted and not recipe.model.checkpoint:
        progress.note(f"{wanted} is not set: the baseline is trained here")
    store = store or Store()
    data = data or load_data(recipe.data, cache=store.root / "data")
    check_trainings(recipe, data.augment)
    source = model_source(
        model if model is not None else recipe.model.source,
        image_shape=data.image_shape,
        num_classes=len(data.classes),
    )
    check_classifier(source.build(0), data.image_shape, len(data.classes))
    if frozen := source.frozen():
        progress.note(f"{len(frozen)} parameters of {source.name} were frozen, such as {frozen[0]!r}; all learn here")
    with torch_threads(recipe.compute.threads):
        yield Shop(recipe, data, source, store, progress, team)


def _steps(shop: Shop, made: Arrow) -> list[Step]:
    missing = [stage for stage in made if not shop.has(stage)]
    speed = assemble.macs_per_second(shop) if any(stage.macs for stage in missing) else 1.0
    absent = {stage.key for stage in missing}
    return [
        Step(
            stage.label,
            (stage.macs / speed + stage.seconds) if stage.key in absent else 0.0,
            cached=stage.key not in absent,
        )
        for stage in made
    ]

"""Stages that make a network: baseline, reference, prune, quantize, finetune, control."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from coldforge.attacks import predict
from coldforge.compress import PruningPlan, Structure, fold_quantized, joined, network_digest, save_network
from coldforge.compress import build as build_network
from coldforge.compress import prune as prune_channels
from coldforge.compress import quantize as quantize_network
from coldforge.compress.importance import Importance
from coldforge.errors import RecipeError
from coldforge.evaluate import chance_doubt
from coldforge.models import check_classifier, checkpoint_file, load_weights, normalized
from coldforge.recipe import QuantizeSpec, TrainSpec
from coldforge.sealed import sha256_of
from coldforge.stages.shop import Report, Shop, Stage, write_json
from coldforge.stages.training import (
    UNTRAINED,
    between_steps,
    joined_outcomes,
    outcome_of,
    threat_of,
    train_into,
    trained,
    training_macs,
)
from coldforge.train.ranking import taylor_on

_OPTIMIZER = ("optimizer", "lr", "momentum", "nesterov", "weight_decay")
_UNTRAINED = "rounded to {} bits after all of its training; a lower finetune.float_epochs trains through the rounding"


def baseline(shop: Shop) -> Stage:
    """The network that the user brings, or one trained as ``[model.train]`` says."""
    spec = shop.recipe.model
    structure = _dense_structure(shop)
    checkpoint = spec.checkpoint if shop.source.rebuildable else ""  # a live network brings its weights
    if checkpoint or not shop.source.rebuildable:
        weights = sha256_of(checkpoint_file(checkpoint)) if checkpoint else ""

        def load(folder: Path, report: Report) -> None:
            bare = shop.source.build(0)
            if checkpoint:
                load_weights(bare, spec.checkpoint, key_prefix=spec.key_prefix)
            network = normalized(bare, structure.mean, structure.std).eval()
            check_classifier(network, structure.image_shape, len(structure.classes))
            save_network(folder, network, structure)
            write_json(folder / "result.json", UNTRAINED | {"notes": _doubts(shop, network)})

        return shop.declare("baseline", "baseline: load", [structure, weights, spec.key_prefix, *_code(shop)], [], load)
    build = _training(shop, lambda: build_network(structure, seed=shop.recipe.seed), structure, spec.train)
    return shop.declare(
        "baseline",
        "baseline: train",
        [structure, spec.train, threat_of(shop, spec.train), shop.recipe.seed, *_code(shop)],
        [],
        build,
        trains=True,
        macs=training_macs(shop, spec.train, shop.dense_macs()),
    )


def _doubts(shop: Shop, network: nn.Module) -> list[str]:
    """Said now, before hours of fine-tuning: the usual mistakes with a network of one's own."""
    part = shop.data.validation.take(slice(0, 1000))
    right = predict(network, part.pixels()).argmax(1) == part.labels
    doubt = chance_doubt(float(right.double().mean()), len(part.classes))
    if doubt:
        shop.progress.note(doubt)
    return [doubt] if doubt else []


def reference(shop: Shop) -> Stage:
    """The dense network trained adversarially from scratch: what the paper compares with."""
    spec = shop.recipe.reference
    _needs_fresh_weights(shop, "reference")
    structure = _dense_structure(shop)
    build = _training(shop, lambda: build_network(structure, shop.source, seed=shop.recipe.seed), structure, spec)
    return shop.declare(
        "reference",
        "reference: train adversarially",
        [structure, spec, threat_of(shop, spec), shop.recipe.seed, *_code(shop)],
        [],
        build,
        trains=True,
        macs=training_macs(shop, spec, shop.dense_macs()),
    )


def harden(shop: Shop, network: Stage) -> Stage:
    """The baseline after a few adversarial epochs, still dense."""
    spec = shop.recipe.harden
    note = f"pruned from a dense network that was hardened: {spec.epochs} epochs, {spec.objective}, {spec.attack}"

    def build(folder: Path, report: Report) -> None:
        start, structure = shop.network(network)
        train_into(shop, folder, start, structure, spec, report, earlier=[UNTRAINED | {"notes": [note]}])

    return shop.declare(
        "harden",
        "harden: train the dense network adversarially",
        [spec, threat_of(shop, spec), shop.recipe.seed],
        [network],
        build,
        trains=True,
        macs=training_macs(shop, spec, shop.dense_macs()),
    )


def prune(shop: Shop, network: Stage, *, earlier: Stage | None = None) -> Stage:
    """Remove channels; the result is the *parent* of all that follows.

    In several steps, if wanted, with training between them on what the deployed arm is trained on. ``earlier`` is the
    stage whose training belongs to the parent's: the hardening.
    """
    spec = shop.recipe.prune
    between = between_steps(shop) if spec.steps > 1 and spec.ratio else None
    sees_images = spec.importance.startswith("taylor")
    part = 1 / spec.steps
    each = spec.model_copy(update={"ratio": 1 - (1 - spec.ratio) ** part, "floor": spec.floor**part})

    def build(folder: Path, report: Report) -> None:
        small, structure = shop.network(network)
        plan = PruningPlan()
        rounds = spec.steps if spec.ratio else 1
        outcomes = [] if earlier is None else [shop.result(earlier)]
        for number in range(rounds):
            ranking = _taylor(shop, small) if sees_images else None
            small, more = prune_channels(
                small, each, image_shape=structure.image_shape, seed=shop.recipe.seed, importance=ranking
            )
            plan = joined(plan, more, spec.ratio) if plan.widths else more.model_copy(update={"requested": spec.ratio})
            if between is not None and number + 1 < rounds:
                checkpoints = folder / f"checkpoint-step-{number}"
                checkpoints.mkdir(exist_ok=True)
                result = trained(shop, small, between, checkpoints, report)
                small = result.model
                outcomes.append(outcome_of(result))
        save_network(folder, small, structure.model_copy(update={"pruning": plan}))
        write_json(folder / "result.json", joined_outcomes(outcomes))

    seed = shop.recipe.seed if spec.importance == "random" or sees_images or between else 0
    attacked = threat_of(shop, between) if between else None
    if spec.importance == "taylor-adversarial":
        attacked = shop.recipe.threat_model
    cost = 0.0
    if between is not None:
        cost = (spec.steps - 1) * training_macs(shop, between, (shop.dense_macs() + shop.small_macs()) / 2)
    return shop.declare(
        "prune",
        f"prune {spec.ratio:.0%} of channels",
        [spec, seed, between, attacked],
        [network],
        build,
        reads="training" if sees_images or between is not None else "nothing",
        trains=between is not None,
        macs=cost,
    )


def _taylor(shop: Shop, network: nn.Module) -> Importance:
    spec = shop.recipe.prune
    attacked = shop.threat_model if spec.importance == "taylor-adversarial" else None
    return taylor_on(network, shop.data.train.take(slice(0, spec.importance_n)), attacked, seed=shop.recipe.seed)


def quantize(shop: Shop, network: Stage) -> Stage:
    """Round weights and activations; calibrated on training images, not yet trained."""
    spec = _quantization(shop)
    beyond = _beyond_box(shop)

    def build(folder: Path, report: Report) -> None:
        small, structure = shop.network(network)
        save_network(folder, _rounded(shop, small), structure.rounded(spec))

    label = f"quantize to {spec.weight_bits}/{spec.activation_bits} bits" if spec.enabled else "quantize (off)"
    settings: list[object] = [spec, beyond] if beyond else [spec]
    if spec.activation_bits < spec.edge_bits:
        settings.append("last input and all sums at edge")  # they were not in older stores
    return shop.declare("quantize", label, settings, [network], build)


def _rounded(shop: Shop, network: nn.Module, *, keep_batchnorm: bool = False) -> nn.Module:
    """Folded, if it is not to be kept, rounded and calibrated as the recipe says."""
    spec = _quantization(shop)
    images = shop.data.train.pixels(slice(0, spec.calibration_n))
    return quantize_network(network, spec, images, beyond_box=_beyond_box(shop), keep_batchnorm=keep_batchnorm)


def finetune_in_float(shop: Shop, parent: Stage, arm: str, *, teacher: Stage | None = None) -> Stage | None:
    """The first ``finetune.float_epochs`` of an arm, which train the float ``parent`` with its BatchNorm.

    None where there are none. What follows the rounding is :func:`finetune`. Networks that differ only in their bits
    share this stage.
    """
    spec, _ = _parts(shop, arm)
    if spec is None:
        return None
    teaches = teacher if spec.objective == "distill" else None

    def build(folder: Path, report: Report) -> None:
        taught_by = shop.network(teaches)[0] if teaches else None
        start, structure = shop.network(parent)
        train_into(shop, folder, start, structure, spec, report, teacher=taught_by)

    return shop.declare(
        "finetune",
        f"fine-tune in float: {arm}",
        [spec, threat_of(shop, spec), shop.recipe.seed],
        [parent, *([teaches] if teaches else [])],
        build,
        trains=True,
        macs=training_macs(shop, spec, shop.small_macs()),
    )


def finetune(
    shop: Shop, compressed: Stage, arm: str, *, begun: Stage | None = None, teacher: Stage | None = None
) -> Stage:
    """Train the compressed network, through its rounding, on natural or on adversarial images.

    With ``begun`` the network that was tuned in floating point takes the place of the compressed one: it is rounded
    first, and keeps its BatchNorm until it is trained. Where all epochs were in floating point, nothing follows the
    rounding.
    """
    _, spec = _parts(shop, arm)
    teaches = teacher if spec is not None and spec.objective == "distill" else None
    quantization = _quantization(shop)

    def build(folder: Path, report: Report) -> None:
        network, structure = shop.network(compressed)
        earlier = []
        if begun is not None:
            network = _rounded(shop, shop.network(begun)[0], keep_batchnorm=spec is not None)
            earlier.append(shop.result(begun))
        if spec is not None:
            taught_by = shop.network(teaches)[0] if teaches else None
            train_into(
                shop, folder, network, structure, spec, report,
                teacher=taught_by, earlier=earlier, finish=fold_quantized,
            )  # fmt: skip
            return
        outcome = joined_outcomes(earlier)
        if quantization.fewest_bits < 8:  # 8 need no training
            outcome["notes"].append(_UNTRAINED.format(quantization.fewest_bits))
        save_network(folder, network, structure)
        write_json(folder / "result.json", outcome)

    settings = [] if spec is None else [spec, threat_of(shop, spec)]
    if spec is not None and begun is not None:
        settings.append("keeps BatchNorm")  # networks of older stores did not
    if spec is not None and quantization.enabled and spec.optimizer == "muon":
        settings.append("steps are stretched")  # they were left to SGD
        if not quantization.learned_steps:
            settings.append("steps follow their filters")  # they stood still
    cost = 0.0 if spec is None else 1.5 * training_macs(shop, spec, shop.small_macs())
    return shop.declare(
        "finetune",
        f"fine-tune: {arm}" if spec else f"{'round' if quantization.enabled else 'fold'} after fine-tuning: {arm}",
        [*settings, shop.recipe.seed],
        [stage for stage in (compressed, begun, teaches) if stage is not None],
        build,
        trains=spec is not None,
        macs=cost,
    )


def _parts(shop: Shop, arm: str) -> tuple[TrainSpec | None, TrainSpec | None]:
    """What of an arm's training comes before the rounding, in floating point, and what after it."""
    whole = shop.recipe.finetune
    spec = TrainSpec.model_construct(**{name: getattr(whole, name) for name in TrainSpec.model_fields})
    in_float = whole.epochs_in_float(shop.recipe.quantize.fewest_bits)
    first: dict[str, object] = {**whole.in_float, "epochs": in_float}
    rest: dict[str, object] = {"epochs": whole.epochs - in_float}
    if arm == "natural":  # what only an inner attack reads must not decide the key
        plain = TrainSpec()
        inner = ("attack", "beta", "rel_eps", "soft", "temperature", "awp")
        only_adversarial = {name: getattr(plain, name) for name in inner}
        spec = spec.model_copy(update={**only_adversarial, "objective": "natural", "eps_ramp": 0.0})
        first["attack"] = plain.attack
        if whole.natural_lr:
            first["lr"] = rest["lr"] = whole.natural_lr
    if in_float:
        rest["eps_ramp"] = 0.0  # the network is robust already
    before, after = spec.model_copy(update=first), spec.model_copy(update=rest)
    return before if before.epochs else None, after if after.epochs else None


def control(shop: Shop, compressed: Stage) -> Stage:
    """The same small network with fresh weights: is pruning a trained network worth anything?

    Trained adversarially with the attack of the fine-tuning (that after the rounding, if there is one), for its epochs
    and as many more as the hardening's multiply-adds would have paid for, or fewer, where some epochs of the tuning had
    a cheaper attack; with the optimizer and the learning rate of a baseline, in floating point, and rounded afterwards:
    steps for weights that are still random mean nothing. Fair at 8 bits, harsh below.
    """
    _needs_fresh_weights(shop, "control")
    whole = shop.recipe.finetune
    before, after = _parts(shop, "adversarial")
    tuning = {name: getattr(whole, name) for name in TrainSpec.model_fields}
    tuning["attack"] = whole.attack if after else whole.in_float["attack"]
    as_baseline = {name: getattr(shop.recipe.model.train, name) for name in _OPTIMIZER}
    spec = TrainSpec(**{**tuning, **as_baseline, "objective": "adversarial", "bits_ramp": 0.0})
    small, more = shop.small_macs(), 0.0
    if shop.recipe.harden.train:
        more += training_macs(shop, shop.recipe.harden, shop.dense_macs())
    if before:
        as_here = before.model_copy(update={"attack": spec.attack})
        more += training_macs(shop, before, small) - training_macs(shop, as_here, small)
    if more:
        one = training_macs(shop, spec.model_copy(update={"epochs": 1}), small)
        spec = spec.model_copy(update={"epochs": max(spec.epochs + round(more / one), 1)})

    def build(folder: Path, report: Report) -> None:
        _, structure = shop.network(compressed)
        bare = structure.model_copy(update={"quantization": None})
        fresh = build_network(bare, shop.live_source, seed=shop.recipe.seed + 1)
        train_into(shop, folder, fresh, structure, spec, report, finish=partial(_rounded, shop))

    return shop.declare(
        "control",
        "control: train the small network from scratch",
        [spec, _quantization(shop), threat_of(shop, spec), shop.recipe.seed],
        [compressed],
        build,
        trains=True,
        macs=training_macs(shop, spec, small),
    )


def _training(
    shop: Shop,
    start: Callable[[], nn.Module],
    structure: Structure,
    spec: TrainSpec,
) -> Callable[[Path, Report], None]:
    def build(folder: Path, report: Report) -> None:
        train_into(shop, folder, start(), structure, spec, report)

    return build


def _dense_structure(shop: Shop) -> Structure:
    spec, shape = shop.recipe.model, shop.data.image_shape
    mean, std = spec.mean or shop.data.mean, spec.std or shop.data.std
    if not shop.source.rebuildable:  # a live network takes pixels, or normalizes them itself
        if bool(spec.mean) != bool(spec.std):
            raise RecipeError("model.mean and model.std: expected both or none of them, got one")
        mean, std = spec.mean or (0.0,) * shape[0], spec.std or (1.0,) * shape[0]
    elif spec.checkpoint and not (spec.mean and spec.std):
        raise RecipeError(
            "model.mean and model.std: expected the normalization that the network in model.checkpoint was trained "
            "with, for inputs in [0, 1], got none; [0.0] and [1.0] for each channel mean none"
        )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != shape[0]:
            raise RecipeError(f"model.{name}: expected {shape[0]} numbers, one a channel, got {len(values)}")
    return Structure(source=shop.source.name, image_shape=shape, classes=shop.data.classes, mean=mean, std=std)


def _quantization(shop: Shop) -> QuantizeSpec:
    spec = shop.recipe.quantize
    if shop.recipe.deploy.reduce_range and spec.weight_bits <= 8:
        seven = {"weight_bits": min(spec.weight_bits, 7), "edge_bits": min(spec.edge_bits, 7)}
        return spec.model_copy(update=seven)
    return spec


def _beyond_box(shop: Shop) -> float:
    """How far the pixels of adversarial images may leave [0, 1]."""
    threat = shop.recipe.threat_model
    return threat.eps if threat.literal else 0.0


def _needs_fresh_weights(shop: Shop, what: str) -> None:
    if not shop.source.rebuildable:
        raise RecipeError(
            f"{what}.train: expected an architecture that can be built with fresh weights, such as "
            "package.module:factory, got a network that is already trained"
        )


def _code(shop: Shop) -> list[str]:
    """What the key must know of an architecture whose code is not ours: what it builds and computes."""
    return [] if shop.source.name.startswith("zoo:") else [network_digest(shop.source.build(0))]

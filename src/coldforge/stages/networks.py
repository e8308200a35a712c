"""Stages that make a network: baseline, reference, prune, quantize, finetune, control."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from torch import nn

from coldforge.attacks import parse_pgd
from coldforge.compress import Structure, save_network
from coldforge.compress import build as build_network
from coldforge.compress import prune as prune_channels
from coldforge.compress import quantize as quantize_network
from coldforge.errors import RecipeError
from coldforge.models import check_classifier, load_weights, normalized
from coldforge.recipe import QuantizeSpec, TrainSpec
from coldforge.stages.shop import Report, Shop, Stage, file_digest, write_json
from coldforge.train import train


def baseline(shop: Shop) -> Stage:
    """The network that the user brings, or one trained as ``[model.train]`` says."""
    spec = shop.recipe.model
    structure = _dense_structure(shop)
    checkpoint = spec.checkpoint if shop.source.rebuildable else ""  # a live network brings its weights
    if checkpoint or not shop.source.rebuildable:
        weights = file_digest(checkpoint) if checkpoint else ""

        def load(folder: Path, report: Report) -> None:
            bare = shop.source.build(0)
            if checkpoint:
                load_weights(bare, spec.checkpoint, key_prefix=spec.key_prefix)
            network = normalized(bare, structure.mean, structure.std).eval()
            check_classifier(network, structure.image_shape, len(structure.classes))
            save_network(folder, network, structure)
            write_json(folder / "result.json", {})

        return shop.declare("baseline", "baseline: load", [structure, weights, spec.key_prefix, *_code(shop)], [], load)
    build = _training(shop, lambda: build_network(structure, seed=shop.recipe.seed), structure, spec.train)
    return shop.declare(
        "baseline",
        "baseline: train",
        [structure, spec.train, _threat_of(shop, spec.train), shop.recipe.seed, *_code(shop)],
        [],
        build,
        macs=_training_macs(shop, spec.train, shop.dense_macs()),
    )


def reference(shop: Shop) -> Stage:
    """The dense network trained adversarially from scratch: what the paper compares with."""
    spec = shop.recipe.reference
    _needs_fresh_weights(shop, "reference")
    structure = _dense_structure(shop)
    build = _training(shop, lambda: build_network(structure, shop.source, seed=shop.recipe.seed), structure, spec)
    return shop.declare(
        "reference",
        "reference: train adversarially",
        [structure, spec, _threat_of(shop, spec), shop.recipe.seed, *_code(shop)],
        [],
        build,
        macs=_training_macs(shop, spec, shop.dense_macs()),
    )


def prune(shop: Shop, network: Stage) -> Stage:
    """Remove channels; the result is the *parent* of all that follows."""
    spec = shop.recipe.prune

    def build(folder: Path, report: Report) -> None:
        dense, structure = shop.network(network)
        small, plan = prune_channels(dense, spec, image_shape=structure.image_shape, seed=shop.recipe.seed)
        save_network(folder, small, structure.model_copy(update={"pruning": plan}))

    seed = shop.recipe.seed if spec.importance == "random" else 0
    return shop.declare(
        "prune", f"prune {spec.ratio:.0%} of channels", [spec, seed], [network], build, reads_data=False
    )


def quantize(shop: Shop, network: Stage) -> Stage:
    """Round weights and activations; calibrated on training images, not yet trained."""
    spec = _quantization(shop)
    beyond = _beyond_box(shop)

    def build(folder: Path, report: Report) -> None:
        small, structure = shop.network(network)
        images = shop.data.train.pixels(slice(0, spec.calibration_n))
        rounded = quantize_network(small, spec, images, beyond_box=beyond)
        quantization = spec if spec.enabled else None
        save_network(folder, rounded, structure.model_copy(update={"quantization": quantization}))

    label = f"quantize to {spec.weight_bits}/{spec.activation_bits} bits" if spec.enabled else "quantize (off)"
    return shop.declare("quantize", label, [spec, beyond] if beyond else [spec], [network], build)


def finetune(shop: Shop, network: Stage, arm: str) -> Stage:
    """Train the compressed network, through its rounding, on natural or on adversarial images."""
    spec = TrainSpec(**{**shop.recipe.finetune.model_dump(exclude={"arms"}), "objective": arm})
    if arm == "natural":  # what only an inner attack reads must not decide the key
        spec = spec.model_copy(update={"attack": TrainSpec().attack, "eps_ramp": 0.0})

    def build(folder: Path, report: Report) -> None:
        start, structure = shop.network(network)
        _training(shop, lambda: start, structure, spec)(folder, report)

    return shop.declare(
        "finetune",
        f"fine-tune: {arm}",
        [spec, _threat_of(shop, spec), shop.recipe.seed],
        [network],
        build,
        macs=1.5 * _training_macs(shop, spec, shop.small_macs()),
    )


def control(shop: Shop, compressed: Stage) -> Stage:
    """The same small network with fresh weights: is pruning a trained network worth anything?

    Trained adversarially with the epochs and the attack of the fine-tuning and the learning rate of a baseline, in
    floating point, and rounded afterwards: steps for weights that are still random mean nothing. Fair at 8 bits,
    harsh below.
    """
    _needs_fresh_weights(shop, "control")
    tuning = shop.recipe.finetune.model_dump(exclude={"arms"})
    spec = TrainSpec(**{**tuning, "objective": "adversarial", "lr": shop.recipe.model.train.lr})
    quantization = _quantization(shop)

    def build(folder: Path, report: Report) -> None:
        _, structure = shop.network(compressed)
        bare = structure.model_copy(update={"quantization": None})
        fresh = build_network(bare, shop.live_source, seed=shop.recipe.seed + 1)
        _training(shop, lambda: fresh, structure, spec, finish=round_it)(folder, report)

    def round_it(network: nn.Module) -> nn.Module:
        images = shop.data.train.pixels(slice(0, quantization.calibration_n))
        return quantize_network(network, quantization, images, beyond_box=_beyond_box(shop))

    return shop.declare(
        "control",
        "control: train the small network from scratch",
        [spec, quantization, _threat_of(shop, spec), shop.recipe.seed],
        [compressed],
        build,
        macs=_training_macs(shop, spec, shop.small_macs()),
    )


def _training(
    shop: Shop,
    start: Callable[[], nn.Module],
    structure: Structure,
    spec: TrainSpec,
    *,
    finish: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> Callable[[Path, Report], None]:
    def build(folder: Path, report: Report) -> None:
        result = train(
            start(),
            shop.data,
            spec,
            shop.threat_model,
            seed=shop.recipe.seed,
            precision=shop.recipe.compute.precision,
            folder=folder,
            on_progress=report,
            on_note=shop.progress.note,
        )
        save_network(folder, finish(result.model), structure)
        found = {
            "train_seconds": result.seconds,
            "train_macs": result.macs,
            "curve": [point.model_dump() for point in result.curve],
            "notes": list(result.notes),
        }
        write_json(folder / "result.json", found)

    return build


def _dense_structure(shop: Shop) -> Structure:
    spec, shape = shop.recipe.model, shop.data.image_shape
    mean, std = spec.mean or shop.data.mean, spec.std or shop.data.std
    if not shop.source.rebuildable:  # a live network takes pixels, or normalizes them itself
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
    """What the key must know of an architecture whose code is not ours: what it builds."""
    return [] if shop.source.name.startswith("zoo:") else [_network_digest(shop.source.build(0))]


def _threat_of(shop: Shop, spec: TrainSpec) -> object:
    return shop.recipe.threat_model if spec.objective == "adversarial" else None


def _training_macs(shop: Shop, spec: TrainSpec, macs: float) -> float:
    inner = parse_pgd(spec.attack).steps if spec.objective == "adversarial" else 0
    return len(shop.data.train) * spec.epochs * macs * (3 + 2 * inner)


def _network_digest(network: nn.Module) -> str:
    digest = hashlib.sha256(repr(network).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

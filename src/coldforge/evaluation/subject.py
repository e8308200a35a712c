"""What a path names, loaded: a network, a file or both, with its test images and its threat model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from coldforge.attacks import Attack, Ensemble, ThreatModel, as_parts, parse_attack
from coldforge.compress import load_network, read_structure
from coldforge.data import DataSplits, ImageSet, load_data
from coldforge.deploy import OnnxSession
from coldforge.errors import DataError, ModelError, UsageError
from coldforge.evaluate import Target
from coldforge.evaluate.crew import workers_of
from coldforge.evaluate.target import Deployed
from coldforge.evaluation.request import ATTACKS, BLACK_BOX_ATTACKS, NetworkRequest, Request, parse_numbers
from coldforge.models import channels_last, check_classifier, load_weights, model_source, normalized
from coldforge.models.checkpoints import SUFFIXES
from coldforge.recipe import DataSpec, Recipe, ThreatModelSpec, load_recipe
from coldforge.records import TargetRecord, load_record
from coldforge.sealed import sha256_of

Kind = Literal["folder", "weights folder", "weights file", "onnx"]

FORMS = (
    f"a folder that `coldforge run` wrote, an .onnx file, a checkpoint ({', '.join(SUFFIXES)}) with --model, "
    "or a folder with model.safetensors and structure.json"
)


@dataclass(frozen=True, eq=False)
class Subject:
    """All that an evaluation needs, ready."""

    target: Target
    record: TargetRecord
    data: ImageSet
    """Test images."""
    data_record: dict[str, Any]
    threat_model: ThreatModel
    attacks: tuple[Attack | Ensemble, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Network:
    """A network with gradients, and where it comes from."""

    module: nn.Module
    architecture: str
    sha256: str
    size_bytes: int
    weight_bits: int = 32
    activation_bits: int = 32


def load_subject(path: Path, request: Request, *, threads: int) -> Subject:
    """Find out what ``path`` is, and load it with the data and the attacks asked for.

    Args:
        path: a folder of ``coldforge run``, a checkpoint, or an ONNX file.
        request: the options.
        threads: threads for a file that has no network beside it.

    Raises:
        UsageError: nothing there that can be evaluated, an option that is missing or would be ignored, or an attack
            that needs gradients where there are none.
        ColdforgeError: a network, a file or data that are damaged or do not fit.
    """
    kind = _kind(path)
    _refuse_ignored_options({kind} | ({_kind(request.surrogate)} if request.surrogate else set()), kind, request)
    recipe = load_recipe(path / "recipe.toml") if kind == "folder" else None
    threat_model = _threat_model(request, recipe)
    attacks = _attacks(request, kind, threat_model)
    splits, source = _data(path, request, recipe)
    data, notes = splits.test, list[str]()

    surrogate = _network(request.surrogate, request, data) if request.surrogate else None
    network: _Network | None = None
    file: OnnxSession | None = None
    asked: Deployed | None = None
    if kind != "onnx":
        network = _network(path, request, data)
    if kind in ("folder", "onnx"):
        # one thread beside a network: the threads of a second runtime would spin between its calls and slow the search
        alone = network is None and surrogate is None
        asking = workers_of(threads, math.prod(data.image_shape))
        file = OnnxSession(path / "model.onnx" if kind == "folder" else path, threads=threads // asking if alone else 1)
        asked = file
        if kind == "onnx" and surrogate is None and (request.mean or request.std):
            asked = _normalizing(file, request, data)
            notes.append(f"the file was asked about normalized pixels: mean {request.mean}, std {request.std}")
        _check(_FileAsModule(asked), data, str(path))
        notes += _names_differ(file, data)
    if kind == "folder" and attacks and all(part.uses_gradients for attack in attacks for part in as_parts(attack)):
        notes.append("no attack searched on the file itself (--attack names no square): its worst case is without one")
    surrogates = {"the surrogate": surrogate.module} if surrogate else {}
    return Subject(
        target=Target(network.module if network else None, file=asked, surrogates=surrogates),
        record=_record(path, kind, request, network, file, surrogate),
        data=data,
        data_record={
            "source": source,
            "name": data.name,
            "fingerprint": data.fingerprint,
            "test": len(data),
            "classes": list(data.classes),
        },
        threat_model=threat_model,
        attacks=attacks,
        notes=tuple(notes),
    )


def load_network_of(path: Path, request: NetworkRequest) -> tuple[nn.Module, DataSplits, ThreatModel]:
    """A network, its data and its threat model, for what is learned on validation images.

    Raises:
        UsageError: an ONNX file, which has no network, or an option that is missing or would be ignored.
        ColdforgeError: a network or data that are damaged or do not fit.
    """
    kind = _kind(path)
    if kind == "onnx":
        raise UsageError(f"expected a network whose layers can be changed, got the file {path}")
    _refuse_ignored_options({kind}, kind, request)
    recipe = load_recipe(path / "recipe.toml") if kind == "folder" else None
    threat_model = _threat_model(request, recipe)
    splits, _ = _data(path, request, recipe)
    return _network(path, request, splits.test).module, splits, threat_model


# --- what is it, and what was asked ----------------------------------------------------------------------------------


def _kind(path: Path) -> Kind:
    if path.is_dir():
        if (path / "record.json").is_file() or (path / "recipe.toml").is_file():
            parts = ("record.json", "recipe.toml", "model.onnx", "model")
            if missing := [name for name in parts if not (path / name).exists()]:
                raise UsageError(
                    f"{path}: expected the whole folder that `coldforge run` wrote, missing {', '.join(missing)}"
                )
            return "folder"
        if (path / "structure.json").is_file():
            return "weights folder"
        raise UsageError(f"expected {FORMS}; found nothing of the kind in the folder {path}")
    if not path.is_file():
        raise UsageError(f"expected {FORMS}; found nothing at {path}")
    if path.suffix.lower() == ".onnx":
        return "onnx"
    if path.suffix in SUFFIXES:
        return "weights file"
    raise UsageError(f"expected {FORMS}; got {path}")


def _refuse_ignored_options(kinds: set[Kind], kind: Kind, request: NetworkRequest) -> None:
    """An option without effect would let a reader believe that it had one; ``kinds`` are all that are loaded."""
    if "weights file" not in kinds:
        for option, value in (("mean", request.mean), ("std", request.std), ("key-prefix", request.key_prefix)):
            if value and (kinds != {"onnx"} or option == "key-prefix"):
                files = "checkpoint files such as model.safetensors"
                files += "" if option == "key-prefix" else ", and for an .onnx file without a surrogate"
                raise UsageError(f"--{option} is for {files}, got a {kind}")
    if kinds == {"onnx"} and request.model:
        raise UsageError("--model is for checkpoints; an .onnx file holds its own architecture")


def _threat_model(request: NetworkRequest, recipe: Recipe | None) -> ThreatModel:
    spec = recipe.threat_model if recipe else None
    norm = request.norm or (spec.norm if spec else "linf")
    if request.eps is None and (spec is None or spec.norm != norm):
        raise UsageError(
            f"--eps: expected the radius of the attacks ({norm}, pixel units), such as --eps 0.1 or --eps 8/255, "
            "got none; only a folder of `coldforge run` brings its own, for its own norm"
        )
    try:
        eps = ThreatModelSpec.model_validate({"norm": norm, "eps": request.eps or (spec.eps if spec else 0)})
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ").removeprefix("threat_model.eps: ")
        got = "" if "got" in message else f", got {request.eps!r}"
        raise UsageError(f"--eps: {message[0].lower()}{message[1:]}{got}") from None
    return ThreatModel(norm, eps.eps, box=not (spec.literal if spec else False))


def _attacks(request: Request, kind: Kind, threat_model: ThreatModel) -> tuple[Attack | Ensemble, ...]:
    blind = kind == "onnx" and request.surrogate is None
    names = request.attack_names or (BLACK_BOX_ATTACKS if blind else ATTACKS)
    attacks = {attack.name: attack for attack in map(parse_attack, names)}
    for attack in attacks.values():
        attack.check(threat_model)
    needing = [name for name, attack in attacks.items() if any(part.uses_gradients for part in as_parts(attack))]
    if blind and needing:
        raise UsageError(
            f"--attack: {', '.join(needing)} needs gradients, which an .onnx file does not have; either name a network "
            "to search on with --surrogate (a folder of `coldforge run`, or a checkpoint), or use --attack square"
        )
    return tuple(attacks.values())


def _data(path: Path, request: NetworkRequest, recipe: Recipe | None) -> tuple[DataSplits, str]:
    """The data, and the name of their source."""
    if request.data:
        spec = DataSpec(source=request.data)
        return load_data(spec), spec.source
    if recipe is None:
        raise UsageError(
            "--data: expected test images, got none; name them as in recipes, such as --data fashion-mnist or "
            "--data folder:DIR; only a folder of `coldforge run` names its own"
        )
    splits = load_data(recipe.data)
    expected = load_record(path).provenance.get("data", {}).get("fingerprint", splits.fingerprint)
    if splits.fingerprint != expected:
        raise DataError(
            f"{path} was made with other images than {recipe.data.source} gives here (they came from memory, or the "
            "files have changed); name its test images with --data, such as --data folder:DIR"
        )
    return splits, recipe.data.source


# --- networks and files ----------------------------------------------------------------------------------------------


def _network(path: Path, request: NetworkRequest, data: ImageSet) -> _Network:
    kind = _kind(path)
    if kind == "onnx":
        raise UsageError(f"--surrogate: expected a network with gradients, got the file {path}; name a checkpoint")
    found = _from_file(path, request, data) if kind == "weights file" else _from_folder(path, kind, request, data)
    _check(found.module, data, str(path))
    channels_last(found.module)
    return found


def _from_folder(path: Path, kind: Kind, request: NetworkRequest, data: ImageSet) -> _Network:
    folder = path / "model" if kind == "folder" else path
    structure = read_structure(folder)
    shape, classes = structure.image_shape, len(structure.classes)
    source = model_source(request.model, image_shape=shape, num_classes=classes) if request.model else None
    if source is None and ":" not in structure.source:
        raise UsageError(
            f"{path} was made from a network in memory ({structure.source}), whose architecture no name can rebuild; "
            "name a function that returns it with --model package.module:factory, or evaluate its model.onnx alone"
        )
    module, structure = load_network(folder, source)
    bits = structure.quantization
    weights = folder / "model.safetensors"
    return _Network(
        module,
        request.model or structure.source,
        sha256_of(weights),
        weights.stat().st_size,
        weight_bits=bits.weight_bits if bits else 32,
        activation_bits=bits.activation_bits if bits else 32,
    )


def _from_file(path: Path, request: NetworkRequest, data: ImageSet) -> _Network:
    if not request.model:
        raise UsageError(
            f"--model: expected the architecture of {path}, such as --model package.module:factory or "
            "--model zoo:resnet18, got none"
        )
    if not (request.mean and request.std):
        raise UsageError(
            "--mean and --std: expected the normalization that the checkpoint was trained with, for pixels in [0, 1], "
            "got none; a network that takes pixels as they are has --mean 0 --std 1"
        )
    channels = data.image_shape[0]
    mean, std = parse_numbers(request.mean, channels, "--mean"), parse_numbers(request.std, channels, "--std")
    bare = model_source(request.model, image_shape=data.image_shape, num_classes=len(data.classes)).build(0)
    load_weights(bare, path, key_prefix=request.key_prefix)
    return _Network(normalized(bare, mean, std).eval(), request.model, sha256_of(path), path.stat().st_size)


@dataclass(frozen=True, eq=False)
class _Normalizing:
    """A file that takes normalized pixels, asked about pixels in [0, 1]."""

    file: OnnxSession
    mean: Tensor
    std: Tensor

    def logits(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] to logits (N, K)."""
        return self.file.logits((images - self.mean) / self.std)

    def labels(self, images: Tensor) -> Tensor:
        """Images to labels (N,)."""
        return self.logits(images).argmax(1)


def _normalizing(file: OnnxSession, request: NetworkRequest, data: ImageSet) -> _Normalizing:
    if not (request.mean and request.std):
        raise UsageError("--mean and --std: expected both or none of them, got one")
    channels = data.image_shape[0]
    values = (
        parse_numbers(request.mean, channels, "--mean"),
        parse_numbers(request.std, channels, "--std"),
    )
    return _Normalizing(file, *(torch.tensor(each).view(-1, 1, 1) for each in values))


class _FileAsModule(nn.Module):
    """So that a file passes the same checks as a network."""

    def __init__(self, file: Deployed) -> None:
        super().__init__()
        self._file = file

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, K)."""
        return self._file.logits(images)


def _check(model: nn.Module, data: ImageSet, what: str) -> None:
    try:
        check_classifier(model, data.image_shape, len(data.classes))
    except ModelError as error:
        raise ModelError(f"{what} on the images of {data.name}: {error}") from error


def _names_differ(file: OnnxSession, data: ImageSet) -> list[str]:
    named = file.header.classes if "coldforge_version" in file.metadata else ()
    if not named or named == data.classes:
        return []
    return [
        "the classes of the file and of the data have different names "
        f"({', '.join(named[:3])}, ... and {', '.join(data.classes[:3])}, ...): they were matched by their order"
    ]


def _record(
    path: Path,
    kind: Kind,
    request: Request,
    network: _Network | None,
    file: OnnxSession | None,
    surrogate: _Network | None,
) -> TargetRecord:
    kinds: dict[Kind, Literal["folder", "checkpoint", "onnx"]] = {"folder": "folder", "onnx": "onnx"}
    if file is not None:
        sha256, size_bytes = sha256_of(file.path), file.path.stat().st_size
        weight_bits = activation_bits = 8 if file.uses_integer_kernels() else 32
    if network is not None:
        weight_bits, activation_bits = network.weight_bits, network.activation_bits
        if file is None:
            sha256, size_bytes = network.sha256, network.size_bytes
    return TargetRecord(
        path=str(path),
        sha256=sha256,
        kind=kinds.get(kind, "checkpoint"),
        architecture=network.architecture if network else "",
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        size_bytes=size_bytes,
        surrogate=str(request.surrogate) if request.surrogate else "",
        surrogate_sha256=surrogate.sha256 if surrogate else "",
    )

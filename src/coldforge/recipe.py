"""Recipes: one frozen spec per stage, TOML in and out.

A spec is configuration, cache key and label at once: :func:`spec_hash` of the same spec is the same on every machine.
Every key has a default, so an empty recipe is a valid one. Unknown keys are refused with the
nearest valid one. Numbers may be written as fractions (``eps = "8/255"``).
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from coldforge.errors import RecipeError, nearest
from coldforge.spec import Number, Spec


class ThreatModelSpec(Spec):
    """What the adversary may do to an image."""

    norm: Literal["linf", "l2"] = "linf"
    """Norm of the perturbation."""
    eps: Number = 0.1
    """Radius of the ball, in pixel units: a fraction of the range [0, 1], e.g. 0.1 or "8/255"."""
    literal: bool = False
    """Let adversarial images leave the box [0, 1], as the code of arXiv 2403.09441 does. Flagged in every report."""

    @model_validator(mode="after")
    def _plausible(self) -> Self:
        if self.norm == "linf" and self.eps >= 1:
            raise ValueError(
                f"threat_model.eps: expected a fraction of the pixel range [0, 1], got {self.eps:g}; "
                f"did you mean {self.eps:g}/255?"
            )
        if self.eps <= 0:
            raise ValueError(f"threat_model.eps: expected a number above 0, got {self.eps:g}")
        return self


class DataSpec(Spec):
    """Where the images come from and how they are split."""

    source: str = "fashion-mnist-mini"
    """fashion-mnist-mini (embedded), fashion-mnist[:DIR], cifar10[:DIR], hf:NAME, folder:DIR or parquet:DIR."""
    validation: int = Field(default=0, ge=0)
    """Images split from *train* for validation; 0 chooses: 5,000, or a twelfth of train if that is less."""
    augment: Literal["auto", "none", "crop-flip"] = "auto"
    """Training augmentation; auto is crop-flip for colour images and none otherwise."""
    train_n: int = Field(default=0, ge=0)
    """Use only the first so many training images (0: all). For tests and trials."""
    test_n: int = Field(default=0, ge=0)
    """Use only the first so many test images (0: all). For tests and trials."""


class TrainSpec(Spec):
    """One training run: objective, inner attack, optimizer, schedule."""

    objective: Literal["natural", "adversarial", "trades", "distill"] = "natural"
    """natural: cross-entropy on clean images; adversarial: on adversarial ones (Madry et al. 2018); trades: clean
    cross-entropy plus beta times the divergence of clean and adversarial answers (Zhang et al. 2019); distill: answers
    of a teacher on adversarial images (RSLAD, Zi et al. 2021), in fine-tuning only."""
    attack: str = "fgsm-rs"
    """Inner attack: fgsm-rs, n-fgsm, fgsm-reuse, or pgd-K such as pgd-7. See `coldforge recipes --attacks`."""
    beta: Number = Field(default=6.0, gt=0)
    """Weight of the divergence in trades."""
    epochs: int = Field(default=3, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=128, ge=1)
    """Images per optimizer step."""
    lr: Number = Field(default=0.05, gt=0)
    """Peak learning rate of SGD."""
    momentum: Number = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: Number = Field(default=5e-4, ge=0)
    """L2 penalty on weights (not on biases, BatchNorm or quantizer steps)."""
    nesterov: bool = True
    """Nesterov momentum."""
    warmup: Number = Field(default=0.2, ge=0, lt=1)
    """Part of training in which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls to 0 after the warm-up."""
    eps_ramp: Number = Field(default=0.3, ge=0, lt=1)
    """Part of training in which eps of the inner attack rises from 0 to its full value."""
    label_smoothing: Number = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the outer loss."""
    soft: Number = Field(default=1.0, ge=0, le=1)
    """distill: part of the teacher's answer in the target; the rest is the label."""
    temperature: Number = Field(default=1.0, gt=0)
    """distill: the teacher's logits are divided by it."""
    awp: Number = Field(default=0.0, ge=0)
    """Adversarial weight perturbation (Wu et al. 2020): its size, relative to each layer's weights, such as 0.005; 0:
    off. Takes one more forward and backward pass a step."""
    ema: Number = Field(default=0.0, ge=0, lt=1)
    """Decay of an average of the weights, such as 0.995; 0: off. The average is watched beside the weights, and what is
    better on the validation part is kept."""
    keep: Literal["last", "best"] = "last"
    """Which epoch is kept: the last, or the one that is best on the validation part."""
    bits_ramp: Number = Field(default=0.0, ge=0, lt=1)
    """Part of training in which the bits of a quantized network fall from 8 to theirs; 0: theirs from the start."""
    retries: int = Field(default=2, ge=0)
    """How often a collapsed training is rolled back to its last good epoch: it goes on at a third of the learning rate,
    or, if it overfitted its inner attack, with one more step of it."""

    @model_validator(mode="after")
    def _teachable(self) -> Self:
        if self.objective == "distill" and "teacher" not in type(self).model_fields:
            raise ValueError('objective: expected natural, adversarial or trades, got "distill", which needs a teacher')
        return self


class ModelSpec(Spec):
    """The baseline: an architecture, and a checkpoint or how to train it."""

    source: str = "zoo:cnn8"
    """zoo:NAME, timm:NAME, torchvision:NAME or package.module:factory."""
    checkpoint: str = ""
    """A .safetensors, .pt or .pth file with trained weights; empty trains the baseline as [model.train] says.
    Environment variables and ~ are expanded."""
    key_prefix: str = ""
    """Prefix to strip from the checkpoint's keys, such as "module."."""
    mean: tuple[Number, ...] = ()
    """Per-channel mean of the normalization layer, for inputs in [0, 1]; empty: of the training images."""
    std: tuple[Number, ...] = ()
    """Per-channel standard deviation of the normalization layer; empty: of the training images."""
    train: TrainSpec = TrainSpec(epochs=8, lr=0.1, eps_ramp=0.0)
    """How to train the baseline where no checkpoint is given."""


class PruneSpec(Spec):
    """Structured channel pruning."""

    ratio: Number = 0.5
    """Part of the channels to remove from every layer but the output, 0 (off) up to but not including 1."""
    importance: Literal["l1", "l2", "random"] = "l1"
    """How channels are ranked: L1 or L2 norm of their weights, or at random (a control)."""
    round_to: int = Field(default=8, ge=1)
    """Widths are rounded to multiples of this (1 for the paper's figure)."""
    min_width: int = Field(default=8, ge=1)
    """No layer gets narrower than this."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        if not 0 <= self.ratio < 1:
            raise ValueError(
                f"prune.ratio: expected a part of the channels, 0 <= ratio < 1, got {self.ratio:g}; "
                "1 would remove every channel"
            )
        return self


Bits = Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32]


def _bits(value: object) -> object:
    valid = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)
    if value not in valid:
        raise ValueError(f"expected a whole number of bits, one of {', '.join(map(str, valid))} (32: off), got {value}")
    return value


class QuantizeSpec(Spec):
    """Quantization of weights (per channel, symmetric) and activations (per tensor)."""

    weight_bits: Annotated[Bits, BeforeValidator(_bits)] = 8
    """Bits of the weights: 1 is -1 and 1, 2 also 0 (ternary); 32 for both turns quantization off."""
    activation_bits: Annotated[Bits, BeforeValidator(_bits)] = 8
    """Bits of the activations."""
    edge_bits: Annotated[Bits, BeforeValidator(_bits)] = 8
    """Least bits of the input image, and of the weights of the first and the last layer."""
    calibration: Literal["minmax", "percentile", "mse"] = "mse"
    """How the ranges of activations are chosen before fine-tuning."""
    calibration_n: int = Field(default=512, ge=1)
    """Training images seen by the calibration."""
    learned_steps: bool = True
    """Train the step sizes together with the weights (LSQ, Esser et al. 2020)."""

    @property
    def enabled(self) -> bool:
        """False where both weights and activations stay in floating point."""
        return (self.weight_bits, self.activation_bits) != (32, 32)

    @model_validator(mode="after")
    def _both(self) -> Self:
        if self.enabled and 32 in (self.weight_bits, self.activation_bits):
            raise ValueError(
                "quantize: expected weight_bits and activation_bits both quantized or both 32, "
                f"got {self.weight_bits} and {self.activation_bits}"
            )
        return self


class FinetuneSpec(TrainSpec):
    """Fine-tuning of the compressed network; one run for each arm."""

    objective: Literal["natural", "adversarial", "trades", "distill"] = "adversarial"
    """Of the adversarial arm: adversarial, trades or distill; the natural arm is always natural."""
    teacher: Literal["baseline", "reference"] = "baseline"
    """Who teaches in distill: the dense baseline, or the dense adversarially trained reference (trained if need be)."""
    attack: str = "pgd-2"
    """Inner attack of the adversarial arm: fgsm-rs, n-fgsm, fgsm-reuse, or pgd-K such as pgd-7."""
    float_epochs: int = Field(default=0, ge=0)
    """So many of the epochs come first, in floating point and with BatchNorm, before the network is rounded."""
    float_lr: Number = Field(default=0.0, ge=0)
    """Peak learning rate of these; 0: lr."""
    lr: Number = Field(default=0.03, gt=0)
    """Peak learning rate of SGD."""
    weight_decay: Number = Field(default=1e-4, ge=0)
    """L2 penalty on weights (not on biases, BatchNorm or quantizer steps)."""
    eps_ramp: Number = Field(default=0.15, ge=0, lt=1)
    """Part of training in which eps of the inner attack rises from 0 to its full value."""
    arms: tuple[Literal["none", "natural", "adversarial"], ...] = ("natural", "adversarial")
    """Which fine-tunings to run from the same compressed network."""

    @model_validator(mode="after")
    def _arms_decide(self) -> Self:
        if self.objective == "natural":
            raise ValueError(
                'finetune.objective is that of the adversarial arm; expected finetune.arms = ["natural"] instead'
            )
        if self.float_epochs >= self.epochs:
            raise ValueError(
                f"finetune.float_epochs: expected fewer than finetune.epochs = {self.epochs}, got {self.float_epochs}: "
                "the network must be trained through its rounding, too"
            )
        return self

    @model_validator(mode="after")
    def _some_arm(self) -> Self:
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"finetune.arms: expected distinct arms, at least one, got {list(self.arms)}")
        return self


class EvaluateSpec(Spec):
    """How accuracy and robustness are found."""

    attacks: tuple[str, ...] = Field(default=("fgsm", "pgd-20", "autoattack-lite"), min_length=1)
    """Attacks run on every stage; worst_case is the point-wise worst of them and of the clean image."""
    n: int = Field(default=0, ge=0)
    """Test images to attack (0: all), taken from the front of the test set."""
    masking_n: int = Field(default=100, ge=0)
    """Test images on which the artifact's robust accuracy is checked for gradient masking (0: not checked)."""


class DeploySpec(Spec):
    """Which network becomes the file, and where it runs."""

    arm: Literal["none", "natural", "adversarial"] = "adversarial"
    """The fine-tuning arm that is exported."""
    runtimes: tuple[Literal["onnxruntime", "openvino"], ...] = ("onnxruntime",)
    """Runtimes whose latency is measured."""
    reduce_range: bool = False
    """7-bit weights, for CPUs without VNNI whose 16-bit accumulators saturate. See `coldforge doctor`."""


class ReferenceSpec(TrainSpec):
    """The dense adversarially trained network that the paper compares with."""

    objective: Literal["natural", "adversarial"] = "adversarial"
    """adversarial, unless a naturally trained reference is wanted."""
    attack: str = "pgd-7"
    """Inner attack of the reference."""
    epochs: int = Field(default=15, ge=1)
    """Passes over the training images."""
    lr: Number = Field(default=0.05, gt=0)
    """Peak learning rate of SGD."""
    train: bool = False
    """Train and evaluate the reference too (takes many times the fine-tuning)."""


class ControlSpec(Spec):
    """The control: the same small network, trained adversarially from scratch with the budget of the fine-tuning."""

    train: bool = False
    """Train and evaluate the control too."""


class ComputeSpec(Spec):
    """Settings that change bits of the results; the same for every executor, and part of every stage's key."""

    threads: int = Field(default=0, ge=0)
    """Threads of torch; 0 chooses the physical cores, at most 8, when the recipe is resolved."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Training precision; auto is bf16 where the CPU computes it in hardware. Verdicts are always fp32."""
    device: Literal["cpu"] = "cpu"
    """Where to train; the CPU is the only choice so far."""


class Recipe(Spec):
    """Everything a run needs to know. TOML tables and keys carry these names."""

    name: str = "quickstart"
    """Name of the recipe; labels the report."""
    description: str = ""
    """One sentence for `coldforge recipes`."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random draw."""
    threat_model: ThreatModelSpec = ThreatModelSpec()
    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()
    prune: PruneSpec = PruneSpec()
    quantize: QuantizeSpec = QuantizeSpec()
    finetune: FinetuneSpec = FinetuneSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    deploy: DeploySpec = DeploySpec()
    reference: ReferenceSpec = ReferenceSpec()
    control: ControlSpec = ControlSpec()
    compute: ComputeSpec = ComputeSpec()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.deploy.arm not in self.finetune.arms:
            raise ValueError(
                f"deploy.arm: expected one of finetune.arms {list(self.finetune.arms)}, got {self.deploy.arm!r}"
            )
        return self


# --- in and out ------------------------------------------------------------------------------------------------------


def preset_names() -> list[str]:
    """Names of the recipes that ship with coldforge."""
    folder = resources.files("coldforge") / "presets"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_recipe(
    source: str | Path | Mapping[str, Any] = "quickstart", *, overrides: Iterable[str] | Mapping[str, object] = ()
) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides.

    Args:
        source: name of a shipped preset, path of a TOML file, or a nested mapping.
        overrides: texts such as ``"finetune.epochs=5"`` or ``"threat_model.eps=8/255"``, whose values are TOML or
            bare words; or a mapping such as ``{"finetune.epochs": 5}``.

    Raises:
        RecipeError: for a file that is missing or not TOML, an unknown key (names the nearest valid one), or a value
            out of range.
    """
    table = _read(source)
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _set(table, key, value)
    else:
        for text in overrides:
            _override(table, text)
    return _validate(table)


def _read(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return json.loads(json.dumps(source))  # type: ignore[no-any-return]  # a deep copy of plain values
    name = str(source)
    if name in preset_names():
        text = (resources.files("coldforge") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    elif name.endswith(".toml") or os.sep in name:
        raise RecipeError(f"expected a recipe file, found nothing at {name}")
    else:
        raise RecipeError(f"expected a recipe file or a preset, got {name!r}; {nearest(name, preset_names())}")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name} is not valid TOML: {error}") from None


def _override(table: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"expected key=value, such as finetune.epochs=5, got {text!r}")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    _set(table, key, parsed)


def _set(table: dict[str, Any], key: str, value: object) -> None:
    *path, last = key.strip().split(".")
    for part in path:
        child = table.setdefault(part, {})
        if not isinstance(child, dict):
            raise RecipeError(f"{key.strip()}: expected a table at {part!r}, found a value")
        table = child
    table[last] = value


def _validate(table: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(item) for item in error.errors())) from None


def _fields_at(path: Iterable[Any]) -> list[str]:
    """Names of the keys that are valid beside the last element of ``path``."""
    spec: type[BaseModel] = Recipe
    for part in path:
        annotation = spec.model_fields[part].annotation if part in spec.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        spec = annotation
    return list(spec.model_fields)


def _explain(item: Mapping[str, Any]) -> str:
    location = [part for part in item["loc"] if isinstance(part, str) and not part.startswith("function-")]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {nearest(str(location[-1]), _fields_at(location[:-1]))}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    prefix = "" if not key or message.startswith(key) else f"{key}: "
    got = "" if "got" in message or item["type"] == "value_error" else f", got {item['input']!r}"
    return f"{prefix}{message}{got}"


def to_toml(recipe: Recipe) -> str:
    """The complete recipe as TOML; :func:`load_recipe` reads it back to an equal recipe."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json"))

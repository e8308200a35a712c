"""One frozen spec per stage, and the recipe that holds them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from coldforge.recipe.training import ControlSpec, FinetuneSpec, HardenSpec, ReferenceSpec, TrainSpec
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
    importance: Literal["l1", "l2", "batchnorm", "taylor", "taylor-adversarial", "random"] = "l1"
    """How channels are ranked: L1 or L2 norm of their weights; scale of the BatchNorm behind; weight times gradient on
    clean or on adversarial training images; or at random (a control)."""
    importance_n: int = Field(default=1024, ge=1)
    """Training images on which taylor takes gradients."""
    scope: Literal["uniform", "global"] = "uniform"
    """uniform: every layer loses the same part; global: those channels go that matter least, wherever they are."""
    floor: Number = Field(default=0.2, gt=0, le=1)
    """global: every layer keeps at least this part of its channels."""
    steps: int = Field(default=1, ge=1)
    """Prune in so many steps, each by the same factor, with training in floating point between them."""
    step_epochs: int = Field(default=1, ge=1)
    """Epochs between two steps, as [finetune] says for the deployed arm."""
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
        if self.scope == "global" and self.ratio and self.floor > 1 - self.ratio + 1e-9:
            raise ValueError(
                f"prune.floor: expected at most the part of the channels that ratio leaves, {1 - self.ratio:g}, got "
                f"{self.floor:g}; every layer would keep more than is to be left of all"
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
    """Bits of the weights: 1 is -1 and 1, 2 is -3, -1, 1 and 3; 32 for both turns quantization off."""
    activation_bits: Annotated[Bits, BeforeValidator(_bits)] = 8
    """Bits of the activations that trained layers read; what sums and poolings read has ``edge_bits``."""
    edge_bits: Annotated[Bits, BeforeValidator(_bits)] = 8
    """Least bits of the input image, of what the last layer and what sums and poolings read, and of the weights of
    the first and last layer."""
    calibration: Literal["minmax", "percentile", "mse"] = "mse"
    """How the ranges of activations are chosen before fine-tuning."""
    calibration_n: int = Field(default=512, ge=1)
    """Training images seen by the calibration."""
    learned_steps: bool = True
    """Train the step sizes together with the weights (LSQ, Esser et al. 2020); else those of weights keep their ratio
    to the norm of their filter under Muon, and stay what they are under SGD."""
    ternary: bool = False
    """Weights of 2 bits are -1, 0 and 1: zeros, but one value less."""

    def known_as(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Weights of 2 bits were ternary once, and others do not care."""
        del plain["ternary"]
        return plain | ({"odd_codes": True} if self.has_odd_codes else {})

    @property
    def enabled(self) -> bool:
        """False where both weights and activations stay in floating point."""
        return (self.weight_bits, self.activation_bits) != (32, 32)

    @property
    def has_odd_codes(self) -> bool:
        """Whether weights, those of the first and last layer included, have 2 bits and the codes -3, -1, 1 and 3."""
        return 2 in (self.weight_bits, max(self.weight_bits, self.edge_bits)) and not self.ternary

    @property
    def fewest_bits(self) -> int:
        """The fewer of the bits of weights and activations."""
        return min(self.weight_bits, self.activation_bits)

    @model_validator(mode="after")
    def _both(self) -> Self:
        if self.enabled and 32 in (self.weight_bits, self.activation_bits):
            raise ValueError(
                "quantize: expected weight_bits and activation_bits both quantized or both 32, "
                f"got {self.weight_bits} and {self.activation_bits}"
            )
        return self


class EvaluateSpec(Spec):
    """How accuracy and robustness are found."""

    attacks: tuple[str, ...] = Field(default=("fgsm", "pgd-20", "autoattack-lite"), min_length=1)
    """Attacks run on every stage; worst_case is the point-wise worst of them and of the clean image."""
    stages: tuple[Literal["baseline", "compressed", "tuned", "artifact", "reference", "control"], ...] = (
        *("baseline", "compressed", "tuned", "artifact"),
        *("reference", "control"),
    )
    """Which rows of the table are evaluated; the others are left out. The artifact always is one of them."""
    part: Literal["test", "validation"] = "test"
    """Which images are attacked. Choose among recipes by "validation", the images held out of train, and evaluate only
    the chosen one on "test": the best of many would be too good by luck."""
    n: int = Field(default=0, ge=0)
    """Images to attack (0: all), taken from the front of the part."""
    masking_n: int = Field(default=100, ge=0)
    """Test images on which the artifact's robust accuracy is checked for gradient masking (0: not checked)."""

    @model_validator(mode="after")
    def _artifact(self) -> Self:
        if "artifact" not in self.stages:
            raise ValueError(f'evaluate.stages: expected at least "artifact", got {list(self.stages)}')
        return self


class DeploySpec(Spec):
    """Which network becomes the file, and where it runs."""

    arm: Literal["none", "natural", "adversarial"] = "adversarial"
    """The fine-tuning arm that is exported."""
    runtimes: tuple[Literal["onnxruntime", "openvino"], ...] = ("onnxruntime",)
    """Runtimes whose latency is measured; [] measures neither latency nor energy."""
    reduce_range: bool = False
    """7-bit weights, for CPUs without VNNI whose 16-bit accumulators saturate. See `coldforge doctor`."""


class ComputeSpec(Spec):
    """Settings that change bits of the results; the same for every executor, and part of every stage's key."""

    threads: int = Field(default=0, ge=0)
    """Threads of torch; 0 chooses the physical cores, at most 8, when the recipe is resolved."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Training precision; auto is bf16 where the CPU computes it in hardware. Verdicts are always fp32."""
    compile: Literal["auto", "off", "kernels", "network"] = "auto"
    """What training compiles: "kernels" is the arithmetic of fake quantization (a second, once a machine), "network"
    with torch.compile also whole networks in floating point (minutes; for long trainings); auto is kernels where there
    is a C++ compiler."""
    device: Literal["cpu"] = "cpu"
    """Where to train; the CPU is the only choice so far."""
    devices: int = Field(default=1, ge=1)
    """Processes of each machine that train one network together and share its threads. In the keys of trainings."""
    num_nodes: int = Field(default=1, ge=1)
    """Machines that train one network together, started by torchrun or SLURM. In the keys of trainings."""

    def in_every_key(self) -> dict[str, object]:
        """What the key of every stage holds: devices and num_nodes only decide trainings."""
        return self.model_dump(mode="json", exclude={"devices", "num_nodes"})


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
    harden: HardenSpec = HardenSpec()
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
        if self.finetune.objective == "distill" and self.finetune.teacher == "hardened" and not self.harden.train:
            raise ValueError('finetune.teacher = "hardened": expected harden.train = true, got false')
        return self

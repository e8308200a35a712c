"""Specs of trainings."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from coldforge.spec import Number, Spec, added


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
    optimizer: Literal["sgd", "muon"] = "sgd"
    """sgd; or muon (Jordan et al. 2024): the same, but each step of a hidden layer is made orthogonal and turns its
    filters by the part lr of their norm, which stays."""
    lr: Number = Field(default=0.05, gt=0)
    """Peak learning rate."""
    momentum: Number = Field(default=0.9, ge=0, lt=1)
    """Momentum of the optimizer."""
    weight_decay: Number = Field(default=5e-4, ge=0)
    """L2 penalty on weights (not on biases, BatchNorm or quantizer steps; with muon, not on hidden layers)."""
    nesterov: bool = True
    """Nesterov momentum."""
    warmup: Number = Field(default=0.2, ge=0, lt=1)
    """Part of training in which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls to 0 after the warm-up."""
    eps_ramp: Number = Field(default=0.3, ge=0, lt=1)
    """Part of training in which eps of the inner attack rises from 0 to its full value."""
    rel_eps: Number = added(1.0, gt=0)
    """Radius of the inner attack, relative to eps of the threat model, such as 1.1: robustness at the rim of a ball is
    learned by training a little beyond it."""
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
    """How often a collapsed training is rolled back to its last good epoch. It goes on with one more step of its inner
    attack, if it overfitted that; with an eps that rises more slowly, if it answers everything the same under attack
    (the first time at the same learning rate); otherwise at a third of the learning rate. Where it collapses again
    before the end of the next epoch, it starts again."""

    @model_validator(mode="after")
    def _teachable(self) -> Self:
        if self.objective == "distill" and "teacher" not in type(self).model_fields:
            raise ValueError('objective: expected natural, adversarial or trades, got "distill", which needs a teacher')
        return self


class FinetuneSpec(TrainSpec):
    """Fine-tuning of the compressed network; one run for each arm."""

    objective: Literal["natural", "adversarial", "trades", "distill"] = "adversarial"
    """Of the adversarial arm: adversarial, trades or distill; the natural arm is always natural."""
    teacher: Literal["baseline", "hardened", "reference"] = "baseline"
    """Who teaches in distill: the dense baseline, the same after [harden], or the dense reference that was trained
    adversarially from scratch (trained if need be)."""
    attack: str = "pgd-4"
    """Inner attack of the adversarial arm: fgsm-rs, n-fgsm, fgsm-reuse, or pgd-K such as pgd-7. Weaker ones are faster
    and may teach a network to mislead them (docs/recipes.md, the quickstart)."""
    optimizer: Literal["sgd", "muon"] = "muon"
    """sgd: stochastic gradient descent with momentum. muon: orthogonal steps for hidden layers, for the rest sgd."""
    batch_size: int = Field(default=64, ge=1)
    """Images a step."""
    float_epochs: int | Literal["all", "auto"] = "auto"
    """So many of the epochs come first, in floating point and with BatchNorm, before the network is rounded; "all" of
    them: it is only rounded, and not trained through its rounding, which is enough at 8 bits. auto: all from 8 bits on,
    below it the first of three or more. After one at least, BatchNorm stays until the network has been trained."""
    float_lr: Number = Field(default=0.0, ge=0)
    """Peak learning rate of these; 0: lr."""
    float_attack: str = added("")
    """Inner attack of these; empty: attack. A cheap one may do in floating point that rounding, which hides gradients
    from a single step, makes too weak."""
    natural_lr: Number = Field(default=0.0, ge=0)
    """Peak learning rate of the natural arm, in floating point and after; 0: that of the adversarial one, which has
    farther to go."""
    lr: Number = Field(default=0.03, gt=0)
    """Peak learning rate."""
    weight_decay: Number = Field(default=1e-4, ge=0)
    """L2 penalty on weights (not on biases, BatchNorm or quantizer steps; with muon, not on hidden layers)."""
    eps_ramp: Number = Field(default=0.15, ge=0, lt=1)
    """Part of training in which eps of the inner attack rises from 0 to its full value."""
    arms: tuple[Literal["none", "natural", "adversarial"], ...] = ("natural", "adversarial")
    """Which fine-tunings to run from the same compressed network."""

    @field_validator("float_epochs", mode="before")
    @classmethod
    def _number_or_all(cls, value: object) -> object:
        if value in ("all", "auto") or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        raise ValueError(f'expected a number of epochs, 0 or more, "all" or "auto", got {value!r}')

    @property
    def in_float(self) -> dict[str, object]:
        """How the epochs in floating point are trained, where that differs from the rest."""
        return {"lr": self.float_lr or self.lr, "attack": self.float_attack or self.attack, "bits_ramp": 0.0}

    def epochs_in_float(self, bits: int) -> int:
        """``float_epochs`` as a number, for the fewer of the bits of weights and activations."""
        if self.float_epochs == "auto":
            return self.epochs if bits >= 8 else min(1, self.epochs // 3)
        return self.epochs if self.float_epochs == "all" else self.float_epochs

    @model_validator(mode="after")
    def _arms_decide(self) -> Self:
        if self.objective == "natural":
            raise ValueError(
                'finetune.objective is that of the adversarial arm; expected finetune.arms = ["natural"] instead'
            )
        if isinstance(self.float_epochs, int) and self.float_epochs > self.epochs:
            raise ValueError(
                f"finetune.float_epochs: expected at most finetune.epochs = {self.epochs}, got {self.float_epochs}"
            )
        return self

    @model_validator(mode="after")
    def _some_arm(self) -> Self:
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"finetune.arms: expected distinct arms, at least one, got {list(self.arms)}")
        return self


class HardenSpec(TrainSpec):
    """A few adversarial epochs of the dense network before it is pruned: channels are then chosen from a network that
    is somewhat robust already, and there is a teacher for little. Their cost belongs to all that follows.
    """

    train: bool = False
    """Harden the baseline first."""
    objective: Literal["adversarial", "trades"] = "adversarial"
    """adversarial or trades."""
    attack: str = "fgsm-rs"
    """Inner attack: cheap, as the dense network is large."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the training images."""
    optimizer: Literal["sgd", "muon"] = "muon"
    """sgd: stochastic gradient descent with momentum. muon: orthogonal steps for hidden layers, for the rest sgd."""
    batch_size: int = Field(default=64, ge=1)
    """Images a step."""
    lr: Number = Field(default=0.03, gt=0)
    """Peak learning rate."""
    weight_decay: Number = Field(default=1e-4, ge=0)
    """L2 penalty on weights (not on biases or BatchNorm; with muon, not on hidden layers)."""
    eps_ramp: Number = Field(default=0.15, ge=0, lt=1)
    """Part of training in which eps of the inner attack rises from 0 to its full value."""


class ReferenceSpec(TrainSpec):
    """The dense adversarially trained network that the paper compares with."""

    objective: Literal["natural", "adversarial"] = "adversarial"
    """adversarial, unless a naturally trained reference is wanted."""
    attack: str = "pgd-7"
    """Inner attack of the reference."""
    epochs: int = Field(default=15, ge=1)
    """Passes over the training images."""
    lr: Number = Field(default=0.05, gt=0)
    """Peak learning rate."""
    keep: Literal["last", "best"] = "best"
    """Which epoch is kept: the last, or the one that is best on the validation part."""
    train: bool = False
    """Train and evaluate the reference too (takes many times the fine-tuning)."""


class ControlSpec(Spec):
    """The control: the same small network, trained adversarially from scratch with the budget of all tuning."""

    train: bool = False
    """Train and evaluate the control too."""

"""One training loop for everything: baselines, the reference, the control and fine-tuning, natural or adversarial.

The loop is a function of its arguments: the images of a step, their augmentation and the start of the inner attack are
drawn from generators keyed by (seed, epoch, step), and a checkpoint holds the rest. So a training that was killed
continues to the same bits. A network that collapses is started again at a lower rate, and the result says so.

The inner attack on a quantized network takes its gradients through the clipping range in the two known ways in turn,
step by step. With BPDA alone the network learns to saturate its activations until that attack is blind: accuracy under
it looks well and the other kind of gradients breaks it (measured: docs/architecture.md).
"""

from __future__ import annotations

import copy
import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from coldforge.attacks import PGD, ThreatModel, parse_pgd, perturb
from coldforge.compress import ActivationQuantizer, QuantizedLayer, attacking
from coldforge.data import DataSplits, epoch_batches, steps_per_epoch
from coldforge.errors import CollapseError, TrainingError
from coldforge.evaluate import BACKWARDS
from coldforge.measure import count_macs
from coldforge.models import channels_last
from coldforge.recipe import TrainSpec
from coldforge.records import CurvePoint
from coldforge.spec import spec_hash
from coldforge.train.checkpoint import TrainState, load_state, save_state
from coldforge.train.guard import Collapse, NotFinite, Overfitting, monitor, refuse_collapse
from coldforge.train.schedule import learning_rate, ramped_eps

CHECKPOINT_SECONDS = 15.0
RETRY_FACTOR = 1 / 3
STEP_RANGE = 10.0
"""A learned quantizer step stays within this factor of its calibrated value."""


@dataclass(frozen=True)
class TrainResult:
    """A trained network and how it got there."""

    model: nn.Module
    curve: tuple[CurvePoint, ...]
    seconds: float
    macs: float
    """Multiply-adds spent: 3 per image and pass of training (forward, two backward), 2 per step of the inner attack."""
    notes: tuple[str, ...]


class _Meter:
    """What a training has cost so far, attempts that collapsed included."""

    def __init__(self, seconds: float, macs: float) -> None:
        self.macs = macs
        self._before, self._started = seconds, time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started


def train(
    model: nn.Module,
    data: DataSplits,
    spec: TrainSpec,
    threat_model: ThreatModel,
    *,
    seed: int = 0,
    precision: str = "fp32",
    folder: Path | None = None,
    on_progress: Callable[[float, str], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train a copy of ``model``.

    Args:
        model: float or fake-quantized classifier; quantizer steps are trained with the weights.
        data: training images; the validation part watches each epoch and chooses nothing else.
        spec: objective, inner attack, optimizer, schedule.
        threat_model: what the inner attack may do, and the monitor's eps.
        seed: seed of every draw.
        precision: ``"bf16"`` (autocast) or ``"fp32"``.
        folder: where a checkpoint is kept every few seconds, and looked for; None: nowhere.
        on_progress: called with the finished fraction and a line such as "epoch 2/3  loss 0.61".
        on_note: called with what a person must know.

    Returns:
        The trained network in evaluation mode, its curve, cost and notes.

    Raises:
        CollapseError: every attempt collapsed to a constant answer.
        TrainingError: the loss became NaN in every attempt.
    """
    state = (load_state(folder) if folder else None) or TrainState()
    while True:
        meter = _Meter(state.seconds, state.macs)
        try:
            return _attempt(model, data, spec, threat_model, seed, precision, folder, state, meter, on_progress)
        except Collapse as collapse:
            if state.attempt >= spec.retries:
                raise (TrainingError if isinstance(collapse, NotFinite) else CollapseError)(
                    f"training collapsed (attempt {state.attempt + 1} of {spec.retries + 1}), "
                    f"last with {_way(spec, state)}: {collapse}. "
                    "Lower lr, raise epochs or eps_ramp, take a stronger attack, or prune less"
                ) from None
            again = TrainState(
                attempt=state.attempt + 1,
                stronger=state.stronger + isinstance(collapse, Overfitting),
                seconds=meter.seconds,
                macs=meter.macs,
            )
            note = f"training with {_way(spec, state)} collapsed ({collapse}); started again with {_way(spec, again)}"
            state = replace(again, notes=(*state.notes, note))
            if folder:
                save_state(folder, state)
            if on_note:
                on_note(note)


def _peak(spec: TrainSpec, state: TrainState) -> float:
    return spec.lr * RETRY_FACTOR ** (state.attempt - state.stronger)


def _inner(spec: TrainSpec, state: TrainState) -> PGD | None:
    """The inner attack; one more step for each time that it was overfitted."""
    if spec.objective != "adversarial":
        return None
    inner = parse_pgd(spec.attack)
    return parse_pgd(f"pgd-{inner.steps + state.stronger}") if state.stronger else inner


def _way(spec: TrainSpec, state: TrainState) -> str:
    inner = _inner(spec, state)
    return f"lr {_peak(spec, state):.3g}" + (f" and {inner.name}" if inner else "")


def _attempt(
    model: nn.Module,
    data: DataSplits,
    spec: TrainSpec,
    threat_model: ThreatModel,
    seed: int,
    precision: str,
    folder: Path | None,
    state: TrainState,
    meter: _Meter,
    on_progress: Callable[[float, str], None] | None,
) -> TrainResult:
    fabric = _fabric(precision)
    network = channels_last(copy.deepcopy(model))
    optimizer = torch.optim.SGD(
        _parameter_groups(network, spec.weight_decay), lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov
    )
    calibrated = [(step, step.detach().clone()) for step in _quantizer_steps(network)]
    if state.model:
        state.restore(network, optimizer)
    wrapped, optimizer = fabric.setup(network, optimizer)
    inner = _inner(spec, state)
    per_epoch = steps_per_epoch(len(data.train), spec.batch_size)
    total = per_epoch * spec.epochs
    peak = _peak(spec, state)
    image_macs = count_macs(network, data.image_shape) * (3 + (2 * inner.steps if inner else 0))
    step, epoch_loss, curve, saved = state.step, state.epoch_loss, list(state.curve), time.monotonic()
    while step < total:
        epoch = step // per_epoch
        batches = epoch_batches(
            data.train,
            batch_size=spec.batch_size,
            seed=seed,
            epoch=epoch,
            augment=data.augment,
            start=step % per_epoch,
        )
        for images, labels, _ in batches:
            lr = learning_rate(step, total, peak=peak, warmup=spec.warmup, schedule=spec.schedule)
            eps = ramped_eps(step, total, eps=threat_model.eps, ramp=spec.eps_ramp)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images = images.contiguous(memory_format=torch.channels_last)
            if inner is not None:
                now = replace(threat_model, eps=eps)
                generator = torch.Generator().manual_seed(_seed(seed, "inner attack", step))
                with attacking(network, BACKWARDS[step % len(BACKWARDS)]), fabric.autocast():
                    images = perturb(network, images, labels, now, inner, generator)
            network.train()
            with torch.random.fork_rng(devices=[]):  # for dropout
                torch.manual_seed(_seed(seed, "forward", step))
                loss = F.cross_entropy(wrapped(images), labels, label_smoothing=spec.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            fabric.backward(loss)
            optimizer.step()
            with torch.no_grad():
                for learned, start in calibrated:
                    learned.clamp_(start / STEP_RANGE, start * STEP_RANGE)
            meter.macs += float(len(images) * image_macs)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NotFinite(f"the loss is not finite at step {step}")
            epoch_loss += value
            step += 1
            if on_progress is not None:
                on_progress(step / total, f"epoch {epoch + 1}/{spec.epochs}  loss {value:.3f}")
            if step % per_epoch == 0:
                if not all(bool(parameter.isfinite().all()) for parameter in network.parameters()):
                    raise NotFinite(f"the weights are not finite after step {step}")
                point = monitor(network, data.validation, threat_model, spec, epoch, epoch_loss / per_epoch, lr, eps)
                curve.append(point)
                epoch_loss = 0.0
                refuse_collapse(network, data.validation, curve, inner, threat_model.eps, spec)
            if folder is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                saved = time.monotonic()
                reached = replace(
                    state,
                    step=step,
                    epoch_loss=epoch_loss,
                    seconds=meter.seconds,
                    macs=meter.macs,
                    curve=tuple(curve),
                )
                save_state(folder, reached.holding(network, optimizer))
    return TrainResult(network.eval(), tuple(curve), meter.seconds, meter.macs, state.notes)


def _seed(*parts: object) -> int:
    return int(spec_hash(*parts)[:15], 16)


def _fabric(precision: str):  # type: ignore[no-untyped-def]  # Fabric's generics say nothing here
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if precision == "bf16" else "32-true")
        fabric.launch()
    return fabric


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weights (more than one dimension) decay; biases, normalization and quantizer steps do not."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def _quantizer_steps(network: nn.Module) -> list[nn.Parameter]:
    """Learned step sizes. SGD can carry one past zero, where no gradient brings it back and its channel is dead."""
    layers = [module.weight_step for module in network.modules() if isinstance(module, QuantizedLayer)]
    quantizers = [module.step for module in network.modules() if isinstance(module, ActivationQuantizer)]
    return [step for step in (*layers, *quantizers) if step.requires_grad]

"""One training loop for everything: baselines, the reference, the control and fine-tuning, natural or adversarial.

The loop is a function of its arguments: the images of a step, their augmentation and the start of the inner attack are
drawn from generators keyed by (seed, epoch, step), and a checkpoint holds the rest. So a training that was killed
continues to the same bits. A network that collapses is rolled back to its last good epoch and goes on in another way,
or starts again if that does not help, and the result says so.

The inner attack on a quantized network takes its gradients through the clipping range in the two known ways in turn,
step by step. With BPDA alone the network learns to saturate its activations until that attack is blind: accuracy under
it looks well and the other kind of gradients breaks it (measured: docs/architecture.md).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from coldforge.attacks import ThreatModel, perturb
from coldforge.compress import ActivationQuantizer, QuantizedLayer, attacking, fused, is_quantized, rectified, set_bits
from coldforge.data import DataSplits, epoch_batches, steps_per_epoch
from coldforge.errors import CollapseError, RecipeError, TrainingError
from coldforge.evaluate import BACKWARDS
from coldforge.measure import count_macs
from coldforge.models import channels_last
from coldforge.provenance import cpp_compiler
from coldforge.recipe import TrainSpec
from coldforge.records import CurvePoint
from coldforge.spec import seed_of
from coldforge.train import retry
from coldforge.train.batchnorm import whole_batch
from coldforge.train.checkpoint import Shelf, TrainState
from coldforge.train.guard import Collapse, NotFinite, first_misled, kept_misled, monitor, refuse_collapse
from coldforge.train.muon import macs_of_a_step
from coldforge.train.objective import Objective, Teacher, check_inner
from coldforge.train.optimizer import filter_norms, follow, make_fabric, make_optimizer, quantizer_steps, turned
from coldforge.train.schedule import bits_now, learning_rate, ramped_eps
from coldforge.train.searcher import Searcher
from coldforge.train.weights import Averaged, copies, perturbed
from coldforge.train.world import World

CHECKPOINT_SECONDS = 15.0
STEP_RANGE = 10.0
"""A learned quantizer step stays within this factor of its calibrated value, which beside Muon follows the norm of its
filter."""
_INT8 = 127


@dataclass(frozen=True)
class TrainResult:
    """A trained network and how it got there."""

    model: nn.Module
    curve: tuple[CurvePoint, ...]
    seconds: float
    macs: float
    """Multiply-adds spent: 3 per image and pass of training (forward, two backward), 2 per step of the inner attack;
    the passes of a teacher and the arithmetic of Muon included."""
    notes: tuple[str, ...]


def train(
    model: nn.Module,
    data: DataSplits,
    spec: TrainSpec,
    threat_model: ThreatModel,
    *,
    seed: int = 0,
    precision: str = "fp32",
    compiled: str = "off",
    teacher: nn.Module | None = None,
    folder: Path | None = None,
    on_progress: Callable[[float, str], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    world: World | None = None,
) -> TrainResult:
    """Train a copy of ``model``.

    Args:
        model: float or fake-quantized classifier; quantizer steps are trained with the weights.
        data: training images; the validation part watches each epoch, and chooses the epoch that is kept and between
            weights and their average where the spec wants that. Nothing else.
        spec: objective, inner attack, optimizer, schedule.
        threat_model: what the inner attack may do, and the monitor's eps.
        seed: seed of every draw.
        precision: ``"bf16"`` (autocast) or ``"fp32"``.
        compiled: ``"kernels"``: the arithmetic of fake quantization is; ``"network"``: a network in floating point is,
            too; ``"off"``.
        teacher: whose answers are learned where the objective is "distill".
        folder: where a checkpoint is kept every few seconds, and looked for; None: nowhere.
        on_progress: called with the finished fraction and a line such as "epoch 2/3  loss 0.61".
        on_note: called with what a person must know.
        world: the processes that train together, all of which call this function with the same arguments; folder,
            on_progress and on_note only on rank 0. None: this process alone.

    Returns:
        The trained network in evaluation mode, its curve, cost and notes.

    Raises:
        CollapseError: every attempt collapsed.
        TrainingError: the loss became NaN in every attempt.
        RecipeError: a teacher is missing, :func:`~coldforge.train.objective.check_inner` refuses the inner attack, or a
            batch has fewer images than there are processes.
        LostError: another process ended or fell silent.
    """
    world = world or World()
    if spec.objective == "distill" and teacher is None:
        raise RecipeError('objective "distill": expected a teacher, got none')
    check_inner(spec, data.augment)
    if min(spec.batch_size, len(data.train)) < world.size:
        raise RecipeError(
            f"batch_size: expected at least one image for each of {world.size} processes, got a batch of "
            f"{min(spec.batch_size, len(data.train))}"
        )
    shelf, say = Shelf(folder), on_note or (lambda note: None)
    state = shelf.last() or TrainState()
    while True:
        state = world.from_first(state)
        attempt = _Attempt(
            model,
            data,
            spec,
            threat_model,
            seed,
            precision,
            compiled,
            teacher,
            shelf,
            state,
            on_progress,
            say,
            world,
        )
        try:
            with fused(compiled != "off" and attempt.quantized):
                return attempt.run()
        except Collapse as collapse:
            if state.attempt >= spec.retries:
                shelf.clear()
                raise (TrainingError if isinstance(collapse, NotFinite) else CollapseError)(
                    f"training collapsed (attempt {state.attempt + 1} of {spec.retries + 1}), "
                    f"last with {retry.described(spec, state)}: {collapse}. "
                    "Lower lr, raise epochs or eps_ramp, take a stronger attack, or prune less"
                ) from None
            good = shelf.before(state)
            again = replace(retry.after(collapse, state, good, spec), seconds=attempt.seconds, macs=attempt.macs)
            back = f"rolled back to the end of epoch {len(good.curve)}" if good.curve else "started again"
            before, now = retry.described(spec, state), retry.described(spec, again)
            note = f"training with {before} collapsed ({collapse}); {back} with {now}"
            state = replace(again, notes=(*state.notes, note))
            shelf.put(state)
            say(note)


class _Attempt:
    """One way through the training, from a state to its end or to a collapse."""

    def __init__(
        self,
        model: nn.Module,
        data: DataSplits,
        spec: TrainSpec,
        threat_model: ThreatModel,
        seed: int,
        precision: str,
        compiled: str,
        teacher: nn.Module | None,
        shelf: Shelf,
        state: TrainState,
        on_progress: Callable[[float, str], None] | None,
        say: Callable[[str], None],
        world: World,
    ) -> None:
        self._data, self._threat_model, self._seed = data, threat_model, seed
        spec = self._spec = retry.changed(spec, state)
        self._radius = spec.rel_eps * threat_model.eps
        self._shelf, self._state, self._report, self._say, self._world = shelf, state, on_progress, say, world
        self._before, self._started = state.seconds, time.monotonic()
        self.macs = state.macs
        self._per_epoch = steps_per_epoch(len(data.train), spec.batch_size)
        self._total = self._per_epoch * spec.epochs
        self._fabric = make_fabric(precision)
        self._network = channels_last(copy.deepcopy(model))
        optimizer = make_optimizer(self._network, spec, precision)
        self._inner = retry.inner_attack(spec, state)
        self._objective = Objective(spec, self._taught_by(teacher))
        passes = self._objective.passes(self._inner.steps if self._inner else 0)
        self._image_macs = passes * count_macs(self._network, data.image_shape)
        self._step_macs = macs_of_a_step(turned(self._network)) if spec.optimizer == "muon" else 0
        if self._objective.teacher is not None and self._objective.teacher.asks:
            assert teacher is not None
            self._image_macs += count_macs(teacher, data.image_shape)
        if spec.bits_ramp:
            set_bits(self._network, self._bits(max(state.step - 1, 0)), keep_steps=bool(state.model))
        self._calibrated = copies(quantizer_steps(self._network))
        if state.model:
            state.restore(self._network, optimizer)
            for name, start in state.steps.items():
                self._calibrated[name].copy_(start)
        self._averaged = Averaged(self._network, spec.ema) if spec.ema else None
        if self._averaged is not None and state.averaged:
            self._averaged.state = {name: tensor.clone() for name, tensor in state.averaged.items()}
        self._previous = state.perturbations.get("previous")
        if self._previous is None and self._inner is not None and self._inner.start == "previous":
            self._previous = torch.zeros(data.train.images.shape, dtype=torch.int8)
        self.quantized = is_quantized(self._network)
        self._searcher = Searcher(self._network, precision, data.validation if self._inner else None)
        if compiled == "network" and world.size == 1 and not self.quantized and cpp_compiler() is not None:
            self._network.compile()  # in place; not copies, nor BatchNorm over several processes
        self._wrapped, self._optimizer = self._fabric.setup(self._network, optimizer)

    @property
    def seconds(self) -> float:
        """Spent so far, by attempts before this one, too."""
        return self._before + time.monotonic() - self._started

    def run(self) -> TrainResult:
        """Train to the end.

        Raises:
            Collapse: this way does not lead there.
        """
        with rectified(self._network):
            state = self._run()
        self._network.load_state_dict(state.best)
        which = {"best": "the best"}.get(self._spec.keep, "the better of weights and average" if self._spec.ema else "")
        kept = f"kept {state.chosen}, {which} on the validation part" if which else ""
        notes = (*state.notes, *filter(None, (kept, kept_misled(state.curve, state.chosen))))
        return TrainResult(copy.deepcopy(self._network).eval(), state.curve, self.seconds, self.macs, notes)

    def _run(self) -> TrainState:
        """All steps; the state at their end."""
        spec, data, state = self._spec, self._data, self._state
        step, epoch_loss, saved = state.step, state.epoch_loss, time.monotonic()
        while step < self._total:
            epoch = step // self._per_epoch
            batches = epoch_batches(
                data.train,
                batch_size=spec.batch_size,
                seed=self._seed,
                epoch=epoch,
                augment=data.augment,
                start=step % self._per_epoch,
            )
            for images, labels, indices in batches:
                value = self._step(step, images, labels, indices)
                epoch_loss += value
                step += 1
                if self._report is not None:
                    self._report(step / self._total, f"epoch {epoch + 1}/{spec.epochs}  loss {value:.3f}")
                if step % self._per_epoch == 0:
                    watched = partial(self._end_of_epoch, state, step, epoch_loss / self._per_epoch)
                    state, asleep = self._world.agree(watched, Collapse)
                    epoch_loss = 0.0
                    if not asleep:
                        self._shelf.put_good(state)
                if self._shelf.lasts and time.monotonic() - saved > CHECKPOINT_SECONDS:
                    saved = time.monotonic()
                    self._shelf.put(self._at(state, step, epoch_loss))
        return state

    def _step(self, step: int, batch: Tensor, labels: Tensor, indices: Tensor) -> float:
        """One step of the optimizer on a batch, of which this process computes its share; the loss."""
        spec, network = self._spec, self._network
        if spec.bits_ramp and set_bits(network, self._bits(step)):
            self._calibrated = copies(quantizer_steps(network))
            if self._averaged is not None:  # steps of other bits cannot be averaged
                self._averaged = Averaged(network, spec.ema)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr(step)
        batch = batch.contiguous(memory_format=torch.channels_last)
        mine = self._world.share(len(batch))
        images = batch[mine]
        part = len(images) / len(batch)
        with self._fabric.autocast():
            targets = self._objective.targets(images, labels[mine], indices[mine], len(self._data.classes))
        attacked = self._attacked(step, batch, labels, indices, targets)
        network.train()
        with torch.random.fork_rng(devices=[]), whole_batch(network, self._world):
            torch.manual_seed(seed_of(self._seed, "forward", step, *self._world.apart))  # for dropout
            loss = self._objective.loss(self._wrapped, images, attacked, targets) * part
            self._optimizer.zero_grad(set_to_none=True)
            self._fabric.backward(loss)
            if spec.awp and attacked is not None:
                with perturbed(network, spec.awp, self._world):
                    worse = self._objective.loss(self._wrapped, images, attacked, targets) * part
                    self._fabric.backward(worse)
        total = loss.detach().clone()
        self._world.add_up([total, *(p.grad for p in network.parameters() if p.grad is not None)])
        norms = filter_norms(network) if spec.optimizer == "muon" else {}
        self._optimizer.step()
        with torch.no_grad():
            if norms:
                grown = follow(network, norms)
                self._calibrated = {name: start * grown.get(name, 1.0) for name, start in self._calibrated.items()}
            for name, learned in quantizer_steps(network).items():
                start = self._calibrated[name]
                learned.clamp_(start / STEP_RANGE, start * STEP_RANGE)
        if self._averaged is not None:
            self._averaged.update(network, step)
        self.macs += float(len(batch) * self._image_macs + self._step_macs)
        if not math.isfinite(value := float(total)):
            raise NotFinite(f"the loss is not finite at step {step}")
        return value

    def _attacked(self, step: int, batch: Tensor, labels: Tensor, indices: Tensor, targets: Tensor) -> Tensor | None:
        """Adversarial images of this process's share of a batch; None where the objective wants none."""
        if self._inner is None:
            return None
        mine = self._world.share(len(batch))
        now = replace(self._threat_model, eps=self._eps(step))
        previous = None
        if self._previous is not None and step >= self._per_epoch:
            previous = self._previous[indices].float() * (self._radius / _INT8)
        generator = torch.Generator().manual_seed(seed_of(self._seed, "inner attack", step))
        with attacking(self._network, BACKWARDS[step % len(BACKWARDS)]), self._fabric.autocast():
            direction = self._objective.direction(self._network, batch[mine], labels[mine], targets)
            found = perturb(self._searcher.now(), batch, direction, now, self._inner, generator, previous, share=mine)
        if self._previous is not None:
            codes = (found - batch[mine]) * (_INT8 / self._radius)
            codes = codes.round().clamp(-_INT8, _INT8).to(torch.int8)
            self._previous[indices] = self._world.gather(codes, len(batch))
        return found

    def _end_of_epoch(self, state: TrainState, step: int, loss: float) -> tuple[TrainState, bool]:
        """Watch, choose, and refuse a network that collapsed; True if it still gives one answer only, and is not worth
        going back to.
        """
        network, spec, watched = self._network, self._spec, self._data.validation
        if not all(bool(parameter.isfinite().all()) for parameter in network.parameters()):
            raise NotFinite(f"the weights are not finite after step {step}")
        robust = self._objective.robust
        found = monitor(network, watched, self._threat_model, robust=robust)
        point = CurvePoint(
            epoch=step // self._per_epoch,
            loss=loss,
            lr=self._lr(step - 1),
            eps=self._eps(step - 1) if robust else 0.0,
            **asdict(found),
        )
        candidates = {"": (found.score, network.state_dict())}
        if self._averaged is not None:
            mean = copy.deepcopy(network)
            mean.load_state_dict(self._averaged.state)
            found = monitor(mean, watched, self._threat_model, robust=robust)
            point = point.model_copy(update={f"averaged_{name}": value for name, value in asdict(found).items()})
            candidates[", averaged"] = (found.score, self._averaged.state)
        curve = [*state.curve, point]
        asleep = refuse_collapse(network, watched, curve, self._inner, spec)
        which = max(candidates, key=lambda name: candidates[name][0])
        score, weights = candidates[which]
        at_full_bits = self._bits(step - 1) == self._bits(self._total - 1)
        state = replace(state, curve=tuple(curve))
        if note := first_misled(curve):
            self._say(note)
        if spec.keep == "last" or (at_full_bits and (not state.best or score >= state.score)):
            state = replace(state, best=copies(weights), score=score, chosen=f"epoch {point.epoch}{which}")
        return self._at(state, step, 0.0), asleep

    def _at(self, state: TrainState, step: int, epoch_loss: float) -> TrainState:
        """The whole state of now."""
        now = replace(
            state,
            step=step,
            epoch_loss=epoch_loss,
            seconds=self.seconds,
            macs=self.macs,
            averaged=self._averaged.state if self._averaged is not None else {},
            steps=self._calibrated,
            perturbations={"previous": self._previous} if self._previous is not None else {},
        )
        return now.holding(self._network, self._optimizer)

    def _taught_by(self, teacher: nn.Module | None) -> Teacher | None:
        if self._spec.objective != "distill":
            return None
        assert teacher is not None
        fixed = self._data.train.pixels() if self._data.augment == "none" else None
        if fixed is not None and not self._state.step:
            self.macs += float(len(fixed) * count_macs(teacher, self._data.image_shape))
        return Teacher(channels_last(copy.deepcopy(teacher)).eval(), self._spec.temperature, fixed)

    def _lr(self, step: int) -> float:
        spec = self._spec
        return learning_rate(step, self._total, peak=spec.lr, warmup=spec.warmup, schedule=spec.schedule)

    def _eps(self, step: int) -> float:
        return ramped_eps(step, self._total, eps=self._radius, ramp=self._spec.eps_ramp)

    def _bits(self, step: int) -> int:
        quantizers = (m for m in self._network.modules() if isinstance(m, QuantizedLayer | ActivationQuantizer))
        final = min((quantizer.final_bits for quantizer in quantizers), default=32)
        return bits_now(step, self._total, final=final, ramp=self._spec.bits_ramp)

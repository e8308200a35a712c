"""How many images a second does adversarial fine-tuning take, beside the loops that others use?

    COLDFORGE_CIFAR10=DIR python benchmarks/training_speed.py [--only resnet18 pgd-7] [--turns 3] [--seconds 2]
    python benchmarks/training_speed.py --table

Half of the channels are pruned and the rest is fake-quantized to int8; the inner attack is FGSM-RS or PGD-7. Ours is
``coldforge.train.train`` with the compute settings that the recipe resolves to on this machine (bf16 where the CPU has
it, channels-last, compiled kernels), learned quantizer steps included. The others, all in fp32 and contiguous:

- plain loop: what the paper's code does, the gradients of all weights in every step of the attack included; the same
  pruned network, fake-quantized on fixed grids by torch's own operators (learned steps would cost it more);
- plain loop, float: the same without any rounding, on the pruned network with its BatchNorm, which is what the paper's
  code fine-tunes; beside it ours on that network, too;
- torchattacks and a plain step of training; ART's trainers (for FGSM-RS the one of "Fast is better than free", with its
  own schedule of learning rates, for PGD the one of Madry et al.); both on the network of the plain loop.

Everybody starts from the same network, a short natural training old, sees the same images in batches of 64, and takes
the same number of steps of the same size in the same ball; augmented images are made on the clock only for ours. The
clock runs from the first step of the optimizer, which warms up, to the last one. Counted besides: forward passes an
image; loss and accuracy after the measured steps on 1,000 validation images, clean and under FGSM, in fp32: where an
accuracy is more than 5 points from that of ours, the work was not the same, and the goal is not judged. Watching the
validation part after each epoch, which only ours does, is timed once and included, at its share of the recipe's whole
epoch, in the column "with watching".

The whole takes about 7 minutes on two quiet cores, half of it for ResNet-18 under PGD-7; --only takes names of
networks, attacks and contenders.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import tables
import torch
from peers import seeded
from plain import plain_quantized, plain_train
from torch import Tensor, nn
from torch.nn import functional as F
from turns import Record, Run, arguments_of, chosen, in_turns, installed, judged, median_ratio, version

from coldforge.attacks import InnerAttack, ThreatModel, parse_inner
from coldforge.compress import prune, quantize
from coldforge.data import DataSplits, epoch_batches, load_data, steps_per_epoch
from coldforge.models import Normalize, model_source, normalized
from coldforge.pipeline import resolve
from coldforge.recipe import DataSpec, PruneSpec, QuantizeSpec, Recipe, TrainSpec, load_recipe
from coldforge.train import loop, train
from coldforge.train.guard import MONITOR_IMAGES

NETWORKS = {"cnn8": "fashion-mnist", "resnet20": "cifar10-resnet20", "resnet18": "cifar10-resnet18"}
"""Network: the recipe that says data, normalization, eps and compute settings."""
ATTACKS = ("fgsm-rs", "pgd-7")
CONTENDERS = {
    "ours": "coldforge",
    "plain loop": "torch",
    "torchattacks": "torchattacks",
    "art": "art",
    "ours, float": "coldforge",
    "plain loop, float": "torch",
}
"""Contender: the module that it needs."""
PACKAGES = {"torchattacks": "torchattacks", "art": "adversarial-robustness-toolbox"}
GOALS = {"cnn8": 3.0, "resnet20": 3.0, "resnet18": 2.5}
"""Times faster than the others."""
FEW = 64
"""Validation images where watching is not what is measured."""
JUDGED = 1000
"""Validation images on which everybody's network is looked at afterwards."""
SAME = 0.05
"""By so much accuracies, clean and under FGSM, may differ after trainings that did the same work. Where they differ
more, the times are of other work, and no goal is judged."""
LEAST_STEPS, MOST_STEPS = 2, 60


@dataclass(frozen=True)
class Job:
    """What is trained, on what, how."""

    recipe: Recipe  # resolved
    data: DataSplits
    attack: InnerAttack
    batch_size: int
    networks: dict[str, nn.Module]  # int8, float: where everybody starts

    @property
    def threat_model(self) -> ThreatModel:
        return ThreatModel.of(self.recipe.threat_model)

    @property
    def lr(self) -> float:
        """Constant, as in the paper's code; a quarter of the recipe's peak, because it does not rise slowly."""
        return self.recipe.finetune.lr / 4

    def of_steps(self, steps: int, watched: int) -> Job:
        """The same with images for so many steps."""
        part = replace(
            self.data,
            train=self.data.train.take(slice(steps * self.batch_size)),
            validation=self.data.validation.take(slice(watched)),
        )
        return replace(self, data=part)

    def batches(self, turn: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What everybody sees in a turn."""
        drawn = epoch_batches(
            self.data.train, batch_size=self.batch_size, seed=turn, epoch=0, augment=self.data.augment
        )
        return ((images, labels) for images, labels, _ in drawn)


@dataclass
class Stopwatch:
    """Notes the time and the images forwarded so far, at each step of the optimizer."""

    seconds: list[float] = field(default_factory=list)
    forwarded: list[int] = field(default_factory=list)
    images: int = 0

    def stamp(self, *_: object) -> None:
        self.seconds.append(time.perf_counter())
        self.forwarded.append(self.images)

    def counting(self, network: nn.Module) -> nn.Module:
        """A copy of ``network`` that counts images here; its copies do, too."""
        network = copy.deepcopy(network)

        def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            self.images += len(inputs[0])

        first = next(module for module in network.modules() if isinstance(module, Normalize))
        first.register_forward_hook(count)  # copies of a traced network keep the hooks of its layers only
        return network


def few_steps(
    network: nn.Module, data: DataSplits, spec: TrainSpec, recipe: Recipe, watch: Stopwatch, seed: int = 0
) -> nn.Module:
    """A training too short to be judged, with the threat model and the compute settings of a resolved recipe."""
    compute = recipe.compute
    with mock.patch.object(loop, "refuse_collapse"):  # so few steps may look like one
        return train(
            network,
            data,
            spec,
            ThreatModel.of(recipe.threat_model),
            seed=seed,
            precision=compute.precision,
            compiled=compute.compile,
            on_progress=watch.stamp,
        ).model


@dataclass(frozen=True)
class Timing:
    """One turn of a contender, from the end of the first step to that of the last."""

    images_per_s: float
    forwards: float  # passes an image
    ending_s: float  # after the last step
    network: nn.Module  # as it was trained


# --- contenders: the trained network; every step of the optimizer is stamped ------------------------------------------


def _ours(network: nn.Module, job: Job, watch: Stopwatch, turn: int) -> nn.Module:
    spec = TrainSpec(
        objective="adversarial",
        attack=job.attack.label,
        epochs=1,
        batch_size=job.batch_size,
        lr=job.lr,
        nesterov=False,
        weight_decay=0.0,
        warmup=0.0,
        schedule="constant",
        eps_ramp=0.0,
        retries=0,
    )
    return few_steps(network, job.data, spec, job.recipe, watch, turn)


def _sgd(network: nn.Module, job: Job, watch: Stopwatch) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(network.parameters(), lr=job.lr, momentum=0.9)
    optimizer.register_step_post_hook(watch.stamp)
    return optimizer


def _plain(network: nn.Module, job: Job, watch: Stopwatch, turn: int) -> nn.Module:
    batches = list(job.batches(turn))
    plain_train(network, batches, _sgd(network, job, watch), job.attack, job.threat_model)
    return network


def _torchattacks(network: nn.Module, job: Job, watch: Stopwatch, turn: int) -> nn.Module:
    import torchattacks

    eps, step_size = job.threat_model.eps, job.attack.pgd.step_size(job.threat_model)
    if job.attack.label == "fgsm-rs":
        attack = torchattacks.FFGSM(network, eps=eps, alpha=step_size)
    else:
        attack = torchattacks.PGD(network, eps=eps, alpha=step_size, steps=job.attack.steps)
    optimizer = _sgd(network, job, watch)
    network.train()
    for images, labels in list(job.batches(turn)):
        adversarial = attack(images, labels)
        optimizer.zero_grad()
        F.cross_entropy(network(adversarial), labels).backward()
        optimizer.step()
    return network


def _art(network: nn.Module, job: Job, watch: Stopwatch, turn: int) -> nn.Module:
    from art.defences.trainer import AdversarialTrainerFBFPyTorch, AdversarialTrainerMadryPGD
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        network,
        loss=nn.CrossEntropyLoss(),
        optimizer=_sgd(network, job, watch),
        input_shape=job.data.image_shape,
        nb_classes=len(job.data.classes),
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    eps, common = job.threat_model.eps, {"nb_epochs": 1, "batch_size": job.batch_size}
    if job.attack.label == "fgsm-rs":
        trainer = AdversarialTrainerFBFPyTorch(classifier, eps=eps)
    else:
        step_size = job.attack.pgd.step_size(job.threat_model)
        trainer = AdversarialTrainerMadryPGD(classifier, eps=eps, eps_step=step_size, max_iter=job.attack.steps)
    images, labels = (torch.cat(parts).numpy() for parts in zip(*job.batches(turn), strict=True))
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        trainer.fit(images, np.eye(len(job.data.classes), dtype=np.float32)[labels], **common)
    return network


_TRAINERS: dict[str, Callable[[nn.Module, Job, Stopwatch, int], nn.Module]] = {
    "ours": _ours,
    "plain loop": _plain,
    "torchattacks": _torchattacks,
    "art": _art,
}


def timed(who: str, job: Job, turn: int) -> Timing:
    """One turn: a copy of the first network is trained on all images of the job."""
    trainer, _, precision = who.partition(", ")
    start = job.networks[precision or "int8"]
    watch = Stopwatch()
    with seeded(turn):
        network = _TRAINERS[trainer](
            watch.counting(start if trainer == "ours" else _as_others_have_it(start)), job, watch, turn
        )
    ended = time.perf_counter()
    images = (len(watch.seconds) - 1) * job.batch_size
    return Timing(
        images_per_s=images / (watch.seconds[-1] - watch.seconds[0]),
        forwards=(watch.forwarded[-1] - watch.forwarded[0]) / images,
        ending_s=ended - watch.seconds[-1],
        network=network,
    )


def _as_others_have_it(network: nn.Module) -> nn.Module:
    return plain_quantized(network).to(memory_format=torch.contiguous_format)


# --- the job ----------------------------------------------------------------------------------------------------------


def prepare(name: str, ratio: float, images: int) -> Job:
    """The pruned network, trained for a moment on ``images`` natural images, in float and rounded to int8."""
    recipe = resolve(load_recipe(NETWORKS[name]))
    if recipe.data.source == "cifar10" and not os.environ.get("COLDFORGE_CIFAR10"):
        raise SystemExit(
            f"{name}: expected $COLDFORGE_CIFAR10, a folder with train.parquet and test.parquet of CIFAR-10, got none; "
            "or leave it out: --only cnn8"
        )
    data = load_data(DataSpec(source=recipe.data.source))
    source = model_source(f"zoo:{name}", image_shape=data.image_shape, num_classes=len(data.classes))
    dense = normalized(source.build(0), recipe.model.mean or data.mean, recipe.model.std or data.std)
    parent, _ = prune(dense, PruneSpec(ratio=ratio), image_shape=data.image_shape)
    threat_model = ThreatModel.of(recipe.threat_model)
    start = replace(data, train=data.train.take(slice(images)), validation=data.validation.take(slice(64)))
    spec = TrainSpec(epochs=2, batch_size=64, lr=0.05, retries=0)
    parent = train(parent, start, spec, threat_model, precision=recipe.compute.precision).model
    twin = quantize(parent, QuantizeSpec(), data.train.pixels(slice(0, 512)))
    return Job(recipe, data, parse_inner("fgsm-rs"), 64, {"int8": twin, "float": parent})


def state(network: nn.Module, job: Job) -> dict[str, float]:
    """Loss and accuracy on validation images, clean and under FGSM, in fp32."""
    network.eval()
    part = job.data.validation.take(slice(JUDGED))
    found: dict[str, list[Tensor]] = {"clean": [], "fgsm": []}
    for images, labels in zip(part.pixels().split(FEW), part.labels.split(FEW), strict=True):
        images.requires_grad_()
        clean = network(images)
        (gradient,) = torch.autograd.grad(F.cross_entropy(clean, labels, reduction="sum"), images)
        with torch.no_grad():
            attacked = network((images + job.threat_model.eps * gradient.sign()).clamp(0, 1))
        found["clean"].append(clean.detach())
        found["fgsm"].append(attacked)
    values = {}
    for name, parts in found.items():
        logits = torch.cat(parts)
        values[f"{name}_loss"] = float(F.cross_entropy(logits, part.labels))
        values[f"{name}_accuracy"] = float((logits.argmax(1) == part.labels).float().mean())
    return values


def is_same_work(after: dict[str, float], ours: dict[str, float]) -> bool:
    """Whether two trainings from the same network have come equally far, up to noise."""
    return all(abs(after[name] - ours[name]) <= SAME for name in ("clean_accuracy", "fgsm_accuracy"))


def race(name: str, whole: Job, contenders: list[str], turns: int, seconds: float, watched: int) -> Run:
    """Everybody in turns."""
    torch._dynamo.reset()  # one network a process is what a recipe has
    first = {who: timed(who, whole.of_steps(2, FEW), 0) for who in contenders}  # imports, compiles, warms up
    rate = first[next((who for who in contenders if who.startswith("plain")), contenders[-1])].images_per_s
    steps = min(max(round(seconds * rate / whole.batch_size), LEAST_STEPS), MOST_STEPS)
    job = whole.of_steps(1 + steps, FEW)

    def turn(who: str, number: int) -> Timing:
        found = timed(who, job, number)
        print(f"{name:9} {job.attack.label:8} {who:18} {found.images_per_s:9.1f} images/s", flush=True)
        return found

    found = in_turns(contenders, turns, turn)
    rates = {who: [one.images_per_s for one in each] for who, each in found.items()}
    watching_s = timed("ours", whole.of_steps(2, watched), 0).ending_s
    epoch_s = steps_per_epoch(len(whole.data.train), job.batch_size) * job.batch_size / statistics.median(rates["ours"])
    after = {who: state(each[-1].network, whole) for who, each in found.items()}
    rows = []
    for who, each in found.items():
        counterpart = "ours, float" if who.endswith("float") and "ours, float" in after else "ours"
        same = is_same_work(after[who], after[counterpart])
        is_peer = not who.startswith("ours")
        times = median_ratio(rates["ours"], rates[who])
        row: dict[str, Any] = {
            "who": who,
            "version": version(PACKAGES[who]) if who in PACKAGES else "",
            "images_per_s": rates[who],
            "median_images_per_s": statistics.median(rates[who]),
            "ours_times_faster": times,
            "ours_times_faster_with_watching": times * epoch_s / (epoch_s + watching_s) if is_peer else None,
            "forward_passes_an_image": each[-1].forwards,
            "after": after[who],
            "same_work": same,
            **judged(times, GOALS[name] if is_peer and same else None),
        }
        rows.append(row)
    return {
        "network": name,
        "attack": job.attack.label,
        "attack_steps": job.attack.steps,
        "eps": job.threat_model.eps,
        "batch_size": job.batch_size,
        "lr": job.lr,
        "steps": steps,
        "turns": turns,
        "precision": job.recipe.compute.precision,
        "compile": job.recipe.compute.compile,
        "watching_s": watching_s,
        "before": {precision: state(network, whole) for precision, network in job.networks.items()},
        "rows": rows,
    }


def main() -> None:
    """Run what is asked for, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of the plain loop in a turn; at least 2 steps")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=4096, help="of the short natural training before, two epochs")
    parser.add_argument("--watched", type=int, default=MONITOR_IMAGES, help="validation images of a whole training")
    arguments = arguments_of(parser, "results/training_speed.json", tables.training_speed)
    networks, attacks, contenders = chosen(arguments.only, NETWORKS, ATTACKS, CONTENDERS)
    there = installed(CONTENDERS)
    contenders = [who for who in CONTENDERS if who in there and (who == "ours" or who in contenders)]
    record = Record(arguments.out, "network", "attack")
    for name in networks:
        wanted = [attack for attack in attacks if not (arguments.missing and record.has(name, attack))]
        if not wanted:
            continue
        job = prepare(name, arguments.ratio, arguments.images)
        for attack in wanted:
            whole = replace(job, attack=parse_inner(attack))
            run = race(name, whole, contenders, arguments.turns, arguments.seconds, arguments.watched)
            record.keep(run | {"ratio": arguments.ratio})
    print(tables.training_speed(record.content))


if __name__ == "__main__":
    main()

"""How long does the training of a compressed network take, beside that of the dense, adversarially trained reference?

    python benchmarks/training_cost.py [--only "half, 4 bits, 3 epochs"] [--turns 3] [--seconds 1.5]
    python benchmarks/training_cost.py --table

The networks in results/artifacts, as their recipe.toml trained them on Fashion-MNIST: what is counted is what
docs/results.md counts as training (hardening, and fine-tuning in floating point and through the rounding; of the
reference its adversarial training). A few steps of each part are timed in turns with a few steps of the reference's,
with the compute settings of this machine; a step takes the forward and backward passes of the inner attack, those of
the weights, and the optimizer. The time of a part is the median of its steps times their number. Left out on both sides
is what comes once or once an epoch: loading, calibration, ranking channels, watching the validation part.

With its defaults it takes about two and a half minutes at one thread without bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import recipe_results
import tables
from torch import nn
from training_speed import FEW, Stopwatch, few_steps
from turns import Record, Run, arguments_of, chosen, in_turns

from coldforge.compress import build, load_network, read_structure
from coldforge.data import DataSplits, load_data, steps_per_epoch
from coldforge.measure import count_macs
from coldforge.pipeline import resolve
from coldforge.recipe import Recipe, TrainSpec, load_recipe
from coldforge.records import load_record

SEED, DATA = 0, "fashion-mnist"
LEAST_STEPS = 2


@dataclass(frozen=True)
class Part:
    """A part of a training: so many epochs of one network."""

    name: str
    network: nn.Module
    spec: TrainSpec


@dataclass(frozen=True)
class Training:
    """All parts of what a row of docs/results.md is trained with."""

    row: str
    parts: tuple[Part, ...]
    train_macs: float
    recipe: Recipe  # resolved
    data: DataSplits

    def steps(self, part: Part) -> int:
        """Steps of the optimizer of a whole part."""
        return part.spec.epochs * steps_per_epoch(len(self.data.train), part.spec.batch_size)

    def seconds_a_step(self, part: Part, steps: int) -> float:
        """Median of ``steps`` steps after a first one."""
        few = replace(
            self.data,
            train=self.data.train.take(slice((steps + 1) * part.spec.batch_size)),
            validation=self.data.validation.take(slice(FEW)),
        )
        spec = part.spec.model_copy(update={"epochs": 1, "eps_ramp": 0.0, "bits_ramp": 0.0, "retries": 0})
        watch = Stopwatch()
        few_steps(part.network, few, spec, self.recipe, watch)
        return statistics.median(after - before for before, after in pairwise(watch.seconds))


def training_of(folder: Path, row: str) -> Training:
    """How a folder of results/artifacts was trained; networks have the weights of its end, or fresh ones.

    Raises:
        SystemExit: by a teacher, whose passes are not timed here.
    """
    here = {"compute.precision": "auto", "compute.compile": "auto"}  # the recipe names those of where it was trained
    recipe = resolve(load_recipe(folder / "recipe.toml", overrides=here))
    structure = read_structure(folder / "model")
    in_float = structure.model_copy(update={"quantization": None})
    dense = build(in_float.model_copy(update={"pruning": None}))
    whole = recipe.finetune
    parts = []
    if whole.arms == ("none",):
        parts.append(Part("from scratch", dense, recipe.model.train))
    else:
        if whole.objective == "distill":
            raise SystemExit(f"{row}: expected a training without a teacher, got objective distill")
        first = whole.epochs_in_float(recipe.quantize.fewest_bits)
        specs = [
            ("hardening", dense, recipe.harden, recipe.harden.epochs * recipe.harden.train),
            ("in floating point", build(in_float), whole.model_copy(update=whole.in_float), first),
            ("through the rounding", load_network(folder / "model")[0], whole, whole.epochs - first),
        ]
        parts += [Part(name, network, spec.model_copy(update={"epochs": n})) for name, network, spec, n in specs if n]
    macs = sum(stage.train_macs for stage in recipe_results.trained_stages(load_record(folder)))
    return Training(row, tuple(parts), macs, recipe, load_data(recipe.data))


def race(reference: Training, other: Training, turns: int, seconds: float) -> Run:
    """Steps of all parts of both, in turns."""
    jobs = {(training.row, part.name): (training, part) for training in (reference, other) for part in training.parts}
    first = {which: training.seconds_a_step(part, LEAST_STEPS) for which, (training, part) in jobs.items()}

    def turn(which: tuple[str, str], number: int) -> float:
        training, part = jobs[which]
        return training.seconds_a_step(part, max(round(seconds / first[which]), LEAST_STEPS))

    found = in_turns(jobs, turns, turn)
    wholes = {
        training.row: [
            sum(training.steps(part) * found[training.row, part.name][number] for part in training.parts)
            for number in range(turns)
        ]
        for training in (reference, other)
    }
    rows = [
        {
            "part": part.name,
            "attack": part.spec.attack,
            "batch_size": part.spec.batch_size,
            "macs_a_forward_pass": count_macs(part.network, other.data.image_shape),
            "steps": other.steps(part),
            "seconds_a_step": found[other.row, part.name],
        }
        for part in other.parts
    ]
    shares = [ours / theirs for ours, theirs in zip(wholes[other.row], wholes[reference.row], strict=True)]
    run = {
        "row": other.row,
        "against": reference.row,
        "turns": turns,
        "precision": other.recipe.compute.precision,
        "compile": other.recipe.compute.compile,
        "seconds": statistics.median(wholes[other.row]),
        "reference_seconds": statistics.median(wholes[reference.row]),
        "share_of_seconds": statistics.median(shares),
        "shares_of_seconds": shares,
        "share_of_macs": other.train_macs / reference.train_macs,
        "train_macs": other.train_macs,
        "rows": rows,
    }
    print(f"{other.row}: {100 * run['share_of_seconds']:.1f} % of the reference's seconds", flush=True)
    return run


def artifacts() -> Iterator[tuple[str, Path]]:
    """Label and folder of each network that is kept, of one seed."""
    for network in recipe_results.kept([str(SEED)]):
        if network.data == DATA:
            yield network.row, network.folder


def main() -> None:
    """Run what is asked for, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each part in a turn; at least 2 steps")
    arguments = arguments_of(parser, "results/training_cost.json", tables.training_cost)
    folders = dict(artifacts())
    reference = training_of(folders.pop(recipe_results.REFERENCE), recipe_results.REFERENCE)
    (rows,) = chosen(arguments.only, folders)
    record = Record(arguments.out, "row")
    record.keep_each(
        [(row,) for row in rows],
        lambda row: race(reference, training_of(folders[row], row), arguments.turns, arguments.seconds),
        missing=arguments.missing,
    )
    print(tables.training_cost(record.content))


if __name__ == "__main__":
    main()

"""The whole main job, start to finish, beside the same steps written by hand with the tools of the paper.

    python benchmarks/main_job.py [--fraction 1] [--turns 1]
    python benchmarks/main_job.py --table

Ours is `coldforge run fashion-mnist` as a user starts it, with an empty store and an empty cache of compiled kernels.
By hand, in fp32 and contiguous: the dense network trained by a plain loop; half of its channels pruned by torch-pruning
(L1); the small network fine-tuned naturally and adversarially (PGD with as many steps as the recipe,
``loss.backward()`` in the attack), in float as the paper's code does it; files of all of these networks, the pruned
ones rounded to int8 by ONNX Runtime's static quantizer; clean accuracy, FGSM and PGD-20 by torchattacks on every
network, and what is found on the float network shown to the int8 file; latency at batch 1 and 64. Epochs, batch sizes,
peak learning rates and attacks are those of the recipe. Both sides give the same evidence, so ours runs without
AutoAttack and without the masking panel here; what only ours does stays in: learned quantizer steps, watching, the
search on the rounded network with every verdict by the file, a second try by other gradients and by transfer,
checksummed stages, the report.

--fraction takes that part of the training and test images on both sides. With its default, 0.1, the whole takes about 6
minutes on two quiet cores, with 1 most of an hour. Start-up, compiling and measuring cost the same in both, so a small
fraction understates the ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tables
import torch
from latency import static_quantize
from plain import plain_train
from torch import Tensor, nn
from turns import Record, arguments_of, in_turns, installed, judged, median_ratio

from coldforge.attacks import InnerAttack, ThreatModel, parse_inner
from coldforge.data import DataSplits, epoch_batches, load_data, steps_per_epoch
from coldforge.deploy import OnnxSession
from coldforge.measure import measure_latency
from coldforge.models import model_source, normalized
from coldforge.recipe import Recipe, TrainSpec, load_recipe
from coldforge.records import Record as RunRecord
from coldforge.records import load_record

RECIPE = "fashion-mnist"
ATTACKS = ("fgsm", "pgd-20")
GOAL = 4.0
BATCH = 128
"""Images that torchattacks gets at a time."""


def changed(fraction: float, threads: int) -> dict[str, object]:
    """What is changed in the recipe, for both sides."""
    whole = load_data(load_recipe(RECIPE).data)
    changes: dict[str, object] = {"evaluate.attacks": list(ATTACKS), "evaluate.masking_n": 0}
    changes["compute.threads"] = threads
    if fraction < 1:
        changes["data.train_n"] = round(fraction * (len(whole.train) + len(whole.validation)))
        changes["data.test_n"] = round(fraction * len(whole.test))
    return changes


# --- by hand ----------------------------------------------------------------------------------------------------------


def by_hand(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """All steps: seconds of each, and accuracies."""
    started, seconds = time.perf_counter(), dict[str, float]()

    def lap(step: str) -> None:
        seconds[step] = time.perf_counter() - started - sum(seconds.values())

    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.compute.threads)
    data = load_data(recipe.data)
    threat_model = ThreatModel.of(recipe.threat_model)
    source = model_source(recipe.model.source, image_shape=data.image_shape, num_classes=len(data.classes))
    networks = {"baseline": normalized(source.build(recipe.seed), data.mean, data.std)}
    lap("data")
    train_plainly(networks["baseline"], data, recipe.model.train, None, threat_model)
    lap("dense training")
    networks["compressed"] = pruned(networks["baseline"], data, recipe)
    for arm, attack in (("natural", None), ("adversarial", parse_inner(recipe.finetune.attack))):
        networks[arm] = copy.deepcopy(networks["compressed"])
        train_plainly(networks[arm], data, recipe.finetune, attack, threat_model)
        lap(f"{arm} fine-tuning")
    calibration = data.train.pixels(slice(0, recipe.quantize.calibration_n))
    for name, network in networks.items():
        export_plainly(network, folder / f"{name}.onnx", calibration)
        if name != "baseline":
            static_quantize(folder / f"{name}.onnx", folder / f"{name}-int8.onnx", calibration)
    lap("files")
    images, labels = data.test.pixels(), data.test.labels
    artifact = OnnxSession(folder / "adversarial-int8.onnx", threads=recipe.compute.threads)
    accuracies = {}
    for name, network in networks.items():
        shown = {"clean": images}
        shown |= {attack: attacked(network, attack, images, labels, threat_model.eps) for attack in ATTACKS}
        accuracies[name] = {what: accuracy(network, part, labels) for what, part in shown.items()}
        if name == "adversarial":
            accuracies["artifact"] = {what: accuracy(artifact.run, part, labels) for what, part in shown.items()}
        lap(f"evaluation: {name}")
    dense = OnnxSession(folder / "baseline.onnx", threads=recipe.compute.threads)
    with torch.inference_mode():
        for batch in (1, 64):
            calls = [networks["baseline"], dense.run, artifact.run]
            measure_latency({str(call): partial(call, images[:batch]) for call in calls}, seconds=1.0)
    lap("latency")
    return {"accuracies": accuracies, "seconds_of_steps": seconds}


def train_plainly(
    network: nn.Module, data: DataSplits, spec: TrainSpec, attack: InnerAttack | None, threat_model: ThreatModel
) -> None:
    """SGD with one cycle of learning rates that is that of the recipe."""
    optimizer = torch.optim.SGD(network.parameters(), spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
    steps = spec.epochs * steps_per_epoch(len(data.train), spec.batch_size)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, spec.lr, total_steps=steps + 1, pct_start=spec.warmup, anneal_strategy="linear", cycle_momentum=False
    )
    optimizer.register_step_post_hook(lambda *_: cycle.step())
    for epoch in range(spec.epochs):
        drawn = epoch_batches(data.train, batch_size=spec.batch_size, seed=0, epoch=epoch, augment=data.augment)
        plain_train(network, ((images, labels) for images, labels, _ in drawn), optimizer, attack, threat_model)
    network.eval()


def pruned(network: nn.Module, data: DataSplits, recipe: Recipe) -> nn.Module:
    """A copy without the channels that have the smallest L1 norms."""
    import torch_pruning

    small = copy.deepcopy(network)
    output = [module for module in small.modules() if isinstance(module, nn.Linear)][-1]
    torch_pruning.pruner.BasePruner(
        small,
        data.test.pixels(slice(0, 1)),
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=recipe.prune.ratio,
        ignored_layers=[output],
        round_to=recipe.prune.round_to,
    ).step()
    return small


def export_plainly(network: nn.Module, path: Path, images: Tensor) -> None:
    """A float file for any batch size."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (images,), path, input_names=["image"], output_names=["logits"], dynamic_shapes=({0: "batch"},)
        )


def attacked(network: nn.Module, attack: str, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Adversarial images by torchattacks."""
    import torchattacks

    steps = 20
    attacks = {
        "fgsm": torchattacks.FGSM(network, eps=eps),
        "pgd-20": torchattacks.PGD(network, eps=eps, alpha=2.5 * eps / steps, steps=steps),
    }
    batches = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    return torch.cat([attacks[attack](part, right) for part, right in batches])


@torch.no_grad()
def accuracy(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Share of images that are classified right."""
    answers = torch.cat([network(part).argmax(1) for part in images.split(BATCH)])
    return float((answers == labels).float().mean())


# --- both, as processes -----------------------------------------------------------------------------------------------


def job(who: str, changes: dict[str, object]) -> dict[str, Any]:
    """One whole job in a process of its own, with a store and a cache of its own."""
    words = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "COLDFORGE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        out = Path(folder, "out")
        if who == "ours":
            settings = [word for change in words for word in ("--set", change)]
            command = [sys.executable, "-m", "coldforge", "run", RECIPE, *settings, "--out", str(out)]
        else:
            command = [sys.executable, __file__, "--by-hand", str(out), *words]
        started = time.perf_counter()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        found = ours_of(load_record(out)) if who == "ours" else json.loads((out / "result.json").read_text())
    artifact = ", ".join(f"{what} {100 * value:.1f} %" for what, value in found["accuracies"]["artifact"].items())
    print(f"{who:8} {seconds:8.1f} s  artifact: {artifact}", flush=True)
    return {"seconds": seconds, **found}


def ours_of(record: RunRecord) -> dict[str, Any]:
    """Accuracies and seconds of training from the record of a run."""
    names = {"baseline": "baseline", "compressed": "compressed", "artifact": "artifact"}
    accuracies, seconds = {}, {}
    for stage in record.stages:
        arm = "adversarial" if "adversarial" in stage.label else "natural"
        name = names.get(stage.name, arm)
        accuracies[name] = {"clean": stage.clean_accuracy} | {what: stage.robust_accuracy[what] for what in ATTACKS}
        if stage.train_seconds:
            seconds["dense training" if name == "baseline" else f"{name} fine-tuning"] = stage.train_seconds
    return {"accuracies": accuracies, "seconds_of_steps": seconds}


def main() -> None:
    """Run and print."""
    if sys.argv[1:2] == ["--by-hand"]:
        folder = Path(sys.argv[2])
        folder.mkdir()
        found = by_hand(load_recipe(RECIPE, overrides=sys.argv[3:]), folder)
        (folder / "result.json").write_text(json.dumps(found))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=float, default=0.1, help="of the training and test images")
    parser.add_argument("--turns", type=int, default=1)
    arguments = arguments_of(parser, "results/main_job.json", tables.main_job, parts=False)
    if not installed({"by hand": "torchattacks"}):
        raise SystemExit(1)
    changes = changed(arguments.fraction, arguments.threads)
    found = in_turns(("ours", "by hand"), arguments.turns, lambda who, _: job(who, changes))
    seconds = {who: [one["seconds"] for one in each] for who, each in found.items()}
    times = median_ratio(seconds["by hand"], seconds["ours"])
    rows = [
        {**each[-1], "who": who, "median_s": statistics.median(seconds[who]), "seconds": seconds[who]}
        | {"ours_times_faster": times if who == "by hand" else 1.0, **judged(times, GOAL if who == "by hand" else None)}
        for who, each in found.items()
    ]
    record = Record(arguments.out, "fraction")
    record.keep({"fraction": arguments.fraction, "recipe": RECIPE, "changes": changes, "rows": rows})
    print(tables.main_job(record.content))


if __name__ == "__main__":
    main()

"""What do compressed, adversarially fine-tuned networks hold under the standard ensemble, beside the dense reference?

    coldforge sweep recipes/results-fashion-mnist.toml
    python benchmarks/recipe_results.py sweep-results-fashion-mnist [--n 1000] [--only "half, 4 bits" 0] [--keep 0]
    python scripts/update_readme.py      # writes docs/results.md from it

For each trial of the sweep that is finished: its file is attacked by `coldforge evaluate --attack autoattack` (both
kinds of gradients, transfer from the float twin, Square on the file) and looked at by the masking panel. What is found
is kept in results/recipes/, a file for each network, image by image, so that differences are paired; a sweep with other
seeds, or of another day, adds to it. The folders of the seeds named by --keep go to results/artifacts/ before, so that
anybody can attack them, as the next call of this does, with or without a sweep, where they were not attacked yet.

The same networks also meet the attacks of the code of arXiv 2403.09441, as it uses them: FGSM and PGD-20 from the image
in steps of 0.005, eps 0.05 of the pixel range (which it writes as 0.1, of inputs in [-1, 1]), on the first 2,000 test
images, but inside the box, and every iterate counts. They were trained for twice that eps.

Where 1,000 images decide nothing, --lite attacks all test images of the networks chosen with autoattack-lite.

A network is skipped when it was attacked like that already; an attack that was stopped goes on with the image where it
stopped. --only takes beginnings of labels, and seeds. The ensemble takes half an hour or more a network at one thread
(`seconds` of the records).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from attacks_parity import difference as paired
from attacks_parity import from_hex, to_hex
from paper_claims import student_t95
from rich.console import Console
from safetensors.torch import save

from coldforge.attacks import parse_attack
from coldforge.compress import QuantizedLayer, load_network
from coldforge.console import RichProgress
from coldforge.evaluate import WORST_CASE
from coldforge.evaluation.job import evaluate_path
from coldforge.evaluation.request import Request
from coldforge.records import EvaluationRecord, Record, StageRecord, load_record
from coldforge.sealed import sha256_of, write_atomic
from coldforge.store import Store
from coldforge.sweep.plan import trial_of
from coldforge.sweep.table import load_results
from coldforge.sweep.workshop import RecipeWorkshop

ROOT = Path(__file__).resolve().parent.parent
RESULTS, ARTIFACTS = ROOT / "results" / "recipes", ROOT / "results" / "artifacts"
ATTACK = "autoattack"
ALSO: dict[str, dict[str, Any]] = {
    "paper": {"attack": "fgsm,pgd-20-paper", "eps": "0.05", "n": 2000},
    "lite": {"attack": "autoattack-lite", "eps": None, "n": 0},
}
"""Further attacks on the same networks."""
WEIGHTS, LARGE = "model/model.safetensors", 4_000_000
KEPT = ("record.json", "recipe.toml", "model.onnx", WEIGHTS, "model/structure.json")
"""Of a folder of `coldforge run`, what an attack needs; weights of more bytes than ``LARGE`` are made smaller."""
PAPER = tuple(ALSO["paper"]["attack"].split(","))
WHICH = "row.json"
Found = dict[str, Any]
"""What is kept of one network."""


@dataclass(frozen=True)
class Goal:
    """A row is to be at most so far below another; without points: it is only compared."""

    row: str
    against: str
    points: float | None = None

    @property
    def rows(self) -> tuple[str, ...]:
        """What it is about, in the order of the table."""
        return self.against, self.row

    @property
    def wanted(self) -> str:
        """As one cell."""
        return "" if self.points is None else f"≥ −{self.points:g}"


@dataclass(frozen=True)
class Floor:
    """A row is to hold, and to get right when clean, at least so many percent."""

    row: str
    robust: float
    clean: float

    @property
    def rows(self) -> tuple[str, ...]:
        """What it is about."""
        return (self.row,)


REFERENCE = "R: dense, PGD-7, 15 epochs"
FASHION_MNIST = (
    Goal("half, 8 bits, 3 epochs", REFERENCE, 1.0),
    Goal("quarter, 8 bits, 3 epochs", REFERENCE, 4.0),
    Goal("half, 4 bits, 3 epochs", "half, 8 bits, 3 epochs", 0.5),
    Goal("half, 2-bit weights, 4-bit activations, 5 epochs", "half, 8 bits, 5 epochs", 2.0),
    Goal("half, 2 bits, 10 epochs", "half, 8 bits, 10 epochs", 6.0),
    Goal("half, 1-bit weights, 4-bit activations, 10 epochs", "half, 8 bits, 10 epochs", 8.0),
    Goal("quarter, 4 bits, 5 epochs", REFERENCE, 5.0),
    Goal("half, 8 bits, 5 epochs", REFERENCE),
    Goal("half, 8 bits, 5 epochs", "half, 8 bits, 3 epochs"),
)
CIFAR10 = (
    Goal("ResNet-20, ratio 0.3, 8 bits, 10 epochs", REFERENCE, 3.0),
    Goal("ResNet-20, ratio 0.3, 8 bits, 10 epochs", "ResNet-20, ratio 0.3, floating point, 10 epochs", 0.5),
    Goal("ResNet-20, ratio 0.3, 4 bits, 12 epochs", "ResNet-20, ratio 0.3, floating point, 10 epochs", 2.0),
    Floor("ResNet-18, ratio 0.5, 8 bits, 20 epochs", robust=43.0, clean=77.0),
)
"""The floor is the level of HARP on the public leaderboard of pruned robust networks."""
GOALS: dict[str, tuple[Goal | Floor, ...]] = {"fashion-mnist": FASHION_MNIST, "cifar10": CIFAR10}
CHEAP, SHARE = (FASHION_MNIST[0],), 0.1
"""Rows whose training may take so small a part of the reference's multiply-adds at most."""


# --- attacking -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A folder of `coldforge run`, and which row of which seed it is."""

    folder: Path
    data: str
    row: str
    seed: int
    trial: str
    """Of the sweep that made it: the hash of all that decides its results."""

    @property
    def name(self) -> str:
        """As files and folders are called."""
        return f"{self.data}-{slug(self.row)}-{self.seed}"


def slug(label: str) -> str:
    """A label as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def of_sweep(sweep: Path, only: Sequence[str]) -> Iterator[Network]:
    """The trials that are finished, their folders written."""
    for trial in (trial_of(sweep, name) for name in load_results(sweep).finished):
        row, data = str(trial.point["row"]), trial.recipe.data.source.partition(":")[0]
        if wanted(row, trial.seed, only):
            folder = sweep / "trials" / trial.id
            RecipeWorkshop(Store()).write_folder(trial, folder)
            yield Network(folder, data, row, trial.seed, trial.id)


def kept(only: Sequence[str]) -> Iterator[Network]:
    """What :func:`keep` kept."""
    for path in sorted(ARTIFACTS.glob(f"*/{WHICH}")):
        which = json.loads(path.read_text(encoding="utf-8"))
        if wanted(which["row"], which["seed"], only):
            yield Network(path.parent, **which)


def keep(network: Network) -> None:
    """Copy what an attack needs, a few hundred kilobytes, and say which row it is."""
    target = ARTIFACTS / network.name
    for name in KEPT:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(network.folder / name, target / name)
    if (target / WEIGHTS).stat().st_size > LARGE:
        make_small(target / WEIGHTS)
    which = {name: getattr(network, name) for name in ("data", "row", "seed", "trial")}
    (target / WHICH).write_text(json.dumps(which, indent=1) + "\n", encoding="utf-8")


def make_small(path: Path) -> None:
    """Half the size of the weights beside a file: those on their grids, in 16 bits, which round to the same codes.

    The file's twin computes what it did; only in its float twin are weights rounded then.
    """
    model, _ = load_network(path.parent)
    tensors = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            codes, weight = layer.weight_codes(), layer.quantized_weight().detach().half()
            layer.weight.data.copy_(weight)
            if not torch.equal(layer.weight_codes(), codes):
                raise ValueError(f"{path}: {name}: expected the same codes from weights in 16 bits")
            tensors[f"{name}.weight"] = weight
    write_atomic(path, save(tensors))


def is_attacked(network: Network, n: int) -> bool:
    """Whether there is a record of this network, with at least so many images."""
    path = _path(network)
    if not path.is_file():
        return False
    old = json.loads(path.read_text(encoding="utf-8"))
    same = old["trial"] == network.trial and old["sha256"] == sha256_of(network.folder / "model.onnx")
    return bool(same and old["n"] >= n)


def attack(network: Network, out: Path, *, n: int, threads: int) -> Found:
    """Attack the file; write what was found, and return it. ``out`` is for what an interrupted attack leaves."""
    request = Request(attack=(ATTACK,), n=n, threads=threads, seed=network.seed)
    command = " ".join(["coldforge evaluate", network.name, *request.words()])
    evaluation = _evaluated(network, request, out, command)
    found = _found(network, evaluation, _stands(out, n))
    old = _kept_of(network)
    if old.get("sha256") == found["sha256"]:
        found |= {what: old[what] for what in ALSO if what in old}
    RESULTS.mkdir(parents=True, exist_ok=True)
    _write(network, found)
    return found


def _evaluated(network: Network, request: Request, out: Path, command: str = "") -> EvaluationRecord:
    """What is found, while a person can see how far it is: it takes hours."""
    with RichProgress(Console(stderr=True)) as progress:
        return evaluate_path(network.folder, request, out=out, progress=progress, command=command)


def _stands(out: Path, n: int) -> torch.Tensor:
    """Which of the first ``n`` images no attack broke, ``(n,)`` bool; wrong when clean counts as broken."""
    ledger = pq.read_table(out / "ledger.parquet").to_pydict()
    columns = [values[:n] for name, values in ledger.items() if name.endswith(":fooled")]
    return ~torch.tensor(columns, dtype=torch.bool).any(0)


def _path(network: Network) -> Path:
    return RESULTS / f"{network.name}.json"


def _write(network: Network, found: Found) -> None:
    write_atomic(_path(network), json.dumps(found, indent=1) + "\n")


def attack_also(network: Network, what: str, out: Path, *, threads: int) -> bool:
    """Add what other attacks leave, ``"paper"`` or ``"lite"``, to what is kept of a network; False if that is there, or
    nothing is kept.
    """
    found = _kept_of(network)
    of_this = found.get("trial") == network.trial and found["sha256"] == sha256_of(network.folder / "model.onnx")
    asked = {"attacks": _described(what), **ALSO[what]}
    if not of_this or found.get(what, {}).get("asked") == asked:
        return False
    attacks = tuple(ALSO[what]["attack"].split(","))
    request = Request(
        attack=attacks, eps=ALSO[what]["eps"], n=ALSO[what]["n"], threads=threads, seed=network.seed, no_masking=True
    )
    evaluation = _evaluated(network, request, out)
    _write(network, found | {what: {"asked": asked} | _also(evaluation, _stands(out, evaluation.attacked.n))})
    return True


def _kept_of(network: Network) -> Found:
    path = _path(network)
    found: Found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _described(what: str) -> dict[str, Any]:
    """The attacks with their settings and versions."""
    names = ALSO[what]["attack"].split(",")
    return {name: json.loads(json.dumps(parse_attack(name).describe())) for name in names}


def _also(evaluation: EvaluationRecord, stands: torch.Tensor) -> Found:
    return {
        "eps": evaluation.threat_model.eps,
        "n": evaluation.attacked.n,
        "clean_accuracy": evaluation.attacked.clean_accuracy,
        "robust_accuracy": evaluation.robust_accuracy,
        "stands": to_hex(stands),
        "seconds": evaluation.seconds,
    }


def trained_stages(record: Record) -> list[StageRecord]:
    """Whose training is counted: not the baseline's, which a user brings; but the reference is trained as one."""
    others = [stage for stage in record.stages if stage.name != "baseline"]
    return others if any(stage.train_macs for stage in others) else list(record.stages)


def _found(network: Network, evaluation: EvaluationRecord, stands: torch.Tensor) -> Found:
    record = load_record(network.folder)
    artifact = next(stage for stage in record.stages if stage.name == "artifact")
    trained = trained_stages(record)
    return {
        "data": network.data,
        "row": network.row,
        "seed": network.seed,
        "trial": network.trial,
        "sha256": evaluation.target.sha256,
        "pruned": artifact.pruning_ratio.achieved,
        "weight_bits": artifact.weight_bits,
        "activation_bits": artifact.activation_bits,
        "params": artifact.params,
        "macs": artifact.macs,
        "size_bytes": artifact.size_bytes,
        "packed_bytes": artifact.packed_bytes,
        "train_macs": sum(stage.train_macs for stage in trained),
        "train_seconds": sum(stage.train_seconds for stage in trained),
        "clean_accuracy": evaluation.clean_accuracy,
        "n_clean": evaluation.n,
        "n": evaluation.attacked.n,
        "robust_accuracy": evaluation.robust_accuracy["worst_case"],
        "stands": to_hex(stands),
        "broken_by": {
            **evaluation.broken_by[ATTACK],
            **{name: count for name, count in evaluation.broken.items() if name not in (ATTACK, WORST_CASE)},
        },
        "masking": evaluation.masking.verdict,
        "failed_checks": [check.name for check in evaluation.masking.checks if not check.passed],
        "attack": evaluation.attacks[ATTACK],
        "eps": evaluation.threat_model.eps,
        "seconds": evaluation.seconds,
        "notes": list(evaluation.notes),
        "provenance": evaluation.provenance,
    }


# --- the table -------------------------------------------------------------------------------------------------------


def load(folder: Path = RESULTS) -> list[Found]:
    """All networks, sorted."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def difference(first: Sequence[Found], second: Sequence[Found]) -> tuple[float, float, float, int]:
    """Robust accuracy of one row minus another's in points, its 95 % interval, and the number of seeds.

    With one seed the interval is that of paired images. With several it is the mean over the seeds that both have, and
    its interval has two parts, added in squares: that of the images, the same for all seeds and so not narrower than
    with one; and that of the seeds (Student's t).
    """
    ours, theirs = ({found["seed"]: found for found in row} for row in (first, second))
    seeds = sorted(ours.keys() & theirs.keys())
    gaps, ends = [], []
    for seed in seeds:
        n = min(ours[seed]["n"], theirs[seed]["n"])
        gap, low, high = paired(*(from_hex(row[seed]["stands"], row[seed]["n"])[:n] for row in (ours, theirs)))
        gaps.append(gap)
        ends.append((low, high))
    low, high = map(statistics.fmean, zip(*ends, strict=True))
    centre, width = (low + high) / 2, (high - low) / 2
    if len(seeds) > 1:
        among = student_t95(len(seeds) - 1) * statistics.stdev(gaps) / math.sqrt(len(seeds))
        width = math.hypot(width, among)
    return statistics.fmean(gaps), centre - width, centre + width, len(seeds)


def table(folder: Path = RESULTS, data: str = "fashion-mnist") -> str:
    """All rows, and each goal with what became of it."""
    rows = _rows(folder, data)
    if not rows:
        return "*Not computed yet.*"
    lines = [
        "| network | seeds | clean % | worst case % | images broken by | masking | training, 10¹² MACs | packed |",
        "|---|---:|---:|---:|---|---|---:|---:|",
    ]
    lines += [_line(name, row) for name, row in rows.items()]
    return "\n".join([*lines, "", *_verdicts(rows, GOALS[data])])


def paper_table(folder: Path = RESULTS, data: str = "fashion-mnist") -> str:
    """The rows under the paper's attacks."""
    lines = [
        "| network | seeds | clean % | FGSM % | PGD-20 of the paper % | worst case, transfer included % |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in _rows(folder, data).items():
        papers = [found["paper"] for found in row if "paper" in found]
        if papers:
            columns = [[paper["robust_accuracy"][which] for paper in papers] for which in (*PAPER, WORST_CASE)]
            clean = _spread([100 * paper["clean_accuracy"] for paper in papers])
            cells = " | ".join(_spread([100 * value for value in values]) + _flag(row) for values in columns)
            lines.append(f"| {name} | {len(papers)} | {clean} | {cells} |")
    return "\n".join(lines) if len(lines) > 2 else "*Not computed yet.*"


def lite_table(folder: Path = RESULTS, data: str = "fashion-mnist") -> str:
    """What AutoAttack-lite leaves beside the whole ensemble, of the same images, where both were run."""
    lines = [
        "| network | images | AutoAttack-lite % | AutoAttack % | difference, points |",
        "|---|---:|---:|---:|---|",
    ]
    for name, row in _rows(folder, data).items():
        for found in [found for found in row if "lite" in found]:
            gap, low, high, _ = difference(_lite([found]), [found])
            whole, flag = 100 * found["robust_accuracy"], _flag([found])
            lines.append(
                f"| {name} (seed {found['seed']}) | {found['n']} | {whole + gap:.1f}{flag} | {whole:.1f}{flag} "
                f"| {gap:+.1f} [{low:+.1f}, {high:+.1f}] |"
            )
    return "\n".join(lines) if len(lines) > 2 else "*Not computed yet.*"


def _rows(folder: Path, data: str) -> dict[str, list[Found]]:
    """What is kept of each row, the reference first, the others as their goals stand."""
    rows: dict[str, list[Found]] = {}
    for found in load(folder):
        if found["data"] == data:
            rows.setdefault(found["row"], []).append(found)
    order = [REFERENCE, *(name for goal in GOALS[data] for name in goal.rows)]
    names = sorted(rows, key=lambda name: (order.index(name) if name in order else len(order), name))
    return {name: rows[name] for name in names}


def _line(name: str, row: Sequence[Found]) -> str:
    clean, robust = ([100 * found[what] for found in row] for what in ("clean_accuracy", "robust_accuracy"))
    parts: dict[str, list[int]] = {}
    for found in row:
        for part, count in found["broken_by"].items():
            parts.setdefault(part, []).append(count)
    broken = ", ".join(f"{part} {sum(counts)}" for part, counts in parts.items())
    verdicts = ", ".join(sorted({_masking(found) for found in row}))
    macs = statistics.fmean(found["train_macs"] for found in row) / 1e12
    return (
        f"| {name} | {len(row)} | {_spread(clean)} | {_spread(robust)}{_flag(row)} | {broken} | {verdicts} "
        f"| {macs:.1f} | {row[0]['packed_bytes'] / 1000:.0f} KB |"
    )


def _flag(*rows: Sequence[Found]) -> str:
    """What must stand beside a number made of these robust accuracies."""
    return " (suspect)" if any(found["masking"] == "suspect" for row in rows for found in row) else ""


def _masking(found: Found) -> str:
    return found["masking"] + (f" ({', '.join(found['failed_checks'])})" if found["failed_checks"] else "")


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _verdicts(rows: dict[str, list[Found]], goals: Sequence[Goal | Floor]) -> Iterator[str]:
    yield "| network | beside | goal, points | difference, points | seeds | met | AutoAttack-lite, all test images |"
    yield "|---|---|---:|---|---:|---|---|"
    for goal in goals:
        ours = rows.get(goal.row, [])
        if isinstance(goal, Floor):
            yield _reached(goal, ours)
            continue
        theirs = rows.get(goal.against, [])
        judged = _judged(goal, ours, theirs)
        if judged is None:
            yield f"| {goal.row} | {goal.against} | {goal.wanted} | not computed yet | | | |"
            continue
        found, met, seeds = judged
        more, flag = _judged(goal, _lite(ours), _lite(theirs)), _flag(ours, theirs)
        decided = f"{more[0]}{flag}{more[1] and f': {more[1]}'}" if more else ""
        yield f"| {goal.row} | {goal.against} | {goal.wanted} | {found}{flag} | {seeds} | {met} | {decided} |"
    for name in [goal.row for goal in CHEAP if goal.row in rows and REFERENCE in rows]:
        spent = statistics.fmean(found["train_macs"] for found in rows[name])
        whole = statistics.fmean(found["train_macs"] for found in rows[REFERENCE])
        yield ""
        yield (
            f"Training of “{name}”: {100 * spent / whole:.1f} % of the reference's multiply-adds "
            f"(goal: at most {100 * SHARE:.0f} %); the natural training of the dense network, which a user brings, is "
            "not in it."
        )


def _reached(goal: Floor, row: Sequence[Found]) -> str:
    wanted = f"| {goal.row} | nothing | ≥ {goal.robust:g} % robust, {goal.clean:g} % clean |"
    if not row:
        return f"{wanted} not computed yet | | | |"
    clean, robust = (
        100 * statistics.fmean(found[what] for found in row) for what in ("clean_accuracy", "robust_accuracy")
    )
    met = "yes" if robust >= goal.robust and clean >= goal.clean else "no"
    return f"{wanted} {robust:.1f} % robust{_flag(row)}, {clean:.1f} % clean | {len(row)} | {met} | |"


def _lite(row: Sequence[Found]) -> list[Found]:
    """What AutoAttack-lite left on all test images, where it was run."""
    return [{"seed": found["seed"]} | found["lite"] for found in row if "lite" in found]


def _judged(goal: Goal, ours: Sequence[Found], theirs: Sequence[Found]) -> tuple[str, str, int] | None:
    """The difference with its interval, whether the goal is met ("" without one), and the number of seeds.

    None: no seed is in both.
    """
    if not {found["seed"] for found in ours} & {found["seed"] for found in theirs}:
        return None
    mean, low, high, seeds = difference(ours, theirs)
    met = ""
    if goal.points is not None:
        met = "yes" if mean >= -goal.points else "no"
        met += "" if low >= -goal.points or high < -goal.points else ", not decided"
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", met, seeds


# --- the command -----------------------------------------------------------------------------------------------------


def wanted(label: str, seed: int, only: Sequence[str]) -> bool:
    """Whether ``only`` has a beginning of the label, and the seed, where it has any of their kind."""
    labels, seeds = [word for word in only if not word.isdigit()], [int(word) for word in only if word.isdigit()]
    return (not labels or any(label.startswith(word) for word in labels)) and (not seeds or seed in seeds)


def main() -> None:
    """Attack what is finished and not attacked yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", type=Path, help="folders of `coldforge sweep`")
    parser.add_argument("--n", type=int, default=1000, help="test images to attack")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="beginnings of labels, and seeds")
    parser.add_argument("--keep", nargs="*", type=int, default=[0], help="seeds whose folders go to results/artifacts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lite", action="store_true", help="also autoattack-lite on all test images: an hour")
    parser.add_argument("--work", type=Path, default=Path("recipe-results"), help="folder for interrupted attacks")
    parser.add_argument("--table", action="store_true", help="print the table and attack nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        networks = {network.name: network for network in kept(arguments.only)}
        for sweep in arguments.sweeps:
            for network in of_sweep(sweep, arguments.only):
                networks[network.name] = network
                if network.seed in arguments.keep:
                    keep(network)
        for network in (network for network in networks.values() if not is_attacked(network, arguments.n)):
            print(f"{network.name} ...", flush=True)
            out = arguments.work / f"{network.name}-{arguments.n}"
            found = attack(network, out, n=arguments.n, threads=arguments.threads)
            held = f"{ATTACK} {100 * found['robust_accuracy']:.1f} %"
            print(f"  {held}, {found['masking']}, {found['seconds']:.0f} s", flush=True)
        for what in ("paper", *["lite"] * arguments.lite):
            for network in networks.values():
                if attack_also(network, what, arguments.work / f"{network.name}-{what}", threads=arguments.threads):
                    print(f"{network.name}: {what}", flush=True)
    print(table(), paper_table(), sep="\n\n")


if __name__ == "__main__":
    main()

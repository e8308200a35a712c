"""Does the look at the validation part after an epoch see that gradients mislead?

    python benchmarks/training_watch.py [--out results/training_watch.json]

The networks of results/artifacts, which the masking panel calls honest, and two of results/search that it calls
suspect (a dense one, trained by Muon for fifteen epochs, and a small one, taught by a hardened network): what the guard
of a training would have seen of each on the validation part of Fashion-MNIST. PGD-10 on its first 1,000 images, and
what a short Square, on the first 250, breaks of those that PGD leaves. Beside it the seconds of this look, in turns
with PGD alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tables import training_watch
from turns import in_turns, median_ratio

from coldforge.attacks import ThreatModel, parse_attack
from coldforge.compress import load_network
from coldforge.data import load_data
from coldforge.evaluate import Target, evaluate
from coldforge.provenance import provenance
from coldforge.recipe import DataSpec
from coldforge.train.guard import ASKED_ATTACK, ASKED_IMAGES, MISLED, MONITOR_ATTACK, MONITOR_IMAGES, monitor

RESULTS = Path(__file__).resolve().parent.parent / "results"
EPS = 0.1
SUSPECT = {
    "dense, Muon, 15 epochs": "reference-muon-fashion-mnist/muon",
    "quarter, 4 bits, 5 epochs, distilled": "quarter-fashion-mnist/distilled",
}
"""Label to folder."""


def networks() -> dict[str, Path]:
    """Label to the folder of a network."""
    kept = sorted((RESULTS / "artifacts").glob("fashion-mnist-*/row.json"))
    found = {json.loads(path.read_text(encoding="utf-8"))["row"]: path.parent / "model" for path in kept}
    return found | {label: RESULTS / "search" / folder / "model" for label, folder in SUSPECT.items()}


def panel(folder: Path) -> str:
    """What the masking panel said of that network when it was attacked: "ok" or "suspect"."""
    name, kept = folder.parent.name, RESULTS / "recipes" / f"{folder.parent.name}.json"
    if kept.is_file():
        return str(json.loads(kept.read_text(encoding="utf-8"))["masking"])
    evaluation = folder.parent.parent / f"{name}-evaluation.json"
    return str(json.loads(evaluation.read_text(encoding="utf-8"))["masking"]["verdict"])


def seconds(call: Callable[[], Any]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=MONITOR_IMAGES, help="validation images")
    parser.add_argument("--turns", type=int, default=3, help="of timing, after the look itself")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "training_watch.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    threat_model = ThreatModel("linf", EPS)
    validation = load_data(DataSpec(source="fashion-mnist", validation=5000)).validation.take(slice(0, arguments.n))
    pgd = [parse_attack(MONITOR_ATTACK)]
    rows = []
    for label, folder in networks().items():
        network, _ = load_network(folder)
        found = monitor(network, validation, threat_model, robust=True)
        calls = {
            "alone": partial(evaluate, Target(network), validation, pgd, threat_model, transfer=False),
            "look": partial(monitor, network, validation, threat_model, robust=True),
        }
        times = in_turns(calls, arguments.turns, lambda who, _: seconds(calls[who]))  # noqa: B023
        rows.append(
            {
                "network": label,
                "panel": panel(folder),
                "clean_accuracy": found.clean_accuracy,
                "robust_accuracy": found.robust_accuracy,
                "beyond_gradients": found.beyond_gradients,
                "misleads": found.beyond_gradients > MISLED,
                "seconds": statistics.median(times["look"]),
                "times_pgd_alone": median_ratio(times["look"], times["alone"]),
            }
        )
        print(rows[-1], flush=True)
    record = {"what": __doc__, "eps": EPS, "n": len(validation), "threads": arguments.threads, "rows": rows}
    record |= {"attack": MONITOR_ATTACK, "asked": ASKED_ATTACK, "asked_n": ASKED_IMAGES, "misled": MISLED}
    record["provenance"] = provenance(0, "python benchmarks/training_watch.py")
    arguments.out.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    print(training_watch(record))


if __name__ == "__main__":
    main()

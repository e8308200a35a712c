"""What does rounding to 8 bits cost a robust network, which part of it, and does another calibration help?

    python benchmarks/rounding_cost.py [FOLDER] [--n 3000] [--out results/rounding_cost.json]

The floating-point network of FOLDER (as `coldforge run` or `recipe_results.py` leave it) is rounded, without training,
to 16 and 8 bits of weights and activations, and attacked with PGD-20 on validation images. Each search is judged twice:
by all of its iterates, as coldforge judges, and by its last one alone. Differences from floating point are paired.
Beside them stands the noise: the root mean square by which rounding moves the logits (less their mean over the classes)
at random points of the ball.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import tables
import torch
from attacks_parity import difference as paired
from torch import Tensor, nn

from coldforge.attacks import ThreatModel, parse_attack, predict
from coldforge.compress import attacking, quantize
from coldforge.data import ImageSet
from coldforge.evaluation.request import Request
from coldforge.evaluation.subject import load_network_of
from coldforge.provenance import physical_cores, provenance
from coldforge.recipe import QuantizeSpec

DEFAULT = Path("results/artifacts/cifar10-resnet-20-ratio-0-3-floating-point-10-epochs-0")
ATTACK = "pgd-20"
ROUNDINGS = (
    *((16, 16, "minmax"), (8, 16, "minmax"), (16, 8, "minmax")),
    *((8, 8, "minmax"), (8, 8, "percentile"), (8, 8, "mse")),
)
CALIBRATION_N = 2048


def attacked(network: nn.Module, data: ImageSet, threat_model: ThreatModel) -> dict[str, Tensor]:
    """Which images are right when clean, at all iterates of the attack, and at its last one; ``(N,)`` bool each."""
    images, labels = data.pixels(), data.labels
    with attacking(network):
        found = parse_attack(ATTACK)(network, images, labels, threat_model, keep_last=True)
        right = predict(network, images).argmax(1) == labels
        last = predict(network, found.last).argmax(1) == labels
    return {"clean": right, "all": right & ~found.fooled, "last": right & last}


def centred(logits: Tensor) -> Tensor:
    """Logits less their mean over the classes, which decides nothing."""
    return logits - logits.mean(1, keepdim=True)


def table(path: Path) -> str:
    """The record as Markdown."""
    if not path.is_file():
        return tables.NOT_YET
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        cells = [row["bits"], row.get("calibration", ""), f"{100 * row['clean']:.1f}"]
        for how in ("all", "last"):
            gap = row["differences"][how] if "differences" in row else None
            cells += [f"{100 * row[how]:.1f}", "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gap) if gap else ""]
        rows.append([*cells, f"{row['noise']:.3f}" if "noise" in row else ""])
    judged = [f"{what} {part}" for what in ("every iterate", "last iterate") for part in ("%", "difference")]
    return tables.markdown(["rounded", "calibration", "clean %", *judged, "noise"], rows, words=2)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--out", type=Path, default=Path("results/rounding_cost.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    network, splits, threat_model = load_network_of(arguments.folder, Request(attack=(ATTACK,)))
    data = splits.validation.take(slice(0, arguments.n))
    calibration = splits.train.pixels(slice(0, CALIBRATION_N))
    images = data.pixels()
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    points = (images + threat_model.eps * (2 * noise - 1)).clamp(0, 1)
    expected = centred(predict(network, points))
    stands = attacked(network, data, threat_model)
    rows: list[dict[str, Any]] = [
        {"bits": "floating point"} | {how: float(ok.float().mean()) for how, ok in stands.items()}
    ]
    print(rows[0], flush=True)
    for weight_bits, activation_bits, method in ROUNDINGS:
        spec = QuantizeSpec(
            weight_bits=weight_bits, activation_bits=activation_bits, calibration=method, calibration_n=CALIBRATION_N
        )
        rounded = quantize(network, spec, calibration)
        moved = centred(predict(rounded, points)) - expected
        found = attacked(rounded, data, threat_model)
        rows.append(
            {
                "bits": f"weights {weight_bits}, activations {activation_bits}",
                "calibration": method,
                **{how: float(ok.float().mean()) for how, ok in found.items()},
                "differences": {how: paired(found[how].numpy(), stands[how].numpy()) for how in ("all", "last")},
                "noise": float(moved.square().mean().sqrt()),
            }
        )
        print(rows[-1], flush=True)
    record = {"rows": rows, "n": len(data), "attack": ATTACK, "eps": threat_model.eps, "spread": float(expected.std())}
    record["provenance"] = provenance(0, f"benchmarks/rounding_cost.py {arguments.folder}")
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

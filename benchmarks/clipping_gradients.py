"""How should an attack pass gradients through the clipping range of a quantized network, while it trains that network?

    python benchmarks/clipping_gradients.py [--epochs 5] [--out results/clipping_gradients.json]

The compressed int8 network of the quickstart is fine-tuned adversarially three times from one start: its inner attack
passes gradients through clipped activations ("pass_through", BPDA), stops them there ("clipped", straight-through
estimator), or takes one and the other in turn, step by step, as coldforge does; the pruned float network is fine-tuned
in the same way. Each result is attacked with PGD-20 through both kinds of gradients.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from coldforge.attacks import ThreatModel, parse_attack
from coldforge.compress import Backward, attacking, prune, quantize
from coldforge.data import DataSplits, load_data
from coldforge.evaluate import BACKWARDS
from coldforge.models import model_source, normalized
from coldforge.provenance import has_bf16, physical_cores, provenance
from coldforge.recipe import PruneSpec, QuantizeSpec, TrainSpec
from coldforge.train import loop, train

THREAT_MODEL = ThreatModel("linf", 0.1)


def attacked(network: nn.Module, data: DataSplits) -> dict[str, float]:
    """Clean accuracy, and the share of test images that PGD-20 does not fool by each kind of gradients, and by both."""
    images, labels = data.test.pixels(), data.test.labels
    row, standing = {}, torch.ones(len(labels), dtype=torch.bool)
    for backward in BACKWARDS:
        with attacking(network, backward):
            fooled = parse_attack("pgd-20")(network, images, labels, THREAT_MODEL).fooled
        row[f"pgd-20 {backward}"] = float((~fooled).float().mean())
        standing &= ~fooled
    with torch.no_grad():
        row["clean"] = float((network(images).argmax(1) == labels).float().mean())
    return row | {"pgd-20 both": float(standing.float().mean())}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--attack", default="pgd-2")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--out", type=Path, default=Path("results/clipping_gradients.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    precision = "bf16" if has_bf16() else "fp32"

    data = load_data()
    source = model_source("zoo:cnn8", image_shape=data.image_shape, num_classes=len(data.classes))
    dense = normalized(source.build(0), data.mean, data.std)
    dense = train(dense, data, TrainSpec(epochs=8, lr=0.05), THREAT_MODEL, precision=precision).model
    parent, _ = prune(dense, PruneSpec(ratio=0.5), image_shape=data.image_shape)
    rounded = quantize(parent, QuantizeSpec(), data.train.pixels(slice(0, 512)))
    spec = TrainSpec(objective="adversarial", attack=arguments.attack, epochs=arguments.epochs, lr=0.03, retries=0)
    alternatives: dict[str, tuple[nn.Module, tuple[Backward, ...]]] = {
        "int8, inner attack: pass_through": (rounded, ("pass_through",)),
        "int8, inner attack: clipped": (rounded, ("clipped",)),
        "int8, inner attack: in turn": (rounded, BACKWARDS),
        "float parent": (parent, BACKWARDS),
    }
    rows = {}
    for name, (start, backwards) in alternatives.items():
        loop.BACKWARDS = backwards
        loop.refuse_collapse = lambda *_: None  # no rescue: what happens is what is to be seen
        result = train(start, data, spec, THREAT_MODEL, precision=precision)
        rows[name] = attacked(result.model, data)
        print(f"{name:34}" + "  ".join(f"{what} {100 * value:.1f} %" for what, value in rows[name].items()), flush=True)
    record = {"rows": rows, "spec": spec.model_dump(), "eps": THREAT_MODEL.eps}
    record["provenance"] = provenance(0, f"benchmarks/clipping_gradients.py --attack {arguments.attack}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Train the two dense robust networks on which attacks are compared with the reference implementations.

    COLDFORGE_CIFAR10=DIR COLDFORGE_RESNET20=FILE python benchmarks/robust_networks.py [--only cifar10-resnet20]

A cnn8 on Fashion-MNIST at eps 0.1, and a ResNet-20 on CIFAR-10 at 8/255 that starts from a foreign natural checkpoint;
floating point, BatchNorm kept. They are left as checkpoints in results/networks/ (safetensors and a description).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from coldforge.attacks import ThreatModel
from coldforge.compress import Structure, save_network
from coldforge.data import load_data
from coldforge.models import load_weights, model_source, normalized
from coldforge.provenance import has_bf16, physical_cores, provenance
from coldforge.recipe import DataSpec, TrainSpec
from coldforge.train import train

NETWORKS = {
    "fashion-mnist-cnn8": {
        "data": DataSpec(source="fashion-mnist"),
        "source": "zoo:cnn8",
        "checkpoint": "",
        "spec": TrainSpec(objective="adversarial", attack="pgd-3", epochs=6, batch_size=128, lr=0.1),
        "threat_model": ThreatModel("linf", 0.1),
    },
    "cifar10-resnet20": {
        "data": DataSpec(source="cifar10", validation=5000),
        "source": "zoo:resnet20",
        "checkpoint": "$COLDFORGE_RESNET20",
        "spec": TrainSpec(objective="adversarial", attack="fgsm-rs", epochs=10, lr=0.1, warmup=0.1, eps_ramp=0.1),
        "threat_model": ThreatModel("linf", 8 / 255),
    },
}


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--out", type=Path, default=Path("results/networks"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, wanted in NETWORKS.items():
        if arguments.only and name != arguments.only:
            continue
        data = load_data(wanted["data"])
        source = model_source(wanted["source"], image_shape=data.image_shape, num_classes=len(data.classes))
        network, mean, std = source.build(0), data.mean, data.std
        if wanted["checkpoint"]:
            load_weights(network, wanted["checkpoint"], key_prefix="module.")
            mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        last = [""]

        def say(fraction: float, detail: str, last: list[str] = last) -> None:
            line = f"{100 * fraction:3.0f} %"
            if line != last[0]:
                last[0] = line
                print(line, detail, flush=True)

        found = train(
            normalized(network, mean, std),
            data,
            wanted["spec"],
            wanted["threat_model"],
            precision="bf16" if has_bf16() else "fp32",
            on_progress=say,
            on_note=print,
        )
        structure = Structure(
            source=wanted["source"],
            image_shape=data.image_shape,
            classes=tuple(data.classes),
            mean=tuple(mean),
            std=tuple(std),
        )
        folder = arguments.out / name
        folder.mkdir(parents=True, exist_ok=True)
        save_network(folder, found.model, structure)
        story = {
            "what": __doc__.splitlines()[0],
            "spec": wanted["spec"].model_dump(),
            "eps": wanted["threat_model"].eps,
            "seconds": found.seconds,
            "curve": [point.model_dump() for point in found.curve],
            "notes": list(found.notes),
            "provenance": provenance(0, "python benchmarks/robust_networks.py"),
        }
        (folder / "training.json").write_text(json.dumps(story, indent=1, default=str) + "\n")
        print(name, found.curve[-1], flush=True)


if __name__ == "__main__":
    main()

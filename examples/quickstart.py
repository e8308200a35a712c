"""The whole arrow on the embedded Fashion-MNIST images: train, prune, quantize, fine-tune, export, prove.

    python examples/quickstart.py
    python examples/quickstart.py --set finetune.epochs=3 --set threat_model.eps=0.05

A few minutes to half an hour on two cores the first time (`coldforge run --plan` says how long here); finished stages
are kept, so a second run takes seconds.
"""

from __future__ import annotations

import argparse

import coldforge


class Lines(coldforge.Progress):
    """One line for each finished stage."""

    def end(self, label: str, *, cached: bool = False) -> None:
        print(f"  {label}{' (from the store)' if cached else ''}", flush=True)

    def note(self, text: str) -> None:
        print(f"  note: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="coldforge quickstart")
    parser.add_argument("--out", default="forged-quickstart", help="folder for the report and the ONNX file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    options = parser.parse_args()

    recipe = coldforge.load_recipe("quickstart", overrides=options.set)
    data = coldforge.load_data(recipe.data)
    forged = coldforge.forge("zoo:cnn8", data, recipe=recipe, out=options.out, progress=Lines())

    print(f"{'':40} {'clean':>7} {'robust':>7} {'file':>8}")
    for stage in forged.record.stages:
        robust = stage.robust_accuracy["worst_case"]
        print(f"{stage.label:40} {stage.clean_accuracy:7.1%} {robust:7.1%} {stage.size_bytes / 1e3:5.0f} KB")

    images, labels = data.test.images[:100], data.test.labels[:100]
    right = forged.session().labels(images) == labels
    print(f"{forged.folder}/model.onnx answers {int(right.sum())} of {len(labels)} test images correctly")


if __name__ == "__main__":
    main()

"""A network and images of your own: any traceable nn.Module, arrays of pixels, and the claim checked by hand.

    python examples/own_model.py

The images are bars of three directions under noise, the network is written in plain PyTorch and knows nothing of
coldforge. About a minute on two cores.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import coldforge
from coldforge.data import from_arrays

CLASSES = ("horizontal", "vertical", "diagonal")
SIDE, EPS = 16, 0.1


def draw(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gray images (n, SIDE, SIDE), uint8, of one bright bar each; and the direction of the bar, (n,)."""
    rng = np.random.default_rng(seed)
    images, labels = rng.uniform(0, 0.5, (n, SIDE, SIDE)), rng.integers(0, len(CLASSES), n)
    for image, label, place in zip(images, labels, rng.integers(3, SIDE - 3, n), strict=True):
        rows, columns = np.indices((SIDE, SIDE))
        distance = [rows - place, columns - place, rows - columns + place - SIDE // 2][label]
        image[np.abs(distance) <= 1] += 0.4
    return np.uint8(255 * images), labels


class Bars(nn.Module):
    """A small residual network; takes pixels in [0, 1], as every network that is given as an object must."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.wide = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, len(CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(inputs))), 2)
        x = F.relu(self.body(x) + x)
        return self.head(F.relu(self.wide(x)).mean((2, 3)))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 3) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="coldforge on a network of your own")
    parser.add_argument("--out", default="forged-own-model", help="folder for the report and the ONNX file")
    parser.add_argument("--n", type=int, default=4000, help="training images")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of fine-tuning")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: physical cores")
    options = parser.parse_args()
    torch.manual_seed(0)

    data = from_arrays(*draw(options.n, seed=0), *draw(400, seed=1), classes=CLASSES, name="bars")
    model = Bars()
    train(model, data.train.pixels(), data.train.labels)
    forged = coldforge.forge(
        model,
        data,
        out=options.out,
        settings={
            "threat_model.eps": EPS,
            "prune.ratio": 0.5,
            "finetune.epochs": options.epochs,
            "finetune.batch_size": 64,
            "finetune.lr": 0.02,
            "compute.threads": options.threads,
            "evaluate.attacks": ["fgsm", "pgd-20"],
        },
    )
    print(f"written to {forged.folder}: {', '.join(sorted(path.name for path in forged.folder.iterdir()))}")

    # The claim, found again with nothing but PyTorch: one step of FGSM on the twin, answered by the ONNX file.
    images, labels = data.test.pixels().requires_grad_(), data.test.labels
    twin, session = forged.network(), forged.session()
    (gradient,) = torch.autograd.grad(F.cross_entropy(twin(images), labels), images)
    adversarial = (images + EPS * gradient.sign()).clamp(0, 1).detach()
    clean, robust = (float((session.labels(x) == labels).float().mean()) for x in (images.detach(), adversarial))
    recorded = forged.record.stage("artifact")
    assert recorded is not None
    print(f"before: {float((model(images).argmax(1) == labels).float().mean()):.1%} of the test images are right")
    print(f"file:   {clean:.1%} right, {robust:.1%} after one FGSM step of {EPS}")
    print(f"record: {recorded.clean_accuracy:.1%} right, {recorded.robust_accuracy['fgsm']:.1%} under FGSM")


if __name__ == "__main__":
    main()

"""Adversarial examples and what the networks answer: the file from which the report draws its images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from coldforge.errors import UsageError
from coldforge.sealed import write_atomic

_FORMAT = "coldforge-examples-1"


@dataclass(frozen=True, eq=False)
class Examples:
    """A few test images, attacked on each network separately (white box), and every answer.

    Raises:
        UsageError: where shapes, networks or labels do not fit together.
    """

    clean: NDArray[np.float32]
    """Clean images in [0, 1], (K, C, H, W)."""
    labels: NDArray[np.int64]
    """True labels, (K,)."""
    classes: tuple[str, ...]
    """Class names, one a label."""
    adversarial: dict[str, NDArray[np.float32]]
    """Label of a network to the images that were made against it, (K, C, H, W)."""
    predictions: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    """Label of a network to its answers on the clean and on its own adversarial images, (K,) each."""
    eps: float
    """Radius of the ball in pixel units."""
    norm: str = "linf"
    """Norm of the ball."""

    def __post_init__(self) -> None:
        if self.clean.ndim != 4 or self.clean.shape[1] not in (1, 3) or not len(self.clean):
            raise UsageError(f"examples: expected clean images (K, 1 or 3, H, W), got {self.clean.shape}")
        count = len(self.clean)
        _expect("labels", self.labels.shape, (count,))
        if not self.adversarial or set(self.adversarial) != set(self.predictions):
            raise UsageError(
                "examples: expected the same networks, at least one, in adversarial and predictions, got "
                f"{sorted(self.adversarial)} and {sorted(self.predictions)}"
            )
        for label, images in self.adversarial.items():
            _expect(f"adversarial images of {label!r}", images.shape, self.clean.shape)
            for answers in self.predictions[label]:
                _expect(f"predictions of {label!r}", answers.shape, (count,))
        answers = np.concatenate([self.labels, *(part for pair in self.predictions.values() for part in pair)])
        if answers.min() < 0 or answers.max() >= len(self.classes):
            raise UsageError(
                f"examples: expected labels from 0 to {len(self.classes) - 1} ({len(self.classes)} class names), "
                f"got {answers.min()} to {answers.max()}"
            )

    def __len__(self) -> int:
        return len(self.clean)


def _expect(what: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise UsageError(f"examples: expected {what} of shape {expected}, got {got}")


def save_examples(examples: Examples, path: str | Path) -> None:
    """Write a ``.safetensors`` file, whole or not at all; the same examples give the same bytes."""
    networks = list(examples.adversarial)
    arrays: dict[str, NDArray[Any]] = {
        "clean": examples.clean.astype(np.float32),
        "labels": examples.labels.astype(np.int64),
    }
    for index, label in enumerate(networks):
        on_clean, on_adversarial = examples.predictions[label]
        arrays[f"adversarial.{index}"] = examples.adversarial[label].astype(np.float32)
        arrays[f"answers_clean.{index}"] = on_clean.astype(np.int64)
        arrays[f"answers_adversarial.{index}"] = on_adversarial.astype(np.int64)
    about = {
        "format": _FORMAT,
        "classes": examples.classes,
        "networks": networks,
        "eps": examples.eps,
        "norm": examples.norm,
    }
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomic(Path(path), save(whole, metadata={"coldforge": json.dumps(about)}))


def load_examples(path: str | Path) -> Examples:
    """Read what :func:`save_examples` wrote.

    Raises:
        UsageError: where there is no such file, or it is not an examples file.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"expected an examples file at {file}, found nothing")
    try:
        with safe_open(file, framework="np") as handle:
            about = json.loads((handle.metadata() or {}).get("coldforge", "{}"))
            if about.get("format") != _FORMAT:
                raise UsageError(f"{file}: expected the format {_FORMAT!r}, got {about.get('format')!r}")
            networks = list(enumerate(about["networks"]))
            return Examples(
                clean=handle.get_tensor("clean"),
                labels=handle.get_tensor("labels"),
                classes=tuple(about["classes"]),
                adversarial={label: handle.get_tensor(f"adversarial.{index}") for index, label in networks},
                predictions={
                    label: (
                        handle.get_tensor(f"answers_clean.{index}"),
                        handle.get_tensor(f"answers_adversarial.{index}"),
                    )
                    for index, label in networks
                },
                eps=float(about["eps"]),
                norm=str(about["norm"]),
            )
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{file} is not an examples file (damaged or not safetensors): {error}") from None

"""Clean and robust accuracy of a network or a deployed file, with a ledger of every image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from coldforge.attacks import Attack, AttackResult, Judge, ThreatModel, predict
from coldforge.compress import ActivationQuantizer, Backward, attacking
from coldforge.data import ImageSet
from coldforge.errors import AttackError
from coldforge.evaluate.statistics import wilson_interval

BACKWARDS: tuple[Backward, ...] = ("pass_through", "clipped")
"""How attacks take gradients of a quantized network: every image that stands after the first is tried with the second.

Neither is enough alone. Where activations are clipped, "clipped" (the plain straight-through estimator) sees a gradient
of 0, and "pass_through" (BPDA) one that the forward pass does not have; a network trained under the latter alone keeps
61 % under it and 6 % under the other (docs/architecture.md).
"""


@dataclass(frozen=True)
class Ledger:
    """What happened to each of n test images.

    ``right`` are the clean verdicts; each attack adds which images it fooled, at which step and restart of it, after
    how many queries, and the smallest margin it saw. Images that were wrong when clean were not attacked (step -1,
    no queries) and count as fooled.
    """

    labels: Tensor  # (n,) int64
    answers: Tensor  # (n,) int64, on the clean image
    fooled: dict[str, Tensor] = field(default_factory=dict)  # attack -> (m,) bool, m <= n: the attacked front part
    step: dict[str, Tensor] = field(default_factory=dict)
    restart: dict[str, Tensor] = field(default_factory=dict)
    queries: dict[str, Tensor] = field(default_factory=dict)
    margin: dict[str, Tensor] = field(default_factory=dict)

    @property
    def right(self) -> Tensor:
        """(n,) bool: right when clean."""
        return self.answers == self.labels

    def survived(self, attack: str) -> Tensor:
        """(m,) bool: right when clean and under that attack; ``"worst_case"``: under every attack run."""
        if attack != "worst_case":
            return ~self.fooled[attack]
        if not self.fooled:
            return self.right
        part = min(len(fooled) for fooled in self.fooled.values())
        survived = self.right[:part].clone()
        for fooled in self.fooled.values():
            survived &= ~fooled[:part]
        return survived

    def write(self, path: Path) -> None:
        """One row an image, as parquet."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        n = len(self.labels)
        columns: dict[str, object] = {
            "image": list(range(n)),
            "label": self.labels.tolist(),
            "clean_answer": self.answers.tolist(),
            "clean_right": self.right.tolist(),
        }
        for attack in self.fooled:
            for what in ("fooled", "step", "restart", "queries", "margin"):
                values = getattr(self, what)[attack].tolist()
                columns[f"{attack}:{what}"] = values + [None] * (n - len(values))
        pq.write_table(pa.table(columns), path)


@dataclass(frozen=True)
class Robustness:
    """Accuracies of one network, as they stand in the record."""

    n: int
    clean_accuracy: float
    clean_ci95: tuple[float, float]
    robust_accuracy: dict[str, float]
    robust_n: dict[str, int]
    robust_ci95: dict[str, tuple[float, float]]
    per_class: dict[str, dict[str, float]]


def evaluate(
    model: nn.Module,
    data: ImageSet,
    attacks: Sequence[Attack],
    threat_model: ThreatModel,
    *,
    n: int = 0,
    seed: int = 0,
    judge: Judge | None = None,
    on_progress: Callable[[float, str], None] | None = None,
) -> Ledger:
    """Clean verdicts on all of ``data``, and every attack on its first ``n`` images.

    Args:
        model: float or fake-quantized classifier. Attacks on the latter pass its rounding in two ways
            (:data:`BACKWARDS`); an image stands only if it stands both.
        data: test images.
        attacks: each is run on every attacked image that is right when clean.
        threat_model: ball and box.
        n: how many images to attack; 0: all.
        seed: seed of the random starts.
        judge: labels of the deployed file made from ``model``. With it, every verdict is the file's: an image is
            fooled only when the file is.
        on_progress: called with the finished fraction and the name of the attack.

    Returns:
        The ledger. ``model`` is left as it was.
    """
    if len(data) == 0:
        raise AttackError("expected test images, got none")
    images, labels = data.pixels(), data.labels
    count = min(n, len(data)) if n else len(data)
    with attacking(model):
        answers = judge(images) if judge is not None else predict(model, images).argmax(1)
    ledger = Ledger(labels, answers)
    backwards = (
        BACKWARDS if any(isinstance(module, ActivationQuantizer) for module in model.modules()) else BACKWARDS[:1]
    )
    tries = [(attack, backward) for attack in attacks for backward in backwards]
    for number, (attack, backward) in enumerate(tries):

        def report(fraction: float, number: int = number, name: str = attack.name) -> None:
            if on_progress is not None:
                on_progress((number + fraction) / len(tries), name)

        standing = ~ledger.fooled[attack.name] if attack.name in ledger.fooled else ledger.right[:count]
        targets = standing.nonzero()[:, 0]
        with attacking(model, backward):
            result = attack(
                model,
                images[targets],
                labels[targets],
                threat_model,
                seed=seed,
                indices=targets,
                judge=judge,
                on_progress=report,
            )
        _enter(ledger, attack.name, result, targets, count)
    return ledger


def _enter(ledger: Ledger, attack: str, result: AttackResult, targets: Tensor, count: int) -> None:
    """Add one try of an attack on the images that still stood."""
    if attack not in ledger.fooled:
        ledger.fooled[attack] = torch.ones(count, dtype=torch.bool)
        ledger.step[attack] = torch.full((count,), -1)
        ledger.restart[attack] = torch.full((count,), -1)
        ledger.queries[attack] = torch.zeros(count, dtype=torch.int64)
        ledger.margin[attack] = torch.full((count,), torch.inf)
    ledger.fooled[attack][targets] = result.fooled
    ledger.step[attack][targets] = result.step
    ledger.restart[attack][targets] = result.restart
    ledger.queries[attack][targets] += result.queries
    ledger.margin[attack][targets] = torch.minimum(ledger.margin[attack][targets], result.margin)


def summarize(ledger: Ledger, classes: Sequence[str]) -> Robustness:
    """Fractions, counts, Wilson intervals, and accuracy per class."""
    robust_accuracy, robust_n, robust_ci95 = {}, {}, {}
    for attack in [*ledger.fooled, "worst_case"]:
        survived = ledger.survived(attack)
        robust_n[attack] = len(survived)
        robust_accuracy[attack] = int(survived.sum()) / len(survived)
        robust_ci95[attack] = wilson_interval(int(survived.sum()), len(survived))
    worst = ledger.survived("worst_case")
    per_class = {}
    for index, name in enumerate(classes):
        members = ledger.labels == index
        attacked = members[: len(worst)]
        if int(members.sum()) and int(attacked.sum()):
            per_class[name] = {
                "n": float(members.sum()),
                "n_attacked": float(attacked.sum()),
                "clean": float(ledger.right[members].double().mean()),
                "worst_case": float(worst[attacked].double().mean()),
            }
    right, n = int(ledger.right.sum()), len(ledger.labels)
    return Robustness(n, right / n, wilson_interval(right, n), robust_accuracy, robust_n, robust_ci95, per_class)

"""Two networks on the same images: by how much do they differ, and is it more than luck?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coldforge.errors import UsageError
from coldforge.evaluate import WORST_CASE, Ledger, mcnemar, paired_interval
from coldforge.records import MaskingRecord, ThreatModelRecord, load_evaluation, load_record

CLEAN = "clean"


@dataclass(frozen=True)
class Difference:
    """Accuracies of two networks on the same images."""

    what: str
    """"clean", an attack that both were attacked with, or "worst_case" over all attacks of each."""
    n: int
    """Images that both were tried on."""
    first: float
    second: float
    only_first: int
    """Images on which only the first is right."""
    only_second: int
    interval: tuple[float, float]
    """95 % interval of first minus second (:func:`coldforge.evaluate.paired_interval`)."""
    p: float
    """p-value of McNemar's exact test."""
    suspect: tuple[bool, bool] = (False, False)
    """Whether the masking checks call the first, and the second, accuracy suspect; never the clean one."""


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found."""

    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    """What a reader must know: a masking verdict, attacks that only one was attacked with."""


@dataclass(frozen=True, eq=False)
class _Side:
    name: str
    threat_model: ThreatModelRecord
    masking: MaskingRecord
    attacks: dict[str, Any]
    unfinished: dict[str, int]
    images: str
    """Fingerprint of the test images; empty where only that of all data is known."""
    labels: Tensor
    right: Tensor
    stands: dict[str, Tensor]

    @property
    def suspect(self) -> bool:
        """Whether the masking checks say that the robust accuracies may not hold."""
        return self.masking.verdict == "suspect"


def compare(first: Path, second: Path) -> Comparison:
    """Clean and robust accuracy of two networks, image by image.

    Args:
        first: a folder with ``ledger.parquet``, of ``coldforge run`` (its artifact) or of ``coldforge evaluate``.
        second: another, of the same test images.

    Raises:
        UsageError: no such folder, other images, or another threat model.
    """
    sides = _side(first), _side(second)
    shared = min(len(side.labels) for side in sides)
    known = {side.images for side in sides if side.images}
    if len(known) > 1 or not torch.equal(sides[0].labels[:shared], sides[1].labels[:shared]):
        raise UsageError(f"expected ledgers of the same test images, got others in {second} than in {first}")
    models = [side.threat_model.model_dump() for side in sides]
    if models[0] != models[1]:
        said = [f"{m.norm} {m.eps:g}{'' if m.box else ' without the box'}" for m in (s.threat_model for s in sides)]
        raise UsageError(f"expected the same threat model, got {said[0]} in {first} and {said[1]} in {second}")
    names = [name for name in sides[0].stands if name in sides[1].stands]
    one, two = sides
    suspect = one.suspect, two.suspect
    found = [_difference(CLEAN, one.right[:shared], two.right[:shared])]
    found += [_difference(name, one.stands[name], two.stands[name], suspect) for name in names]
    found.append(_difference(WORST_CASE, _worst(one), _worst(two), suspect))
    return Comparison(tuple(found), tuple(_notes(sides)))


def _side(folder: Path) -> _Side:
    ledger = folder / "ledger.parquet"
    if not ledger.is_file():
        raise UsageError(
            f"expected a folder of `coldforge run` or of `coldforge evaluate`, found no ledger.parquet in {folder}"
        )
    kept = Ledger.read(ledger)
    stands = {attack: kept.survived(attack) for attack in kept.fooled}
    if (folder / "evaluation.json").is_file():
        evaluation = load_evaluation(folder)
        images = str(evaluation.data.get("fingerprint", ""))
        about = (evaluation.threat_model, evaluation.masking, evaluation.attacks, evaluation.unfinished, images)
    else:
        record = load_record(folder)
        artifact = record.stage("artifact")
        masking = artifact.masking if artifact else MaskingRecord()
        about = (record.threat_model, masking, record.provenance.get("attacks", {}), {}, "")
    return _Side(str(folder), *about, kept.labels, kept.right, stands)


def _worst(side: _Side) -> Tensor:
    count = min((len(values) for values in side.stands.values()), default=len(side.right))
    worst = side.right[:count].clone()
    for values in side.stands.values():
        worst &= values[:count]
    return worst


def _difference(what: str, first: Tensor, second: Tensor, suspect: tuple[bool, bool] = (False, False)) -> Difference:
    n = min(len(first), len(second))
    first, second = first[:n], second[:n]
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return Difference(
        what,
        n,
        int(first.sum()) / n,
        int(second.sum()) / n,
        only_first,
        only_second,
        paired_interval(only_first, only_second, n),
        mcnemar(only_first, only_second),
        suspect,
    )


def _notes(sides: tuple[_Side, _Side]) -> list[str]:
    notes = []
    for side, other in (sides, sides[::-1]):
        alone = [name for name in side.stands if name not in other.stands]
        if alone:
            tried = ", ".join(alone)
            notes.append(f"only {side.name} was attacked with {tried}: the worst cases are not of the same attacks")
        if side.masking.verdict != "ok":
            failed = ", ".join(check.name for check in side.masking.failed)
            said = f"suspect ({failed})" if side.suspect else "not checked for masking"
            notes.append(f"the robust accuracies of {side.name} are {said}")
        if side.unfinished:
            notes.append(f"{side.name} is bounded by its budget: images that were not finished count as robust")
    for name in sorted(sides[0].attacks.keys() & sides[1].attacks.keys()):
        if _settings(sides[0].attacks[name]) != _settings(sides[1].attacks[name]):
            notes.append(f"{name} had other settings, or another version, in one of them")
    return notes


def _settings(described: dict[str, Any]) -> dict[str, Any]:
    """Of an attack: runs also say which gradients they take."""
    return {key: value for key, value in described.items() if key != "gradients_of_quantized_networks"}

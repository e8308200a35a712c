"""Ensembles: attacks that are run one after the other on the images that still stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from coldforge.attacks.base import Attack, AttackResult
from coldforge.attacks.query import Classifier, Judge
from coldforge.attacks.threat import ThreatModel
from coldforge.spec import Spec


class Ensemble(Spec):
    """A cascade of attacks; an image stands if it stands all. Called like an :class:`Attack`."""

    version: ClassVar[int] = 1

    label: str
    """Name in the record."""
    parts: tuple[Any, ...]
    """The attacks, in the order in which they are run."""

    @property
    def name(self) -> str:
        """Name in the record, such as "autoattack"."""
        return self.label

    def check(self, threat_model: ThreatModel) -> None:
        """Refuse a threat model for which a part is not defined, with an AttackError."""
        for part in self.parts:
            part.check(threat_model)

    def passes(self, classes: int) -> float:
        """As of every attack, where an image stands all parts."""
        total: float = sum(part.passes(classes) for part in self.parts)
        return total

    def describe(self) -> dict[str, Any]:
        """Everything that defines the attack, for the record."""
        return {"attack": "Ensemble", "version": self.version, "parts": [part.describe() for part in self.parts]}

    def __call__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        threat_model: ThreatModel,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
        judge: Judge | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> AttackResult:
        """As :meth:`Attack.__call__`; in the result, ``part`` is the attack that came first, and step and restart are
        those of that part.
        """
        self.check(threat_model)
        names = torch.arange(len(images)) if indices is None else indices
        result: AttackResult | None = None
        for number, attack in enumerate(self.parts):
            standing = torch.arange(len(images)) if result is None else (~result.fooled).nonzero()[:, 0]

            def report(fraction: float, number: int = number) -> None:
                if on_progress is not None:
                    on_progress((number + fraction) / len(self.parts))

            found: AttackResult = attack(
                model,
                images[standing],
                labels[standing],
                threat_model,
                seed=seed,
                indices=names[standing],
                judge=judge,
                on_progress=report,
            )
            result = found if result is None else merge(result, found, standing, number)
            report(1.0)
        assert result is not None
        return result


def merge(result: AttackResult, found: AttackResult, rows: Tensor, number: int) -> AttackResult:
    """``result`` with what a further attack, the one called ``number``, ``found`` on its images ``rows``."""
    merged = replace(result, queries=result.queries.clone(), margin=result.margin.clone())
    merged.queries[rows] += found.queries
    merged.margin[rows] = torch.minimum(merged.margin[rows], found.margin)
    merged.disputed[rows] |= found.disputed
    for name in ("fooled", "adversarial", "step", "restart", "finished"):
        getattr(merged, name)[rows] = getattr(found, name)
    merged.part[rows] = torch.where(found.fooled, number, -1)
    return merged


def as_parts(attack: Attack | Ensemble) -> tuple[Attack, ...]:
    """The attacks that one name stands for, in order."""
    return attack.parts if isinstance(attack, Ensemble) else (attack,)

"""Attacks: frozen specs that are callables. ``parse_attack`` turns the names of a recipe into them."""

from __future__ import annotations

import re

from coldforge.attacks.base import (
    TILE,
    Attack,
    AttackResult,
    Classifier,
    Judge,
    check_images,
    margins,
    predict,
    query,
    untouched,
)
from coldforge.attacks.gradient import PGD, perturb
from coldforge.attacks.threat import ThreatModel
from coldforge.errors import RecipeError, nearest

__all__ = [
    "ATTACK_FORMS",
    "PGD",
    "TILE",
    "Attack",
    "AttackResult",
    "Classifier",
    "Judge",
    "ThreatModel",
    "check_images",
    "margins",
    "parse_attack",
    "perturb",
    "predict",
    "query",
    "untouched",
]

ATTACK_FORMS = {
    "fgsm": "one step of eps along the sign of the gradient, from the image",
    "fgsm-rs": "one step of 1.25 eps from a random point of the ball (the fast inner attack of training)",
    "pgd-K": "K steps of 2.5 eps / K from a random point, e.g. pgd-20",
    "pgd-K-R": "the same from R random points, e.g. pgd-50-10",
    "pgd-K-paper": "K steps of 0.005 (0.01 on inputs in [-1, 1]) from the image itself, as in arXiv 2403.09441",
}
"""Valid forms of an attack's name, and what they mean."""


def parse_attack(name: str) -> PGD:
    """The attack with that name.

    Raises:
        RecipeError: lists the valid forms.
    """
    if name == "fgsm":
        return PGD(label=name, steps=1, rel_step=1.0, random_start=False)
    if name == "fgsm-rs":
        return PGD(label=name, steps=1, rel_step=1.25)
    match = re.fullmatch(r"pgd-(\d+)(?:-(\d+)|-(paper))?", name)
    if not match:
        raise RecipeError(f"unknown attack {name!r}; {nearest(name, ATTACK_FORMS)}")
    steps, restarts = int(match[1]), int(match[2] or 1)
    try:
        if match[3]:
            return PGD(label=name, steps=steps, abs_step=0.005, random_start=False)
        return PGD(label=name, steps=steps, restarts=restarts, rel_step=2.5 / max(steps, 1))
    except ValueError as error:
        raise RecipeError(f"attack {name!r}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None  # type: ignore[attr-defined]

"""The names of attacks, as recipes and records hold them."""

from __future__ import annotations

import re

from coldforge.attacks.apgd import APGD
from coldforge.attacks.base import Attack
from coldforge.attacks.ensemble import Ensemble
from coldforge.attacks.fab import FAB
from coldforge.attacks.gradient import PGD
from coldforge.attacks.square import STANDARD_QUERIES, Square
from coldforge.errors import RecipeError, nearest

ATTACK_FORMS = {
    "fgsm": "one step of eps along the sign of the gradient, from the image",
    "fgsm-rs": "one step of 1.25 eps from a random point of the ball (the fast inner attack of training)",
    "pgd-K": "K steps of 2.5 eps / K from a random point, e.g. pgd-20",
    "pgd-K-R": "the same from R random points, e.g. pgd-50-10",
    "pgd-K-paper": "K steps of 0.005 (0.01 on inputs in [-1, 1]) from the image itself, as in arXiv 2403.09441",
    "apgd-ce-K": "APGD on cross-entropy, K steps; apgd-ce: 100",
    "apgd-t-K-T": "APGD on the targeted DLR loss, K steps for each of T targets; apgd-t: 100 and 9",
    "fab-t-K-T": "FAB, K steps for each of T targets; fab-t: 100 and 9; linf only",
    "square-Q": f"Square, random search with Q queries and no gradients; square: {STANDARD_QUERIES}",
    "autoattack": "apgd-ce, apgd-t, fab-t, square: the standard ensemble; linf only",
    "autoattack-lite": "apgd-ce-30, apgd-t-20-3, square-500: a cheaper cascade for daily work, weaker than autoattack",
}
"""Valid forms of an attack's name, and what they mean."""

LITE = Ensemble(
    label="autoattack-lite",
    parts=(APGD(loss="ce", steps=30), APGD(loss="dlr", steps=20, n_targets=3), Square(steps=500)),
)
"""For daily work."""
STANDARD = Ensemble(label="autoattack", parts=(APGD(loss="ce"), APGD(loss="dlr"), FAB(), Square()))
"""AutoAttack, version "standard" (Croce and Hein 2020): the same parts, budgets and order."""


def parse_attack(name: str) -> Attack | Ensemble:
    """The attack with that name.

    Raises:
        RecipeError: lists the valid forms.
    """
    try:
        found = _parse(name)
    except ValueError as error:
        details = error.errors() if hasattr(error, "errors") else [{"msg": str(error)}]
        raise RecipeError(f"attack {name!r}: {details[0]['msg'].removeprefix('Value error, ')}") from None
    if found is None:
        raise RecipeError(f"unknown attack {name!r}; {nearest(name, ATTACK_FORMS)}")
    return found


def parse_pgd(name: str) -> PGD:
    """The FGSM or PGD of that name: what training can use.

    Raises:
        RecipeError: another attack, or none of that name.
    """
    found = parse_attack(name)
    if not isinstance(found, PGD):
        raise RecipeError(
            f"expected fgsm, fgsm-rs or pgd-K as an inner attack, got {name!r}, which is for evaluation only"
        )
    return found


def _parse(name: str) -> Attack | Ensemble | None:
    match [int(word) if word.isdecimal() else word for word in name.split("-")]:
        case ["fgsm"]:
            return PGD(label=name, steps=1, rel_step=1.0, random_start=False)
        case ["fgsm", "rs"]:
            return PGD(label=name, steps=1, rel_step=1.25)
        case ["pgd", int(steps), "paper"]:
            return PGD(label=name, steps=steps, abs_step=0.005, random_start=False)
        case ["pgd", int(steps), *rest] if re.fullmatch(r"pgd-\d+(-\d+)?", name):
            restarts = rest[0] if rest else 1
            assert isinstance(restarts, int)
            return PGD(label=name, steps=steps, restarts=restarts, rel_step=2.5 / max(steps, 1))
        case ["apgd", "ce"]:
            return APGD(loss="ce")
        case ["apgd", "ce", int(steps)]:
            return APGD(loss="ce", steps=steps)
        case ["apgd", "t"]:
            return APGD(loss="dlr")
        case ["apgd", "t", int(steps)]:
            return APGD(loss="dlr", steps=steps)
        case ["apgd", "t", int(steps), int(targets)]:
            return APGD(loss="dlr", steps=steps, n_targets=targets)
        case ["fab", "t"]:
            return FAB()
        case ["fab", "t", int(steps)]:
            return FAB(steps=steps)
        case ["fab", "t", int(steps), int(targets)]:
            return FAB(steps=steps, n_targets=targets)
        case ["square"]:
            return Square()
        case ["square", int(queries)]:
            return Square(steps=queries)
        case ["autoattack"]:
            return STANDARD
        case ["autoattack", "lite"]:
            return LITE
    return None

"""Attacks: frozen specs that are callables. ``parse_attack`` turns the names of a recipe into them."""

from __future__ import annotations

from coldforge.attacks.apgd import APGD
from coldforge.attacks.base import WITH_GRADIENT, Attack, AttackResult
from coldforge.attacks.ensemble import Ensemble, as_parts
from coldforge.attacks.fab import FAB
from coldforge.attacks.gradient import PGD
from coldforge.attacks.inner import INNER_FORMS, InnerAttack, parse_inner, perturb
from coldforge.attacks.names import ATTACK_FORMS, parse_attack, parse_pgd
from coldforge.attacks.query import TILE, Classifier, Judge, check_images, loss_direction, margins, predict, untouched
from coldforge.attacks.square import Square
from coldforge.attacks.threat import ThreatModel
from coldforge.attacks.tiles import Tiles

__all__ = [
    "APGD",
    "ATTACK_FORMS",
    "FAB",
    "INNER_FORMS",
    "PGD",
    "TILE",
    "WITH_GRADIENT",
    "Attack",
    "AttackResult",
    "Classifier",
    "Ensemble",
    "InnerAttack",
    "Judge",
    "Square",
    "ThreatModel",
    "Tiles",
    "as_parts",
    "check_images",
    "loss_direction",
    "margins",
    "parse_attack",
    "parse_inner",
    "parse_pgd",
    "perturb",
    "predict",
    "untouched",
]

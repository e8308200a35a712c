"""Our attacks against the reference implementation (github.com/fra31/auto-attack), image by image.

The full comparison, on trained networks and with everybody's full budgets, is benchmarks/attacks_parity.py.
"""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from coldforge.attacks import ThreatModel, parse_attack, predict

pytest.importorskip(
    "pyautoattack",
    reason="the reference implementation is missing: pip install --no-deps -r benchmarks/requirements-peers.txt",
)

HALF_FALL, HALF_FALL_TO_SQUARES = ThreatModel("linf", 0.2), ThreatModel("linf", 0.3)
L2, L2_TO_SQUARES = ThreatModel("l2", 1.1), ThreatModel("l2", 2.3)
STEPS, QUERIES, L2_QUERIES = 30, 300, 100
MARGIN = 3
"""Of 150 images, how many more the reference may fool; two runs of one attack with two seeds differ by up to 2."""


def fooled_by_reference(task: Any, attack: str, threat_model: ThreatModel) -> Tensor:
    """(N,) bool, verified here."""
    model, images, labels = copy.deepcopy(task)  # it leaves gradients on the parameters
    part = {"apgd-ce": "autopgd_base", "apgd-t": "autopgd_base", "fab-t": "fab_pt", "square": "square"}[attack]
    module = importlib.import_module(f"pyautoattack.{part}")
    common = {
        "norm": {"linf": "Linf", "l2": "L2"}[threat_model.norm],
        "eps": threat_model.eps,
        "seed": 0,
        "device": "cpu",
    }
    silent = SimpleNamespace(warning=lambda _: None)
    if attack == "apgd-ce":
        peer = module.APGDAttack(model, n_iter=STEPS, logger=silent, **common)
    elif attack == "apgd-t":
        peer = module.APGDAttack_targeted(model, n_iter=STEPS, n_target_classes=3, logger=silent, **common)
    elif attack == "fab-t":
        peer = module.FABAttack_PT(model, n_iter=STEPS, targeted=True, n_target_classes=3, **common)
    else:
        queries = QUERIES if threat_model.norm == "linf" else L2_QUERIES
        peer = module.SquareAttack(model, n_queries=queries, resc_schedule=False, **common)
    with torch.random.fork_rng(), torch.no_grad():  # it seeds the global generator
        adversarial = peer.perturb(images, labels)
    threat_model.verify(adversarial, images)
    return predict(model, adversarial).argmax(1) != labels


def lead_of_reference(task: Any, ours: str, theirs: str, threat_model: ThreatModel) -> int:
    """How many images more the reference fools."""
    model, images, labels = task
    expected = fooled_by_reference(task, theirs, threat_model)
    assert 0.25 < expected.float().mean() < 0.75, "with next to none or all fooled, every attack would pass"
    result = parse_attack(ours)(model, images, labels, threat_model)
    threat_model.verify(result.adversarial, images)
    found = predict(model, result.adversarial).argmax(1) != labels
    return int(expected.sum()) - int(found.sum())


@pytest.mark.parametrize(
    ("ours", "theirs", "threat_model"),
    [
        (f"apgd-ce-{STEPS}", "apgd-ce", HALF_FALL),
        (f"apgd-t-{STEPS}-3", "apgd-t", HALF_FALL),
        (f"fab-t-{STEPS}-3", "fab-t", HALF_FALL),
        (f"square-{QUERIES}", "square", HALF_FALL_TO_SQUARES),
        (f"apgd-ce-{STEPS}", "apgd-ce", L2),
        (f"square-{L2_QUERIES}", "square", L2_TO_SQUARES),  # ahead by 50: there one window serves all images
        (f"pgd-{STEPS}", "apgd-ce", HALF_FALL),  # the reference has no PGD; here it keeps up with APGD-CE
    ],
)
def test_attack_is_not_weaker_than_the_reference_implementation(
    task: Any, ours: str, theirs: str, threat_model: ThreatModel
) -> None:
    assert lead_of_reference(task, ours, theirs, threat_model) <= MARGIN


@pytest.mark.parametrize(
    ("weak", "theirs", "threat_model"),
    [
        ("fgsm", "apgd-ce", HALF_FALL),
        (f"square-{QUERIES // 6}", "square", HALF_FALL_TO_SQUARES),
        ("fgsm", "apgd-ce", L2),
        (f"square-{L2_QUERIES // 6}", "square", L2_TO_SQUARES),
    ],
)
def test_a_weaker_attack_would_be_noticed(task: Any, weak: str, theirs: str, threat_model: ThreatModel) -> None:
    assert lead_of_reference(task, weak, theirs, threat_model) > MARGIN

"""The queue of the engine, and every named attack's independence of batch and order."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from coldforge.attacks import ATTACK_FORMS, AttackResult, Ensemble, Square, ThreatModel, as_parts, parse_attack, predict
from coldforge.attacks.query import TILE

LINF = ThreatModel("linf", 0.2)
NAMES = {
    "fgsm": "fgsm",
    "fgsm-rs": "fgsm-rs",
    "pgd-K": "pgd-6",
    "pgd-K-R": "pgd-3-3",
    "pgd-K-paper": "pgd-80-paper",
    "apgd-ce-K": "apgd-ce-10",
    "apgd-t-K-T": "apgd-t-6-2",
    "fab-t-K-T": "fab-t-6-2",
    "square-Q": "square-40",
    "autoattack": "autoattack",
    "autoattack-lite": "autoattack-lite",
}
"""A short one of every form."""


def short(form: str) -> Ensemble | object:
    """The attack; an ensemble with short parts."""
    attack = parse_attack(NAMES[form])
    if isinstance(attack, Ensemble):
        names = [part.name for part in attack.parts]
        parts = {"apgd-ce": "apgd-ce-4", "apgd-t": "apgd-t-3-2", "fab-t": "fab-t-3-2", "square": "square-20"}
        kinds = [next(kind for kind in parts if name.startswith(kind)) for name in names]
        return Ensemble(label=attack.label, parts=tuple(parse_attack(parts[kind]) for kind in kinds))
    return attack


def test_every_form_has_a_short_attack_here() -> None:
    assert set(NAMES) == set(ATTACK_FORMS)


@pytest.mark.parametrize("form", NAMES)
def test_pitfall_18_results_do_not_move_with_batch_or_order(task: tuple[nn.Module, Tensor, Tensor], form: str) -> None:
    model, images, labels = task
    attack = short(form)
    whole = attack(model, images, labels, LINF)
    for size in (1, 7, 256):
        for start in range(0, 14, size):
            names = torch.arange(start, min(start + size, len(images)))
            part = attack(model, images[names], labels[names], LINF, indices=names)
            for what in ("fooled", "adversarial", "step", "restart", "queries", "margin", "part"):
                assert torch.equal(getattr(part, what), getattr(whole, what)[names]), what
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    turned = attack(model, images[order], labels[order], LINF, indices=order)
    assert torch.equal(turned.adversarial, whole.adversarial[order])
    assert torch.equal(turned.step, whole.step[order])


@pytest.mark.parametrize("form", NAMES)
def test_pitfalls_15_16_19_nothing_is_left_behind(task: tuple[nn.Module, Tensor, Tensor], form: str) -> None:
    model, images, labels = task
    model[1].train()

    def state() -> str:
        digest = hashlib.sha256(repr([module.training for module in model.modules()]).encode())
        digest.update(repr([(p.requires_grad, p.grad) for p in model.parameters()]).encode())
        for tensor in (*model.state_dict().values(), torch.random.get_rng_state()):
            digest.update(tensor.numpy().tobytes())
        digest.update(repr((np.random.get_state()[1].tolist(), random.getstate())).encode())  # noqa: NPY002
        return digest.hexdigest()

    before = state()
    short(form)(model, images[:5], labels[:5], LINF)
    assert state() == before
    model.eval()


def test_pitfall_8_names_carry_every_hyperparameter() -> None:
    standard = parse_attack("autoattack").describe()["parts"]
    found = [(part["attack"], part["steps"], part.get("n_targets"), part.get("loss")) for part in standard]
    assert found == [
        ("APGD", 100, 9, "ce"),
        ("APGD", 100, 9, "dlr"),
        ("FAB", 100, 9, None),
        ("Square", 5000, None, None),
    ]
    for name in NAMES.values():
        attack = parse_attack(name)
        assert attack.name == name
        assert all("version" in part.describe() for part in as_parts(attack))
    assert parse_attack("autoattack-lite").describe() != parse_attack("autoattack").describe()


def test_more_images_than_slots_and_several_runs(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    done: list[int] = []

    def keep(result: AttackResult, positions: list[int]) -> None:
        assert result.finished[positions].all()
        assert (result.queries[positions] > 0).all()
        done.extend(positions)

    found = parse_attack("pgd-2-3")(model, images, labels, ThreatModel("linf", 0.19), on_done=keep)
    assert len(images) > 2 * TILE
    assert sorted(done) == list(range(len(images)))
    assert found.restart[found.fooled].unique().numel() > 1
    standing = ~found.fooled
    assert standing.any()
    assert (found.queries[standing] == 9).all()


def test_a_stop_leaves_the_rest_unfinished(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    asked = iter([False] * 12)
    stopped = parse_attack("pgd-10")(model, images, labels, LINF, stop=lambda: next(asked, True))
    whole = parse_attack("pgd-10")(model, images, labels, LINF)
    assert 0 < stopped.finished.sum() < len(images)
    assert torch.equal(stopped.fooled[stopped.finished], whole.fooled[stopped.finished])
    assert not stopped.fooled[~stopped.finished].any()


def test_an_ensemble_is_the_union_and_names_who_came_first(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    parts = (parse_attack("fgsm"), parse_attack("pgd-10"), Square(steps=50))
    weak = ThreatModel("linf", 0.15)
    found = Ensemble(label="three", parts=parts)(model, images, labels, weak)
    alone = [part(model, images, labels, weak).fooled for part in parts]
    assert torch.equal(found.fooled, alone[0] | alone[1] | alone[2])
    assert torch.equal(found.part == 0, alone[0])
    assert torch.equal(found.part == 1, alone[1] & ~alone[0])
    assert (found.part >= 0).equal(found.fooled)
    assert torch.equal(predict(model, found.adversarial).argmax(1) != labels, found.fooled)


def test_no_images(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    for name in ("pgd-3", "autoattack-lite"):
        assert len(parse_attack(name)(model, images[:0], labels[:0], LINF).fooled) == 0


@given(st.floats(0.01, 0.5), st.sampled_from([-1e-4, 1e-4]), st.booleans())
def test_pitfalls_20_26_the_verifier_knows_ball_and_box(eps: float, beyond: float, box: bool) -> None:
    tm = ThreatModel("linf", eps, box=box)
    clean = torch.full((1, 1, 2, 2), 0.5)
    point = clean.clone()
    point[0, 0, 0, 0] += eps + beyond
    assert bool(tm.contains(point, clean)) == (beyond < 0)
    for value in (float("nan"), float("inf")):
        broken = clean.clone()
        broken[0, 0, 1, 1] = value
        assert not tm.contains(broken, clean)
    edge = torch.ones(1, 1, 2, 2)
    assert tm.contains(edge, edge)
    assert bool(tm.contains(edge + min(eps, 1e-3) / 2, edge)) == (not box)

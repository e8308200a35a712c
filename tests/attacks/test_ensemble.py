"""Ensembles: the union of their parts, each run on what the parts before it left."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from coldforge.attacks import (
    APGD,
    FAB,
    PGD,
    Attack,
    Ensemble,
    Square,
    ThreatModel,
    as_parts,
    parse_attack,
    predict,
)
from coldforge.attacks.base import Slots

WEAK = ThreatModel("linf", 0.15)
PARTS = (parse_attack("fgsm"), parse_attack("apgd-t-10-2"), parse_attack("square-60"))


class Asked(PGD):
    """Writes down on how many queries, and which images, it was put."""

    keys: ClassVar[set[int]] = set()

    def advance(self, slots: Slots, threat_model: ThreatModel) -> Tensor:
        self.keys.update(slots.key.tolist())
        return super().advance(slots, threat_model)


def test_an_ensemble_is_the_union_and_names_who_came_first(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    found = Ensemble(label="three", parts=PARTS)(model, images, labels, WEAK)
    alone = [part(model, images, labels, WEAK) for part in PARTS]
    union = alone[0].fooled | alone[1].fooled | alone[2].fooled
    assert torch.equal(found.fooled, union)
    before = torch.zeros_like(union)
    for number, part in enumerate(alone):
        first = part.fooled & ~before
        assert torch.equal(found.part == number, first)
        for what in ("step", "restart", "adversarial"):
            assert torch.equal(getattr(found, what)[first], getattr(part, what)[first]), what
        before |= part.fooled
    assert (alone[0].fooled.any(), (found.part == 1).any()) == (True, True)
    assert (found.part[~union] == -1).all()
    assert (found.step[~union] == -1).all()
    assert found.finished.all()
    assert torch.equal(predict(model, found.adversarial).argmax(1) != labels, found.fooled)
    WEAK.verify(found.adversarial, images)


def test_later_parts_see_only_what_stands(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    found = Ensemble(label="three", parts=PARTS)(model, images, labels, WEAK)
    alone = [part(model, images, labels, WEAK) for part in PARTS]
    spent = [part.queries for part in alone]
    expected = spent[0].clone()
    expected += torch.where(alone[0].fooled, 0, spent[1])
    expected += torch.where(alone[0].fooled | alone[1].fooled, 0, spent[2])
    assert torch.equal(found.queries, expected)
    lowest = torch.stack([part.margin for part in alone])
    lowest[1, alone[0].fooled] = torch.inf
    lowest[2, alone[0].fooled | alone[1].fooled] = torch.inf
    assert torch.equal(found.margin, lowest.amin(0))


def test_a_part_that_has_nothing_left_is_not_asked(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    Asked.keys.clear()
    wide = ThreatModel("linf", 0.9)
    found = Ensemble(label="two", parts=(parse_attack("pgd-20"), Asked(label="asked", steps=3, rel_step=1.0)))(
        model, images[:20], labels[:20], wide
    )
    assert found.fooled.all()
    assert (found.part == 0).all()
    assert Asked.keys == set()


def test_the_judge_has_the_last_word_in_every_part(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task

    def judge(points: Tensor) -> Tensor:
        return predict(lambda x: model((x * 8).round() / 8), points).argmax(1)

    found = Ensemble(label="three", parts=PARTS)(model, images, labels, WEAK, judge=judge)
    assert (judge(found.adversarial[found.fooled]) != labels[found.fooled]).all()
    alone = [part(model, images, labels, WEAK, judge=judge) for part in PARTS]
    assert torch.equal(found.fooled, alone[0].fooled | alone[1].fooled | alone[2].fooled)
    assert (found.disputed >= alone[0].disputed).all()
    assert found.disputed.any()


def test_a_part_that_is_not_defined_is_refused_before_anything_is_run(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    _, images, labels = task

    def never(points: Tensor) -> Tensor:
        raise AssertionError("asked")

    with pytest.raises(Exception, match="fab-t-5-2: expected linf"):
        Ensemble(label="two", parts=(parse_attack("pgd-3"), parse_attack("fab-t-5-2")))(
            never, images, labels, ThreatModel("l2", 1.0)
        )


# --- what is written down


def test_pitfall_8_autoattack_is_the_standard_one() -> None:
    standard = parse_attack("autoattack")
    assert standard.name == "autoattack"
    apgd, targeted, fab, square = as_parts(standard)
    assert (type(apgd), apgd.steps, apgd.restarts, apgd.loss) == (APGD, 100, 1, "ce")  # type: ignore[attr-defined]
    assert (type(targeted), targeted.steps, targeted.restarts) == (APGD, 100, 1)
    assert (targeted.loss, targeted.n_targets) == ("dlr", 9)  # type: ignore[attr-defined]
    assert (type(fab), fab.steps, fab.restarts, fab.n_targets) == (FAB, 100, 1, 9)  # type: ignore[attr-defined]
    assert (type(square), square.steps, square.restarts, square.p_init) == (Square, 5000, 1, 0.8)  # type: ignore[attr-defined]
    assert all(attack.runs(0) == 1 for attack in (apgd, square))


def every_setting(attack: Attack) -> dict[str, Any]:
    return {name: getattr(attack, name) for name in type(attack).model_fields}


@pytest.mark.parametrize(
    "name",
    ["fgsm", "pgd-20", "pgd-20-paper", "apgd-ce", "apgd-t-5-2", "fab-t", "square", "autoattack", "autoattack-lite"],
)
def test_pitfall_8_a_record_holds_every_hyperparameter_and_version(name: str) -> None:
    attack = parse_attack(name)
    assert attack.name == name
    whole = attack.describe()
    assert whole["version"] == attack.version
    written = whole["parts"] if isinstance(attack, Ensemble) else [whole]
    for part, found in zip(as_parts(attack), written, strict=True):
        expected = {"attack": type(part).__name__, "version": part.version, **every_setting(part)}
        assert found == expected
        assert {"steps", "restarts", "random_start"} <= found.keys()


def test_pitfall_8_other_settings_have_another_record_and_name() -> None:
    names = [
        *("fgsm", "fgsm-rs", "pgd-10", "pgd-20", "pgd-20-2", "pgd-20-paper", "apgd-ce", "apgd-ce-50", "apgd-t"),
        *("apgd-t-50", "apgd-t-50-3", "apgd-t-100-3", "fab-t", "fab-t-50", "fab-t-50-3", "square", "square-500"),
        *("autoattack", "autoattack-lite"),
    ]
    attacks = [parse_attack(name) for name in names]
    assert len({str(attack.describe()) for attack in attacks}) == len(names)
    assert len({attack.name for attack in attacks}) == len(names)
    for attack in attacks:
        assert parse_attack(attack.name).describe() == attack.describe(), "a record's name gives the attack back"


@pytest.mark.parametrize("settings", [(APGD, {"loss": "dlr"}), (FAB, {})], ids=["apgd-t", "fab-t"])
def test_restarts_that_would_not_be_made_are_refused(settings: tuple[type[Attack], dict[str, Any]]) -> None:
    kind, others = settings
    with pytest.raises(ValueError, match="restarts"):
        kind(steps=2, restarts=2, **others)

"""Inner attacks of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from coldforge.attacks import INNER_FORMS, PGD, ThreatModel, loss_direction, parse_inner, perturb
from coldforge.errors import AttackError, RecipeError

LINF, L2 = ThreatModel("linf", 0.3), ThreatModel("l2", 1.0)
NAMES = ("fgsm", "fgsm-rs", "n-fgsm", "fgsm-reuse", "pgd-2", "pgd-7")


def ascend(labels: Tensor) -> Any:
    return lambda logits: loss_direction(logits, labels, "ce")


def made(name: str, task: Any, ball: ThreatModel = LINF, previous: Tensor | None = None, seed: int = 0) -> Tensor:
    model, images, labels = task
    generator = torch.Generator().manual_seed(seed)
    return perturb(model, images, ascend(labels), ball, parse_inner(name), generator, previous)


def ce(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(images), labels))


def test_the_last_iterate_equals_that_of_the_attack_for_evaluation(task: Any) -> None:
    model, images, labels = task
    attack = PGD(label="x", steps=20, rel_step=0.1, random_start=False)
    inner = parse_inner("fgsm").model_copy(update={"pgd": attack})
    kept = attack(model, images, labels, LINF, keep_last=True).last
    batch = perturb(model, images, ascend(labels), LINF, inner, torch.Generator())
    assert ((kept - batch).abs() < 1e-5).float().mean() > 0.995
    assert not batch.requires_grad


@pytest.mark.parametrize("ball", [LINF, L2], ids=["linf", "l2"])
@pytest.mark.parametrize("name", NAMES)
def test_images_are_harder_and_stay_where_they_must(task: Any, name: str, ball: ThreatModel) -> None:
    model, images, labels = task
    found = made(name, task, ball)
    assert ce(model, found, labels) > ce(model, images, labels) + 0.1
    assert found.min() >= 0
    assert found.max() <= 1
    if name == "n-fgsm":  # by design: de Jorge et al. 2022, section 4
        assert float(ball.size(found - images).max()) > ball.eps * 1.5
        assert float(ball.size(found - images).max()) <= ball.eps * 3 + 1e-5
    else:
        ball.verify(found, images)


def test_the_start_is_where_the_last_epoch_ended(task: Any) -> None:
    model, images, labels = task
    first = made("fgsm-reuse", task)
    assert torch.equal(first, made("fgsm-rs", task)), "without a last epoch the start is random"
    second = made("fgsm-reuse", task, previous=first - images, seed=1)
    assert torch.equal(second, made("fgsm-reuse", task, previous=first - images, seed=2)), "nothing is drawn"
    assert ce(model, second, labels) > ce(model, first, labels), "two epochs are two steps"


@given(st.sampled_from(NAMES), st.integers(0, 3))
def test_what_is_stronger_takes_more_steps(name: str, times: int) -> None:
    inner = parse_inner(name)
    assert inner.stronger(times).steps == inner.steps + times
    assert inner.stronger(0) is inner


@pytest.mark.parametrize("name", ["square", "apgd-ce", "pgd-5-2", "autoattack", "nfgsm", "pgd"])
def test_what_is_no_inner_attack_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="unknown inner attack "):
        parse_inner(name)


def test_every_form_is_an_attack() -> None:
    for form in INNER_FORMS:
        assert parse_inner(form.replace("K", "20")).label == form.replace("K", "20")


def test_pitfall_07_steps_that_cannot_cross_the_ball_are_refused() -> None:
    parse_inner("pgd-20-paper").check(ThreatModel("linf", 0.05))
    with pytest.raises(AttackError, match="take at least 40"):
        parse_inner("pgd-20-paper").check(ThreatModel("linf", 0.1))


def test_training_mode_is_left_and_taken_up_again(task: Any) -> None:
    model, images, labels = task
    model = nn.Sequential(nn.BatchNorm2d(images.shape[1]), model).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perturb(model, images[:4], ascend(labels[:4]), LINF, parse_inner("pgd-2"), torch.Generator())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

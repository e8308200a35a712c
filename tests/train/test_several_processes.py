"""Two processes with gloo train what one process trains: the same losses, weights and accuracy within rounding."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn

from coldforge.data import from_arrays
from coldforge.errors import ModelError, RecipeError, UsageError
from coldforge.recipe import ComputeSpec, FinetuneSpec
from coldforge.train import Team, loop, train
from coldforge.train import team as teams
from coldforge.train import world as worlds
from coldforge.train.world import LostError, World

# Weights of gradient sums in another order; signs of an attack's gradient may flip at zero.
LOSS, WEIGHT = {"rel": 2e-4}, {"rtol": 1e-3, "atol": 1e-4}


def spec_of(**settings):
    plain = {"objective": "natural", "epochs": 2, "batch_size": 15, "lr": 0.02, "weight_decay": 5e-4}
    return FinetuneSpec.model_construct(**{**FinetuneSpec().model_dump(), **plain, **settings})


@pytest.fixture(scope="module")
def team():
    made = Team(ComputeSpec(devices=2))
    yield made
    made.close(done=True)


@pytest.fixture
def losses(monkeypatch):
    """Of each step, as rank 0 reports them."""
    found = []
    plain = loop._Attempt._step

    def step(self, *arguments):
        found.append(plain(self, *arguments))
        return found[-1]

    monkeypatch.setattr(loop._Attempt, "_step", step)
    return found


def both(team, losses, *arguments, **settings):
    """The results of one process and of two, and the losses of each."""
    alone = train(*arguments, **settings)
    first = losses.copy()
    losses.clear()
    shared = team.call(train, *arguments, here={}, **settings)
    return alone, shared, first, losses


CASES = {
    "natural": {},
    "uneven": {"batch_size": 13},
    "fgsm-rs": {"objective": "adversarial", "attack": "fgsm-rs"},
    "pgd": {"objective": "adversarial", "attack": "pgd-3"},
    "noise": {"objective": "trades", "attack": "n-fgsm"},
    "reuse": {"objective": "adversarial", "attack": "fgsm-reuse", "epochs": 3},
    "average and awp": {"objective": "adversarial", "attack": "pgd-2", "ema": 0.9, "awp": 0.01, "keep": "best"},
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(case, team, losses, build, splits, threat):
    spec = spec_of(**CASES[case])
    alone, shared, first, second = both(team, losses, build("float"), splits, spec, threat, seed=1)
    assert second == pytest.approx(first, **LOSS)
    assert len(second) == spec.epochs * (66 // spec.batch_size)
    after = shared.model.state_dict()
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(after[name], tensor, **WEIGHT)
    assert [point.clean_accuracy for point in shared.curve] == [point.clean_accuracy for point in alone.curve]
    assert [point.robust_accuracy for point in shared.curve] == [point.robust_accuracy for point in alone.curve]
    assert (shared.macs, shared.notes) == (alone.macs, alone.notes)


@pytest.mark.parametrize("objective", ["natural", "trades"])
@pytest.mark.parametrize("kind", ["batchnorm", "quantized"])
def test_batchnorm_and_rounding_are_shared_too(kind, objective, team, losses, build, splits, threat):
    spec = spec_of(objective=objective, attack="pgd-2", batch_size=13)
    alone, shared, first, second = both(team, losses, build(kind), splits, spec, threat)
    assert second == pytest.approx(first, **LOSS if kind == "batchnorm" else {"rel": 2e-2})  # rounding jumps
    if kind == "batchnorm":
        for name, tensor in alone.model.state_dict().items():
            torch.testing.assert_close(shared.model.state_dict()[name], tensor, **WEIGHT)
        assert type(shared.model.network[1]) is nn.BatchNorm2d
    assert shared.curve[-1].clean_accuracy == pytest.approx(alone.curve[-1].clean_accuracy, abs=0.04)


def test_augmentation_and_distillation(team, losses, build, splits, threat):
    moved = from_arrays(
        *(splits.train.images, splits.train.labels, splits.test.images, splits.test.labels),
        validation=18,
        augment="crop-flip",
    )
    spec = spec_of(objective="distill", attack="pgd-2")
    arguments = (build("float"), moved, spec, threat)
    _, _, first, second = both(team, losses, *arguments, teacher=build("batchnorm"))
    assert second == pytest.approx(first, **LOSS)

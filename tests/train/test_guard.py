"""Watching a training: what is said of a network whose gradients mislead, and which epochs are kept."""

import copy

import pytest
import torch
from torch import nn

from coldforge.attacks import parse_attack
from coldforge.evaluate import Target, evaluate, summarize
from coldforge.models import normalized
from coldforge.recipe import TrainSpec
from coldforge.records import CurvePoint
from coldforge.train import loop, train
from coldforge.train.guard import ASKED_IMAGES, MISLED, Watched, misled, monitor

ADVERSARIAL = TrainSpec(objective="adversarial", attack="pgd-3", epochs=3, batch_size=32, lr=0.03)


class Stairs(nn.Module):
    """The network of the images in few grey levels: its gradient at the images is zero, and it is no more robust."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(torch.round(images * 8) / 8)


@pytest.fixture(scope="module")
def natural(tempting, threat):
    network = normalized(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), (0.5,), (0.1,))
    return train(network, tempting, TrainSpec(epochs=6, batch_size=32, lr=0.03), threat).model


@pytest.fixture(scope="module")
def robust(tempting, threat):
    network = normalized(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), (0.5,), (0.1,))
    return train(network, tempting, ADVERSARIAL.model_copy(update={"epochs": 6}), threat)


def point(epoch, beyond, averaged=-1.0):
    return CurvePoint(
        epoch=epoch,
        loss=1.0,
        lr=0.1,
        eps=0.1,
        clean_accuracy=0.9,
        robust_accuracy=0.8,
        beyond_gradients=beyond,
        averaged_beyond_gradients=averaged,
    )


def test_gradients_that_are_zero_are_seen(natural, tempting, threat):
    plain = monitor(natural, tempting.validation, threat, robust=True)
    masked = monitor(Stairs(natural), tempting.validation, threat, robust=True)
    assert masked.robust_accuracy > plain.robust_accuracy + 0.2  # it looks more robust
    assert masked.beyond_gradients > 0.2
    assert masked.score < plain.robust_accuracy + 0.2
    assert plain.beyond_gradients <= MISLED


def test_an_honest_training_is_not_accused(robust, tempting):
    assert all(0 <= epoch.beyond_gradients <= MISLED for epoch in robust.curve)
    assert robust.notes == ()


def test_what_square_breaks_is_counted_of_the_first_images_only(natural, tempting, threat):
    """The slow twin: PGD and Square each on their own, on all images watched."""
    network = Stairs(natural)
    watched = tempting.validation
    assert len(watched) < ASKED_IMAGES
    attacks = [parse_attack("pgd-10"), parse_attack("square-30")]
    found = summarize(evaluate(Target(network), watched, attacks, threat, transfer=False), watched.classes)
    now = monitor(network, watched, threat, robust=True)
    assert now.robust_accuracy == found.robust_accuracy["pgd-10"]
    assert now.score == pytest.approx(found.robust_accuracy["worst_case"])
    few = [monitor(network, watched.take(slice(0, n)), threat, robust=True) for n in (10, 120)]
    assert all(0 < one.beyond_gradients <= 1 for one in few)


def test_a_network_that_is_always_wrong_leaves_nothing_to_ask(natural, tempting, threat):
    wrong = copy.deepcopy(natural)
    with torch.no_grad():
        wrong.network[1].weight.neg_()
        wrong.network[1].bias.neg_()
    right = monitor(natural, tempting.validation, threat, robust=False).clean_accuracy
    found = monitor(wrong, tempting.validation, threat, robust=True)
    assert found.clean_accuracy == pytest.approx(1 - right)
    assert found.robust_accuracy == found.beyond_gradients == 0


def test_no_attack_is_run_where_none_is_wanted(natural, tempting, threat):
    found = monitor(natural, tempting.validation, threat, robust=False)
    assert (found.robust_accuracy, found.beyond_gradients) == (-1.0, -1.0)
    assert found.score == found.clean_accuracy > 0.9


def test_the_score_is_what_stands_under_both():
    assert Watched(0.9, 0.8, 0.1).score == pytest.approx(0.7)
    assert Watched(0.9, 0.8).score == 0.8
    assert Watched(0.9).score == 0.9


@pytest.mark.parametrize("averaged", [False, True])
def test_it_is_said_once_in_a_training(averaged):
    def curve(*beyond):
        return [point(n, *((0.0, value) if averaged else (value,))) for n, value in enumerate(beyond, 1)]

    assert misled(curve(0.0, MISLED)) == ""
    said = misled(curve(0.0, 0.04))
    assert "gradients mislead after epoch 2: square-30" in said
    assert "broke 4.0% of validation images that pgd-10 had left" in said
    assert "autoattack" in said
    assert misled(curve(0.04, 0.04)) == ""  # it was
    assert misled(curve(0.04, 0.0)) == ""


def test_a_training_whose_gradients_mislead_says_so(natural, tempting, threat):
    said = []
    result = train(Stairs(natural), tempting, ADVERSARIAL, threat, on_note=said.append)
    assert len(said) == 1
    assert said[0].startswith("gradients mislead after epoch 1")
    assert result.notes == tuple(said)
    assert result.curve[-1].beyond_gradients > 0.2


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_an_epoch_that_only_looks_robust_is_not_the_best(ema, natural, tempting, threat, monkeypatch):
    seen = iter([Watched(0.9, 0.5, 0.0), Watched(0.9, 0.6, 0.2), Watched(0.9, 0.45, 0.0)])
    real = loop.monitor

    def acted(network, *arguments, robust):
        if ema and not acted.averaged:
            acted.averaged = True
            return Watched(0.9, 0.1, 0.0)  # the weights; what follows is of their average
        acted.averaged = False
        return next(seen) if robust else real(network, *arguments, robust=robust)

    acted.averaged = False
    monkeypatch.setattr(loop, "monitor", acted)
    monkeypatch.setattr(loop, "refuse_collapse", lambda *_: False)
    result = train(natural, tempting, ADVERSARIAL.model_copy(update={"keep": "best", "ema": ema}), threat)
    which = "epoch 1, averaged" if ema else "epoch 1"
    assert result.notes[-1] == f"kept {which}, the best on the validation part"
    assert result.notes[0].startswith("gradients mislead after epoch 2")

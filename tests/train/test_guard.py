"""Watching a training: what is said of a network whose gradients mislead, and which epochs are kept."""

import copy

import pytest
import torch
from torch import nn

from coldforge.attacks import ThreatModel, parse_attack
from coldforge.errors import ModelError
from coldforge.evaluate import Target, evaluate
from coldforge.models import normalized
from coldforge.recipe import TrainSpec
from coldforge.records import CurvePoint
from coldforge.train import guard, loop, train
from coldforge.train.guard import HONEST, MISLED, Collapse, Watched, first_misled, kept_misled, monitor

ADVERSARIAL = TrainSpec(objective="adversarial", attack="pgd-3", epochs=3, batch_size=32, lr=0.03)


class Stairs(nn.Module):
    """The network of the images in few grey levels: its gradient at the images is zero, and it is no more robust."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(torch.round(images * 8) / 8)


def linear():
    return normalized(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), (0.5,), (0.1,))


@pytest.fixture(autouse=True)
def few_are_asked(monkeypatch):
    monkeypatch.setattr(guard, "ASKED_IMAGES", 120)  # all of the validation part


@pytest.fixture(scope="module")
def natural(tempting, threat):
    return train(linear(), tempting, TrainSpec(epochs=6, batch_size=32, lr=0.03), threat).model


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


def test_an_honest_training_is_not_accused(tempting, threat):
    robust = train(linear(), tempting, ADVERSARIAL.model_copy(update={"epochs": 6}), threat)
    assert all(0 <= epoch.beyond_gradients <= MISLED for epoch in robust.curve)
    assert robust.notes == ()


@pytest.mark.parametrize("asked", [40, 120])
def test_what_square_breaks_is_counted_of_the_first_images(asked, natural, tempting, monkeypatch):
    """The slow twin: PGD and Square each on their own."""
    monkeypatch.setattr(guard, "ASKED_IMAGES", asked)
    network, watched = Stairs(natural), tempting.validation
    threat = ThreatModel("linf", 0.06)  # less: some stand
    assert len(watched) == 120
    attacks = [parse_attack("pgd-10"), parse_attack(guard.ASKED_ATTACK)]
    ledger = evaluate(Target(network), watched, attacks, threat, transfer=False)
    pgd, square = (ledger.survived(attack.name) for attack in attacks)
    now = monitor(network, watched, threat, robust=True)
    assert now.robust_accuracy == float(pgd.double().mean())
    assert now.beyond_gradients == pytest.approx(float((pgd & ~square)[:asked].sum()) / asked)
    assert 0.2 < now.beyond_gradients < 1


def test_a_small_validation_part_is_not_asked(natural, tempting, threat, monkeypatch):
    monkeypatch.setattr(guard, "ASKED_IMAGES", 121)
    found = monitor(Stairs(natural), tempting.validation, threat, robust=True)
    assert found.beyond_gradients == -1
    assert found.score == found.robust_accuracy > 0.5


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


def test_whatever_a_network_answers_does_not_end_its_training(natural, tempting, threat):
    """What answers with probabilities is refused before it is trained, and few images may look as if one did."""

    class Sums(nn.Module):
        """Two logits whose sum is the same for all images, and all of them positive."""

        def forward(self, images):
            return natural(images).softmax(1)

    with pytest.raises(ModelError, match="returns probabilities"):
        evaluate(Target(Sums()), tempting.validation, [], threat)
    assert monitor(Sums(), tempting.validation, threat, robust=True).clean_accuracy > 0.9


def test_the_score_is_what_pgd_leaves_without_what_square_breaks_beyond_honesty():
    assert Watched(0.9, 0.8, 0.1).score == pytest.approx(0.8 - (0.1 - HONEST))
    assert Watched(0.9, 0.8, HONEST).score == 0.8  # a single image or two choose no epoch
    assert Watched(0.9, 0.8).score == 0.8
    assert Watched(0.9).score == 0.9


@pytest.mark.parametrize("averaged", [False, True])
def test_a_person_is_told_once(averaged):
    def curve(*beyond):
        return [point(n, *((0.0, value) if averaged else (value,))) for n, value in enumerate(beyond, 1)]

    assert first_misled(curve(0.0, MISLED)) == ""
    said = first_misled(curve(0.0, 0.04))
    assert "after epoch 2 gradients mislead: square-30" in said
    assert "broke 4.0% of 120 validation images, all of which pgd-10 had left" in said
    assert "autoattack" in said
    assert first_misled(curve(0.04, 0.04)) == ""  # it was
    assert first_misled(curve(0.04, 0.0)) == ""


def test_the_record_is_told_of_the_weights_that_are_kept():
    curve = [point(1, 0.0, 0.2), point(2, 0.1, 0.0)]
    assert kept_misled(curve, "epoch 1") == kept_misled(curve, "epoch 2, averaged") == ""
    assert kept_misled(curve, "epoch 2").startswith("in the network of epoch 2 gradients mislead: square-30")
    assert "broke 20.0% of" in kept_misled(curve, "epoch 1, averaged")


def test_a_training_whose_gradients_mislead_says_so(natural, tempting, threat):
    said = []
    result = train(Stairs(natural), tempting, ADVERSARIAL, threat, on_note=said.append)
    assert len(said) == 1
    assert said[0].startswith("after epoch 1 gradients mislead")
    (note,) = result.notes
    assert note.startswith("in the network of epoch 3 gradients mislead")
    assert result.curve[-1].beyond_gradients > 0.2


def test_it_is_still_said_after_a_collapse(natural, tempting, threat, monkeypatch):
    real, collapses = loop.refuse_collapse, iter([False, True])

    def once(network, validation, curve, inner, spec):
        if next(collapses, False):
            raise Collapse("planted")
        return real(network, validation, curve, inner, spec)

    monkeypatch.setattr(loop, "refuse_collapse", once)
    said = []
    result = train(Stairs(natural), tempting, ADVERSARIAL, threat, on_note=said.append)
    assert [note.startswith("after epoch 1 gradients mislead") for note in said] == [True, False]
    assert "collapsed (planted); rolled back" in result.notes[0]
    assert result.notes[1].startswith("in the network of epoch 3 gradients mislead")


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_an_epoch_that_only_looks_robust_is_not_the_best(ema, natural, tempting, threat, monkeypatch):
    """Of weights, or of their average beside bad weights."""
    epochs = [Watched(0.9, 0.5, 0.0), Watched(0.9, 0.6, 0.2), Watched(0.9, 0.45, 0.0)]
    seen = iter([each for epoch in epochs for each in ((Watched(0.9, 0.1, 0.0), epoch) if ema else (epoch,))])
    monkeypatch.setattr(loop, "monitor", lambda *_, robust: next(seen))
    monkeypatch.setattr(loop, "refuse_collapse", lambda *_: False)
    said = []
    spec = ADVERSARIAL.model_copy(update={"keep": "best", "ema": ema})
    result = train(natural, tempting, spec, threat, on_note=said.append)
    which = "epoch 1, averaged" if ema else "epoch 1"
    assert result.notes == (f"kept {which}, the best on the validation part",)  # whose gradients do not mislead
    assert [note[:13] for note in said] == ["after epoch 2"]

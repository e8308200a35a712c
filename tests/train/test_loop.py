import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from coldforge.attacks import ThreatModel, parse_attack, parse_inner, perturb, predict
from coldforge.compress import ActivationQuantizer, QuantizedLayer, quantize
from coldforge.data import from_arrays
from coldforge.errors import CollapseError, TrainingError
from coldforge.evaluate import Target, evaluate, summarize
from coldforge.measure import count_macs
from coldforge.models import normalized
from coldforge.provenance import cpp_compiler
from coldforge.recipe import QuantizeSpec, TrainSpec
from coldforge.records import CurvePoint
from coldforge.train import loop, train
from coldforge.train.guard import Collapse, Overfitting, SameAnswer


def accuracy(network, data, threat, attack="pgd-10"):
    found = summarize(evaluate(Target(network), data, [parse_attack(attack)], threat, transfer=False), data.classes)
    return found.clean_accuracy, found.robust_accuracy[attack]


# --- what training is for


@pytest.mark.parametrize("kind", ["float", "batchnorm", "quantized"])
def test_training_learns(kind, build, splits, threat):
    network = build(kind)
    before, _ = accuracy(network, splits.test, threat)
    result = train(network, splits, TrainSpec(epochs=5, batch_size=8, lr=0.03), threat)
    after, _ = accuracy(result.model, splits.test, threat)
    assert before < 0.6
    assert after > 0.9
    assert result.curve[-1].clean_accuracy > 0.9
    assert result.curve[-1].loss < result.curve[0].loss / 2
    assert [point.epoch for point in result.curve] == [1, 2, 3, 4, 5]
    assert {(point.eps, point.robust_accuracy) for point in result.curve} == {(0.0, -1.0)}  # not watched
    assert result.notes == ()
    assert not result.model.training


def test_adversarial_training_is_worth_it(tempting, threat):
    network = normalized(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), (0.5,), (0.1,))
    spec = TrainSpec(epochs=6, batch_size=32, lr=0.03, attack="pgd-3")
    natural = train(network, tempting, spec, threat)
    adversarial = train(network, tempting, spec.model_copy(update={"objective": "adversarial"}), threat)
    clean, robust = accuracy(natural.model, tempting.test, threat)
    assert clean > 0.93  # better than the strong pixels alone
    assert robust < 0.5
    clean, robust = accuracy(adversarial.model, tempting.test, threat)
    assert clean > 0.8
    assert robust > 0.75
    assert adversarial.curve[-1].robust_accuracy == pytest.approx(robust, abs=0.15)
    assert [point.eps for point in adversarial.curve][-1] == threat.eps
    assert adversarial.curve[0].eps < threat.eps  # the ramp


@pytest.mark.parametrize("kind", ["batchnorm", "quantized"])
def test_the_argument_stays_as_it_was(kind, build, splits, threat):
    network = build(kind).train()
    network.network[0].weight.requires_grad_(False) if kind == "batchnorm" else None
    before = copy.deepcopy(network.state_dict())
    needed = [parameter.requires_grad for parameter in network.parameters()]
    random_state = torch.get_rng_state()
    result = train(network, splits, TrainSpec(epochs=1, batch_size=16, objective="adversarial"), threat)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [parameter.requires_grad for parameter in network.parameters()] == needed
    assert [parameter.grad for parameter in network.parameters()] == [None] * len(needed)
    assert all(module.training for module in network.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in result.model.state_dict().items())
    if kind == "batchnorm":
        assert torch.equal(result.model.network[0].weight, before["network.0.weight"])  # frozen stays frozen


@pytest.mark.skipif(cpp_compiler() is None, reason="needs a C++ compiler to compile the network")
@pytest.mark.parametrize("kind", ["float", "batchnorm"])
@pytest.mark.parametrize("objective", ["natural", "adversarial"])
def test_a_compiled_network_trains_like_an_uncompiled_one(kind, objective, build, splits, threat, monkeypatch):
    asked, compile_it = [], nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda network: (asked.append(1), compile_it(network)))
    spec = TrainSpec(epochs=2, batch_size=16, lr=0.01, objective=objective, attack="pgd-2", ema=0.9)
    plain, compiled = (
        train(build(kind), splits, spec, threat, precision="fp32", compiled=how) for how in ("off", "network")
    )
    assert [point.loss for point in compiled.curve] == pytest.approx([point.loss for point in plain.curve], rel=1e-3)
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], tensor, rtol=0.01, atol=1e-3)
    assert asked == [1]
    assert compiled.model._compiled_call_impl is None


def test_step_sizes_are_trained_with_the_weights(build, splits, threat):
    network = build("quantized")
    trained = train(network, splits, TrainSpec(epochs=1, batch_size=16, lr=0.05), threat).model
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, QuantizedLayer)]
    assert len(layers) == 3
    for name, layer in layers:
        assert not torch.equal(trained.get_submodule(name).weight_step, layer.weight_step)
        assert not torch.equal(trained.get_submodule(name).weight, layer.weight)


def test_no_step_size_dies_or_explodes(build, splits, threat):
    """SGD alone carries the steps of this network's last layer below 0: two of its three outputs were constant."""
    network = build("quantized")
    trained = train(network, splits, TrainSpec(epochs=4, batch_size=16, lr=0.05), threat).model
    steps = {name: step for name, step in trained.named_parameters() if name.endswith("step")}
    before = dict(network.named_parameters())
    assert len(steps) == 6
    for name, step in steps.items():
        ratio = step / before[name]
        assert (ratio >= 0.0999).all()
        assert (ratio <= 10.001).all()
    spread = predict(trained, splits.test.pixels()).std(0)
    assert (spread > 0.1).all()


@pytest.mark.parametrize("what", ["seed", "labels"])
def test_another_seed_or_data_set_ends_elsewhere(what, build, splits, threat):
    spec = TrainSpec(epochs=1, batch_size=16)
    first = train(build("float"), splits, spec, threat).model.state_dict()
    if what == "seed":
        second = train(build("float"), splits, spec, threat, seed=1)
    else:
        train_set = splits.train
        other = from_arrays(
            train_set.images, train_set.labels.flip(0), splits.test.images, splits.test.labels, validation=30
        )
        second = train(build("float"), other, spec, threat)
    assert not torch.equal(first["network.0.weight"], second.model.state_dict()["network.0.weight"])


class Idle(nn.Module):
    """Parameters whose gradient is 0 all the time, beside a real network."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.matrix = nn.Parameter(torch.ones(2, 2))
        self.vector = nn.Parameter(torch.ones(2))
        self.number = nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs):
        return self.network(inputs) + 0 * (self.matrix.sum() + self.vector.sum() + self.number)


def test_only_weights_decay(build, splits, threat):
    spec = TrainSpec(
        epochs=1, batch_size=66, lr=0.01, momentum=0, nesterov=False, weight_decay=5, warmup=0, schedule="constant"
    )
    trained = train(Idle(build("float")), splits, spec, threat).model
    assert torch.allclose(trained.matrix, torch.full((2, 2), 1 - 0.01 * 5))
    assert torch.equal(trained.vector, torch.ones(2))
    assert torch.equal(trained.number, torch.tensor(1.0))


# --- what it says


@pytest.mark.parametrize(
    ("objective", "attack", "passes"),
    [("natural", "pgd-7", 3), ("adversarial", "fgsm-rs", 5), ("adversarial", "pgd-3", 9)],
)
@pytest.mark.parametrize(("batch_size", "seen"), [(16, 64), (100, 66)])
def test_macs(objective, attack, passes, batch_size, seen, build, splits, threat):
    """Forward and backward of training are 3 passes, each step of the inner attack 2; the last batch is dropped."""
    spec = TrainSpec(epochs=2, batch_size=batch_size, objective=objective, attack=attack, lr=0.01)
    result = train(build("float"), splits, spec, threat)
    assert result.macs == 2 * seen * passes * count_macs(build("float"), (1, 8, 8))
    assert result.seconds > 0


def test_progress_rises_to_1(build, splits, threat):
    said = []
    spec = TrainSpec(epochs=2, batch_size=16)
    train(build("float"), splits, spec, threat, on_progress=lambda fraction, text: said.append((fraction, text)))
    fractions = [fraction for fraction, _ in said]
    assert fractions == [step / 8 for step in range(1, 9)]
    assert said[0][1].startswith("epoch 1/2  loss ")
    assert said[-1][1].startswith("epoch 2/2  loss ")


# --- what it refuses


class Fragile(nn.Module):
    """Falls to a constant answer for good where a learning rate tears at its weights."""

    def __init__(self, network, limit):
        super().__init__()
        self.network, self.limit = network, limit

    def forward(self, inputs):
        whole = self.network.network[-1].weight.detach().abs().max() < self.limit
        return self.network(inputs) * whole + torch.tensor([0.0, 1.0, 0.0]) * ~whole


def test_a_collapse_is_retried_at_a_third_of_the_rate(build, splits, threat):
    notes = []
    spec = TrainSpec(epochs=2, batch_size=16, lr=0.6, schedule="constant", warmup=0, weight_decay=0)
    result = train(Fragile(build("float"), 0.8), splits, spec, threat, on_note=notes.append)
    assert tuple(notes) == result.notes
    assert 1 <= len(notes) <= 2
    assert notes[0].startswith("training with lr 0.6 collapsed (")
    assert "% of the validation images get the same answer after epoch" in notes[0]
    assert notes[0].endswith("started again with lr 0.2")
    assert result.curve[-1].lr == pytest.approx(0.6 / 3 ** len(notes))
    assert [point.epoch for point in result.curve] == [1, 2]  # of the attempt that held
    assert result.curve[-1].clean_accuracy > 0.8
    again = train(Fragile(build("float"), 0.8), splits, spec, threat)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), result.model.parameters(), strict=True))


class Constant(nn.Sequential):
    """Always the same answer."""

    def forward(self, inputs):
        return super().forward(inputs) * 0 + torch.tensor([0.0, 1.0, 0.0])


def test_a_network_that_always_collapses(build, splits, threat):
    notes = []
    with pytest.raises(CollapseError) as raised:
        train(Constant(build("float")), splits, TrainSpec(lr=0.09, batch_size=16), threat, on_note=notes.append)
    message = str(raised.value)
    assert (
        "training collapsed (attempt 3 of 3), last with lr 0.01: 100% of the validation images get the same answer"
        in message
    )
    assert "Lower lr, raise epochs or eps_ramp, take a stronger attack, or prune less" in message
    assert len(notes) == 2
    with pytest.raises(CollapseError, match=r"collapsed \(attempt 1 of 1\), last with lr 0\.09"):
        train(Constant(build("float")), splits, TrainSpec(lr=0.09, batch_size=16, retries=0), threat)


def test_a_network_that_gives_up_under_attack_meets_it_more_slowly(build, splits, threat):
    """At the same rate first; where that does not help, at a ninth of it, too."""
    notes = []
    spec = TrainSpec(epochs=2, lr=0.09, batch_size=16, eps_ramp=0.2, objective="adversarial", attack="pgd-2")
    with pytest.raises(CollapseError, match=r"last with lr 0\.01 and pgd-2, eps rising over 80% of training: 100% of"):
        train(Constant(build("float")), splits, spec, threat, on_note=notes.append)
    assert notes[0].startswith("training with lr 0.09 and pgd-2 collapsed (100% of the validation images get the same")
    assert notes[0].endswith("; started again with lr 0.09 and pgd-2, eps rising over 60% of training")  # from a state
    # in which it answers, not from the end of epoch 1, which may be slow
    assert notes[1].endswith("with lr 0.01 and pgd-2, eps rising over 80% of training")


def test_the_slower_rise_of_eps_is_what_is_trained_with(build, splits, threat, monkeypatch):
    seen = []

    def once(network, validation, curve, inner, spec):
        seen.append(curve[-1].eps / threat.eps)
        if len(seen) == 2:
            raise SameAnswer("gave up")

    monkeypatch.setattr(loop, "refuse_collapse", once)
    spec = TrainSpec(epochs=4, batch_size=66, lr=0.01, eps_ramp=0.5, objective="adversarial")
    result = train(build("float"), splits, spec, threat)
    assert seen == pytest.approx([1 / 2, 1, 2 / 3, 1, 1])  # epoch 2 once more, when eps rises over three of four
    assert result.notes == (
        "training with lr 0.01 and fgsm-rs collapsed (gave up); rolled back to the end of epoch 1 "
        "with lr 0.01 and fgsm-rs, eps rising over 75% of training",
    )


@pytest.mark.parametrize("attack", ["pgd-2", "fgsm-reuse"])
def test_training_beyond_the_ball(attack, build, splits, threat, monkeypatch):
    farthest = []

    def measured(model, images, *rest, **options):
        found = perturb(model, images, *rest, **options)
        farthest.append(float((found - images).abs().max()))
        return found

    monkeypatch.setattr(loop, "perturb", measured)
    spec = TrainSpec(
        epochs=2, batch_size=33, lr=0.01, eps_ramp=0.0, objective="adversarial", attack=attack, rel_eps=1.5
    )
    result = train(build("float"), splits, spec, threat)
    assert [point.eps for point in result.curve] == pytest.approx([1.5 * threat.eps] * 2)
    assert farthest == pytest.approx([1.5 * threat.eps] * len(farthest), rel=1e-4)


def test_a_constant_answer_that_is_right_is_no_collapse(build, threat):
    images = torch.rand(96, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.ones(96, dtype=torch.int64)
    data = from_arrays(images, labels, images, labels, classes=("a", "b", "c"), validation=30)
    assert train(Constant(build("float")), data, TrainSpec(epochs=1, batch_size=16), threat).notes == ()


@pytest.mark.parametrize("objective", ["natural", "adversarial"])
def test_a_loss_that_is_not_finite(objective, build, splits, threat):
    spec = TrainSpec(epochs=2, batch_size=16, lr=1e30, retries=1, objective=objective)
    with pytest.raises(
        TrainingError, match=r"collapsed \(attempt 2 of 2\).* the loss is not finite at step \d"
    ) as raised:
        train(build("float"), splits, spec, threat)
    assert not isinstance(raised.value, CollapseError)


class Torn(nn.Module):
    """Its loss is finite, its gradient is not: the first step makes the weights NaN."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, inputs):
        return self.network(inputs) * (1 + self.zero.abs().sqrt())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("objective", ["natural", "adversarial"])
def test_weights_that_the_last_step_of_an_epoch_destroys(objective, norm, build, splits):
    threat = ThreatModel(norm, 0.1)
    spec = TrainSpec(epochs=2, batch_size=66, retries=1, objective=objective)
    with pytest.raises(
        TrainingError, match=r"collapsed \(attempt 2 of 2\).* the weights are not finite after step 1"
    ) as raised:
        train(Torn(build("float")), splits, spec, threat)
    assert not isinstance(raised.value, CollapseError)


def curve(*robust, loss=1.5, eps=0.1):
    common = {"lr": 0.1, "clean_accuracy": 0.9, "loss": loss, "eps": eps}
    return [CurvePoint(epoch=epoch, robust_accuracy=value, **common) for epoch, value in enumerate(robust, 1)]


def judge(build, splits, points, attack="fgsm-rs", **settings):
    inner = parse_inner(attack) if attack else None
    settings = {"epochs": 2, "objective": "adversarial" if attack else "natural", **settings}
    spec = TrainSpec(**settings)
    loop.refuse_collapse(build("float"), splits.validation, points, inner, spec)


@pytest.mark.parametrize("robust", [(0.5, 0.05), (0.1, 0.6, 0.55, 0.2), (0.3, 0.0)])
def test_a_fall_of_pgd_accuracy_is_catastrophic_overfitting(robust, build, splits):
    message = rf"catastrophic overfitting: PGD accuracy fell from {max(robust):.0%} to {robust[-1]:.0%} in epoch \d"
    with pytest.raises(Overfitting, match=message):
        judge(build, splits, curve(*robust))


def test_under_a_strong_attack_a_fall_is_a_fault_of_something_else(build, splits):
    """Such as the learning rate, which is what a plain collapse lowers."""
    with pytest.raises(Collapse, match=r"PGD accuracy fell from 64% to 30% in epoch 2") as found:
        judge(build, splits, curve(0.64, 0.3), attack="pgd-7")
    assert type(found.value) is Collapse


def test_few_bits_are_not_measured_by_many(build, splits):
    """With bits_ramp, epochs 1 and 2 of 4 still had more bits at some step."""
    points = curve(0.9, 0.8, 0.3, 0.28)
    judge(build, splits, points, bits_ramp=0.7, epochs=4)
    judge(build, splits, points[:2], bits_ramp=0.7, epochs=4)
    with pytest.raises(Overfitting, match="fell from 80% to 28%"):
        judge(build, splits, points, bits_ramp=0.5, epochs=4)


@pytest.mark.parametrize("robust", [(0.5,), (0.5, 0.4), (0.1, 0.3, 0.5), (0.5, 0.3, 0.45), (0.1, 0.06)])
def test_robustness_that_wavers_is_not(robust, build, splits):
    judge(build, splits, curve(*robust))


def test_epochs_at_a_smaller_eps_are_not_measured_by_those_before_a_rollback(build, splits):
    """eps rises anew, and PGD always has all of it."""
    points = [*curve(0.5), *curve(0.0, 0.2, eps=0.05)[1:]]
    judge(build, splits, points, eps_ramp=0.9)
    with pytest.raises(Overfitting):
        judge(build, splits, curve(0.5, 0.2))


def test_confidence_that_pgd_does_not_bear_out_is_overfitting(build, splits):
    """exp(-0.2) = 82 % under the inner attack, 50 % under PGD: the network fools its own attack."""
    points = curve(0.5, 0.5, loss=0.2)
    with pytest.raises(Overfitting, match=r"fgsm-rs leaves 82% confidence .* PGD accuracy is 50% after epoch 2"):
        judge(build, splits, points)
    judge(build, splits, points, attack="pgd-7")  # strong enough to be believed
    judge(build, splits, curve(0.5, 0.5, loss=0.4))  # 67 %: within reach
    judge(build, splits, points, eps_ramp=0.51)  # eps was still rising when the epoch began, of two the second
    with pytest.raises(Overfitting, match="after epoch 1"):  # a training of one epoch is watched, too
        judge(build, splits, points[:1], eps_ramp=0.0)
    judge(build, splits, points[:1])  # eps was still rising


@pytest.mark.parametrize(("loss", "overfits"), [(0.65, True), (1.0, False)])
def test_smoothed_labels_leave_less_confidence(loss, overfits, build, splits):
    """Three classes, smoothing 0.3: the loss is never below 0.64, which is full confidence."""
    points = curve(0.5, 0.5, loss=loss)
    if overfits:
        with pytest.raises(Overfitting, match=r"leaves 9\d% confidence"):
            judge(build, splits, points, label_smoothing=0.3)
    else:
        judge(build, splits, points, label_smoothing=0.3)


def test_natural_training_may_lose_robustness(build, splits):
    judge(build, splits, curve(0.9, 0.0, loss=0.01), attack="")


def test_an_inner_attack_that_is_too_weak_is_made_stronger(build, splits, threat, monkeypatch):
    """One step more each time, at the rate as it was."""
    told, seen = [], []

    def weak(network, validation, points, inner, spec):
        seen.append(inner.steps)
        if inner.steps < 3:
            raise Overfitting("too weak")

    monkeypatch.setattr(loop, "refuse_collapse", weak)
    spec = TrainSpec(epochs=1, batch_size=66, lr=0.01, objective="adversarial", attack="fgsm-rs")
    result = train(build("float"), splits, spec, threat, on_note=told.append)
    assert seen == [1, 2, 3]
    assert told[1] == ("training with lr 0.01 and pgd-2 collapsed (too weak); started again with lr 0.01 and pgd-3")
    steps = [3 + 2 * inner for inner in seen]  # what collapsed was paid for, too
    assert result.macs == 66 * sum(steps) * count_macs(build("float"), (1, 8, 8))
    with pytest.raises(CollapseError, match=r"collapsed \(attempt 2 of 2\), last with lr 0\.01 and pgd-2: too weak"):
        train(build("float"), splits, spec.model_copy(update={"retries": 1}), threat)


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_the_inner_attack_takes_both_gradients_in_turn(kind, build, splits, threat, monkeypatch):
    modes = []

    def spy(network, *arguments, **keywords):
        modes.append({module.backward_mode for module in network.modules() if isinstance(module, ActivationQuantizer)})
        return perturb(network, *arguments, **keywords)

    monkeypatch.setattr(loop, "perturb", spy)
    spec = TrainSpec(epochs=1, batch_size=16, lr=0.001, objective="adversarial", attack="pgd-4")
    train(build(kind), splits, spec, threat)
    assert modes == ([{"pass_through"}, {"clipped"}] * 2 if kind == "quantized" else [set()] * 4)


def test_the_loss_of_an_epoch_is_the_mean_of_its_steps(build, splits, threat):
    losses = []
    spec = TrainSpec(epochs=1, batch_size=16)
    result = train(
        build("float"), splits, spec, threat, on_progress=lambda _, text: losses.append(float(text.split()[-1]))
    )
    assert math.isclose(result.curve[0].loss, sum(losses) / len(losses), abs_tol=1e-3)


def test_steps_that_are_not_learned_are_rounded_with_all_the_same(build, splits, threat, monkeypatch):
    """The kernels, whose arithmetic is that of the file; and never a compiled network."""
    asked = []
    monkeypatch.setattr(loop, "fused", lambda wanted: asked.append(wanted) or nullcontext())
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: pytest.fail("compiled as a float network"))
    fixed = quantize(build("float"), QuantizeSpec(weight_bits=4, learned_steps=False), splits.train.pixels())
    train(fixed, splits, TrainSpec(epochs=1, batch_size=66), threat, compiled="network")
    assert asked == [True]

"""Objectives, teachers, averaged and perturbed weights, bits that fall, and the way back from a collapse."""

from __future__ import annotations

import copy
import re
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coldforge.attacks import ThreatModel, parse_attack, predict
from coldforge.compress import ActivationQuantizer, QuantizedLayer, quantize
from coldforge.data import from_arrays, load_data
from coldforge.errors import CollapseError, RecipeError
from coldforge.evaluate import Target, evaluate, summarize
from coldforge.measure import count_macs
from coldforge.models import normalized
from coldforge.recipe import DataSpec, FinetuneSpec, QuantizeSpec, TrainSpec
from coldforge.train import Objective, loop, train
from coldforge.train.guard import NotFinite, Overfitting
from coldforge.train.objective import CLEAN_SHARE, Teacher
from coldforge.train.optimizer import quantizer_steps
from coldforge.train.weights import Averaged, perturbed
from coldforge.train.world import World

OBJECTIVES = ("natural", "adversarial", "trades", "distill")


def spec_of(objective, **settings):
    plain = {**FinetuneSpec().model_dump(), "optimizer": "sgd"}
    return FinetuneSpec.model_construct(**{**plain, "objective": objective, **settings})


def robust(network, data, threat, attack="pgd-10"):
    found = summarize(evaluate(Target(network), data, [parse_attack(attack)], threat, transfer=False), data.classes)
    return found.robust_accuracy[attack]


# --- losses, by their definitions


def test_losses_equal_their_definitions():
    generator = torch.Generator().manual_seed(0)
    images, attacked = torch.rand(2, 6, 1, 4, 4, generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    clean, bad = network(images), network(attacked)
    targets = F.one_hot(labels, 3).float()
    kl = (F.softmax(clean, 1) * (F.log_softmax(clean, 1) - F.log_softmax(bad, 1))).sum(1).mean()
    expected = {
        "natural": F.cross_entropy(clean, labels),
        "adversarial": F.cross_entropy(bad, labels),
        "trades": F.cross_entropy(clean, labels) + 6 * kl,
        "distill": (1 - CLEAN_SHARE) * F.cross_entropy(bad, labels) + CLEAN_SHARE * F.cross_entropy(clean, labels),
    }
    for objective, wanted in expected.items():
        given = None if objective == "natural" else attacked
        found = Objective(spec_of(objective)).loss(network, images, given, targets)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("objective", ["adversarial", "trades", "distill"])
def test_the_inner_attack_ascends_the_loss_of_its_objective(objective):
    """Against the gradient that autograd finds for the definition; only its direction counts."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(5, 1, 4, 4, generator=generator)
    labels, targets = torch.tensor([0, 1, 2, 0, 1]), torch.rand(5, 3, generator=generator).softmax(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    logits = torch.randn(5, 3, generator=generator, requires_grad=True)
    loss = {
        "adversarial": lambda: F.cross_entropy(logits, labels, reduction="sum"),
        "trades": lambda: F.kl_div(logits.log_softmax(1), network(images).softmax(1).detach(), reduction="sum"),
        "distill": lambda: F.cross_entropy(logits, targets, reduction="sum"),
    }[objective]()
    (wanted,) = torch.autograd.grad(loss, logits)
    found = Objective(spec_of(objective)).direction(network, images, labels, targets)(logits.detach())
    torch.testing.assert_close(F.cosine_similarity(found, wanted), torch.ones(5))


def test_targets_mix_label_teacher_and_smoothing(splits):
    images, labels = splits.train.pixels(slice(0, 8)), splits.train.labels[:8]
    network = normalized(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), (0.5,), (0.25,)).eval()
    indices = torch.arange(8)
    kept, asked = (Teacher(network, 2.0, fixed) for fixed in (splits.train.pixels(), None))
    assert (kept.asks, asked.asks) == (False, True)
    answers = torch.softmax(predict(network, images) / 2, 1)
    for teacher in (kept, asked):
        torch.testing.assert_close(teacher(images, indices), answers)
    one_hot = F.one_hot(labels, 3).float()
    smoothed = Objective(spec_of("natural", label_smoothing=0.3)).targets(images, labels, indices, 3)
    torch.testing.assert_close(smoothed, 0.7 * one_hot + 0.1)
    mixed = Objective(spec_of("distill", soft=0.25), kept).targets(images, labels, indices, 3)
    torch.testing.assert_close(mixed, 0.75 * one_hot + 0.25 * answers)


# --- what they are for


@pytest.mark.parametrize("kind", ["float", "batchnorm", "quantized"])
@pytest.mark.parametrize("objective", ["trades", "distill"])
def test_robust_objectives_make_robust(objective, kind, build, splits, threat):
    teacher = train(build("float"), splits, spec_of("adversarial", epochs=6, batch_size=8), threat).model
    natural = train(build(kind), splits, spec_of("natural", epochs=5, batch_size=8), threat).model
    result = train(build(kind), splits, spec_of(objective, epochs=10, batch_size=8), threat, teacher=teacher)
    assert robust(result.model, splits.test, threat) > 0.75
    assert robust(result.model, splits.test, threat) >= robust(natural, splits.test, threat)


@pytest.mark.parametrize("attack", ["fgsm-rs", "n-fgsm", "fgsm-reuse", "pgd-2"])
def test_every_inner_attack_makes_robust(attack, build, tempting, threat):
    network = normalized(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), (0.5,), (0.1,))
    spec = spec_of("adversarial", epochs=6, batch_size=32, lr=0.03, attack=attack)
    assert robust(train(network, tempting, spec, threat).model, tempting.test, threat) > 0.75


def test_a_teacher_is_needed(build, splits, threat):
    with pytest.raises(RecipeError, match="expected a teacher, got none"):
        train(build("float"), splits, spec_of("distill"), threat)
    with pytest.raises(ValueError, match="needs a teacher"):
        TrainSpec(objective="distill")


def test_perturbations_of_moved_images_are_not_reused(build, splits, threat):
    moved = copy.copy(splits)
    object.__setattr__(moved, "augment", "crop-flip")
    with pytest.raises(RecipeError, match=r"fgsm-reuse starts where .* n-fgsm"):
        train(build("float"), moved, spec_of("adversarial", attack="fgsm-reuse"), threat)


@pytest.mark.parametrize("attack", ["fgsm", "pgd-20-paper"])
def test_trades_does_not_start_where_its_gradient_is_0(attack, build, splits, threat):
    """It would be natural training by the name of adversarial."""
    with pytest.raises(RecipeError, match=rf"{attack} starts at the image, where the gradient .* is 0"):
        train(build("float"), splits, spec_of("trades", attack=attack), threat)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [({}, 5), ({"awp": 0.01}, 8), ({"attack": "pgd-3"}, 9), ({"objective": "trades"}, 9), ({"ema": 0.9}, 5)],
)
def test_cost_counts_every_pass(settings, passes, build, splits, threat):
    spec = spec_of(**{"objective": "adversarial", "attack": "fgsm-rs", "epochs": 1, "batch_size": 66, **settings})
    assert train(build("float"), splits, spec, threat).macs == 66 * passes * count_macs(build("float"), (1, 8, 8))


def test_a_teacher_costs_one_pass_of_its_own(build, splits, threat):
    spec = spec_of("distill", epochs=2, batch_size=66, attack="fgsm-rs")
    macs = count_macs(build("float"), (1, 8, 8))
    assert train(build("float"), splits, spec, threat, teacher=build("float")).macs == 66 * macs * (2 * 8 + 1)


# --- weights


def test_the_average_is_that_of_the_steps():
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    average = Averaged(network, 0.5)
    slow = 0.0
    for step in range(6):
        network.weight.data.fill_(float(step))
        average.update(network, step)
        decay = min(0.5, (1 + step) / (10 + step))
        slow = decay * slow + (1 - decay) * step
    assert float(average.state["weight"]) == pytest.approx(slow)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_what_is_kept_is_what_the_validation_part_prefers(keep, build, splits, threat):
    spec = spec_of("adversarial", epochs=4, batch_size=16, lr=0.05, ema=0.9, keep=keep, attack="fgsm-rs")
    result = train(build("quantized"), splits, spec, threat)
    points = result.curve[-1:] if keep == "last" else result.curve
    best = max(max(point.robust_accuracy, point.averaged_robust_accuracy) for point in points)
    assert robust(result.model, splits.validation, threat) == pytest.approx(best, abs=1e-6)
    assert result.notes[-1].startswith("kept epoch ")
    assert all(point.averaged_clean_accuracy >= 0 for point in result.curve)


@pytest.mark.parametrize("kind", ["float", "quantized", "1 bit"])
def test_perturbed_weights_are_worse_by_their_measure_and_come_back(kind, build, splits):
    network = build(kind).train() if kind != "1 bit" else few(build, splits, 1, 4).train()
    if kind == "1 bit":  # the weights behind the rounding drift away from the rounded ones
        for module in network.modules():
            if isinstance(module, QuantizedLayer):
                module.weight.data.mul_(5)
    images, labels = splits.train.pixels(), splits.train.labels
    before = copy.deepcopy(network.state_dict())
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    with perturbed(network, 0.01, World()):
        worse = F.cross_entropy(network(images), labels)
        for name, module in network.named_modules():
            if isinstance(module, QuantizedLayer):
                assert module.offset is not None
                rounded = module.quantized_weight().detach()
                assert float(module.offset.norm() / rounded.norm()) == pytest.approx(0.01, rel=1e-3), name
    assert worse > loss
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(module.offset is None for module in network.modules() if isinstance(module, QuantizedLayer))


ONE_STEP = {
    "epochs": 1, "batch_size": 66, "momentum": 0, "nesterov": False, "weight_decay": 0, "warmup": 0,
    "schedule": "constant", "eps_ramp": 0.0, "attack": "pgd-2",
}  # fmt: skip
"""Plain gradient descent, once, on all training images."""


@pytest.fixture
def shown(monkeypatch):
    """What the loss was taken of, each time: clean images, attacked ones, targets. No network is refused."""
    shown, real = [], Objective.loss

    def spy(self, network, *tensors):
        shown.append(tensors)
        return real(self, network, *tensors)

    monkeypatch.setattr(Objective, "loss", spy)
    monkeypatch.setattr(loop, "refuse_collapse", lambda *_: False)
    return shown


def test_only_weights_are_perturbed_and_batchnorm_stays(build, splits):
    network, gamma = build("batchnorm").train(), 0.02
    images, labels = splits.train.pixels(), splits.train.labels
    F.cross_entropy(network(images), labels).backward()
    before, steepest = copy.deepcopy(network.state_dict()), {n: p.grad.clone() for n, p in network.named_parameters()}
    network.eval()  # statistics stand still
    with perturbed(network, gamma, World()):
        assert all(parameter.grad is None for parameter in network.parameters())
        for name, tensor in network.state_dict().items():
            if tensor.ndim > 1 and name in steepest:
                moved, gradient = tensor - before[name], steepest[name]
                wanted = gradient * gamma * before[name].norm() / gradient.norm()
                torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-6, msg=name)
            else:
                assert torch.equal(tensor, before[name]), name
        F.cross_entropy(network(images), labels).backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert {name for name in steepest if before[name].ndim == 1} >= {"network.1.weight", "network.1.bias"}


def test_perturbed_weights_come_back_from_an_error(build, splits):
    for kind in ("batchnorm", "quantized"):
        network = build(kind)
        F.cross_entropy(network(splits.train.pixels()), splits.train.labels).backward()
        before = copy.deepcopy(network.state_dict())
        with pytest.raises(RuntimeError, match="inside"), perturbed(network, 0.1, World()):
            raise RuntimeError("inside")
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
        assert all(module.offset is None for module in network.modules() if isinstance(module, QuantizedLayer))


def gradients_by_hand(network, gamma, attacked, targets):
    """Wu et al. 2020, algorithm 1, on a copy: the gradients at perturbed weights, by name."""
    twin = copy.deepcopy(network).train()
    gradients = torch.autograd.grad(F.cross_entropy(twin(attacked), targets), list(twin.parameters()))
    with torch.no_grad():
        for weight, gradient in zip(twin.parameters(), gradients, strict=True):
            if weight.ndim > 1:
                weight += gamma * weight.norm() / gradient.norm() * gradient
    F.cross_entropy(twin(attacked), targets).backward()
    return {name: weight.grad for name, weight in twin.named_parameters()}


@pytest.mark.parametrize("kind", ["float", "batchnorm"])
def test_a_step_under_perturbed_weights_is_that_of_the_paper(kind, build, splits, threat, shown):
    """The unperturbed weights take the gradient of the perturbed ones."""
    gamma, lr, network = 0.05, 0.02, build(kind)
    trained = train(network, splits, spec_of("adversarial", **ONE_STEP, lr=lr, awp=gamma), threat).model
    (_, attacked, targets), (_, again, _) = shown
    assert torch.equal(attacked, again)
    wanted, plain = (gradients_by_hand(network, each, attacked, targets) for each in (gamma, 0.0))
    before = dict(network.named_parameters())
    for name, parameter in trained.named_parameters():
        found = ((before[name] - parameter) / lr).detach()
        error = 0.01 * float(wanted[name].norm()) + 1e-4
        assert float((found - wanted[name]).norm()) < error, name
        assert float((found - plain[name]).norm()) > 3 * error or name.endswith("0.bias"), name


def test_batchnorm_counts_a_step_under_perturbed_weights_once(build, splits, threat, shown):
    for gamma in (0.0, 0.05):
        spec = spec_of("adversarial", **ONE_STEP, lr=0.01, awp=gamma)
        norm = train(build("batchnorm"), splits, spec, threat).model.network[1]
        assert int(norm.num_batches_tracked) == 1, gamma


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_under_perturbed_weights_learns(precision, build, splits, threat):
    spec = spec_of("adversarial", epochs=6, batch_size=8, awp=0.005, attack="fgsm-rs")
    trained = train(build("quantized"), splits, spec, threat, precision=precision).model
    assert robust(trained, splits.test, threat) > 0.75


# --- few bits


def few(build, splits, weight_bits, activation_bits, ternary=False):
    spec = QuantizeSpec(weight_bits=weight_bits, activation_bits=activation_bits, edge_bits=8, ternary=ternary)
    return quantize(build("float"), spec, splits.train.pixels())


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "ternary", "lr"),
    [(4, 4, False, 0.01), (2, 2, True, 0.01), (2, 4, False, 0.1), (1, 4, False, 0.01)],
)
def test_quantizer_steps_learn_from_attacked_images(
    weight_bits, activation_bits, ternary, lr, build, splits, threat, shown
):
    """Each moves by the gradient of the loss on these, which is another than that on clean ones."""
    network = few(build, splits, weight_bits, activation_bits, ternary)
    before = {name: step.detach().clone() for name, step in quantizer_steps(network).items()}
    assert len(before) == 5, "that of the image stays"
    trained = train(network, splits, spec_of("adversarial", **ONE_STEP, lr=lr), threat).model
    ((clean, attacked, targets),) = shown
    assert float((attacked - clean).abs().max()) == pytest.approx(threat.eps)
    wanted = []
    for images in (attacked, clean):
        twin = copy.deepcopy(network).train()
        gradients = torch.autograd.grad(F.cross_entropy(twin(images), targets), list(quantizer_steps(twin).values()))
        wanted.append(dict(zip(before, gradients, strict=True)))
    for name, step in quantizer_steps(trained).items():
        low, high = before[name] / loop.STEP_RANGE, before[name] * loop.STEP_RANGE
        after = [torch.clamp(before[name] - lr * gradients[name], low, high) for gradients in wanted]
        moved, by_attacked, by_clean = (new.detach() - before[name] for new in (step, *after))
        assert bool((moved != 0).any()), name
        tolerance = 0.02 * float(by_attacked.norm()) + 1e-7
        assert float((moved - by_attacked).norm()) < tolerance, name
        assert float((moved - by_clean).norm()) > 5 * tolerance, name


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(1, 4), (2, 2), (1, 1), (4, 4), (8, 4)])
@pytest.mark.parametrize("ramp", [0.0, 0.6])
def test_networks_of_few_bits_learn(weight_bits, activation_bits, ramp, build, splits, threat):
    network = few(build, splits, weight_bits, activation_bits)
    spec = spec_of("natural", epochs=8, batch_size=8, lr=0.03, bits_ramp=ramp)
    trained = train(network, splits, spec, threat).model
    found = (predict(trained, splits.test.pixels()).argmax(1) == splits.test.labels).float().mean()
    assert found > 0.85
    for module in trained.modules():
        if isinstance(module, QuantizedLayer | ActivationQuantizer):
            assert module.bits == module.final_bits
    for name, module in trained.named_modules():
        if isinstance(module, QuantizedLayer) and module.bits == 1:
            assert set(module.weight_codes().unique().tolist()) <= {-1, 1}, name


def test_bits_fall_one_by_one_and_a_stop_changes_nothing(build, splits, threat, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    spec = spec_of("adversarial", epochs=4, batch_size=16, lr=0.01, bits_ramp=0.7, ema=0.9, attack="fgsm-reuse")
    seen = []

    def note(*_):
        seen.append({m.bits for m in watched[0].modules() if isinstance(m, QuantizedLayer)})

    watched = [None]
    real = loop.perturb

    def spy(network, *arguments, **keywords):
        watched[0] = network
        note()
        return real(network, *arguments, **keywords)

    monkeypatch.setattr(loop, "perturb", spy)
    network = few(build, splits, 2, 4)
    undisturbed = train(network, splits, spec, threat)
    lowest = [min(bits) for bits in seen]
    assert lowest == sorted(lowest, reverse=True)
    assert set(lowest) == {8, 7, 6, 5, 4, 3, 2}

    class Stop(Exception):
        pass

    for steps in (3, 4, 2, 5):
        left = iter(range(steps))

        def stop(*_, left=left):
            if next(left, None) is None:
                raise Stop

        with pytest.raises(Stop):
            train(network, splits, spec, threat, folder=tmp_path, on_progress=stop)
    found = train(network, splits, spec, threat, folder=tmp_path)
    assert found.curve == undisturbed.curve
    first, second = found.model.state_dict(), undisturbed.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- the way back


def test_a_collapse_goes_back_to_the_last_good_epoch(build, splits, threat, monkeypatch, tmp_path):
    """Overfitted in epochs 3 and 4, once each; what was learned before stays."""
    failed = set()

    def overfitted(network, validation, curve, inner, spec):
        if curve[-1].epoch in (3, 4) and curve[-1].epoch not in failed:
            failed.add(curve[-1].epoch)
            raise Overfitting("overfitted")

    monkeypatch.setattr(loop, "refuse_collapse", overfitted)
    spec = spec_of("adversarial", epochs=5, batch_size=16, lr=0.01, attack="fgsm-rs")
    for folder in (None, tmp_path):
        failed.clear()
        told = []
        result = train(build("quantized"), splits, spec, threat, folder=folder, on_note=told.append)
        assert told[0] == (
            "training with lr 0.01 and fgsm-rs collapsed (overfitted); rolled back to the end of epoch 2 with lr 0.01 "
            "and pgd-2"
        )
        assert "rolled back to the end of epoch 3 with lr 0.01 and pgd-3" in told[1]
        assert tuple(told) == result.notes
        assert [point.epoch for point in result.curve] == [1, 2, 3, 4, 5]
        macs = 64 * count_macs(build("quantized"), (1, 8, 8))
        assert result.macs == macs * (5 + 5 + 5 + 7 + 7 + 9 + 9), "what was rolled back was paid for"


@pytest.mark.parametrize(("kind", "poisoned"), [("batchnorm", 9), ("quantized", 12)], ids=["first step", "last step"])
def test_what_is_not_a_number_is_left_behind(kind, poisoned, build, splits, threat, monkeypatch, tmp_path):
    """Once in epoch 3, of four steps each: all goes on as if that epoch had been given up without a NaN."""
    real, calls = Objective.loss, []

    def poison(self, network, *tensors):
        calls.append(1)
        return real(self, network, *tensors) * (torch.nan if len(calls) == poisoned else 1)

    def give_up(network, validation, curve, inner, spec):
        if curve[-1].epoch == 3 and not gave_up:
            gave_up.append(1)
            raise NotFinite("given up")

    spec = spec_of("adversarial", epochs=4, batch_size=16, lr=0.03, attack="fgsm-reuse", ema=0.9)
    gave_up = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "refuse_collapse", give_up)
        wanted = train(build(kind), splits, spec, threat)
    for folder in (None, tmp_path):
        calls.clear()
        told = []
        with monkeypatch.context() as patch:
            patch.setattr(Objective, "loss", poison)
            patch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
            result = train(build(kind), splits, spec, threat, folder=folder, on_note=told.append)
        assert told == [
            f"training with lr 0.03 and fgsm-reuse collapsed (the loss is not finite at step {poisoned - 1}); "
            "rolled back to the end of epoch 2 with lr 0.01 and fgsm-reuse"
        ]
        assert result.notes[:1] == tuple(told)
        assert result.curve == wanted.curve
        assert [point.epoch for point in result.curve] == [1, 2, 3, 4]
        assert [point.lr < 0.012 for point in result.curve[2:]] == [True, True]
        first, second = result.model.state_dict(), wanted.model.state_dict()
        assert all(torch.equal(first[name], second[name]) for name in second)
        assert all(bool(tensor.isfinite().all()) for tensor in first.values())


def test_a_training_that_collapses_again_where_it_went_on_starts_again(build, splits, threat, monkeypatch, tmp_path):
    """Twice in epoch 3: what is wrong was there at the end of epoch 2 already."""
    fell = []

    def collapsing(network, validation, curve, inner, spec):
        if curve[-1].epoch == 3 and len(fell) < 2:
            fell.append([point.epoch for point in curve])
            raise loop.Collapse("one answer")

    monkeypatch.setattr(loop, "refuse_collapse", collapsing)
    spec = spec_of("adversarial", epochs=4, batch_size=16, lr=0.09, attack="fgsm-rs")
    for folder in (None, tmp_path):
        fell.clear()
        result = train(build("float"), splits, spec, threat, folder=folder)
        assert [note.partition("; ")[2] for note in result.notes] == [
            "rolled back to the end of epoch 2 with lr 0.03 and fgsm-rs",
            "started again with lr 0.01 and fgsm-rs",
        ]
        assert fell == [[1, 2, 3], [1, 2, 3]]
        assert [point.epoch for point in result.curve] == [1, 2, 3, 4]
        fresh = train(build("float"), splits, spec.model_copy(update={"lr": 0.01}), threat)
        pairs = zip(result.model.parameters(), fresh.model.parameters(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs), "nothing is left of what collapsed"


def test_a_training_that_failed_leaves_nothing_to_continue(build, splits, threat, monkeypatch, tmp_path):
    def collapsing(network, validation, curve, inner, spec):
        if curve[-1].epoch == 2:
            raise loop.Collapse("one answer")

    monkeypatch.setattr(loop, "refuse_collapse", collapsing)
    spec = spec_of("adversarial", epochs=2, batch_size=16, lr=0.01, attack="fgsm-rs")
    with pytest.raises(CollapseError, match="attempt 3 of 3"):
        train(build("float"), splits, spec, threat, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(loop, "refuse_collapse", lambda *arguments: None)
    result = train(build("float"), splits, spec, threat, folder=tmp_path)
    assert result.notes == ()
    assert result.curve[0].lr == train(build("float"), splits, spec, threat).curve[0].lr


@pytest.fixture(scope="module")
def trousers_and_bags():
    """400 images to train with, 100 to watch."""
    whole = load_data(DataSpec(source="fashion-mnist-mini", validation=1))
    parts = []
    for part, n in ((whole.train, 500), (whole.test, 50)):
        chosen = (part.labels == 1) | (part.labels == 8)
        parts += [part.images[chosen][:n], (part.labels[chosen] == 8).long()[:n]]
    return from_arrays(*parts, validation=100)


def test_a_network_that_overfits_fgsm_is_noticed_and_gets_a_stronger_attack(trousers_and_bags, monkeypatch):
    """Nothing is staged here: large eps and one step are enough (Wong et al. 2020, section 5.4)."""
    data, wide = trousers_and_bags, ThreatModel("linf", 0.35)
    torch.manual_seed(2)
    network = normalized(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(784, 2),
        ), data.mean, data.std,
    ).eval()  # fmt: skip
    attacks, caught = [], []
    real_guard, real_attack = loop.refuse_collapse, loop.perturb

    def guard(network, *arguments):
        try:
            return real_guard(network, *arguments)
        except Overfitting:
            caught.append([robust(network, data.validation, wide, attack) for attack in ("fgsm-rs", "pgd-10")])
            raise

    def perturb(network, images, direction, threat, inner, *arguments, **keywords):
        attacks.append(inner.label)
        return real_attack(network, images, direction, threat, inner, *arguments, **keywords)

    monkeypatch.setattr(loop, "refuse_collapse", guard)
    monkeypatch.setattr(loop, "perturb", perturb)
    spec = spec_of(
        "adversarial", epochs=8, batch_size=32, lr=0.03, weight_decay=0, schedule="constant", warmup=0.2, eps_ramp=0.4,
        attack="fgsm-rs", retries=4,
    )  # fmt: skip
    for seed in (2, 0, 1, 3):  # which of them overfits, and how much is saved, is for the last bits to say
        attacks.clear()
        caught.clear()
        with suppress(CollapseError):
            result = train(network, data, spec, wide, seed=seed)
            if caught and robust(result.model, data.validation, wide) > caught[0][1] + 0.15:
                break
    else:
        pytest.fail("no training overfitted FGSM and was saved")
    by_its_own, by_pgd = caught[0]
    assert by_its_own > by_pgd + 0.2, "it withstands only what it was trained with"
    said = r"training with lr 0\.03 and fgsm-rs collapsed \(catastrophic overfitting: .*\); "
    assert re.match(said + r"rolled back to the end of epoch [3-7] with lr 0\.03 and pgd-2$", result.notes[0])
    assert list(dict.fromkeys(attacks))[:2] == ["fgsm-rs", "pgd-2"]
    assert len(result.notes) >= len(caught)
    assert [point.epoch for point in result.curve] == list(range(1, 9))

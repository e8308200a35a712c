"""Mistakes that evaluations of robustness are known for, numbered as in the project's list of them.

Those that belong to one attack or one layer are tested there, under names of the same form; the last test here counts
them all. The list, in short:

 1 eps in normalized space            12 vanishing cross-entropy             23 FAB hits outside eps
 2 pixels stuck at the box            13 fewer than four classes             24 no image, one image
 3 success overwritten by a restart   14 probabilities for logits            25 settrace
 4 restarts that do nothing           15 training mode, BatchNorm            26 success only at low precision
 5 only the last iterate counts       16 gradients left on parameters        27 no error bar
 6 last iterate never asked           17 losses averaged over a batch        28 integers have no gradient
 7 steps that cannot cross the ball   18 results move with the batch         29 clipping range hides pixels
 8 a famous name for less             19 global random state                 30 observers still running
 9 predicted for true labels          20 norm by a hair too large            31 simulated is not deployed
10 wrong images dropped               21 saved as 8 bits by truncation       32 attacked by transfer too
11 mean instead of worst case         22 Square's last row and column
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from coldforge.attacks import PGD, Attack, ThreatModel, parse_attack, predict
from coldforge.attacks.base import Slots
from coldforge.compress import ActivationQuantizer, attacking, quantize
from coldforge.data import ImageSet
from coldforge.deploy import write_probe
from coldforge.errors import AttackError, ModelError
from coldforge.evaluate import Target, evaluate, mcnemar, summarize, wilson_interval
from coldforge.evaluate.fast import Precision
from coldforge.models import Normalize, check_classifier
from coldforge.recipe import QuantizeSpec

LINF = ThreatModel("linf", 0.2)
Task = tuple[nn.Module, Tensor, Tensor]


def as_data(images: Tensor, labels: Tensor) -> ImageSet:
    return ImageSet((images * 255).round().to(torch.uint8), labels, tuple("abcd"))


class Shift(Attack):
    """One step that makes every pixel brighter (or darker)."""

    uses_gradients: ClassVar[bool] = False
    steps: int = 1
    random_start: bool = False
    up: bool

    @property
    def name(self) -> str:
        return "up" if self.up else "down"

    def advance(self, slots: Slots, threat_model: ThreatModel) -> Tensor:
        return slots.points + (threat_model.eps if self.up else -threat_model.eps)


def test_pitfall_01_eps_is_in_pixels_whatever_the_network_normalizes(task: Task) -> None:
    model, images, labels = task
    stretched = nn.Sequential(Normalize([0.5], [0.1]), Normalize([-5.0], [10.0]), model)  # undoes itself
    for attack in (parse_attack("pgd-6"), parse_attack("apgd-ce-6")):
        plain = attack(model, images, labels, LINF, keep_last=True)
        found = attack(stretched.eval(), images, labels, LINF, keep_last=True)
        LINF.verify(found.last, images)
        assert float((found.last - images).abs().max()) == pytest.approx(LINF.eps, abs=1e-6)
        assert (found.fooled != plain.fooled).sum() <= 2
    with pytest.raises(AttackError, match=r"inside \[0, 1\], found -5 .*make the normalization a layer"):
        parse_attack("pgd-6")(model, (images - 0.5) / 0.1, labels, LINF)


class Settles(Attack):
    """Each run stays where it starts: at a pixel value of its own."""

    uses_gradients: ClassVar[bool] = False
    steps: int = 1
    levels: tuple[float, ...]

    @property
    def name(self) -> str:
        return "settles"

    def start(self, slots: Slots, rows: list[int], threat_model: ThreatModel) -> Tensor:
        return torch.stack([torch.full(slots.clean.shape[1:], self.levels[int(slots.run[row])]) for row in rows])

    def advance(self, slots: Slots, threat_model: ThreatModel) -> Tensor:
        return slots.points


@pytest.mark.parametrize("levels", [(0.4, 0.6), (0.6, 0.4), (0.6, 0.4, 0.6)], ids=["first", "last", "in the middle"])
@pytest.mark.parametrize("keep_last", [False, True])
def test_pitfall_03_a_success_is_not_overwritten_by_a_restart_with_a_higher_loss(
    levels: tuple[float, ...], keep_last: bool
) -> None:
    """Dark: wrong, at a cross-entropy of 0.80. Bright: right, at 1.05."""
    dark, bright = torch.tensor([0.0, 0.2, -9.0]), torch.tensor([0.07, 0.0, 0.0])
    assert (
        nn.functional.cross_entropy(dark, torch.tensor(0)) < 0.8 < nn.functional.cross_entropy(bright, torch.tensor(0))
    )

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.flatten(1)[:, :1] < 0.5, dark, bright)

    images, labels = torch.full((70, 1, 2, 2), 0.5), torch.zeros(70, dtype=torch.int64)  # some wait for others to leave
    attack = Settles(levels=levels, restarts=len(levels))
    found = attack(Model(), images, labels, LINF, keep_last=keep_last)
    assert found.fooled.all()
    assert (found.adversarial == 0.4).all()
    assert (found.restart == levels.index(0.4)).all()
    assert found.margin.tolist() == pytest.approx([-0.2] * 70)
    if keep_last:
        assert (found.last == levels[-1]).all()
    else:
        ledger = evaluate(Target(Model()), as_data(images, labels), [attack, Shift(up=True)], LINF)
        assert ledger.right.all()
        assert ledger.fooled["settles"].all()
        assert not ledger.fooled["up"].any()
        assert not ledger.survived("worst_case").any()


def test_pitfall_07_every_named_attack_can_cross_the_ball() -> None:
    for steps in (2, 3, 7, 20, 100, 1000):
        attack = parse_attack(f"pgd-{steps}")
        assert isinstance(attack, PGD)
        assert steps * attack.step_size(LINF) >= 2 * LINF.eps
    with pytest.raises(ValueError, match="cannot cross the ball"):
        PGD(label="eps / steps", steps=20, rel_step=1 / 20)


@pytest.mark.parametrize("name", ["pgd-10", "apgd-ce-10", "apgd-t-10", "fab-t-10", "square-300"])
def test_pitfall_07_and_the_far_wall_is_reached(name: str) -> None:
    """From a start anywhere in the ball to its one corner that fools: at 90 % of the way for random search."""
    images, labels = torch.full((20, 1, 3, 3), 0.5), torch.zeros(20, dtype=torch.int64)
    target = 0.5 + LINF.eps * torch.tensor([1.0, -1, 1, 1, -1, 1, -1, -1, 1]).view(1, 1, 3, 3)

    def model(points: Tensor) -> Tensor:
        distance = (points - target).flatten(1).abs().mean(1)
        return torch.stack([distance, torch.full_like(distance, 0.1 * LINF.eps)], 1)

    assert parse_attack(name)(model, images, labels, LINF).fooled.all()


def test_pitfall_09_labels_are_the_true_ones(task: Task) -> None:
    """Against predicted labels every wrong answer would count as a right one."""
    model, images, labels = task
    wrong = (labels + 1) % 4
    right = predict(model, images).argmax(1) == labels
    found = evaluate(Target(model), as_data(images, wrong), [parse_attack("fgsm")], ThreatModel("linf", 1e-4))
    assert not found.survived("fgsm")[right].any()
    assert found.survived("worst_case").sum() <= (~right).sum()


@pytest.mark.parametrize("name", ["fgsm", "pgd-5", "apgd-ce-5", "apgd-t-5-1"])
def test_pitfall_09_attacks_flee_from_the_true_label(name: str) -> None:
    """Where the network is wrong already and its file is right, the way from the predicted label leads back."""
    images, labels = torch.full((9, 1, 3, 3), 0.5), torch.zeros(9, dtype=torch.int64)

    class Network(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1)
            return torch.stack([0.45 - mean, mean - 0.45], 1)

    class File:
        def logits(self, x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1)
            return torch.stack([0.55 - mean, mean - 0.55], 1)

        def labels(self, x: Tensor) -> Tensor:
            return self.logits(x).argmax(1)

    assert (predict(Network(), images).argmax(1) != labels).all()
    ledger = evaluate(
        Target(Network(), File()), as_data(images, labels), [parse_attack(name)], ThreatModel("linf", 0.1)
    )
    assert ledger.right.all(), "the file's answers count"
    assert ledger.fooled[name].all()
    assert ledger.disputed[name].all(), "the search begins where the network is wrong"


def test_pitfall_10_wrong_when_clean_stays_in_the_denominator(task: Task) -> None:
    model, images, labels = task
    spoiled = labels.clone()
    spoiled[:60] = (labels[:60] + 1) % 4  # 60 images that the network gets wrong
    for attacks in ([parse_attack("fgsm")], [parse_attack("fgsm"), parse_attack("pgd-3")]):
        ledger = evaluate(Target(model), as_data(images, spoiled), attacks, ThreatModel("linf", 1e-4))
        found = summarize(ledger, tuple("abcd"))
        assert found.n == found.robust_n["fgsm"] == found.robust_n["worst_case"] == 150
        assert found.robust_accuracy["worst_case"] == pytest.approx(found.clean_accuracy, abs=0.01)
        assert found.clean_accuracy <= 90 / 150


def test_pitfall_11_worst_case_image_by_image_and_not_the_mean() -> None:
    images = torch.full((8, 1, 4, 4), 0.5)
    labels = torch.zeros(8, dtype=torch.int64)
    images[4:] = 0.3

    class Between(nn.Module):  # right for means in 0.2 ... 0.6: half of the images fall upwards, half downwards
        def forward(self, x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1)
            return torch.stack([0.2 - (mean - 0.4).abs(), *[torch.zeros_like(mean)] * 3], 1)

    ledger = evaluate(Target(Between()), as_data(images, labels), [Shift(up=True), Shift(up=False)], LINF)
    found = summarize(ledger, tuple("abcd"))
    assert found.clean_accuracy == 1
    assert found.robust_accuracy == {"up": 0.5, "down": 0.5, "worst_case": 0.0}


def test_pitfall_14_probabilities_are_refused(task: Task) -> None:
    model, _, _ = task
    check_classifier(model, (1, 8, 8), 4)
    with pytest.raises(ModelError, match="returns probabilities; expected logits; remove the softmax"):
        check_classifier(nn.Sequential(model, nn.Softmax(1)), (1, 8, 8), 4)


def test_pitfall_21_adversarial_images_are_kept_in_full(task: Task, tmp_path: Path) -> None:
    model, images, labels = task
    tight = ThreatModel("linf", 8 / 255)
    pixels = (images * 255).round().to(torch.uint8)
    clean = pixels.float() / 255
    last = parse_attack("pgd-5")(model, clean, labels, tight, keep_last=True).last
    truncated = (last * 255).to(torch.uint8).float() / 255
    assert not tight.contains(truncated, clean).all(), "the pitfall must exist for the test to mean something"
    answers = predict(model, last).argmax(1)
    path = tmp_path / "probe.safetensors"
    write_probe(path, images=pixels, adversarial=last, labels=labels, clean_answer=labels, adversarial_answer=answers)
    kept = load_file(path)["adversarial"]
    assert torch.equal(kept, last)
    assert torch.equal(predict(model, kept).argmax(1), answers)
    in_8_bits = tight.rounded(last, clean)
    assert tight.contains(in_8_bits, clean).all()
    assert torch.equal(in_8_bits, (in_8_bits * 255).round().to(torch.uint8).float() / 255)


@pytest.mark.parametrize("name", ["pgd-3", "apgd-t-3", "fab-t-3", "square-10", "autoattack-lite"])
def test_pitfall_25_debuggers_and_coverage_keep_their_trace(
    task: Task, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, images, labels = task

    def never(*_: object) -> None:
        raise AssertionError("the trace was replaced")

    before = sys.gettrace()
    for function in ("settrace", "setprofile"):
        monkeypatch.setattr(sys, function, never)
    parse_attack(name)(model, images[:3], labels[:3], LINF)
    assert sys.gettrace() is before


def test_pitfall_27_fractions_come_with_an_error_bar_and_pairs_with_a_test(task: Task) -> None:
    low, high = wilson_interval(500, 1000)
    assert (high - low) / 2 == pytest.approx(0.031, abs=5e-4)
    model, images, labels = task
    found = summarize(evaluate(Target(model), as_data(images, labels), [parse_attack("pgd-5")], LINF), tuple("abcd"))
    for name, accuracy in found.robust_accuracy.items():
        low, high = found.robust_ci95[name]
        assert low < accuracy < high
        assert 0.1 < high - low < 0.2  # of 150 images
    assert mcnemar(20, 5) < 0.01, "15 of 1000 images: far inside the error bar of either, but the same images"


class Stopped(nn.Module):
    """A network behind a change of its input that autograd cannot follow back."""

    def __init__(self, network: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.change = network, change

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.change(images))


def in_integers(network: nn.Module, images: Tensor) -> nn.Module:
    """By torch.ao: weights and activations are int8, and the modules call integer kernels."""
    from torch.ao.quantization import DeQuantStub, QuantStub, convert, get_default_qconfig, prepare

    stubbed = nn.Sequential(QuantStub(), copy.deepcopy(network), DeQuantStub()).eval()
    stubbed.qconfig = get_default_qconfig(torch.backends.quantized.engine)
    observed = prepare(stubbed)
    observed(images)
    return convert(observed)


NO_WAY_BACK = {
    "detached": lambda network, images: Stopped(network, torch.Tensor.detach),
    "rounded to uint8": lambda network, images: Stopped(network, lambda x: (x * 255).round().to(torch.uint8) / 255),
    "through numpy": lambda network, images: Stopped(network, lambda x: torch.from_numpy(x.detach().numpy().round(2))),
    "int8 modules": in_integers,
}
IS_REFUSED = (
    "expected logits that depend on the pixels by differentiable operations, found none; take .* such as square"
)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # torch.ao's, about itself
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("precision", ["exact", "fp32", "bf16"])
@pytest.mark.parametrize("stop", NO_WAY_BACK)
def test_pitfall_28_a_network_without_gradients_is_refused_and_not_called_robust(
    task: Task, stop: str, precision: Precision
) -> None:
    model, images, labels = task
    target, data = Target(NO_WAY_BACK[stop](model, images).eval()), as_data(images[:40], labels[:40])
    for name in ("fgsm", "apgd-ce-3", "fab-t-3-2", "autoattack-lite"):
        with pytest.raises(AttackError, match=IS_REFUSED):
            evaluate(target, data, [parse_attack(name)], LINF, precision=precision)
    square = parse_attack("square-60")
    ledger = evaluate(target, data, [square], ThreatModel("linf", 0.35), precision=precision)
    assert ledger.right.float().mean() > 0.9
    assert 10 < int((ledger.fooled[square.name] & ledger.right).sum()) < 40


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning")
@pytest.mark.parametrize("precision", ["exact", "fp32", "bf16"])
def test_pitfall_28_a_network_whose_last_layer_is_int8_is_refused_too(task: Task, precision: Precision) -> None:
    """By torch.ao, dynamically: torch says that such logits need gradients, and has none to give."""
    from torch.ao.quantization import quantize_dynamic

    model, images, labels = task
    target = Target(quantize_dynamic(copy.deepcopy(model), {nn.Linear}))
    with pytest.raises(AttackError, match=IS_REFUSED):
        evaluate(target, as_data(images[:40], labels[:40]), [parse_attack("fgsm")], LINF, precision=precision)


def test_pitfall_29_a_clipping_range_does_not_hide_white_pixels() -> None:
    """A range that ends at 0.9: white pixels are clipped, and their straight-through gradient is 0."""
    rounds = ActivationQuantizer(8, reads_image=True)
    rounds.set_range(0.0, 0.9)
    head = nn.Linear(16, 4)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 13.0, -9.0, -9.0]))
        head.weight[0] = 1.0  # class 0 while pixels are bright: 16 * 0.9 > 13 > 16 * 0.8
    model = nn.Sequential(rounds, nn.Flatten(), head).eval()
    images, labels = torch.ones(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64)
    fgsm = parse_attack("fgsm")
    with attacking(model, "clipped"):
        assert not fgsm(model, images, labels, LINF).fooled.any(), "the pitfall must exist"
    ledger = evaluate(Target(model), as_data(images, labels), [fgsm], LINF)
    assert ledger.right.all()
    assert ledger.fooled["fgsm"].all()
    assert ledger.by["fgsm"] == ["pass_through"] * 3


def test_pitfall_30_ranges_of_our_quantizers_stand_still(task: Task) -> None:
    model, images, labels = task
    rounded = quantize(model, QuantizeSpec(weight_bits=4, activation_bits=4), images[:20])
    before = {name: tensor.clone() for name, tensor in rounded.state_dict().items()}
    assert not any(m.observing for m in rounded.modules() if isinstance(m, ActivationQuantizer))
    rounded.train()
    with attacking(rounded):
        for name in ("pgd-4", "apgd-ce-4", "fab-t-4-1", "square-10"):
            parse_attack(name)(rounded, images, labels, ThreatModel("linf", 0.5))
    assert rounded.training
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_pitfall_30_ranges_of_foreign_quantizers_stand_still(task: Task) -> None:
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    model, images, labels = task
    rounds = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    foreign = nn.Sequential(model, rounds).eval()
    foreign(images)  # calibrated, and as usual nobody switched the observer off
    before = {name: tensor.clone() for name, tensor in foreign.state_dict().items()}
    parse_attack("pgd-4")(foreign, images, labels, LINF)
    assert int(rounds.observer_enabled) == 1, "as it was"
    for name, tensor in foreign.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# --- the list


def test_every_pitfall_has_a_test_whose_name_says_so() -> None:
    tests = Path(__file__).parents[1]
    covered: set[int] = set()
    for file in tests.rglob("test_*.py"):
        for numbers in re.findall(r"def test_pitfalls?_((?:\d+_(?:and_)?)+)", file.read_text(encoding="utf-8")):
            covered |= {int(number) for number in re.findall(r"\d+", numbers)}
    assert covered == set(range(1, 33))

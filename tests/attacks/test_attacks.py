"""One table that every attack enters, and the promises that every attack keeps."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coldforge.attacks import PGD, Attack, ThreatModel, check_images, margins, parse_attack, predict
from coldforge.attacks.base import Slots
from coldforge.attacks.query import TILE, loss_direction, query
from coldforge.errors import AttackError, RecipeError
from coldforge.spec import seed_of
from traces import draw_a_little, traces

WEAK = ThreatModel("linf", 0.16)
LINF, L2 = ThreatModel("linf", 0.3), ThreatModel("l2", 1.5)
TABLE = [
    (parse_attack("fgsm"), LINF, 0.75),
    (parse_attack("fgsm-rs"), LINF, 0.75),
    (parse_attack("pgd-10"), LINF, 0.45),
    (parse_attack("pgd-10-3"), LINF, 0.45),
    (parse_attack("pgd-120-paper"), LINF, 0.45),
    (PGD(label="pgd-margin", steps=10, rel_step=0.25, loss="margin"), LINF, 0.45),
    (parse_attack("apgd-ce-20"), LINF, 0.4),
    (parse_attack("apgd-t-20"), LINF, 0.4),
    (parse_attack("fab-t-20"), LINF, 0.4),
    (parse_attack("square-200"), LINF, 0.75),
    (parse_attack("fgsm"), L2, 0.9),
    (parse_attack("pgd-10"), L2, 0.8),
    (parse_attack("apgd-ce-20"), L2, 0.75),
    (parse_attack("apgd-t-20-2"), L2, 0.75),
    (parse_attack("square-200"), L2, 0.9),
]
each_attack = pytest.mark.parametrize(
    ("attack", "threat_model", "at_most"), TABLE, ids=lambda value: getattr(value, "name", getattr(value, "norm", ""))
)


@each_attack
def test_attack_lowers_accuracy_and_its_images_prove_it(
    task: Any, attack: Attack, threat_model: ThreatModel, at_most: float
) -> None:
    model, images, labels = task
    result = attack(model, images, labels, threat_model)
    answers = predict(model, result.adversarial).argmax(1)
    assert torch.equal(answers != labels, result.fooled), "a reported success must be one when asked again"
    assert (~result.fooled).float().mean() <= at_most
    threat_model.verify(result.adversarial, images)
    assert ((result.step >= 0) == result.fooled).all()
    assert ((result.margin < 0) == result.fooled).all() or not attack.projects
    assert result.finished.all()
    runs = 3 if attack.targets(model, images[:1], labels[:1]) is not None else attack.restarts
    passes = 2 if attack.name.startswith("fab") else 1  # FAB asks again where it steps back
    assert (result.queries <= runs * (passes * attack.steps + 1)).all()


@each_attack
def test_attack_leaves_no_trace(task: Any, attack: Attack, threat_model: ThreatModel, at_most: float) -> None:
    model, images, labels = task
    model[1].train()  # a mixed state must come back as it was
    draw_a_little()
    before = traces(model, images)
    attack(model, images[:9], labels[:9], threat_model)
    assert traces(model, images) == before
    model.eval()


@each_attack
def test_verdicts_do_not_depend_on_batch_size_or_order(
    task: Any, attack: Attack, threat_model: ThreatModel, at_most: float
) -> None:
    model, images, labels = task
    whole = attack(model, images, labels, threat_model)
    for size, upto in ((1, 5), (7, 14)):
        for start in range(0, upto, size):
            names = torch.arange(start, start + size)
            part = attack(model, images[names], labels[names], threat_model, indices=names)
            assert torch.equal(part.adversarial, whole.adversarial[names])
            assert torch.equal(part.step, whole.step[names])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    shuffled = attack(model, images[order], labels[order], threat_model, indices=order)
    assert torch.equal(shuffled.adversarial, whole.adversarial[order])


def slow_pgd(
    model: nn.Module, image: Tensor, label: int, start: Tensor, attack: PGD, tm: ThreatModel
) -> tuple[bool, int]:
    """The textbook, one image at a time, in float64: (fooled, at which step)."""
    model = model.double()
    x, point = image.double(), start.double()
    try:
        for step in range(attack.steps + 1):
            point.requires_grad_()
            logits = model(point[None])
            if int(logits.argmax()) != label:
                return True, step
            loss = nn.functional.cross_entropy(logits, torch.tensor([label]))
            (gradient,) = torch.autograd.grad(loss, point)
            point = point.detach() + attack.step_size(tm) * gradient.sign()
            point = torch.maximum(torch.minimum(point, x + tm.eps), x - tm.eps).clamp(0, 1)
        return False, -1
    finally:
        model.float()


@pytest.mark.parametrize("name", ["fgsm", "pgd-10", "pgd-120-paper"])
def test_pgd_equals_its_slow_twin(task: Any, name: str) -> None:
    model, images, labels = task
    attack = parse_attack(name)
    right = (predict(model, images).argmax(1) == labels).nonzero()[:25, 0]
    result = attack(model, images[right], labels[right], LINF, indices=right)
    same = 0
    for row, which in enumerate(right.tolist()):
        start = images[which]
        if attack.random_start:
            generator = torch.Generator().manual_seed(seed_of(0, attack.name, which, 0))
            start = LINF.random_start(images[which][None], generator)[0]
        fooled, step = slow_pgd(model, images[which], int(labels[which]), start, attack, LINF)
        same += (fooled, step) == (bool(result.fooled[row]), int(result.step[row]))
    assert same >= len(right) - 1  # a sign of a gradient near 0 may differ between float32 and float64


class Band(nn.Module):
    """Right everywhere except where the mean pixel lies in a band; the loss pulls the mean upwards through it."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        inside = ((mean > self.low) & (mean < self.high)).float() * 10
        return torch.stack([2 - mean, mean + inside], 1)


def run_band(low: float, high: float) -> bool:
    images, labels = torch.full((1, 1, 4, 4), 0.5), torch.zeros(1, dtype=torch.int64)
    attack = PGD(label="steps of 0.01", steps=20, rel_step=0.1, random_start=False)
    return bool(attack(Band(low, high), images, labels, ThreatModel("linf", 0.1)).fooled)


def test_pitfall_5_silent_success_an_iterate_in_the_middle_counts() -> None:
    assert run_band(0.535, 0.545), "fooled at step 4 only; the last iterate is right again"


def test_pitfall_6_the_last_iterate_is_judged() -> None:
    images, labels = torch.full((1, 1, 4, 4), 0.2), torch.zeros(1, dtype=torch.int64)
    attack = PGD(label="two steps", steps=2, rel_step=1.0, random_start=False)
    assert attack(Band(0.395, 1.0), images, labels, ThreatModel("linf", 0.2)).step.tolist() == [1]
    one = PGD(label="one step", steps=1, rel_step=1.0, random_start=False)
    assert one(Band(0.395, 1.0), images, labels, ThreatModel("linf", 0.2)).fooled.tolist() == [True]


def test_pitfall_2_pixels_at_the_border_of_the_box_still_move(task: Any) -> None:
    model, images, labels = task
    black = images == 0
    assert black.float().mean() > 0.3
    moved = parse_attack("pgd-10")(model, images, labels, LINF, keep_last=True).last - images
    assert (moved[black] > 0.1).float().mean() > 0.2
    assert moved[black].min() >= 0


def test_pitfall_4_and_3_more_restarts_never_help_the_network(task: Any) -> None:
    model, images, labels = task
    survivors = []
    for restarts in (1, 2, 4, 8):
        attack = PGD(label="restarts", steps=2, restarts=restarts, rel_step=1.0)
        survivors.append(~attack(model, images, labels, WEAK).fooled)
    for fewer, more in itertools.pairwise(survivors):
        assert not (more & ~fewer).any(), "an image that fell to fewer restarts must fall to more"
    assert survivors[-1].sum() < survivors[0].sum()


def test_pitfall_12_confident_logits_do_not_hide_the_gradient(task: Any) -> None:
    model, images, labels = task
    plain = parse_attack("pgd-10")(model, images, labels, WEAK).fooled
    confident = parse_attack("pgd-10")(lambda x: model(x) * 200, images, labels, WEAK).fooled
    assert confident.sum() >= plain.sum() - 1 > 5
    inputs = images[:8].clone().requires_grad_()
    naive = torch.autograd.grad(nn.functional.cross_entropy(model(inputs) * 200, labels[:8], reduction="sum"), inputs)[
        0
    ]
    assert (naive.flatten(1).abs().amax(1) == 0).any(), "the pitfall must exist for the test to mean something"
    _, gradient = query(lambda x: model(x) * 200, images[:8], lambda logits: loss_direction(logits, labels[:8], "ce"))
    assert gradient is not None
    assert (gradient.flatten(1).abs().amax(1) > 0).all()


def test_loss_direction_is_the_gradient_up_to_scale() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 6])
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels, reduction="sum"), logits)
    found = loss_direction(logits.detach(), labels, "ce")
    torch.testing.assert_close(found, expected / expected.abs().amax(1, keepdim=True))
    (expected,) = torch.autograd.grad(-margins(logits, labels).sum(), logits)
    torch.testing.assert_close(loss_direction(logits.detach(), labels, "margin"), expected)


@pytest.mark.parametrize("name", ["pgd-3", "pgd-margin", "apgd-ce-3", "apgd-t-3", "fab-t-3"])
def test_pitfall_17_an_image_is_attacked_alike_whatever_its_neighbours(
    task: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that normalize hide a gradient divided by the batch: so the gradient itself, and its length."""
    model, images, labels = task
    attack = parse_attack(name) if name != "pgd-margin" else PGD(label=name, steps=3, rel_step=1.0, loss="margin")
    advance, lengths = type(attack).advance, []

    def compare(self: Attack, slots: Slots, threat_model: ThreatModel) -> Tensor:
        for row in range(0, len(slots.labels), 9) if len(slots.gradient) and not slots.blind else ():
            alone = copy.copy(slots)
            alone.take(torch.tensor([row]))
            point = alone.points.requires_grad_()
            logits = model(point)
            (expected,) = torch.autograd.grad(logits, point, self.direction(logits.detach(), alone))
            torch.testing.assert_close(alone.gradient, expected, rtol=1e-3, atol=1e-5)
            lengths.append(float(expected.norm()))
        return advance(self, slots, threat_model)

    monkeypatch.setattr(type(attack), "advance", compare)
    crowd = attack(model, images, labels, LINF, keep_last=True).last[:1]
    assert len(lengths) > 50
    assert min(lengths) > 1e-2, "far longer than what is allowed to differ"
    assert torch.equal(attack(model, images[:1], labels[:1], LINF, keep_last=True).last, crowd)


def test_predictions_are_made_in_tiles_of_one_size(task: Any) -> None:
    model, images, _ = task
    shapes = set()

    def spy(x: Tensor) -> Tensor:
        shapes.add(tuple(x.shape))
        return model(x)

    predict(spy, images[:3])
    assert shapes == {(TILE, 1, 8, 8)}


def test_fooled_images_make_room(task: Any) -> None:
    model, images, labels = task
    passes = 0

    def spy(x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return model(x)

    many, truth = images.repeat(6, 1, 1, 1), labels.repeat(6)
    result = parse_attack("pgd-50")(spy, many, truth, ThreatModel("linf", 0.3))
    assert result.fooled.all()
    assert passes < 51 * len(many) / TILE / 2


def test_with_a_judge_the_search_goes_on_until_the_judge_is_fooled(task: Any) -> None:
    model, images, labels = task

    def stubborn(x: Tensor) -> Tensor:
        logits = model(x).detach()
        logits[torch.arange(len(x)), owners(x)] += 2.0
        return logits.argmax(1)

    def owners(x: Tensor) -> Tensor:
        return labels[torch.cdist(x.flatten(1), images.flatten(1), p=float("inf")).argmin(1)]

    attack = parse_attack("pgd-20")
    alone, judged = attack(model, images, labels, WEAK), attack(model, images, labels, WEAK, judge=stubborn)
    assert judged.fooled.sum() < alone.fooled.sum()
    assert (stubborn(judged.adversarial[judged.fooled]) != labels[judged.fooled]).all()
    assert (judged.step[judged.fooled] >= alone.step[judged.fooled]).all()
    assert (judged.step[judged.fooled] > alone.step[judged.fooled]).any()


def test_the_judge_sees_the_last_point_even_if_the_network_is_right() -> None:
    images, labels = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    result = parse_attack("pgd-5")(
        Band(2.0, 3.0), images, labels, LINF, judge=lambda x: torch.ones(len(x), dtype=torch.int64)
    )
    assert result.fooled.all()


def test_literal_threat_model_may_leave_the_box_and_only_it(task: Any) -> None:
    model, images, labels = task
    literal = ThreatModel("linf", 0.3, box=False)
    assert parse_attack("pgd-10")(model, images, labels, literal).adversarial.min() < 0
    assert parse_attack("pgd-10")(model, images, labels, LINF).adversarial.min() >= 0


def test_a_result_outside_the_threat_model_is_refused(task: Any) -> None:
    _, images, _ = task
    with pytest.raises(AttackError, match=r"expected perturbations of at most 0\.3 \(linf\), found 0\.4"):
        LINF.verify(images + 0.4, images)
    with pytest.raises(AttackError, match="NaN"):
        LINF.verify(images * float("nan"), images)
    with pytest.raises(AttackError, match=r"inside \[0, 1\]"):
        LINF.verify(images + 0.1, images)


def test_wrong_images_are_refused(task: Any) -> None:
    model, images, labels = task
    with pytest.raises(AttackError, match=r"inside \[0, 1\], found .*make the normalization a layer"):
        check_images(images * 2 - 1, labels)
    with pytest.raises(AttackError, match="expected float32 images"):
        parse_attack("fgsm")(model, (images * 255).to(torch.uint8), labels, LINF)
    with pytest.raises(AttackError, match="expected 150 int64 labels"):
        check_images(images, labels[:3])


@pytest.mark.parametrize(
    ("name", "steps", "restarts", "random_start"),
    [
        ("fgsm", 1, 1, False),
        ("fgsm-rs", 1, 1, True),
        ("pgd-7", 7, 1, True),
        ("pgd-50-10", 50, 10, True),
        ("pgd-20-paper", 20, 1, False),
    ],
)
def test_names_say_what_is_run(name: str, steps: int, restarts: int, random_start: bool) -> None:
    attack = parse_attack(name)
    assert (attack.name, attack.steps, attack.restarts, attack.random_start) == (name, steps, restarts, random_start)


def test_unknown_and_useless_attacks_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"unknown attack 'pdg-20'; .*pgd-K"):
        parse_attack("pdg-20")
    with pytest.raises(RecipeError, match="at least 1 step"):
        parse_attack("pgd-0")
    with pytest.raises(ValueError, match="cannot cross the ball"):
        PGD(label="x", steps=10, rel_step=0.1)
    with pytest.raises(ValueError, match="expected a step size, either relative or absolute"):
        PGD(label="x", steps=10)
    with pytest.raises(ValueError, match="restarts without random start"):
        PGD(label="x", steps=5, restarts=2, rel_step=1, random_start=False)


def test_the_papers_step_is_absolute(task: Any) -> None:
    """0.01 on inputs in [-1, 1]: 0.1 eps on Fashion-MNIST (pixel eps 0.05), 0.32 eps on CIFAR-10 (4/255)."""
    attack = parse_attack("pgd-20-paper")
    assert attack.step_size(ThreatModel("linf", 0.05)) == attack.step_size(ThreatModel("linf", 4 / 255)) == 0.005
    model, images, labels = task
    with pytest.raises(AttackError, match=r"20 steps of 0\.005 cannot cross a ball of eps 0\.3; take at least 120"):
        attack(model, images, labels, LINF)


@pytest.mark.parametrize("name", ["pgd-5", "pgd-20-3", "apgd-t-10", "fab-t-10-2", "square-50", "autoattack-lite"])
def test_progress_reaches_the_end(task: Any, name: str) -> None:
    model, images, labels = task
    seen: list[float] = []
    parse_attack(name)(model, images, labels, LINF, on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_a_new_attack_writes_one_hook(task: Any) -> None:
    class Random(Attack):
        steps: int = 5

        @property
        def name(self) -> str:
            return "random"

        def advance(self, slots: Slots, threat_model: ThreatModel) -> Tensor:
            noise = torch.rand(slots.clean.shape, generator=torch.Generator().manual_seed(int(slots.step.sum())))
            return slots.clean + 10 * (noise - 0.5)

    model, images, labels = task
    result = Random()(model, images, labels, LINF)
    LINF.verify(result.adversarial, images)  # the hook left the ball; the attack did not

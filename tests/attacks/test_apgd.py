"""APGD against a slow twin written from the paper, and its targeted loss."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.attacks import APGD, ThreatModel, parse_attack, predict
from coldforge.attacks.apgd import strongest_others, targeted_direction
from coldforge.attacks.base import Slots
from coldforge.spec import seed_of

LINF, L2 = ThreatModel("linf", 0.18), ThreatModel("l2", 1.2)
CHECKPOINTS = {
    100: [22, 41, 57, 70, 80, 87, 93, 99],
    50: [11, 21, 30, 38, 45],
    20: [4, 7, 9, *range(10, 21)],
    5: [1, 2, 3, 4, 5],
    1: [1],
}
"""Those of the published code, which rounds window lengths down; at 100 steps they are those of the paper."""


def test_checkpoints_of_100_steps_are_those_of_the_paper() -> None:
    parts = [0.0, 0.22]
    while parts[-1] < 1:
        parts.append(parts[-1] + max(parts[-1] - parts[-2] - 0.03, 0.06))
    assert [math.ceil(100 * part - 1e-9) for part in parts[1:-1]] == CHECKPOINTS[100]


@pytest.mark.parametrize("steps", CHECKPOINTS)
def test_checkpoints(steps: int) -> None:
    windows = APGD(steps=steps)._windows().tolist()
    assert len(windows) == steps + 1
    assert [step for step, window in enumerate(windows) if window] == CHECKPOINTS[steps]
    before = 0
    for step in CHECKPOINTS[steps]:
        assert windows[step] == step - before, "a window begins at the checkpoint before"
        before = step


# --- the slow twin


def cross_entropy(logits: Tensor, label: int, target: int) -> Tensor:
    return F.cross_entropy(logits[None], torch.tensor([label]))


def targeted_dlr(logits: Tensor, label: int, target: int) -> Tensor:
    """Equation 7 of the paper."""
    ordered = logits.sort(descending=True).values
    return -(logits[label] - logits[target]) / (ordered[0] - (ordered[2] + ordered[3]) / 2)


LOSSES = {"ce": cross_entropy, "dlr": targeted_dlr}


def slow_apgd(
    model: nn.Module, x: Tensor, label: int, target: int, start: Tensor, attack: APGD, tm: ThreatModel
) -> tuple[int, list[float]]:
    """Algorithm 1 of arXiv 2003.01690 in float64, one image: step of the first success or -1; size of each step."""

    def look(point: Tensor) -> tuple[float, Tensor, bool]:
        point = point.clone().requires_grad_()
        logits = model(point[None])[0]
        loss = LOSSES[attack.loss](logits, label, target)
        return float(loss.detach()), torch.autograd.grad(loss, point)[0], int(logits.argmax()) != label

    def project(point: Tensor) -> Tensor:
        delta = point - x
        delta = delta.clamp(-tm.eps, tm.eps) if tm.norm == "linf" else delta * min(1.0, tm.eps / float(delta.norm()))
        return (x + delta).clamp(0, 1)

    def ascend(point: Tensor, gradient: Tensor, size: float) -> Tensor:
        return project(point + size * (gradient.sign() if tm.norm == "linf" else gradient / gradient.norm()))

    checkpoints = CHECKPOINTS[attack.steps]
    before, point, size, sizes, losses = 0, start, 2 * tm.eps, [], []
    best = at_check = -math.inf
    halved, moved = True, start
    for step in range(attack.steps + 1):
        old, point = point, moved
        loss, gradient, wrong = look(point)
        if wrong:
            return step, sizes
        losses.append(loss)
        if loss > best:
            best, best_point, best_gradient = loss, point, gradient
        if step == 0:
            at_check = best
        if step in checkpoints:
            rises = sum(losses[i + 1] > losses[i] for i in range(before, step))
            halved = rises <= 0.75 * (step - before) or (not halved and best <= at_check)
            at_check, before = best, step
            if halved:
                size, point, gradient = size / 2, best_point, best_gradient
        sizes.append(size)
        ahead = ascend(point, gradient, size)
        moved = ahead if step == 0 else project(point + 0.75 * (ahead - point) + 0.25 * (point - old))
    return -1, sizes


class Watched(APGD):
    """Writes down the size of every step."""

    sizes: ClassVar[dict[tuple[int, int], float]] = {}

    def advance(self, slots: Slots, threat_model: ThreatModel) -> Tensor:
        moved = super().advance(slots, threat_model)
        for key, step, size in zip(slots.key.tolist(), slots.step.tolist(), slots.memory["size"].tolist(), strict=True):
            self.sizes[key, step] = size
        return moved


@pytest.mark.parametrize(
    ("loss", "tm", "steps"),
    [("ce", LINF, 100), ("ce", LINF, 20), ("ce", L2, 100), ("dlr", LINF, 50), ("dlr", L2, 20)],
    ids=lambda value: getattr(value, "norm", str(value)),
)
def test_equals_its_slow_twin(task: tuple[nn.Module, Tensor, Tensor], loss: Any, tm: ThreatModel, steps: int) -> None:
    model, images, labels = task
    rows = (predict(model, images).argmax(1) == labels).nonzero()[:16, 0]
    attack = Watched(loss=loss, steps=steps, n_targets=2)
    attack.sizes.clear()
    model.double()
    try:

        def precise(points: Tensor) -> Tensor:
            logits: Tensor = model(points.double())
            return logits

        found = attack(precise, images[rows], labels[rows], tm, indices=rows)
        targets = strongest_others(precise, images[rows], labels[rows], 2)
        same, halvings = 0, 0
        for row, which in enumerate(rows.tolist()):
            alike = True
            for run in range(2 if loss == "dlr" else 1):
                key = seed_of(0, attack.name, which, run)
                start = tm.random_start(images[which][None], torch.Generator().manual_seed(key))[0].double()
                clean, label, target = images[which].double(), int(labels[which]), int(targets[row, run])
                step, sizes = slow_apgd(model, clean, label, target, start, attack, tm)
                alike &= [attack.sizes[key, s] for s in range(len(sizes))] == sizes
                halvings += sizes.count(sizes[-1]) < len(sizes) if sizes else 0
                if step >= 0:
                    break
            alike &= (step, run if step >= 0 else -1) == (int(found.step[row]), int(found.restart[row]))
            same += alike
    finally:
        model.float()
    assert same >= len(rows) - 1  # points are float32 here and float64 there
    assert halvings >= 4, "step sizes must have been halved"
    assert 0 < int(found.fooled.sum()) < len(rows)


@pytest.mark.parametrize("slack", [1.02, 0.98])
@pytest.mark.parametrize("name", ["apgd-ce-30", "apgd-t-30"])
def test_on_a_linear_model_success_is_what_geometry_says(name: str, slack: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, generator=generator)
    image = 0.4 + 0.2 * torch.rand(1, 1, 4, 4, generator=generator)
    bias = -float(image.flatten() @ weight) - 0.2
    for norm, distance in (("linf", 0.2 / float(weight.abs().sum())), ("l2", 0.2 / float(weight.norm()))):
        found = parse_attack(name)(
            lambda x: torch.stack([torch.zeros(len(x)), x.flatten(1) @ weight + bias], 1),
            image,
            torch.zeros(1, dtype=torch.int64),
            ThreatModel(norm, distance * slack),  # type: ignore[arg-type]
        )
        assert bool(found.fooled) == (slack > 1), norm


# --- losses


@pytest.mark.parametrize("classes", [4, 10])
def test_direction_is_the_gradient_of_the_targeted_dlr_loss(classes: int) -> None:
    logits = torch.randn(40, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(40) % classes
    targets = (labels + 1 + torch.arange(40) % (classes - 1)) % classes
    loss = torch.stack([targeted_dlr(*row) for row in zip(logits, labels.tolist(), targets.tolist(), strict=True)])
    (expected,) = torch.autograd.grad(loss.sum(), logits)
    found = targeted_direction(logits.detach().float(), labels, targets).double()
    torch.testing.assert_close(found, expected / expected.abs().amax(1, keepdim=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 3])
def test_pitfall_13_below_four_classes_the_loss_is_a_difference(classes: int) -> None:
    logits = 9 * torch.randn(30, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % classes
    targets = (labels + 1) % classes
    expected = F.one_hot(targets, classes) - F.one_hot(labels, classes)
    assert torch.equal(targeted_direction(logits, labels, targets), expected.float())


@pytest.mark.parametrize("classes", [2, 3])
def test_pitfall_13_fewer_than_four_classes(task: tuple[nn.Module, Tensor, Tensor], classes: int) -> None:
    model, images, labels = task

    def fewer(x: Tensor) -> Tensor:
        logits: Tensor = model(x)
        return torch.cat([logits[:, : classes - 1], logits[:, classes - 1 :].logsumexp(1, keepdim=True)], 1)

    folded = labels.clamp_max(classes - 1)
    for name in ("apgd-t-20", "fab-t-20", "square-100", "autoattack-lite"):
        found = parse_attack(name)(fewer, images[:40], folded[:40], ThreatModel("linf", 0.3))
        assert found.finished.all()
        assert found.restart.max() <= classes - 2
        assert found.fooled.any(), name
        wrong = predict(fewer, found.adversarial).argmax(1) != folded[:40]
        assert torch.equal(wrong, found.fooled)


def test_pitfall_12_losses_of_confident_logits_can_still_be_compared() -> None:
    """Cross-entropy of both rows is 0 in float64 (the gaps are 800 and 801), and exactly the same."""
    logits = torch.tensor([[0.0, -800.0, -900.0, -900.0], [0.0, -801.0, -900.0, -900.0]])
    slots = Slots(*[torch.empty(0)] * 11)
    slots.logits, slots.labels = logits, torch.zeros(2, dtype=torch.int64)
    assert F.cross_entropy(logits.double(), slots.labels, reduction="none").tolist() == [0.0, 0.0]
    loss = APGD(loss="ce")._loss(slots)
    assert loss[0] > loss[1]


@pytest.mark.parametrize("name", ["apgd-ce-30", "apgd-t-30", "fab-t-20"])
def test_pitfall_12_a_confident_network_is_attacked_alike(task: tuple[nn.Module, Tensor, Tensor], name: str) -> None:
    model, images, labels = task
    plain = parse_attack(name)(model, images, labels, LINF).fooled
    confident = parse_attack(name)(lambda x: model(x) * 200, images, labels, LINF).fooled
    assert 20 < plain.sum() < len(images)
    assert (plain != confident).sum() <= 2


# --- targets


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_targets_are_the_strongest_other_classes(task: tuple[nn.Module, Tensor, Tensor], count: int) -> None:
    model, images, labels = task
    logits, targets = predict(model, images), strongest_others(model, images, labels, count)
    assert targets.shape == (len(images), min(count, 3))
    for row, (values, label) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
        others = sorted((k for k in range(4) if k != label), key=lambda k: -values[k])
        assert targets[row].tolist() == others[:count]


def test_each_target_is_a_run_of_its_own(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    tiny = ThreatModel("linf", 1e-4)
    right = predict(model, images).argmax(1) == labels
    for name, runs in (("apgd-t-3", 3), ("apgd-t-3-2", 2), ("fab-t-3-1", 1)):
        found = parse_attack(name)(model, images, labels, tiny)
        standing = right & ~found.fooled
        assert standing.sum() > 100
        assert (found.queries[standing] >= runs * 4).all()
        assert (found.queries[standing] <= runs * (4 if name.startswith("apgd") else 7)).all()


def test_the_true_class_is_no_target_where_other_logits_are_infinite() -> None:
    logits = torch.tensor([[1.0, 3.0, -torch.inf, -torch.inf]])
    assert 1 not in strongest_others(lambda x: logits.expand(len(x), 4), torch.zeros(1, 1, 2, 2), torch.tensor([1]), 9)
    logits = torch.tensor([[3.0, 1.0, -torch.inf, -torch.inf]])
    assert 0 not in strongest_others(lambda x: logits.expand(len(x), 4), torch.zeros(1, 1, 2, 2), torch.tensor([0]), 9)


# --- networks whose gradient is not a number somewhere


@pytest.mark.parametrize("name", ["fgsm", "pgd-10", "apgd-ce-20", "apgd-t-20"])
def test_one_pixel_without_gradient_does_not_stop_the_l2_search(
    task: tuple[nn.Module, Tensor, Tensor], name: str
) -> None:
    model, images, labels = task

    def broken(x: Tensor) -> Tensor:
        logits: Tensor = model(x)
        return logits + 0 * x[:, 0, 0, :1].clamp_max(0).sqrt()  # the root's slope at 0 is infinite, times 0: NaN

    plain = parse_attack(name)(model, images, labels, L2)
    found = parse_attack(name)(broken, images, labels, L2)
    L2.verify(found.adversarial, images)
    assert found.fooled.sum() >= plain.fooled.sum() - 3

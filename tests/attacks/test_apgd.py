"""APGD against a slow twin written from the paper, and its targeted loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.attacks import APGD, ThreatModel, margins, parse_attack, predict
from coldforge.attacks.apgd import strongest_others, targeted_direction
from coldforge.attacks.randomness import image_key

LINF = ThreatModel("linf", 0.2)


def slow_apgd(
    model: nn.Module, x: Tensor, label: int, start: Tensor, steps: int, eps: float
) -> tuple[int, list[float]]:
    """Algorithm 1 of arXiv 2003.01690 in float64, one image: (step of the first success or -1, step sizes)."""

    def look(point: Tensor) -> tuple[float, Tensor, bool]:
        point = point.clone().requires_grad_()
        logits = model(point[None])
        loss = F.cross_entropy(logits, torch.tensor([label]))
        return float(loss.detach()), torch.autograd.grad(loss, point)[0], int(logits.argmax()) != label

    def project(point: Tensor) -> Tensor:
        return point.clamp(x - eps, x + eps).clamp(0, 1)

    checkpoints, part, gap = [0], [0.0, 0.22], 0.22
    while part[-1] < 1:
        gap = max(gap - 0.03, 0.06)
        part.append(part[-1] + gap)
    checkpoints = sorted({round(p * steps) for p in part if p <= 1})
    point, old, size, sizes = start, start, 2 * eps, [2 * eps]
    loss, gradient, wrong = look(point)
    best, best_point, best_gradient, at_check, halved = loss, point, gradient, loss, True
    losses = [loss]
    if wrong:
        return 0, sizes
    for step in range(1, steps + 1):
        ahead = project(point + size * gradient.sign())
        moved = ahead if step == 1 else project(point + 0.75 * (ahead - point) + 0.25 * (point - old))
        old, point = point, moved
        loss, gradient, wrong = look(point)
        if wrong:
            return step, sizes
        losses.append(loss)
        if loss > best:
            best, best_point, best_gradient = loss, point, gradient
        if step in checkpoints[1:]:
            window = step - checkpoints[checkpoints.index(step) - 1]
            rises = sum(losses[i + 1] > losses[i] for i in range(step - window, step))
            stuck = not halved and best <= at_check
            halved = rises <= 0.75 * window or stuck
            at_check = best
            if halved:
                size, point, gradient = size / 2, best_point, best_gradient
                sizes.append(size)
    return -1, sizes


@pytest.mark.parametrize("steps", [100, 50])
def test_equals_its_slow_twin(task: tuple[nn.Module, Tensor, Tensor], steps: int) -> None:
    model, images, labels = task
    rows = (predict(model, images).argmax(1) == labels).nonzero()[:30, 0]
    attack = APGD(loss="ce", steps=steps)
    found = attack(model, images[rows], labels[rows], LINF, indices=rows)
    same, halvings = 0, 0
    double = model.double()
    try:
        for row, which in enumerate(rows.tolist()):
            generator = torch.Generator().manual_seed(image_key(0, attack.name, which, 0))
            start = LINF.random_start(images[which][None], generator)[0].double()
            step, sizes = slow_apgd(double, images[which].double(), int(labels[which]), start, steps, LINF.eps)
            same += step == int(found.step[row])
            halvings += len(sizes) - 1
    finally:
        model.float()
    assert same >= len(rows) - 2  # signs of gradients near 0 differ between float32 and float64
    assert halvings > 10, "the twin must have used its checkpoints"
    assert 0 < int(found.fooled.sum()) < len(rows)


def test_checkpoints_of_the_paper() -> None:
    table = APGD(steps=100)._windows()
    assert [step for step in range(101) if table[step]] == [22, 41, 57, 70, 80, 87, 93, 99]
    assert table[table > 0].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]
    for steps in (1, 5, 20):
        assert len(APGD(steps=steps)._windows()) == steps + 1


@pytest.mark.parametrize("classes", [4, 10])
def test_direction_is_the_gradient_of_the_targeted_dlr_loss(classes: int) -> None:
    logits = torch.randn(40, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(40) % classes
    targets = (labels + 1 + torch.arange(40) % (classes - 1)) % classes
    ordered = logits.sort(1).values
    loss = -(logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None]))[:, 0] / (
        ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2 + 1e-12
    )
    (expected,) = torch.autograd.grad(loss.sum(), logits)
    found = targeted_direction(logits.detach().float(), labels, targets).double()
    torch.testing.assert_close(found, expected / expected.abs().amax(1, keepdim=True), rtol=1e-4, atol=1e-4)


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


def test_targets_are_the_strongest_other_classes(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    logits, targets = predict(model, images), strongest_others(model, images, labels, 9)
    assert targets.shape == (len(images), 3)
    assert not (targets == labels[:, None]).any()
    values = logits.gather(1, targets)
    assert (values[:, :-1] >= values[:, 1:]).all()
    assert torch.allclose(logits.gather(1, labels[:, None])[:, 0] - values[:, 0], margins(logits, labels))
    assert strongest_others(model, images, labels, 2).shape[1] == 2


def test_pitfall_12_a_confident_network_is_attacked_alike(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    plain = APGD(steps=30)(model, images, labels, LINF).fooled
    confident = APGD(steps=30)(lambda x: model(x) * 300, images, labels, LINF).fooled
    assert 20 < plain.sum() < len(images)
    assert (plain != confident).sum() <= 2

"""Which channels go: rankings by gradient and BatchNorm, global ratios, several steps, one layer alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.attacks import ThreatModel, loss_direction, parse_inner, perturb
from coldforge.compress import joined, prune, replay, taylor
from coldforge.compress.importance import batchnorm_scale
from coldforge.errors import ModelError
from coldforge.models import normalized, resnet20
from coldforge.recipe import PruneSpec

Build = Callable[..., nn.Module]
SHAPE = (3, 8, 8)


def spec(ratio: float = 0.5, **keys: object) -> PruneSpec:
    return PruneSpec.model_validate({"ratio": ratio, "round_to": 4, "min_width": 4} | keys)


def batches(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.rand(16, *SHAPE, generator=generator), torch.randint(10, (16,), generator=generator)) for _ in range(n)
    ]


def test_taylor_is_the_squared_change_of_the_loss_to_first_order(build: Build) -> None:
    """Against finite differences: scale one filter by 1 - h; the derivative by h at 0 is the sum of weight * gradient.

    The bias is no part of the filter.
    """
    model = build("plain").double()
    data = [(images.double(), labels) for images, labels in batches()]
    scores = taylor(model, data)(model, "2")
    h = 1e-5
    for channel in (0, 7, 31):
        total = 0.0
        for images, labels in data:
            losses = []
            for factor in (1 - h, 1 + h):
                with torch.no_grad():
                    before = model[2].weight[channel].clone()
                    model[2].weight[channel] *= factor
                    losses.append(float(F.cross_entropy(model(images), labels)))
                    model[2].weight[channel] = before
            total += ((losses[1] - losses[0]) / (2 * h)) ** 2
        assert float(scores[channel]) == pytest.approx(total, rel=1e-4, abs=1e-12)


def test_taylor_keeps_what_the_images_need(build: Build) -> None:
    """A filter whose output nobody reads has the score 0, however large it is."""
    model = build("plain")
    with torch.no_grad():
        model[2].weight[3] *= 100
        model[5].weight.view(24, 32, -1)[:, 3] = 0
    scores = taylor(model, batches())(model, "2")
    assert float(scores[3]) == 0
    assert int((scores > 0).sum()) >= 20
    _, plan = prune(model, spec(0.5), image_shape=SHAPE, importance=taylor(model, batches()))
    assert 3 in next(removed for name, _, removed in plan.steps if name == "2")


# --- gradients of adversarial images


def with_an_idle_channel() -> nn.Sequential:
    """Of (1, 4, 4). Channels 0 and 1 read the left half; 2 fires only where the right half is brighter than it ever is
    on a clean image, and then speaks for class 0; 3 is of little use on all images.
    """
    model = nn.Sequential(nn.Conv2d(1, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    read, answer = torch.zeros(4, 4, 4), torch.tensor([[0.0, 2.0, 1.0, 0.0], [2.0, 0.0, -1.0, 0.1]])
    read[0, :, :2], read[1, :, :2], read[2, :, 2:], read[3, :, :2] = 0.1, -0.1, 1.0, 0.1
    with torch.no_grad():
        model[0].weight.copy_(read[:, None])
        model[0].bias.copy_(torch.tensor([-0.4, 0.4, -4.02, 0.0]))
        model[3].weight.copy_(answer)
        model[3].bias.zero_()
    return model.eval()


def left_half_tells(n: int) -> tuple[Tensor, Tensor]:
    """Dark (0) or bright (1) in the left half, 0.5 in the right one, of which channel 2 sees 8 * 0.5 < 4.02."""
    labels = torch.arange(n) % 2
    images = torch.full((n, 1, 4, 4), 0.5)
    images[:, :, :, :2] += 0.3 * (2.0 * labels - 1).view(-1, 1, 1, 1)
    return images, labels


def attacked(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    ascend, generator = partial(loss_direction, labels=labels, loss="ce"), torch.Generator().manual_seed(0)
    return perturb(model, images, ascend, ThreatModel("linf", 0.1), parse_inner("pgd-7"), generator)


def by_hand(model: nn.Sequential, images: Tensor, labels: Tensor) -> list[float]:
    """No autograd: by the chain rule, channel c changes the loss by the mean over images of

    (softmax - one-hot) . answer[:, c] * [it fires] * (its filter . image).
    """
    read, bias, answer = model[0].weight.detach().flatten(1), model[0].bias.detach(), model[3].weight.detach()
    totals = [0.0] * len(read)
    for image, label in zip(images.flatten(1), labels.tolist(), strict=True):
        hidden = [float(row @ image + shift) for row, shift in zip(read, bias, strict=True)]
        error = (answer @ torch.tensor(hidden).clamp_min(0)).softmax(0)
        error[label] -= 1
        for channel, value in enumerate(hidden):
            if value > 0:
                totals[channel] += float(error @ answer[:, channel]) * float(read[channel] @ image) / len(images)
    return [total**2 for total in totals]


def test_taylor_on_adversarial_images_is_the_chain_rule_on_them() -> None:
    model = with_an_idle_channel()
    images, labels = left_half_tells(32)
    found = attacked(model, images, labels)
    clean = taylor(model, [(images, labels)])(model, "0").tolist()
    halves = [(found[:16], labels[:16]), (found[16:], labels[16:])]
    adversarial = taylor(model, halves)(model, "0").tolist()
    assert clean == pytest.approx(by_hand(model, images, labels), rel=1e-4, abs=1e-12)
    expected = [sum(scores) for scores in zip(*(by_hand(model, *half) for half in halves), strict=True)]
    assert adversarial == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert adversarial != pytest.approx(clean, rel=0.1)


def test_a_channel_that_only_adversarial_images_wake_is_ranked_by_them() -> None:
    """Clean images call it worthless; adversarial ones let another channel go."""
    model = with_an_idle_channel()
    images, labels = left_half_tells(32)
    one_of_four = spec(0.25, round_to=1, min_width=1)
    for seen, removed in ((images, 2), (attacked(model, images, labels), 3)):
        ranking = taylor(model, [(seen, labels)])
        assert (float(ranking(model, "0")[2]) == 0) == (removed == 2)
        _, plan = prune(model, one_of_four, image_shape=(1, 4, 4), importance=ranking)
        assert plan.steps == (("0", True, (removed,)),)


def test_batchnorm_scale_decides(build: Build) -> None:
    model = build("residual")
    with torch.no_grad():
        for name in ("stem.1", "bn1", "bn2"):
            norm = model.get_submodule(name)
            norm.weight.copy_(torch.arange(1.0, len(norm.weight) + 1))
    assert float(batchnorm_scale(model)(model, "conv1")[2]) == 3.0
    _, plan = prune(model, spec(0.5, importance="batchnorm"), image_shape=SHAPE)
    removed = {name: indices for name, _, indices in plan.steps}
    for name in ("conv1", "stem.0", "conv2"):
        if name in removed:
            assert removed[name] == tuple(range(len(removed[name])))
    with pytest.raises(ModelError, match=r'expected a network with BatchNorm .* take "l1"'):
        prune(build("plain"), spec(0.5, importance="batchnorm"), image_shape=SHAPE)


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_layers_without_a_batchnorm_are_ranked_by_their_size(scope: str) -> None:
    """And not emptied because nothing is known of them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[1].weight.copy_(1 + 0.1 * torch.randn(16))
        model[5].weight[:10] *= 3
    small, plan = prune(model, spec(0.3, importance="batchnorm", scope=scope, min_width=1), image_shape=(3, 8, 8))
    assert plan.achieved == pytest.approx(0.3, abs=0.06)
    removed = {name: indices for name, _, indices in plan.steps}
    assert removed["5"]
    assert not set(removed["5"]) & set(range(10)), "those that weigh most stay"
    assert small[0].out_channels > 4


def test_names_that_need_images_are_refused_without(build: Build) -> None:
    with pytest.raises(ModelError, match="needs images: pass importance=taylor"):
        prune(build("plain"), spec(0.5, importance="taylor"), image_shape=SHAPE)


# --- global


def test_global_pruning_takes_from_where_it_matters_least(build: Build) -> None:
    model = build("plain")

    def first_layer_is_worthless(network: nn.Module, name: str) -> Tensor:
        width = network.get_submodule(name).weight.shape[0]
        scores = torch.ones(width)
        scores[: width // 4 if name != "0" else width - 1] = 0.01
        return scores

    _, uniform = prune(model, spec(0.5), image_shape=SHAPE, importance=first_layer_is_worthless)
    _, plan = prune(
        model, spec(0.5, scope="global", floor=0.25), image_shape=SHAPE, importance=first_layer_is_worthless
    )
    shares = {name: after / before for name, (before, after) in plan.widths.items()}
    assert shares["0"] == 0.25, "down to the floor"
    assert all(after / before == 0.5 for before, after in uniform.widths.values())
    assert len(set(shares.values())) > 1


@given(
    ratio=st.sampled_from([0.2, 0.5, 0.75]),
    floor=st.sampled_from([0.1, 0.25, 0.5]),
    round_to=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 5),
)
def test_global_widths_keep_every_promise(build: Build, ratio: float, floor: float, round_to: int, seed: int) -> None:
    floor = min(floor, 1 - ratio)
    wanted = spec(ratio, scope="global", floor=floor, round_to=round_to, min_width=round_to, importance="random")
    for name in ("plain", "residual", "concatenation", "grouped"):
        _, plan = prune(build(name), wanted, image_shape=SHAPE, seed=seed)
        for before, after in plan.widths.values():
            assert after % round_to == 0 or after == before
            assert after >= floor * before
            assert after >= min(before, round_to)
        if round_to == 1 and name == "plain":
            assert plan.achieved == pytest.approx(ratio, abs=0.05)


def test_a_floor_that_leaves_no_room_is_refused() -> None:
    message = r"prune\.floor: expected at most the part of the channels that ratio leaves, 0\.1, got 0\.25"
    with pytest.raises(ValueError, match=message):
        PruneSpec(ratio=0.9, scope="global", floor=0.25)
    assert PruneSpec(ratio=0.9, floor=0.25).floor == 0.25  # without effect where all layers lose the same
    assert PruneSpec(ratio=0.0, scope="global", floor=1.0).ratio == 0
    assert PruneSpec(ratio=0.9, scope="global", floor=0.1).floor == 0.1


# --- one layer, and several steps


def test_only_the_named_layer_and_those_tied_to_it_shrink(build: Build) -> None:
    _, plan = prune(build("residual"), spec(0.5), image_shape=SHAPE, only=["conv1"])
    assert {name for name, (before, after) in plan.widths.items() if after < before} == {"conv1"}
    _, plan = prune(build("residual"), spec(0.5), image_shape=SHAPE, only=["stem.0"])
    assert {name for name, (before, after) in plan.widths.items() if after < before} == {"stem.0", "conv2"}


@pytest.mark.parametrize("steps", [2, 3])
def test_steps_end_where_one_would_and_replay(steps: int) -> None:
    dense = normalized(resnet20(), (0.5,) * 3, (0.25,) * 3).eval()
    each = PruneSpec(ratio=1 - 0.5 ** (1 / steps), round_to=1, min_width=1)
    small, plan = prune(dense, each, image_shape=(3, 32, 32))
    for _ in range(steps - 1):
        small, more = prune(small, each, image_shape=(3, 32, 32))
        plan = joined(plan, more, 0.5)
    assert plan.requested == 0.5
    assert plan.achieved == pytest.approx(0.5, abs=0.02)
    again = replay(dense, plan, image_shape=(3, 32, 32))
    first, second = small.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

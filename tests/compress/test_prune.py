from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from coldforge.compress.prune import PruningPlan, prune, replay, target_width
from coldforge.errors import ModelError, TraceError
from coldforge.models.normalize import normalized
from coldforge.models.zoo import OptionAShortcut, cnn8, resnet18, resnet20
from coldforge.recipe import PruneSpec

Build = Callable[..., nn.Module]
SHAPE = (3, 8, 8)

# The channels of these layers live or die together; zeroing the right-hand ones makes a channel exactly zero.
COUPLED = {
    "plain": [(["0"], ["0"]), (["2"], ["2"]), (["5"], ["5"])],
    "residual": [
        (["stem.0", "conv2"], ["stem.1", "bn2"]),
        (["conv1"], ["bn1"]),
        (["conv3", "project"], ["conv3", "project"]),
    ],
    "concatenation": [([name], [name]) for name in ("left", "right", "join", "hidden")],
    "separable": [(["0", "3"], ["1", "4"]), (["6"], ["6"])],
    "grouped": [([name], [name]) for name in ("0", "2", "4")],
    "fully_convolutional": [(["0"], ["0"])],
}


def spec(ratio: float = 0.5, **keys: object) -> PruneSpec:
    return PruneSpec.model_validate({"ratio": ratio, "round_to": 4, "min_width": 4} | keys)


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{parameter.requires_grad}".encode())
    for name, module in model.named_modules():
        digest.update(f"{name}{module.training}".encode())
    return digest.hexdigest()


def masked(model: nn.Module, plan: PruningPlan, coupled: list[tuple[list[str], list[str]]]) -> nn.Module:
    """The slow twin: the dense network with the removed channels set to zero, from a hand-written list of layers."""
    twin = copy.deepcopy(model)
    for layer, _, removed in plan.steps:
        for zeroed in next(zeroed for layers, zeroed in coupled if layer in layers):
            module = twin.get_submodule(zeroed)
            with torch.no_grad():
                module.weight[list(removed)] = 0
                if module.bias is not None:
                    module.bias[list(removed)] = 0
    return twin


# --- widths ----------------------------------------------------------------------------------------------------------


@given(
    width=st.integers(1, 600),
    ratio=st.floats(0, 0.99),
    round_to=st.integers(1, 16),
    min_width=st.integers(1, 32),
    blocks=st.sampled_from([1, 2, 4]),
)
def test_target_width_is_the_nearest_allowed(
    width: int, ratio: float, round_to: int, min_width: int, blocks: int
) -> None:
    kept = target_width(width, ratio, round_to=round_to, min_width=min_width, blocks=blocks)
    if ratio == 0:
        assert kept == width
        return
    # The slow twin: try every width that is allowed and take the nearest to what was asked, the wider of two.
    allowed = [
        candidate
        for candidate in range(1, width + round_to * blocks + min_width * blocks * round_to)
        if candidate % round_to == 0 and candidate % blocks == 0 and candidate >= min_width
    ]
    nearest = min(allowed, key=lambda candidate: (round(abs(candidate - width * (1 - ratio)), 5), -candidate))
    assert kept == min(width, nearest)
    assert 1 <= kept <= width


@pytest.mark.parametrize(
    ("width", "ratio", "round_to", "expected"),
    [(64, 0.5, 8, 32), (20, 0.5, 8, 8), (24, 0.5, 8, 16), (40, 0.7, 8, 16), (128, 0.9, 8, 16), (32, 0.9, 1, 8)],
)
def test_target_width_examples(width: int, ratio: float, round_to: int, expected: int) -> None:
    assert target_width(width, ratio, round_to=round_to, min_width=8) == expected


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["l1", "l2", "random"])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_pruned_equals_the_masked_twin(
    build: Build, network_name: str, images: Tensor, ratio: float, importance: str
) -> None:
    model = build(network_name)
    pruned, plan = prune(model, spec(ratio, importance=importance), image_shape=SHAPE)
    twin = masked(model, plan, COUPLED[network_name])
    with torch.no_grad():
        assert torch.allclose(pruned(images), twin(images), atol=1e-5)
        assert not torch.allclose(pruned(images), model(images), atol=1e-3)
    assert plan.achieved == pytest.approx(ratio, abs=0.15)


def test_every_layer_but_the_output_shrinks(build: Build, network_name: str) -> None:
    model = build(network_name)
    pruned, plan = prune(model, spec(0.5), image_shape=SHAPE)
    outputs = {"fully_convolutional": "2", "plain": "7", "separable": "10", "grouped": "8"}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        after = pruned.get_submodule(name).weight.shape[0]
        if name == outputs.get(network_name, "fc"):
            assert after == 10
            assert name not in plan.widths
        else:
            width = module.weight.shape[0]
            assert after == target_width(width, 0.5, round_to=4, min_width=4)
            assert plan.widths[name] == (width, after)
    before, after = (sum(pair[i] for pair in plan.widths.values()) for i in (0, 1))
    assert plan.requested == 0.5
    assert plan.achieved == pytest.approx(1 - after / before)


def test_l1_keeps_the_filters_with_the_largest_norm(build: Build) -> None:
    model = build("plain")
    pruned, plan = prune(model, spec(0.5), image_shape=SHAPE)
    norms = [float(row.abs().sum()) for row in model[2].weight.detach()]
    removed = sorted(sorted(range(32), key=lambda i: norms[i])[:16])
    assert (("2", True, tuple(removed))) in plan.steps
    kept_in = [i for i in range(16) if i not in next(r for layer, _, r in plan.steps if layer == "0")]
    kept_out = [i for i in range(32) if i not in removed]
    assert torch.equal(pruned[2].weight, model[2].weight[kept_out][:, kept_in])
    assert torch.equal(pruned[2].bias, model[2].bias[kept_out])


@pytest.mark.parametrize(("importance", "power"), [("l1", 1), ("l2", 2)])
def test_layers_that_hang_together_are_ranked_together(build: Build, importance: str, power: int) -> None:
    model = build("residual")
    _, plan = prune(model, spec(0.5, importance=importance), image_shape=SHAPE)
    filters = torch.cat([model.stem[0].weight.flatten(1), model.conv2.weight.flatten(1)], 1)
    norms = filters.abs().pow(power).sum(1)
    removed = next(removed for layer, _, removed in plan.steps if layer in ("stem.0", "conv2"))
    assert removed == tuple(sorted(torch.argsort(norms)[:8].tolist()))


def test_grouped_convolution_loses_as_many_from_each_group(build: Build) -> None:
    pruned, plan = prune(build("grouped"), spec(0.5), image_shape=SHAPE)
    assert (pruned[2].groups, pruned[2].in_channels, pruned[2].out_channels) == (4, 16, 16)
    for layer in ("0", "2"):
        removed = next(removed for name, _, removed in plan.steps if name == layer)
        assert [sum(index // 8 == block for index in removed) for block in range(4)] == [4] * 4


def test_depthwise_convolution_stays_depthwise(build: Build) -> None:
    pruned, _ = prune(build("separable"), spec(0.5), image_shape=SHAPE)
    assert (pruned[3].groups, pruned[3].in_channels, pruned[3].out_channels) == (8, 8, 8)


def test_group_norm_keeps_its_groups(wake: Build) -> None:
    model = wake(nn.Sequential(nn.Conv2d(3, 24, 3), nn.GroupNorm(6, 24), nn.ReLU(), nn.Flatten(), nn.Linear(864, 10)))
    pruned, _ = prune(model, spec(0.5, round_to=4), image_shape=SHAPE)
    assert pruned[1].num_channels == pruned[0].out_channels == 12  # a multiple of 4 and of 6 groups
    assert pruned(torch.rand(2, *SHAPE)).isfinite().all()


def test_custom_importance_decides(build: Build) -> None:
    names: list[str] = []

    def last_are_best(model: nn.Module, name: str) -> Tensor:
        names.append(name)
        return torch.arange(float(model.get_submodule(name).weight.shape[0]))

    _, plan = prune(build("plain"), spec(0.5), image_shape=SHAPE, importance=last_are_best)
    assert sorted(names) == ["0", "2", "5"]
    assert all(removed == tuple(range(len(removed))) for _, _, removed in plan.steps)
    with pytest.raises(ModelError, match=r"importance of layer '\d': expected shape \(\d+,\), got \(1,\)"):
        prune(build("plain"), spec(0.5), image_shape=SHAPE, importance=lambda model, name: torch.ones(1))


def test_pruned_network_trains(build: Build, network_name: str, images: Tensor) -> None:
    pruned, _ = prune(build(network_name), spec(0.5), image_shape=SHAPE)
    pruned.train()(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


# --- the zoo ---------------------------------------------------------------------------------------------------------


def coupled_in_resnet(model: nn.Module) -> list[tuple[list[str], list[str]]]:
    """The groups of a ResNet by hand: each block's inner width, and one width for each stage."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    coupled = [([name], [name.replace("conv1", "bn1")]) for name in names if "layer" in name and "conv1" in name]
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        ends = [name for name in names if stage in name and "conv2" in name]
        short = [name for name in names if stage in name and "shortcut" in name]
        if stage == "layer1":
            ends.append("network.conv1")
        zeroed = [name.replace("conv2", "bn2").replace("conv1", "bn1") for name in ends]
        zeroed += [name if name.endswith("shortcut") else name.replace("shortcut.0", "shortcut.1") for name in short]
        coupled.append((ends + short, zeroed))
    return coupled


@pytest.mark.parametrize(("factory", "round_to"), [(resnet20, 8), (resnet20, 1), (resnet18, 8)])
def test_resnets_equal_their_masked_twin(wake: Build, factory: Callable[..., nn.Module], round_to: int) -> None:
    model = wake(normalized(factory(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)))
    images = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(2))
    pruned, plan = prune(model, spec(0.5, round_to=round_to, min_width=round_to), image_shape=(3, 16, 16))
    twin = masked(model, plan, coupled_in_resnet(model))
    with torch.no_grad():
        assert torch.allclose(pruned(images), twin(images), rtol=1e-4, atol=1e-4)
    assert plan.achieved == pytest.approx(0.5)
    assert not any(name.endswith("shortcut") for name in plan.widths)
    assert fingerprint(replay(model, plan, image_shape=(3, 16, 16))) == fingerprint(pruned)


def test_option_a_shortcut_still_picks_the_survivors(wake: Build) -> None:
    model = wake(normalized(resnet20(), (0.5,) * 3, (0.25,) * 3))
    pruned, plan = prune(model, spec(0.5, round_to=1, min_width=1), image_shape=(3, 16, 16))
    removed = {stage: next(r for layer, _, r in plan.steps if layer in ends) for stage, ends in STAGE_ENDS.items()}
    for above, below in (("layer1", "layer2"), ("layer2", "layer3")):
        dense = model.get_submodule(f"network.{below}.0.shortcut")
        small = pruned.get_submodule(f"network.{below}.0.shortcut")
        assert isinstance(small, OptionAShortcut)
        assert not small.weight.requires_grad
        kept_in = [i for i in range(dense.in_channels) if i not in removed[above]]
        kept_out = [i for i in range(dense.out_channels) if i not in removed[below]]
        assert torch.equal(small.weight, dense.weight[kept_out][:, kept_in])
        assert (small.in_channels, small.out_channels) == (len(kept_in), len(kept_out))


STAGE_ENDS = {
    "layer1": ["network.conv1", *(f"network.layer1.{i}.conv2" for i in range(3))],
    "layer2": ["network.layer2.0.shortcut", *(f"network.layer2.{i}.conv2" for i in range(3))],
    "layer3": ["network.layer3.0.shortcut", *(f"network.layer3.{i}.conv2" for i in range(3))],
}


def test_shortcut_has_no_say_in_the_ranking(wake: Build) -> None:
    model = wake(normalized(resnet20(), (0.5,) * 3, (0.25,) * 3))
    _, plan = prune(model, spec(0.5), image_shape=(3, 16, 16))
    norms = sum(model.get_submodule(f"network.layer2.{i}.conv2").weight.detach().abs().sum((1, 2, 3)) for i in range(3))
    removed = next(removed for layer, _, removed in plan.steps if layer in STAGE_ENDS["layer2"])
    assert removed == tuple(sorted(torch.argsort(norms)[:16].tolist()))


@pytest.mark.parametrize(
    ("ratio", "widths"),
    [(0.5, (16, 16, 32, 32, 64, 64, 64)), (0.75, (8, 8, 16, 16, 32, 32, 32)), (0.9, (8, 8, 8, 8, 16, 16, 16))],
)
def test_cnn8_has_the_parameters_that_its_widths_say(ratio: float, widths: tuple[int, ...]) -> None:
    model = normalized(cnn8(), (0.3,), (0.35,))
    pruned, plan = prune(model, PruneSpec(ratio=ratio), image_shape=(1, 28, 28))
    channels = (1, *widths)
    expected = sum(channels[i] * channels[i + 1] * 9 + channels[i + 1] for i in range(6))
    expected += widths[5] * 16 * widths[6] + widths[6] + widths[6] * 10 + 10
    assert sum(parameter.numel() for parameter in pruned.parameters()) == expected
    assert tuple(after for _, after in plan.widths.values()) == widths
    assert plan.achieved == pytest.approx(1 - sum(widths) / 576)


# --- side effects ----------------------------------------------------------------------------------------------------


def test_argument_is_untouched_and_modes_are_kept(build: Build, network_name: str) -> None:
    model = build(network_name).train()
    for parameter in list(model.parameters())[:2]:
        parameter.requires_grad_(False)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    before, state = fingerprint(model), torch.get_rng_state()
    pruned, plan = prune(model, spec(0.5, importance="random"), image_shape=SHAPE, seed=3)
    again = replay(model, plan, image_shape=SHAPE)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    for result in (pruned, again):
        assert [name for name, parameter in result.named_parameters() if not parameter.requires_grad] == frozen
        assert all(module.training for module in result.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in result.modules())


def test_random_ranking_follows_its_seed(build: Build) -> None:
    plans = [prune(build("plain"), spec(0.5, importance="random"), image_shape=SHAPE, seed=s)[1] for s in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0].steps != plans[2].steps


def test_frozen_network_is_pruned_all_the_same(build: Build) -> None:
    model = build("residual").requires_grad_(False)
    pruned, plan = prune(model, spec(0.5), image_shape=SHAPE)
    assert plan == prune(build("residual"), spec(0.5), image_shape=SHAPE)[1]
    assert not any(parameter.requires_grad for parameter in pruned.parameters())


def test_ratio_0_is_an_unchanged_copy(build: Build) -> None:
    model = build("residual")
    pruned, plan = prune(model, spec(0), image_shape=SHAPE)
    assert pruned is not model
    assert fingerprint(pruned) == fingerprint(model)
    assert plan == PruningPlan()
    assert fingerprint(replay(model, plan, image_shape=SHAPE)) == fingerprint(model)


def test_narrow_layers_stay_whole(build: Build) -> None:
    model = build("residual")
    pruned, plan = prune(model, spec(0.9, round_to=8, min_width=32), image_shape=SHAPE)
    assert fingerprint(pruned) == fingerprint(model)
    assert (plan.requested, plan.achieved, plan.steps) == (0.9, 0, ())


# --- plans -----------------------------------------------------------------------------------------------------------


def test_plan_survives_json_and_replays(build: Build, network_name: str) -> None:
    model = build(network_name)
    pruned, plan = prune(model, spec(0.5), image_shape=SHAPE)
    read = PruningPlan.model_validate_json(plan.model_dump_json())
    assert read == plan
    assert fingerprint(replay(model, read, image_shape=SHAPE)) == fingerprint(pruned)
    # A fresh network with other weights gets the same structure, so that the saved weights fit.
    fresh = replay(build(network_name, seed=7), read, image_shape=SHAPE)
    fresh.load_state_dict(pruned.state_dict())
    assert fingerprint(fresh) == fingerprint(pruned)


def test_plan_of_another_network_is_refused(build: Build) -> None:
    _, plan = prune(build("plain"), spec(0.5), image_shape=SHAPE)
    with pytest.raises(ModelError, match=r"belongs to another network: expected layer '5' with 24 channels, got ReLU"):
        replay(build("separable"), plan.model_copy(update={"widths": {"5": (24, 12)}}), image_shape=SHAPE)
    with pytest.raises(ModelError, match=r"expected a layer 'conv9', found none; did you mean 'conv[123]'\?"):
        replay(build("residual"), PruningPlan(widths={"conv9": (16, 8)}), image_shape=SHAPE)
    wrong = PruningPlan(steps=(("0", True, (99,)),), widths={})
    with pytest.raises(ModelError, match=r"layer '0': its channels could not be removed: expected channels below 16"):
        replay(build("plain"), wrong, image_shape=SHAPE)
    short = plan.model_copy(update={"steps": plan.steps[:1]})
    with pytest.raises(ModelError, match=r"expected layer '\d' to end with \d+ channels, got \d+"):
        replay(build("plain"), short, image_shape=SHAPE)


# --- errors ----------------------------------------------------------------------------------------------------------


class Forward(nn.Module):
    """Two convolutions and a classifier with a function in the middle."""

    def __init__(self, middle: Callable[[Tensor, Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(width, 16, 1)
        self.fc = nn.Linear(16, 10)
        self.middle = middle

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.second(self.middle(self.first(inputs), inputs)).mean((2, 3)))


def shuffle(x: Tensor, _: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)


def test_a_layer_that_fails_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(16, 8, 3)), nn.Flatten())
    with pytest.raises(TraceError, match=r"shape \(2, 3, 8, 8\); layer '1.1' \(Conv2d\) failed: Given groups=1"):
        prune(model, spec(0.5), image_shape=SHAPE)


def test_a_layer_cut_off_from_the_output_is_named() -> None:
    with pytest.raises(TraceError, match=r"layer 'first' runs, but its output is cut off from the logits \(detach"):
        prune(Forward(lambda x, _: x.detach()), spec(0.5), image_shape=SHAPE)


@pytest.mark.parametrize(
    ("middle", "width"), [(shuffle, 16), (lambda x, inputs: torch.cat([inputs, x], 1), 19)], ids=["shuffle", "image"]
)
def test_channels_that_cannot_be_followed_are_refused(
    wake: Build, middle: Callable[[Tensor, Tensor], Tensor], width: int
) -> None:
    model = wake(Forward(middle, width))
    with pytest.raises(TraceError, match=r"layer 'second'"):
        prune(model, spec(0.5), image_shape=SHAPE)


def test_layers_joined_and_then_added_lose_the_same_share(wake: Build) -> None:
    class JoinAdd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.both = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 24, 1), nn.Conv2d(3, 40, 1)
            self.fc = nn.Linear(40, 10)

        def forward(self, inputs: Tensor) -> Tensor:
            joined = torch.cat([self.left(inputs), self.right(inputs)], 1)
            return self.fc((joined + self.both(inputs)).mean((2, 3)))

    _, plan = prune(wake(JoinAdd()), spec(0.5), image_shape=SHAPE)
    assert plan.widths == {"left": (16, 8), "right": (24, 12), "both": (40, 20)}


def test_channels_that_are_tied_or_broadcast_stay(wake: Build) -> None:
    class Gate(nn.Module):
        """Spatial attention: a mean over channels gates all of them."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(2, 1, 1), nn.Conv2d(16, 16, 1)
            self.fc = nn.Linear(16, 10)

        def forward(self, inputs: Tensor) -> Tensor:
            x = self.first(inputs)
            gate = self.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))
            return self.fc(self.last(x * torch.sigmoid(gate)).mean((2, 3)))

    class Doubled(nn.Module):
        """The same channels twice, side by side, added to others."""

        def __init__(self) -> None:
            super().__init__()
            self.single, self.whole, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 32, 1), nn.Conv2d(32, 16, 1)
            self.fc = nn.Linear(16, 10)

        def forward(self, inputs: Tensor) -> Tensor:
            x = self.single(inputs)
            return self.fc(self.last(torch.cat([x, x], 1) + self.whole(inputs)).mean((2, 3)))

    _, plan = prune(wake(Gate()), spec(0.5), image_shape=SHAPE)
    assert plan.widths == {"first": (16, 16), "gate": (1, 1), "last": (16, 8)}
    _, plan = prune(wake(Doubled()), spec(0.5), image_shape=SHAPE)
    assert plan.widths == {"single": (16, 16), "whole": (32, 32), "last": (16, 8)}
    assert plan.achieved == 8 / 64


def test_parametrized_weights_are_refused(wake: Build) -> None:
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3))
    model = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    with pytest.raises(ModelError, match=r"layer '0': its channels could not be removed: .* must be made plain first"):
        prune(model, spec(0.5), image_shape=SHAPE)


def test_output_must_be_logits() -> None:
    with pytest.raises(TraceError, match=r"expected logits of shape \(images, classes\), got shape \(2, 8, 6, 6\)"):
        prune(nn.Conv2d(3, 8, 3), spec(0.5), image_shape=SHAPE)
    with pytest.raises(TraceError, match=r"expected an image shape \(channels, height, width\), got \(8, 8\)"):
        prune(nn.Conv2d(3, 8, 3), spec(0.5), image_shape=(8, 8))


def test_nothing_to_prune() -> None:
    with pytest.raises(ModelError, match=r"expected a network with channels that can be pruned, found none besides"):
        prune(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), spec(0.5), image_shape=SHAPE)


def test_weights_must_be_finite(build: Build) -> None:
    model = build("plain")
    with torch.no_grad():
        model[2].weight[3, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layer '2': expected finite weights, got NaN or infinity"):
        prune(model, spec(0.5), image_shape=SHAPE)

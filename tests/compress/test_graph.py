from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from coldforge.compress.graph import batchnorm_behind, fold_batchnorm, network_digest, set_module, trace
from coldforge.errors import TraceError
from coldforge.models import normalized
from coldforge.models.zoo import resnet20

Build = Callable[..., nn.Module]


def normalizations(model: nn.Module) -> list[str]:
    kinds = nn.BatchNorm1d | nn.BatchNorm2d
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def wake_all(model: nn.Module) -> nn.Module:
    """Random BatchNorm statistics of both kinds; evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.track_running_stats:
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.3, 2.0, generator=generator)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.4, generator=generator)
                nn.init.normal_(module.bias, 0, 0.4, generator=generator)
    return model.eval()


class Shared(nn.Module):
    """One convolution twice, each time with a BatchNorm of its own; one BatchNorm after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.two, self.both = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.two(self.twice(torch.relu(self.one(self.twice(self.stem(inputs))))))
        return (self.both(self.left(x)) + self.both(self.right(x))).mean((2, 3))


class TwoReaders(nn.Module):
    """The convolution feeds its BatchNorm and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.conv(inputs)
        return (self.norm(x) + x).mean((2, 3))


def after_linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))


def without_affine() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Flatten())


def not_after_a_layer() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten())


def without_statistics() -> nn.Module:
    norm = nn.BatchNorm2d(8, track_running_stats=False)  # those of each batch, always
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten())


@torch.no_grad()
def assert_same(model: nn.Module, other: nn.Module, images: Tensor) -> None:
    torch.testing.assert_close(other(images), model(images), rtol=1e-4, atol=1e-5)


def test_folding_changes_no_answer(build: Build, network_name: str, images: Tensor) -> None:
    model = build(network_name)
    folded = fold_batchnorm(model)
    assert_same(model, folded, images)
    assert normalizations(folded) == []


@pytest.mark.parametrize("make", [after_linear, without_affine])
def test_other_kinds_fold_too(make: Callable[[], nn.Module], images: Tensor) -> None:
    model = wake_all(make())
    folded = fold_batchnorm(model)
    assert_same(model, folded, images)
    assert normalizations(folded) == []


def test_the_zoo_folds(images: Tensor) -> None:
    model = wake_all(normalized(resnet20(), [0.4, 0.5, 0.6], [0.2, 0.3, 0.2]))
    folded = fold_batchnorm(model)
    assert normalizations(folded) == []
    assert_same(model, folded, images)
    shortcut = "network.layer2.0.shortcut.weight"
    assert torch.equal(folded.state_dict()[shortcut], model.state_dict()[shortcut])
    assert folded.state_dict()["network.conv1.bias"].any()


@pytest.mark.parametrize(
    ("make", "left"),
    [
        *((Shared, ["one", "two", "both"]), (TwoReaders, ["norm"])),
        *((not_after_a_layer, ["0", "3"]), (without_statistics, ["1"])),
    ],
)
def test_what_cannot_be_folded_stays(make: Callable[[], nn.Module], left: list[str], images: Tensor) -> None:
    torch.manual_seed(0)
    model = wake_all(make())
    folded = fold_batchnorm(model)
    assert normalizations(folded) == left
    assert_same(model, folded, images)


@pytest.mark.parametrize("make", [Shared, TwoReaders, without_affine, after_linear])
def test_what_folds_is_named(make: Callable[[], nn.Module]) -> None:
    model = wake_all(make())
    named = batchnorm_behind(model)
    assert set(named.values()) == set(normalizations(model)) - set(normalizations(fold_batchnorm(model)))
    assert all(isinstance(model.get_submodule(layer), nn.Conv2d | nn.Linear) for layer in named)


def test_folding_leaves_the_model_alone(build: Build, images: Tensor) -> None:
    model = build("residual").train()
    before = copy.deepcopy(model.state_dict())
    folded = fold_batchnorm(model)
    assert model.training
    assert not folded.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        folded.get_parameter("conv1.weight").zero_()
    assert bool(model.get_parameter("conv1.weight").any())


def test_frozen_weights_stay_frozen(build: Build) -> None:
    model = build("residual")
    model.get_parameter("conv1.weight").requires_grad_(False)
    folded = fold_batchnorm(model)
    assert not folded.get_parameter("conv1.weight").requires_grad
    assert folded.get_parameter("conv2.weight").requires_grad


# --- what cannot be traced -------------------------------------------------------------------------------------------


class Choosy(nn.Module):
    """Looks at the values before it decides what to do."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if bool(inputs.mean() > 0) else -inputs


class Counting(nn.Module):
    """A loop whose length only the image knows."""

    def forward(self, inputs: Tensor) -> Tensor:
        for _ in range(inputs.shape[0]):
            inputs = inputs + 1
        return inputs


@pytest.mark.parametrize(("layer", "kind"), [(Choosy, "Choosy"), (Counting, "Counting")])
def test_the_layer_that_cannot_be_traced_is_named(layer: type[nn.Module], kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), layer()), nn.Flatten())
    with pytest.raises(
        TraceError, match=rf"layer '1\.1' \({kind}\) cannot: .*control flow.*quantize\.weight_bits = 32"
    ):
        trace(model)
    with pytest.raises(TraceError, match=rf"expected a network whose forward can be traced; layer '{kind}' \({kind}\)"):
        trace(layer())


def test_a_trace_is_a_copy_in_evaluation_mode(build: Build, images: Tensor) -> None:
    model = build("residual").train()
    traced = trace(model)
    assert not traced.training
    assert_same(copy.deepcopy(model).eval(), traced, images)
    assert traced.get_parameter("fc.weight") is not model.get_parameter("fc.weight")


def test_set_module_replaces_at_any_depth() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.ReLU()))
    set_module(model, "0", nn.Tanh())
    set_module(model, "1.1", nn.Sigmoid())
    assert [type(model.get_submodule(name)).__name__ for name in ("0", "1.0", "1.1")] == ["Tanh", "ReLU", "Sigmoid"]


class Steps(nn.Module):
    """Layers that always print alike; what happens between them is a setting."""

    def __init__(self, between: Callable[[Tensor], Tensor], scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.between, self.scale = between, torch.tensor(scale)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.between(self.first(inputs)) * self.scale)


class ByValue(Steps):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) if inputs.sum() > 0 else self.first(inputs)


class OwnLinear(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).abs()


def test_the_digest_of_a_network_knows_its_code() -> None:
    """What a user's class does between its layers, and numbers that no state dict holds."""
    digest = network_digest(Steps(torch.relu))
    assert network_digest(Steps(torch.relu)) == digest
    others = [Steps(torch.sigmoid), Steps(torch.relu, scale=2.0), ByValue(torch.relu), Steps(torch.relu).half()]
    moved = Steps(torch.relu)
    moved.first.bias.data[0] += 1
    own = Steps(torch.relu)
    own.first.__class__ = OwnLinear
    digests = {digest, *map(network_digest, [*others, moved, own, Steps(torch.relu).to(torch.bfloat16)])}
    assert len(digests) == len(others) + 4

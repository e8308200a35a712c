from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.fx
from torch import nn

from coldforge.errors import ModelError
from coldforge.models import ZOO, Normalize, OptionAShortcut, cnn8, normalized, resnet18, resnet20


def trainable(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("network", "shape", "params"),
    [
        (cnn8(1, 10, 28), (1, 28, 28), 549_994),
        (cnn8(3, 7, 32), (3, 32, 32), 550_570 - 3 * 129),
        (cnn8(1, 10, (9, 30)), (1, 9, 30), 549_994 - 128 * 128 * (16 - 8)),
        (resnet20(3, 10), (3, 32, 32), 269_722),
        (resnet20(1, 5, 28), (1, 28, 28), 269_722 - 2 * 9 * 16 - 5 * 65),
        (resnet18(3, 10), (3, 32, 32), 11_173_962),
    ],
)
def test_size_and_output(network: nn.Module, shape: tuple[int, int, int], params: int) -> None:
    assert trainable(network) == params
    classes = list(network.modules())[-1].out_features
    assert isinstance(classes, int)
    logits = network.eval()(torch.rand(2, *shape))
    assert logits.shape == (2, classes)


class LayerTracer(torch.fx.Tracer):
    """torch.fx looks into convolutions that are not torch's own, such as ``OptionAShortcut``; a compressor does not."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


@pytest.mark.parametrize("name", ZOO)
def test_traceable_with_one_relu_module_per_use(name: str) -> None:
    network = normalized(ZOO[name](in_channels=3, num_classes=10, image_size=32), [0.5] * 3, [0.2] * 3).eval()
    root = LayerTracer().trace(network)
    graph = torch.fx.GraphModule(network, root)
    inputs = torch.rand(2, 3, 32, 32)
    assert torch.equal(graph(inputs), network(inputs))
    assert torch.equal(torch.fx.symbolic_trace(network)(inputs), network(inputs))
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))
    functions = {node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"}
    assert functions <= {"add", "sub", "truediv"}


@pytest.mark.parametrize("name", ZOO)
def test_fresh_networks_have_a_sane_loss(name: str) -> None:
    torch.manual_seed(0)
    network = ZOO[name](in_channels=3, num_classes=10, image_size=32)
    logits = network(torch.randn(16, 3, 32, 32))
    loss = nn.functional.cross_entropy(logits, torch.arange(16) % 10)
    assert abs(loss.item() - math.log(10)) < 1.5
    assert logits.std().item() > 0.01


def slow_option_a(inputs: torch.Tensor, width: int) -> torch.Tensor:
    """As in akamaster's code: every second pixel, then zero channels before and after."""
    return nn.functional.pad(inputs[:, :, ::2, ::2], (0, 0, 0, 0, width // 4, width // 4))


@pytest.mark.parametrize("size", [8, 7])
def test_option_a_is_exactly_the_padding(size: int) -> None:
    inputs = torch.randn(3, 16, size, size)
    assert torch.equal(OptionAShortcut(16, 32)(inputs), slow_option_a(inputs, 32))


def test_option_a_is_frozen_whatever_happens() -> None:
    shortcut = OptionAShortcut(4, 8)
    before = shortcut.weight.clone()
    assert not shortcut.weight.requires_grad
    shortcut.reset_parameters()
    assert torch.equal(shortcut.weight, before)
    assert not copy.deepcopy(shortcut).weight.requires_grad
    shortcut.weight = nn.Parameter(shortcut.weight[:, 1:])  # what pruning libraries do
    assert not shortcut.weight.requires_grad


def test_option_a_is_pruned_by_a_dependency_graph() -> None:
    import torch_pruning as tp

    network = resnet20(3, 10).eval()
    pruner = tp.pruner.BasePruner(
        network,
        torch.rand(1, 3, 32, 32),
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[network.linear],
    )
    pruner.step()
    shortcut = network.get_submodule("layer2.0.shortcut")
    assert isinstance(shortcut, OptionAShortcut)
    assert tuple(shortcut.weight.shape) == (16, 8, 1, 1)
    assert set(shortcut.weight.unique().tolist()) <= {0.0, 1.0}
    assert not shortcut.weight.requires_grad
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_normalize_is_the_formula_and_the_first_layer() -> None:
    inputs = torch.rand(2, 3, 4, 4)
    network = normalized(nn.Flatten(), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert [name for name, _ in network.named_children()] == ["normalize", "network"]
    expected = torch.stack([(inputs[:, c] - (0.1, 0.2, 0.3)[c]) / (0.4, 0.5, 0.6)[c] for c in range(3)], 1)
    torch.testing.assert_close(network(inputs), expected.flatten(1))
    assert list(Normalize([0.5], [0.2]).state_dict()) == ["mean", "std"]
    assert repr(Normalize([0.5], [0.25])) == "Normalize(mean=(0.5), std=(0.25))"


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], [0.5, 0.5], "one mean and one std per channel, got 1 means and 2 stds"),
        ([], [], "got 0 means and 0 stds"),
        ([0.5], [0.0], "expected finite means and stds above 0"),
        ([math.nan], [0.5], "expected finite means and stds above 0"),
    ],
)
def test_normalize_refuses(mean: Any, std: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Normalize(mean, std)

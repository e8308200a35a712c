from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from coldforge.compress import fused
from coldforge.compress.fakequant import ActivationQuantizer, QuantizedLayer, attacking
from coldforge.compress.fold import fold_quantized
from coldforge.compress.quantize import calibrate, insert_quantizers, quantize, set_bits, weight_bit_widths
from coldforge.compress.rectify import rectified
from coldforge.errors import ModelError, TraceError
from coldforge.models import model_source, normalized
from coldforge.models.zoo import OptionAShortcut, resnet20
from coldforge.provenance import cpp_compiler
from coldforge.recipe import QuantizeSpec

Build = Callable[..., nn.Module]
SHAPE = (3, 8, 8)
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


def spec(bits: int = 8, **keys: object) -> QuantizeSpec:
    return QuantizeSpec.model_validate({"weight_bits": bits, "activation_bits": bits, "edge_bits": bits} | keys)


def some_images(n: int = 64, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(n, *(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


def quantizers(network: nn.Module) -> dict[str, ActivationQuantizer]:
    return {name: part for name, part in network.named_modules() if isinstance(part, ActivationQuantizer)}


def layers(network: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: part for name, part in network.named_modules() if isinstance(part, QuantizedLayer)}


def rounded(network: nn.Module) -> list[str]:
    """What each quantizer rounds, in the order of the graph: the name of the module or the function."""
    assert isinstance(network, fx.GraphModule)
    found, modules = [], dict(network.named_modules())
    for node in network.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], ActivationQuantizer):
            source = node.args[0]
            found.append(str(source.target) if source.op == "call_module" else source.name)
    return found


def ranges(network: nn.Module) -> list[tuple[float, int]]:
    return [(float(part.step.detach()), int(part.zero_point)) for part in quantizers(network).values()]


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def unchanged(network: nn.Module, before: dict[str, Tensor]) -> bool:
    after = network.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


# --- further structures ----------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Nothing but layers with weights are modules; the rest is written in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden, self.side, self.fc = nn.Linear(48, 16), nn.Linear(12, 16), nn.Linear(16, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(inputs)))
        y = F.relu(self.conv2(x))
        y += x
        y = F.max_pool2d(y, 2)
        y = F.dropout(F.relu(self.conv3(y)), 0.5, self.training)
        z = torch.flatten(F.avg_pool2d(y, 2), 1)
        w = self.conv4(y).relu().mean((2, 3))
        return self.fc(F.relu(self.hidden(z.view(z.size(0), -1)).add(self.side(w))))


def pooled() -> nn.Module:
    """Max, average and adaptive pooling as modules, dropout, activations that are not ReLU."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout2d(0.3),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.Hardswish(),
        nn.AvgPool2d(2),
        nn.Conv2d(12, 16, 1),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16, 10),
    )


@pytest.fixture
def make(build: Build, wake: Build) -> Build:
    """Any of the small networks, behind its normalization."""

    def network(name: str) -> nn.Module:
        further: dict[str, Callable[[], nn.Module]] = {"functional": Functional, "pooled": pooled}
        model = wake(further[name]()) if name in further else build(name)
        return normalized(model, MEAN, STD).eval()

    return network


STRUCTURES = pytest.mark.parametrize(
    "name",
    ["plain", "residual", "concatenation", "separable", "grouped", "fully_convolutional", "functional", "pooled"],
)

# --- where the quantizers stand --------------------------------------------------------------------------------------


def test_quantizers_of_resnet20() -> None:
    network = insert_quantizers(normalized(resnet20(), MEAN, STD), spec())
    expected = ["normalize", "network.relu"]
    for group in (1, 2, 3):
        for block in range(3):
            name = f"network.layer{group}.{block}"
            expected += [f"{name}.relu1", f"{name}.conv2"]
            expected += [f"{name}.shortcut"] * (group > 1 and block == 0)
            expected += [f"{name}.relu2"]
    assert rounded(network) == [*expected, "network.pool"]
    assert [name for name, part in quantizers(network).items() if part.reads_image] == ["quantizer_0"]
    assert len(layers(network)) == 22


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", ["normalize", "network.1", "network.3", "network.6"]),
        ("separable", ["normalize", "network.2", "network.5", "network.7", "network.8"]),
        ("concatenation", ["normalize", "relu", "relu_1", "cat", "relu_2", "relu_3"]),
        ("pooled", ["normalize", "network.1", "network.6", "network.7", "network.9", "network.10"]),
        (
            "functional",
            ["normalize", "relu", "relu_1", "add", "relu_2", "avg_pool2d", "relu_3", "mean", "network.hidden",
             "network.side", "relu_4"],
        ),
    ],
)  # fmt: skip
def test_quantizers_of_other_structures(make: Build, name: str, expected: list[str]) -> None:
    assert rounded(insert_quantizers(make(name), spec())) == expected


@STRUCTURES
def test_every_layer_reads_values_on_the_grid_it_knows(make: Build, name: str) -> None:
    network = quantize(make(name), spec(4), some_images())
    seen = []

    def check(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(layer, QuantizedLayer)
        rounds = layer.input_quantizer
        codes = inputs[0] / rounds.step + rounds.zero
        assert float((codes - codes.round()).abs().max()) < 1e-3
        assert int(codes.min().round()) >= 0
        assert int(codes.max().round()) <= 15
        assert float(codes.max() - codes.min()) > 1
        seen.append(layer)

    for layer in layers(network).values():
        layer.register_forward_pre_hook(check)
    with torch.no_grad():
        network(some_images(seed=1))
    assert len(seen) == len(layers(network)) > 1
    used = {id(part) for part in quantizers(network).values()}
    assert all(id(layer.input_quantizer) in used for layer in layers(network).values())


@torch.no_grad()
def test_the_whole_network_equals_one_written_by_hand(make: Build) -> None:
    """A residual network with each rounding written out, in the order of the design."""
    model = make("residual")
    network = quantize(model, spec(4), some_images())
    parts, weights = quantizers(network), layers(network)

    def on_grid(x: Tensor, rounds: ActivationQuantizer) -> Tensor:
        step = float(rounds.step)
        return ((x / step).round() + rounds.zero).clamp(0, 15).sub(rounds.zero) * step

    def conv(x: Tensor, name: str, **keys: int) -> Tensor:
        layer = weights[f"network.{name}"]
        folded, step = layer.weight, layer.weight_step.view(-1, 1, 1, 1)
        bias_step = layer.weight_step * layer.input_quantizer.step
        return F.conv2d(
            x, (folded / step).round().clamp(-7, 7) * step, (layer.bias / bias_step).round() * bias_step, **keys
        )

    order = dict(zip(rounded(network), parts.values(), strict=True))
    stem = ["normalize", "network.stem.2", "relu", "network.conv2", "relu_1"]
    assert list(order) == [*stem, "network.conv3", "network.project", "relu_2", "mean"]
    q = list(order.values())
    images = some_images(seed=5)
    x = on_grid((images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), q[0])
    x = on_grid(conv(x, "stem.0", padding=1).relu(), q[1])
    y = on_grid(conv(x, "conv1", padding=1).relu(), q[2])
    y = on_grid(conv(y, "conv2", padding=1), q[3])
    x = on_grid((x + y).relu(), q[4])
    x = (on_grid(conv(x, "conv3", stride=2, padding=1), q[5]) + on_grid(conv(x, "project", stride=2), q[6])).relu()
    x = on_grid(on_grid(x, q[7]).mean((2, 3)), q[8])
    fc = weights["network.fc"]
    weight = (fc.weight / fc.weight_step[:, None]).round().clamp(-7, 7) * fc.weight_step[:, None]
    bias_step = fc.weight_step * fc.input_quantizer.step
    expected = F.linear(x, weight, (fc.bias / bias_step).round() * bias_step)
    torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-3)


def test_a_network_without_normalization_rounds_its_input(build: Build) -> None:
    network = quantize(build("plain"), spec(), some_images())
    assert rounded(network)[0].startswith("input")
    first = quantizers(network)["quantizer_0"]
    assert first.reads_image
    assert float(first.step.detach()) == pytest.approx(1 / 255)


# --- bits ------------------------------------------------------------------------------------------------------------


def test_first_and_last_layer_and_the_image_keep_edge_bits(make: Build) -> None:
    network = insert_quantizers(make("plain"), spec(2, activation_bits=4, edge_bits=8))
    assert [layer.bits for layer in layers(network).values()] == [8, 2, 2, 8]
    assert [part.bits for part in quantizers(network).values()] == [8, 4, 4, 8]
    older = insert_quantizers(make("plain"), spec(2, activation_bits=4, edge_bits=8), last_input_at_edge=False)
    assert [part.bits for part in quantizers(older).values()] == [8, 4, 4, 4]
    network = insert_quantizers(make("plain"), spec(16, edge_bits=8))
    assert [layer.bits for layer in layers(network).values()] == [16] * 4
    # a fixed shortcut is no edge
    network = insert_quantizers(normalized(resnet20(), MEAN, STD), spec(2, edge_bits=6))
    assert [name for name, layer in layers(network).items() if layer.bits == 6] == ["network.conv1", "network.linear"]
    assert [layer.input_quantizer.bits for layer in layers(network).values()][-1] == 6  # past the pooling
    older = insert_quantizers(
        normalized(resnet20(), MEAN, STD), spec(2, edge_bits=6), sums_at_edge=False, sums_apart=False
    )
    assert [part.bits for part in quantizers(older).values()].count(6) == 2


def test_what_sums_and_poolings_read_has_edge_bits_and_what_a_layer_reads_its_own() -> None:
    network = insert_quantizers(normalized(resnet20(), MEAN, STD), spec(4, edge_bits=8))
    names = {part: name for name, part in quantizers(network).items()}
    read = {name: layer.input_quantizer for name, layer in layers(network).items()}
    inner = [name for name in read if "shortcut" not in name][1:-1]
    assert {read[name].bits for name in inner} == {4}
    assert {read[name].bits for name in read if name not in inner} == {8}  # edges, and shortcuts, which multiply by 1

    def rounds(value: fx.Node) -> ActivationQuantizer:
        while str(value.target) not in quantizers(network):
            value = value.all_input_nodes[0]  # an identity
        return quantizers(network)[str(value.target)]

    sums = [node for node in network.graph.nodes if node.target is operator.add]
    assert len(sums) == 9
    assert {rounds(value).bits for node in sums for value in node.all_input_nodes} == {8}
    for first_of_a_block in ("network.layer1.1.conv1", "network.layer2.0.conv1"):
        (node,) = (node for node in network.graph.nodes if node.target == names[read[first_of_a_block]])
        (stream,) = node.all_input_nodes
        assert quantizers(network)[str(stream.target)].bits == 8
        assert len(stream.users) == 2  # the layer's rounding, and the sum or the shortcut
    fewer = insert_quantizers(normalized(resnet20(), MEAN, STD), spec(8, edge_bits=4))
    assert len(quantizers(fewer)) == len(names) - 9  # one grid for all of a stream: it would be the same
    assert {part.bits for part in quantizers(fewer).values()} == {8}


def test_a_frozen_network_has_the_bits_of_one_that_is_trained() -> None:
    model = normalized(model_source("zoo:resnet18", image_shape=(3, 8, 8), num_classes=4).build(0), MEAN, STD)
    trained, frozen = insert_quantizers(model, spec(4)), insert_quantizers(model.requires_grad_(False), spec(4))
    assert [part.bits for part in quantizers(frozen).values()] == [part.bits for part in quantizers(trained).values()]


def test_fewer_bits_on_the_way_leave_both_grids_of_a_stream_in_place(make: Build) -> None:
    network = quantize(make("residual"), spec(4, edge_bits=8), some_images())
    few = [part for part in quantizers(network).values() if part.bits == 4]
    before = network(some_images(8))
    assert set_bits(network, 6)
    assert {part.bits for part in few} == {6}
    assert not torch.equal(network(some_images(8)), before)
    assert set_bits(network, 4)
    assert {part.bits for part in quantizers(network).values()} == {4, 8}
    torch.testing.assert_close(network(some_images(8)), before, rtol=0.1, atol=0.1)


def test_older_networks_have_one_grid_for_sums_and_layers() -> None:
    older = insert_quantizers(normalized(resnet20(), MEAN, STD), spec(4, edge_bits=8), sums_apart=False)
    image_and_last_input, branches, shortcuts_with_weights, last_sum = 2, 9, 2, 1
    expected = image_and_last_input + branches + shortcuts_with_weights + last_sum
    assert [part.bits for part in quantizers(older).values()].count(8) == expected


@STRUCTURES
def test_a_grid_of_its_own_for_sums_loses_less(make: Build, name: str) -> None:
    model, images = make(name), some_images()
    errors = []
    for apart in (True, False):
        network = insert_quantizers(model, spec(8, activation_bits=3, edge_bits=8), sums_apart=apart)
        calibrate(network, images, "minmax")
        with torch.no_grad():
            errors.append(float((network(images) - model(images)).square().mean()))
    if name in ("residual", "functional"):
        assert errors[0] < errors[1]
    else:
        assert errors[0] == errors[1]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_option_a_shortcuts_stay_exact(bits: int) -> None:
    model = normalized(resnet20(), MEAN, STD)
    network = insert_quantizers(model, spec(bits))
    for name, part in model.named_modules():
        if isinstance(part, OptionAShortcut):
            layer = layers(network)[name]
            assert torch.equal(layer.quantized_weight(), part.weight)
            assert not layer.weight.requires_grad
            assert not layer.weight_step.requires_grad


def test_32_bits_are_off(make: Build) -> None:
    model = make("residual")
    network = quantize(model, spec(32), some_images())
    assert network is not model
    assert not layers(network)
    assert not quantizers(network)
    assert torch.equal(network(some_images()), model(some_images()))


@STRUCTURES
def test_16_bits_are_as_good_as_float(make: Build, name: str) -> None:
    model, images = make(name), some_images()
    network = quantize(model, spec(16, calibration="minmax"), images)
    with torch.no_grad():
        torch.testing.assert_close(network(images), model(images), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("mean", [0.0, 0.286, 0.5, 0.1307])
def test_all_gray_values_keep_codes_of_their_own(mean: float) -> None:
    """At a mean of 0.5 every 8-bit pixel lies midway between two codes: one gray value of 256 may be lost, not 40."""
    model = normalized(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), [mean], [0.5])
    network = quantize(model, spec(), some_images(4, 1, 4, 4))
    rounds = quantizers(network)["quantizer_0"]
    gray = (torch.arange(256.0) / 255).view(256, 1, 1, 1)
    values = rounds(network.get_submodule("normalize")(gray)).detach().flatten()
    assert len(values.unique()) == (256 if mean != 0.5 else 255)
    assert torch.equal(values.sort().values, values)
    jitter = rounds(network.get_submodule("normalize")(gray) * (1 + 1e-6)).detach().flatten()
    assert torch.equal(jitter, values)  # the last bit of a float decides nothing


def test_packed_size_counts_every_parameter_once(make: Build) -> None:
    network = insert_quantizers(make("plain"), spec(4, edge_bits=8))
    sizes = weight_bit_widths(network)
    weights = [layer.weight.numel() for layer in layers(network).values()]
    assert sizes[:4] == list(zip(weights, [8, 4, 4, 8], strict=True))
    assert sum(count for count, _ in sizes) == sum(parameter.numel() for parameter in network.parameters())
    assert all(bits == 32 for _, bits in sizes[4:])


# --- BatchNorm that stays while the network is trained ----------------------------------------------------------------


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", ["residual", "separable", "functional", "pooled"])
@pytest.mark.parametrize(
    ("bits", "edge", "ternary"),
    [(1, 1, False), (2, 2, False), (2, 2, True), (4, 4, False), (4, 8, False), (8, 8, False)],
)
def test_batchnorm_becomes_part_of_the_quantized_layer_before_it(
    make: Build, name: str, bits: int, edge: int, ternary: bool
) -> None:
    model, rounding = make(name), spec(bits, edge_bits=edge, ternary=ternary)
    before, generator = state(model), torch.Generator().manual_seed(0)
    kept = quantize(model, rounding, some_images(), keep_batchnorm=True)
    assert norms(kept)
    for norm in norms(kept):  # as after a training: scales of both signs, and none
        with torch.no_grad():
            norm.weight.copy_(torch.randn(len(norm.weight), generator=generator))
            norm.weight[0] = 0.0
            norm.bias.copy_(torch.randn(len(norm.bias), generator=generator))
    with torch.no_grad():
        next(iter(layers(kept).values())).weight[:, 0] = 0.0
    as_it_was = state(kept)
    folded = fold_quantized(kept)
    assert unchanged(model, before)
    assert unchanged(kept, as_it_was)
    assert not norms(folded)
    plain = insert_quantizers(model, rounding)
    assert [*state(folded)] == [*state(plain)]
    plain.load_state_dict(folded.state_dict())
    found = outputs(folded)
    for layer, (expected, _) in outputs(kept).items():  # each on the input that it has in the network with BatchNorm
        mine = layers(folded)[layer]
        with torch.no_grad():
            result = mine(outputs(kept)[layer][1])
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 if bits == edge else 2e-5)
        assert int(mine.bias_codes().abs().max()) < (2**24 if mine.has_zero else 2**30)
    assert found.keys() == outputs(kept).keys()
    with torch.no_grad():
        assert torch.equal(plain(some_images(8)), folded(some_images(8)))


@pytest.mark.parametrize("bits", [1, 2])
def test_codes_change_their_sign_with_the_scale_when_batchnorm_is_folded(make: Build, bits: int) -> None:
    """Weights on a border between two codes, too, which has no side of its own where 0 has no code."""
    kept = quantize(make("residual"), spec(bits), some_images(), keep_batchnorm=True)
    name, layer = next(iter(layers(kept).items()))
    with torch.no_grad():
        borders = torch.tensor([-2.0, -1.5, -0.5, 0.0, 0.5, 1.5, 2.0]).repeat(layer.weight[0].numel())
        layer.weight.copy_(borders[: layer.weight[0].numel()].view_as(layer.weight[0]))
        layer.weight_step.fill_(0.25)
        layer.weight.mul_(0.25)
        for norm in norms(kept):
            norm.weight.copy_(torch.tensor([-1.0, 2.0]).repeat(len(norm.weight))[: len(norm.weight)])
    signs = torch.tensor([-1, 1]).repeat(len(layer.weight))[: len(layer.weight)].view(-1, 1, 1, 1)
    assert torch.equal(layers(fold_quantized(kept))[name].weight_codes(), signs * layer.weight_codes())


def test_on_the_way_to_one_bit_two_are_ternary_wherever_the_network_comes_from(make: Build) -> None:
    network = quantize(make("plain"), spec(1, activation_bits=4, edge_bits=8), some_images())
    set_bits(network, 2)
    inner = list(layers(network).values())[1]
    assert (inner.bits, inner.final_bits) == (2, 1)
    assert set(inner.weight_codes().unique().tolist()) <= {-1, 0, 1}


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("scale", [0.0, 1e-7])
def test_a_channel_that_batchnorm_shuts_is_shut_when_it_is_folded(bits: int, scale: float) -> None:
    """Weights without a code of 0 stay at least a step each: 2,304 of them must not add up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(256, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    network = normalized(model, [0.0] * 256, [1.0] * 256).eval()
    images = some_images(8, 256, 3, 3)
    kept = quantize(network, spec(bits, activation_bits=8, edge_bits=bits), images, keep_batchnorm=True)
    with torch.no_grad():
        (norm,) = norms(kept)
        norm.weight.fill_(scale)
        norm.bias.fill_(1.0)
        folded = fold_quantized(kept)
        first = next(iter(layers(folded)))
        (expected, _), (result, _) = outputs(kept, images)[first], outputs(folded, images)[first]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)


def outputs(network: nn.Module, images: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each quantized layer: its output, after the BatchNorm behind it if there is one, and its input."""
    assert isinstance(network, fx.GraphModule)
    modules, found = dict(network.named_modules()), {}

    class Reader(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.op == "call_module" and isinstance(modules[str(n.target)], QuantizedLayer):
                found[str(n.target)] = (result, self.env[n.all_input_nodes[0]])
            if n.op == "call_module" and isinstance(modules[str(n.target)], nn.BatchNorm2d):
                layer = str(n.all_input_nodes[0].target)
                found[layer] = (result, found[layer][1])
            return result

    with torch.no_grad():
        Reader(network).run(some_images(8) if images is None else images)
    return found


def test_batchnorm_that_stays_is_measured_with_rounded_weights(make: Build) -> None:
    model, images = make("residual"), some_images(256)
    kept = quantize(model, spec(1), images, keep_batchnorm=True)
    for norm in norms(kept):
        assert norm.momentum == 0.1
        assert not norm.training
    conv, norm = next(iter(layers(kept).values())), norms(kept)[0]
    quantizer, normalize = kept.get_submodule("quantizer_0"), kept.get_submodule("normalize")
    with torch.no_grad():
        reads = conv(quantizer(normalize(images)))
    torch.testing.assert_close(norm.running_mean, reads.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    halves = torch.stack([half.var((0, 2, 3)) for half in reads.split(128)]).mean(0)
    torch.testing.assert_close(norm.running_var, halves, rtol=1e-3, atol=1e-5)


def test_batchnorm_that_cannot_be_folded_adds_what_it_did() -> None:
    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

        def forward(self, inputs: Tensor) -> Tensor:
            x = self.conv(inputs)
            return self.fc((self.norm(x) + torch.relu(x)).mean((2, 3)))  # both read the convolution itself

    for keep in (False, True):
        network = quantize(normalized(TwoReaders(), MEAN, STD), spec(2), some_images(), keep_batchnorm=keep)
        assert norms(fold_quantized(network))
        assert not any(module._forward_hooks for module in network.modules())


def test_what_is_not_quantized_is_not_folded(make: Build) -> None:
    model = make("residual")
    assert fold_quantized(model) is model
    off = quantize(model, spec(32), some_images(), keep_batchnorm=True)
    assert norms(fold_quantized(off))


# --- calibration -----------------------------------------------------------------------------------------------------


def calibrated(values: Tensor, bits: int, method: str) -> tuple[ActivationQuantizer, Tensor]:
    """One quantizer calibrated on ``values`` (N, C, H, W), and its rounding errors."""
    rounds = ActivationQuantizer(bits)
    calibrate(nn.Sequential(rounds), values, method)
    return rounds, (rounds(values) - values).detach()


def heavy_tails(seed: int, freedom: float = 2.0) -> Tensor:
    """Student's t, (64, 1, 16, 16)."""
    torch.manual_seed(seed)
    return torch.distributions.StudentT(freedom).sample((64, 1, 16, 16))


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), bits=st.integers(2, 8), rectified=st.booleans())
def test_minmax_covers_every_value(seed: int, bits: int, rectified: bool) -> None:
    values = heavy_tails(seed).relu() if rectified else heavy_tails(seed)
    rounds, errors = calibrated(values, bits, "minmax")
    assert float(errors.abs().max()) <= 1.001 * float(rounds.step.detach())
    assert (rounds.zero == 0) == rectified


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), bits=st.integers(2, 6), freedom=st.sampled_from([1.5, 2.0, 4.0]))
def test_mse_beats_minmax_on_heavy_tails(seed: int, bits: int, freedom: float) -> None:
    values = heavy_tails(seed, freedom)
    least, widest = (float(calibrated(values, bits, method)[1].square().mean()) for method in ("mse", "minmax"))
    assert least <= widest * 1.001


@pytest.mark.parametrize(("bits", "share"), [(2, 0.5), (4, 0.7), (6, 0.8)])
def test_mse_gives_up_the_few_for_the_many(bits: int, share: float) -> None:
    torch.manual_seed(0)
    values = torch.distributions.Laplace(0.0, 1.0).sample((64, 1, 16, 16))
    least, widest = (calibrated(values, bits, method)[1].square().mean() for method in ("mse", "minmax"))
    assert float(least) < share * float(widest)


def test_percentile_clips_outliers() -> None:
    values = some_images(64, 1, 32, 32)
    values[3, 0, 5, 7], values[60, 0, 1, 1] = 1000.0, -1000.0
    rounds, _ = calibrated(values, 8, "percentile")
    assert float(rounds.step.detach()) * 255 == pytest.approx(1.0, abs=0.02)
    assert rounds.zero == 0
    wide, _ = calibrated(values, 8, "minmax")
    assert float(wide.step.detach()) * 255 == pytest.approx(2000.0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_steps_of_weights_beat_the_largest_weight(make: Build, bits: int) -> None:
    errors = {}
    for method in ("mse", "minmax"):
        network = insert_quantizers(make("plain"), spec(bits, calibration=method))
        errors[method] = [
            (layer.quantized_weight() - layer.weight).detach().flatten(1).square().sum(1)
            for layer in layers(network).values()
        ]
    for least, widest in zip(errors["mse"], errors["minmax"], strict=True):
        assert bool((least <= widest * 1.001).all())
        assert float(least.sum()) < 0.95 * float(widest.sum())


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_the_range_of_the_image_is_that_of_the_box(make: Build, method: str) -> None:
    gray, bright = torch.full((8, *SHAPE), 0.45), some_images(8) * 0.1 + 0.8
    networks = [quantize(make("plain"), spec(calibration=method), images) for images in (gray, bright)]
    first = [quantizers(network)["quantizer_0"] for network in networks]
    assert torch.equal(first[0].step, first[1].step)
    assert first[0].zero == first[1].zero
    assert ranges(networks[0])[1:] != ranges(networks[1])[1:]
    for value in (0.0, 1.0):
        pixels = networks[0].get_submodule("normalize")(torch.full((1, *SHAPE), value))
        assert float((first[0](pixels) - pixels).detach().abs().max()) <= 1.001 * float(first[0].step.detach())


def test_the_range_of_the_image_is_wider_where_pixels_leave_the_box(make: Build) -> None:
    images = some_images(8)
    boxed = quantizers(quantize(make("plain"), spec(), images))
    wide = quantize(make("plain"), spec(), images, beyond_box=0.1)
    for value in (-0.1, 1.1):
        pixels = wide.get_submodule("normalize")(torch.full((1, *SHAPE), value))
        image, narrow = quantizers(wide)["quantizer_0"], boxed["quantizer_0"]
        assert float((image(pixels) - pixels).detach().abs().max()) <= 1.001 * float(image.step.detach())
        assert float((narrow(pixels) - pixels).detach().abs().max()) > 5 * float(narrow.step.detach())


@pytest.mark.parametrize("training", [False, True])
def test_ranges_move_only_in_calibrate(make: Build, training: bool) -> None:
    """Observers that run in evaluation would let an attack move the grid."""
    network = quantize(make("pooled"), spec(), some_images())
    before = state(network)
    network.train(training)
    network(some_images(seed=3) * 100 - 50).sum().backward()
    assert unchanged(network, before)
    assert not any(part.observing or part._forward_hooks for part in quantizers(network).values())
    calibrate(network.eval(), some_images(seed=3) * 0.5, "minmax")
    assert not unchanged(network, before)


def test_a_failing_calibration_leaves_no_observer(make: Build) -> None:
    network = insert_quantizers(make("plain"), spec())
    with pytest.raises(RuntimeError):
        calibrate(network, some_images(4, 3, 9, 9), "minmax")
    assert not any(part.observing or part._forward_hooks for part in quantizers(network).values())
    with pytest.raises(ModelError, match="whose range was never set"):
        network(some_images())


def test_calibration_is_the_same_each_time_and_not_in_place(make: Build) -> None:
    model, images = make("residual").train(), some_images(300)
    before, pixels = state(model), images.clone()
    first, second = quantize(model, spec(4), images), quantize(model, spec(4), images)
    assert unchanged(first, state(second))
    assert unchanged(model, before)
    assert model.training
    assert not first.training
    assert torch.equal(images, pixels)
    assert all(parameter.grad is None for parameter in first.parameters())


# --- training --------------------------------------------------------------------------------------------------------

Task = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def task() -> Task:
    """1,024 noisy copies of ten random images, which differ in colour and in pattern, and which one each is."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(10, 3, 1, 1, generator=generator)
    prototypes = (colours + torch.rand(10, *SHAPE, generator=generator)) / 2
    labels = torch.randint(0, 10, (1024,), generator=generator)
    noise = torch.rand(1024, *SHAPE, generator=generator)
    return 0.6 * prototypes[labels] + 0.4 * noise, labels


def fit(model: nn.Module, task: Task, *, lr: float, epochs: int) -> nn.Module:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for _ in range(epochs):
        for images, labels in zip(task[0].split(64), task[1].split(64), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def score(model: nn.Module, task: Task) -> tuple[float, float]:
    """Loss and accuracy."""
    logits = model(task[0])
    return float(F.cross_entropy(logits, task[1])), float((logits.argmax(1) == task[1]).float().mean())


@pytest.fixture(scope="module")
def trained(build: Build, task: Task) -> nn.Module:
    return fit(normalized(build("residual"), MEAN, STD), task, lr=0.05, epochs=5)


@pytest.mark.parametrize(
    ("calibration", "bits", "error"),
    [("minmax", 8, 0.05), ("percentile", 8, 0.05), ("mse", 8, 0.05), ("minmax", 16, 5e-4), ("mse", 16, 5e-4)],
)
def test_a_trained_network_keeps_its_answers(
    trained: nn.Module, task: Task, bits: int, error: float, calibration: str
) -> None:
    assert score(trained, task)[1] > 0.95
    network = quantize(trained, spec(bits, calibration=calibration), task[0])
    with torch.no_grad():
        exact, found = trained(task[0]), network(task[0])
    assert float((found - exact).square().mean().sqrt() / exact.std()) < error
    assert float((found.argmax(1) == exact.argmax(1)).float().mean()) > 0.99


@pytest.mark.parametrize("ternary", [False, True])
def test_training_through_the_rounding_saves_2_bits(ternary: bool, trained: nn.Module, task: Task) -> None:
    network = quantize(trained, spec(2, ternary=ternary), task[0][:256])
    start, before = score(network, task), state(network)
    fit(network, task, lr=0.01, epochs=3)
    end = score(network, task)
    assert end[0] < 0.6 * start[0]
    assert end[1] > start[1] + 0.05
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    expected = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert moved == expected
    image_step = "quantizer_0.step"
    assert expected == {name for name, _ in network.named_parameters()} - {image_step}
    codes = [layer.weight_codes().unique().tolist() for layer in layers(network).values()]
    assert {code for found in codes for code in found} == ({-1, 0, 1} if ternary else {-3, -1, 1, 3})


def test_a_network_that_kept_its_batchnorm_answers_the_same_when_it_is_folded(trained: nn.Module, task: Task) -> None:
    network = quantize(trained, spec(2), task[0][:256], keep_batchnorm=True)
    start = score(network, task)
    fit(network, task, lr=0.01, epochs=3)
    assert score(network, task)[0] < 0.6 * start[0]
    folded = fold_quantized(network)
    assert norms(network)
    assert not norms(folded)
    with torch.no_grad():
        assert float((folded(task[0]).argmax(1) == network(task[0]).argmax(1)).float().mean()) > 0.999


def test_steps_that_are_not_learned_stay(trained: nn.Module, task: Task) -> None:
    network = quantize(trained, spec(4, learned_steps=False), task[0][:256])
    before = state(network)
    assert not any(p.requires_grad for name, p in network.named_parameters() if "step" in name)
    fit(network, task, lr=0.01, epochs=1)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("step" in name or "zero_point" in name or "normalize" in name)


def test_an_attack_sees_through_every_clipped_range(trained: nn.Module, task: Task) -> None:
    """White pixels of images that are brighter than all that the calibration saw still have gradients."""
    network = quantize(trained, spec(4), task[0][:256] * 0.5)
    images = torch.ones(4, *SHAPE, requires_grad=True)
    with attacking(network):
        (gradient,) = torch.autograd.grad(network(images)[:, 0].sum(), images)
    assert float((gradient != 0).float().mean()) > 0.99


def test_copies_are_independent(trained: nn.Module, task: Task) -> None:
    network = quantize(trained, spec(4), task[0][:256])
    twin = copy.deepcopy(network)
    before = state(network)
    fit(twin, task, lr=0.02, epochs=1)
    assert unchanged(network, before)
    for name, layer in layers(twin).items():
        assert layer.input_quantizer in quantizers(twin).values()
        assert layer.input_quantizer is not layers(network)[name].input_quantizer


# --- what cannot be quantized ----------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One convolution, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.again(torch.relu(self.again(self.stem(inputs)))).mean((2, 3))


class Choosy(nn.Module):
    """Looks at the values before it decides what to do."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if bool(inputs.sum() > 0) else -inputs


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Twice(), r"layer 'again' is used more than once in the forward pass; expected each .* used once"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten()),
            r"layer '0': expected padding_mode 'zeros' to quantize, got 'reflect'",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), Choosy(), nn.Flatten()), r"layer '1' \(Choosy\) cannot"),
    ],
    ids=["twice", "reflect", "choosy"],
)
def test_what_cannot_be_quantized_is_named(model: nn.Module, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        quantize(model, spec(), some_images(4))
    assert quantize(model, spec(32), some_images(4)) is not model  # the way out that the message names


# --- ReLU in the pass of the quantizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["clipped", "pass_through", "unrounded"])
@pytest.mark.parametrize(("name", "bits"), [("cnn8", 8), ("resnet20", 8), ("resnet20", 4)])
def test_a_quantizer_that_does_the_work_of_the_relu_before_it(name, bits, mode, compiled) -> None:
    if compiled and cpp_compiler() is None:
        pytest.skip("no C++ compiler: nothing can be compiled")
    torch.manual_seed(0)
    shape = (1, 28, 28) if name == "cnn8" else (3, 32, 32)
    images = torch.rand(8, *shape)
    bare = model_source(f"zoo:{name}", image_shape=shape, num_classes=10).build(0)
    bare = normalized(bare, (0.5,) * shape[0], (0.3,) * shape[0]).eval()
    network = quantize(bare, QuantizeSpec(activation_bits=bits), images)
    relus = [module for module in network.modules() if type(module) is nn.ReLU]

    def everything() -> list[torch.Tensor]:
        pixels = images.clone().requires_grad_()
        with attacking(network, mode) if mode != "clipped" else nullcontext(), fused(compiled):
            loss = nn.functional.cross_entropy(network(pixels), torch.arange(8))
        learned = [p for p in network.parameters() if p.requires_grad and mode == "clipped"]
        return [loss, *torch.autograd.grad(loss, [pixels, *learned], allow_unused=True)]

    before = everything()
    with rectified(network):
        left = [module for module in network.modules() if type(module) is nn.ReLU]
        inside = everything()
    assert len(relus) > 5
    assert not left, "all of these have a quantizer behind them"
    for one, other in zip(before, inside, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert torch.equal(before[1], inside[1]), "what an attack sees is the same to the bit"
    assert [module for module in network.modules() if type(module) is nn.ReLU] == relus
    assert torch.equal(everything()[0], before[0])


def test_a_relu_with_another_reader_keeps_its_work() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.linear = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.relu(self.relu(self.conv(x)).amax((2, 3))))

    images = torch.rand(4, 1, 8, 8)
    network = quantize(normalized(Twice(), (0.5,), (0.3,)).eval(), QuantizeSpec(), images)
    with rectified(network):
        assert any(type(module) is nn.ReLU for module in network.modules()), "it is called twice"
    with rectified(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) as nothing:
        assert nothing is None

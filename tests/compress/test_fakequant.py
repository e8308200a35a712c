from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from coldforge.compress.fakequant import (
    ActivationQuantizer,
    Backward,
    QuantizedLayer,
    attacking,
    binarize,
    fake_quantize,
)
from coldforge.compress.lowbits import odd_codes, round_to_odd
from coldforge.errors import ModelError

BOTH = pytest.mark.parametrize("backward", ["clipped", "pass_through"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(bits: int = 8, low: float = 0.0, high: float = 1.0, **keys: bool) -> ActivationQuantizer:
    made = ActivationQuantizer(bits, **keys)
    made.set_range(low, high)
    return made


def layer(
    source: nn.Module | None = None, bits: int = 4, *, step: float = 0.01, ternary: bool = False
) -> QuantizedLayer:
    torch.manual_seed(0)
    source = source or nn.Conv2d(3, 5, 3, padding=1)
    made = QuantizedLayer(source, bits, quantizer(high=255 * step), ternary=ternary)  # type: ignore[arg-type]
    with torch.no_grad():
        made.weight_step.copy_(made.weight.abs().flatten(1).amax(1) / made.qmax)
        made.bias.normal_()
    return made


# --- slow twins ------------------------------------------------------------------------------------------------------


def slow_forward(x: Tensor, step: float, zero: int, qmin: int, qmax: int) -> list[float]:
    """One number after the other; Python rounds half to even."""
    values = []
    for number in x.numpy().ravel():
        code = round(float(np.float32(number) / np.float32(step))) + zero
        code = min(max(code, qmin), qmax)
        values.append(float(np.float32(code - zero) * np.float32(step)))
    return values


def lsq(x: Tensor, step: Tensor, zero: int, qmin: int, qmax: int, grad_scale: float, backward: Backward) -> Tensor:
    """Esser et al. 2020 by autograd; what must not have a gradient is detached. Half a step more counts as inside."""

    def rounded(value: Tensor) -> Tensor:
        inside = value.clamp(qmin - zero - 0.5, qmax - zero + 0.5)
        return inside + (inside.round().clamp(qmin - zero, qmax - zero) - inside).detach()

    step = step * grad_scale + (step * (1 - grad_scale)).detach()
    result = rounded(x / step) * step
    if backward == "clipped":
        return result
    # pass-through: the value and the step's gradient of the above, the gradient 1 for x
    frozen = rounded(x.detach() / step) * step
    return frozen + (x - x.detach())


def values_and_gradients(*functions: Callable[[Tensor, Tensor], Tensor], x: Tensor, step: Tensor) -> list[list[Tensor]]:
    """Of each function: its value, and the gradients by ``x`` and ``step`` of its product with a fixed tensor."""
    upstream, found = normal(*x.shape, seed=1), []
    for function in functions:
        inputs = x.clone().requires_grad_(), step.clone().requires_grad_()
        result = function(*inputs)
        found.append([result.detach(), *torch.autograd.grad(result, inputs, upstream)])
    return found


@given(
    bits=st.integers(2, 8),
    signed=st.booleans(),
    place=st.floats(0, 1),
    exponent=st.integers(-12, 4),
    mantissa=st.sampled_from([1.0, 1.1, 1.37, 1.999]),
    halves=st.lists(st.integers(-1100, 1100), min_size=1, max_size=20),
    others=st.lists(st.floats(-600, 600, width=32), max_size=10),
)
def test_forward_equals_a_scalar_loop(
    bits: int, signed: bool, place: float, exponent: int, mantissa: float, halves: list[int], others: list[float]
) -> None:
    qmax = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    qmin, zero = (-qmax, 0) if signed else (0, round(place * qmax))
    step = float(np.float32(mantissa * 2.0**exponent))
    # multiples of half a step: half of them are ties, exact ones where the step is a power of two
    x = torch.tensor([half / 2 * step for half in halves] + [other * step for other in others], dtype=torch.float32)
    result = fake_quantize(x, torch.tensor(step), zero=zero, qmin=qmin, qmax=qmax)
    assert result.tolist() == slow_forward(x, step, zero, qmin, qmax)


def test_ties_go_to_the_even_code() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert fake_quantize(x, torch.tensor(1.0), qmin=-7, qmax=7).tolist() == [-2, -2, 0, 0, 2, 2]


@BOTH
@pytest.mark.parametrize(("qmin", "qmax", "zero"), [(0, 15, 0), (0, 15, 6), (-7, 7, 0), (0, 255, 128), (-1, 1, 0)])
@pytest.mark.parametrize("channels", [False, True])
def test_gradients_are_those_of_lsq(qmin: int, qmax: int, zero: int, channels: bool, backward: Backward) -> None:
    x = normal(6, 4, 3) * 0.5 * (qmax - qmin)  # some inside, some outside
    step = torch.linspace(0.3, 1.7, 6).view(-1, 1, 1) if channels else torch.tensor(0.8)
    gradients = values_and_gradients(
        lambda a, b: fake_quantize(a, b, zero=zero, qmin=qmin, qmax=qmax, grad_scale=0.05, backward=backward),
        lambda a, b: lsq(a, b, zero, qmin, qmax, 0.05, backward),
        x=x,
        step=step,
    )
    for found, expected in zip(*gradients, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    clipped = gradients[0][1] == 0
    assert bool(clipped.any()) == (backward == "clipped")
    assert not bool(clipped.all())


def signs(x: Tensor, step: Tensor, grad_scale: float) -> Tensor:
    """Binarization by autograd: to x the gradient of the identity, to the step that of LSQ with the codes -1 and 1."""
    step = step * grad_scale + (step * (1 - grad_scale)).detach()
    codes = torch.tensor([-1.0 if number < 0 else 1.0 for number in x.detach().flatten().tolist()]).view(x.shape)
    return codes * step + (x - x.detach())


@pytest.mark.parametrize("shape", [(6, 20), (6, 3, 3, 3), (6, 1)], ids=["linear", "conv", "one weight"])
def test_gradients_of_signs_are_those_of_lsq(shape: tuple[int, ...]) -> None:
    x = normal(*shape) * 3  # most beyond the step, whose gradient passes nonetheless
    x[0], x[1] = 0.0, -0.0
    step = torch.linspace(0.3, 1.7, 6).view(-1, *[1] * (len(shape) - 1))
    gradients = values_and_gradients(
        lambda a, b: binarize(a, b, grad_scale=0.05), lambda a, b: signs(a, b, 0.05), x=x, step=step
    )
    for found, expected in zip(*gradients, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected)
    assert torch.equal(gradients[0][0][:2], step[:2].expand(2, *shape[1:])), "1 where x is 0"
    assert torch.equal(gradients[0][1], normal(*shape, seed=1))


def odd(x: Tensor, step: Tensor, grad_scale: float) -> Tensor:
    """The nearest odd code by autograd: clipped straight-through to x, to the step that of LSQ."""
    step = step * grad_scale + (step * (1 - grad_scale)).detach()
    inside = (x / step).clamp(-4, 4)
    codes = [min(max(2 * math.floor(number / 2) + 1, -3), 3) for number in (x / step).detach().flatten().tolist()]
    return (inside + (torch.tensor(codes, dtype=x.dtype).view(x.shape) - inside).detach()) * step


@given(exponent=st.integers(-12, 4), places=st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=20))
def test_two_bits_take_the_nearest_of_four_odd_codes(exponent: int, places: list[float]) -> None:
    step = torch.tensor([2.0**exponent])
    x = torch.tensor([places]) * step
    found = round_to_odd(x, step)
    assert set((found / step).flatten().tolist()) <= {-3.0, -1.0, 1.0, 3.0}
    distances = torch.stack([(x - code * step).abs() for code in (-3, -1, 1, 3)])
    assert torch.equal((x - found).abs(), distances.amin(0))
    assert torch.equal(round_to_odd(found, step), found)
    assert torch.equal(odd_codes(x / step) * step, found)


def test_of_two_odd_codes_as_near_the_larger_is_taken() -> None:
    assert odd_codes(torch.tensor([-4.0, -2.0, -0.0, 0.0, 2.0, 4.0])).tolist() == [-3, -1, 1, 1, 3, 3]


@pytest.mark.parametrize("shape", [(6, 20), (6, 3, 3, 3), (6, 1)], ids=["linear", "conv", "one weight"])
def test_gradients_of_odd_codes_are_those_of_lsq(shape: tuple[int, ...]) -> None:
    x = normal(*shape) * 3  # some inside, some outside
    step = torch.linspace(0.3, 1.7, 6).view(-1, *[1] * (len(shape) - 1))
    gradients = values_and_gradients(
        lambda a, b: round_to_odd(a, b, grad_scale=0.05), lambda a, b: odd(a, b, 0.05), x=x, step=step
    )
    for found, expected in zip(*gradients, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert 0 < int((gradients[0][1] == 0).sum()) < x.numel()


@pytest.mark.parametrize(("bits", "ternary"), [(1, False), (2, False), (2, True), (4, False)])
@pytest.mark.parametrize(
    "source",
    [lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: nn.Linear(9, 5)],
    ids=["grouped", "depthwise", "linear"],
)
def test_a_layer_learns_weights_and_steps_as_lsq_says(
    source: Callable[[], nn.Module], bits: int, ternary: bool
) -> None:
    """Section 2.2 of the paper: the gradient of a step is scaled by 1 / sqrt(weights of the step * largest code)."""
    quantized = layer(source(), bits, ternary=ternary)
    with torch.no_grad():
        quantized.weight_step.mul_(torch.linspace(0.4, 1.2, len(quantized.weight)))  # so that some are clipped
    x = torch.rand(3, 4, 6, 6) if quantized.is_conv else torch.rand(3, 9)
    learned = quantized.weight, quantized.weight_step
    found = torch.autograd.grad(quantized(x).square().sum(), learned)
    limit = {1: 1, 2: 1 if ternary else 3, 4: 7}[bits]
    scale = (quantized.weight[0].numel() * limit) ** -0.5
    column = quantized.weight_step.view(-1, *[1] * (quantized.weight.ndim - 1))
    if bits == 1:
        rounded = signs(quantized.weight, column, scale)
    elif bits == 2 and not ternary:
        rounded = odd(quantized.weight, column, scale)
    else:
        rounded = lsq(quantized.weight, column, 0, -limit, limit, scale, "clipped")
    bias = quantized.quantized_bias().detach()
    if quantized.is_conv:
        output = nn.functional.conv2d(x, rounded, bias, groups=quantized.groups)
    else:
        output = nn.functional.linear(x, rounded, bias)
    expected = torch.autograd.grad(output.square().sum(), learned)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert bool((ours != 0).any())
    assert bool((found[0] == 0).any()) == (bits > 1), "one bit clips nothing"


# --- what attacks need -----------------------------------------------------------------------------------------------


def test_attacks_see_white_pixels_that_the_calibration_never_saw() -> None:
    """A range that ends at 0.9 clips 0.996 and 1.0; clipped gradients would tell an attack that they do not matter."""
    rounds = quantizer(high=0.9)
    for mode, expected in (("clipped", [1.0, 0.0, 0.0]), ("pass_through", [1.0, 1.0, 1.0])):
        pixels = torch.tensor([[0.5, 254 / 255, 1.0]], requires_grad=True)
        rounds.backward_mode = mode  # type: ignore[assignment]
        (gradient,) = torch.autograd.grad(rounds(pixels).sum(), pixels)
        assert gradient.tolist() == [expected]


@BOTH
def test_a_frozen_step_gets_no_gradient(backward: Backward) -> None:
    x, step = normal(5, 3).requires_grad_(), torch.tensor(0.1)
    fake_quantize(x, step, qmin=0, qmax=3, backward=backward).sum().backward()
    assert step.grad is None
    expected = torch.ones(5, 3) if backward == "pass_through" else ((x >= 0) & (x <= 0.3)).float()
    assert torch.equal(x.grad, expected)


def test_arguments_stay_as_they_are() -> None:
    x, step = normal(20), torch.tensor(0.1)
    before = x.clone()
    fake_quantize(x, step, qmin=0, qmax=15)
    fake_quantize(x.requires_grad_(), step.requires_grad_(), qmin=0, qmax=15).sum().backward()
    assert torch.equal(x, before)
    assert float(step.detach()) == pytest.approx(0.1)


# --- activations -----------------------------------------------------------------------------------------------------


@given(bits=st.integers(2, 8), low=st.floats(-50, 0), high=st.floats(0, 50))
def test_a_grid_has_no_more_values_than_codes_and_holds_zero(bits: int, low: float, high: float) -> None:
    rounds = quantizer(bits, low, high)
    x = torch.linspace(2 * low - 1, 2 * high + 1, 1001)[None]
    once = rounds(x)
    assert len(once.unique()) <= 2**bits
    assert torch.equal(rounds(once), once)
    assert float(rounds(torch.zeros(1, 1)).detach()) == 0.0
    inside = x[(x >= low) & (x <= high)]
    if high - low > 1e-3:  # an end may lie half a step outside, because 0 has a code of its own
        assert float((rounds(inside[None]) - inside).detach().abs().max()) <= 1.01 * float(rounds.step.detach())


def test_the_range_always_holds_zero() -> None:
    assert quantizer(8, 3.0, 5.1).zero == 0
    assert float(quantizer(8, 3.0, 5.1).step.detach()) == pytest.approx(5.1 / 255)
    assert quantizer(8, -5.1, -3.0).zero == 255
    assert quantizer(4, -1.0, 2.0).zero == 5
    dead = quantizer(8, 0.0, 0.0)  # a layer that is always 0
    assert torch.equal(dead(torch.tensor([[0.0, 0.3]])) > 1e-5, torch.tensor([[False, False]]))


def test_a_step_that_training_pushed_below_zero_still_rounds() -> None:
    rounds = quantizer()
    with torch.no_grad():
        rounds.step.fill_(-0.3)
    assert bool(torch.isfinite(rounds(torch.rand(2, 3))).all())


def test_bf16_holds_all_256_codes() -> None:
    """bfloat16 has 8 significant bits: whole numbers up to 256 are exact, so that no code is lost."""
    for zero in (0, 128):
        codes = torch.arange(256.0) - zero
        x = (codes / 16)[None]
        found = fake_quantize(x.bfloat16(), torch.tensor(1 / 16), zero=zero, qmin=0, qmax=255)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.float(), x)
    # any step: the value may be a code off, as the input is a rounded number itself, and never more
    x = torch.linspace(0, 1, 2001)[None]
    found = fake_quantize(x.bfloat16(), torch.tensor(1 / 255), qmin=0, qmax=255).float()
    assert float((found - x).abs().max()) <= 1.5 / 255


def test_an_unset_range_is_refused() -> None:
    rounds = ActivationQuantizer(8)
    expected = (
        r"expected a calibrated quantizer, got one whose range was never set; call .*calibrate.* load a checkpoint"
    )
    with pytest.raises(ModelError, match=expected):
        rounds(torch.rand(2, 3))
    with pytest.raises(ModelError, match="never set"):
        copy.deepcopy(rounds)(torch.rand(2, 3))
    rounds.set_range(0, 1)
    assert rounds(torch.rand(2, 3)).shape == (2, 3)


def test_the_zero_point_travels_with_the_state() -> None:
    source, target = quantizer(8, -1.0, 2.0), quantizer(8, 0.0, 1.0)
    x = normal(4, 50)
    target(x)  # reads, and remembers, its own zero point
    assert not torch.equal(target(x), source(x))
    target.load_state_dict(source.state_dict())
    assert target.zero == source.zero == 85
    assert torch.equal(target(x), source(x))
    fresh = ActivationQuantizer(8)
    fresh.load_state_dict(source.state_dict())
    assert torch.equal(fresh(x), source(x))
    source.set_range(0.0, 1.0)
    assert (source.zero, target.zero) == (0, 85)


@pytest.mark.parametrize("high", [1.0, 10.0], ids=["too small", "too large"])
def test_learned_step_finds_a_better_range(high: float) -> None:
    """The step's gradient, scaled as in LSQ, leads from a bad range to the best one (step 0.23 for a half normal)."""
    x = normal(64, 32).relu()
    rounds = quantizer(4, 0.0, high)
    optimizer = torch.optim.SGD(rounds.parameters(), lr=2.0)
    for _ in range(150):
        loss = (rounds(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    steps = torch.linspace(0.05, 0.7, 66)
    errors = [float((fake_quantize(x, step, qmin=0, qmax=15) - x).square().mean()) for step in steps]
    assert float(rounds.step.detach()) == pytest.approx(float(steps[errors.index(min(errors))]), rel=0.25)
    assert float(loss.detach()) < 1.2 * min(errors)


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "ternary"), [(1, False), (2, False), (2, True), *((n, False) for n in (3, 4, 8, 16))])
@pytest.mark.parametrize(
    "source",
    [
        lambda: nn.Conv2d(3, 5, 3, padding=1),
        lambda: nn.Conv2d(4, 8, 3, stride=2, dilation=2, groups=2),
        lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False),
        lambda: nn.Linear(7, 5),
    ],
    ids=["conv", "grouped", "depthwise", "linear"],
)
def test_integer_codes_are_what_the_forward_pass_uses(
    source: Callable[[], nn.Module], bits: int, ternary: bool
) -> None:
    quantized = layer(source(), bits, ternary=ternary)
    weights, biases = quantized.weight_codes(), quantized.bias_codes()
    assert weights.dtype == biases.dtype == torch.int32
    largest = {1: 1, 2: 1 if ternary else 3}.get(bits, 2 ** (bits - 1) - 1)
    assert int(weights.abs().max()) == quantized.qmax == largest
    assert len(weights.unique()) <= 2**bits
    column = quantized.weight_step.detach().view(-1, *[1] * (weights.ndim - 1))
    assert torch.equal(weights * column, quantized.quantized_weight().detach())
    torch.testing.assert_close(biases * quantized.accumulator_step(), quantized.quantized_bias().detach())
    # the whole layer, on integers: sums of products of codes, exact in float64
    shape = (2, weights.shape[1] * getattr(quantized, "groups", 1), 9, 9) if quantized.is_conv else (2, 7)
    codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).double()
    if quantized.is_conv:
        settings = quantized.stride, quantized.padding, quantized.dilation, quantized.groups
        sums = nn.functional.conv2d(codes, weights.double(), biases.double(), *settings)
    else:
        sums = nn.functional.linear(codes, weights.double(), biases.double())
    scale = quantized.accumulator_step().double().view(1, -1, *[1] * (sums.ndim - 2))
    inputs = (codes * quantized.input_quantizer.step.double()).float()
    torch.testing.assert_close(quantized(inputs).double(), sums * scale, rtol=1e-4, atol=1e-4)


def test_a_layer_without_bias_learns_none() -> None:
    quantized = QuantizedLayer(nn.Conv2d(3, 4, 3, bias=False), 8, quantizer())
    assert not quantized.bias.requires_grad
    assert quantized.bias_codes().tolist() == [0, 0, 0, 0]
    frozen = nn.Conv2d(3, 4, 3).requires_grad_(False)
    assert not any(p.requires_grad for name, p in layer(frozen).named_parameters() if "weight" in name)


def test_bias_gradient_passes_straight_through() -> None:
    quantized = layer()
    (gradient,) = torch.autograd.grad(quantized.quantized_bias() @ torch.arange(5.0), quantized.bias)
    assert gradient.tolist() == [0, 1, 2, 3, 4]


def test_bias_codes_stay_inside_32_bits() -> None:
    quantized = layer(step=1e-6)
    with torch.no_grad():
        quantized.weight_step.fill_(1e-7)
        quantized.bias.fill_(1.0)
        quantized.bias[0] = -1.0
    assert quantized.bias_codes().tolist() == [-(2**31 - 1)] + [2**31 - 1] * 4


def test_a_copied_network_reads_its_own_quantizer() -> None:
    network = nn.Sequential(quantizer())
    network.append(QuantizedLayer(nn.Linear(3, 2), 8, network[0]))  # type: ignore[arg-type]
    twin = copy.deepcopy(network)
    assert twin[1].input_quantizer is twin[0]
    assert list(twin.state_dict()) == ["0.step", "0.zero_point", "1.weight", "1.bias", "1.weight_step"]


# --- attacking -------------------------------------------------------------------------------------------------------


def small_network() -> nn.Sequential:
    first, second = quantizer(high=0.9), quantizer(high=2.0)
    parts = [first, layer(nn.Linear(6, 4), 8), nn.ReLU(), second, layer(nn.Linear(4, 3), 4)]
    return nn.Sequential(*parts)


def test_attacking_changes_no_answer_and_is_undone() -> None:
    network, x = small_network(), torch.rand(5, 6)
    outside = network(x)
    with attacking(network):
        assert torch.equal(network(x), outside)
        assert [q.backward_mode for q in (network[0], network[3])] == ["pass_through"] * 2
        assert all(part._cached is not None for part in (network[1], network[4]))
        white = torch.ones(1, 6, requires_grad=True)
        assert bool((torch.autograd.grad(network(white)[:, 0].sum(), white)[0] != 0).any())
    assert [q.backward_mode for q in (network[0], network[3])] == ["clipped"] * 2
    assert all(part._cached is None for part in (network[1], network[4]))
    white = torch.ones(1, 6, requires_grad=True)
    assert not torch.autograd.grad(network(white)[:, 0].sum(), white)[0].any()


def test_attacking_quantizes_the_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, calls = small_network(), 0
    original = QuantizedLayer.quantized_weight

    def counted(self: QuantizedLayer) -> Tensor:
        nonlocal calls
        calls += 1
        return original(self)

    monkeypatch.setattr(QuantizedLayer, "quantized_weight", counted)
    with attacking(network):
        for _ in range(5):
            network(torch.rand(2, 6))
    assert calls == 2
    network(torch.rand(2, 6))
    assert calls == 4  # a trained weight is seen at once


def test_nested_attacking_restores_what_was_before() -> None:
    network, x = small_network(), torch.rand(5, 6)

    def fail_inside() -> None:
        with attacking(network, "clipped"):
            assert network[0].backward_mode == "clipped"
            raise RuntimeError("inner")

    def fail_outside() -> None:
        with attacking(network):
            cached = network[1]._cached
            with pytest.raises(RuntimeError, match="inner"):
                fail_inside()
            assert network[0].backward_mode == "pass_through"
            assert network[1]._cached is cached is not None
            raise RuntimeError("outer")

    with pytest.raises(RuntimeError, match="outer"):
        fail_outside()
    assert network[0].backward_mode == "clipped"
    assert network[1]._cached is None
    assert bool(network(x).requires_grad)


def test_attacking_restores_after_failing_to_start() -> None:
    network = small_network()
    network[4].weight_step.data = torch.ones(7)  # fits no weight
    with pytest.raises(RuntimeError), attacking(network):
        pass
    assert network[1]._cached is None
    assert network[0].backward_mode == "clipped"


def test_a_float_network_is_left_alone() -> None:
    network = nn.Linear(3, 2)
    with attacking(network):
        assert network(torch.rand(1, 3)).requires_grad

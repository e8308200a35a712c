"""Networks with a known flaw that makes them look robust: every one must be flagged, and for what is wrong with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.attacks import margins, predict
from coldforge.compress import quantize
from coldforge.errors import ModelError
from coldforge.evaluate import Target, masking_panel
from coldforge.evaluate.binarization import TIGHT, binarization_check, binarization_test
from coldforge.recipe import QuantizeSpec

# --- the flaws


class Before(nn.Module):
    """A network behind a change of its input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def change(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.change(images))


class JpegLike(Before):
    """Coefficients of a 7x7 cosine transform, rounded (Guo et al. 2018 use JPEG itself)."""

    def change(self, images: Tensor) -> Tensor:
        k = torch.arange(7.0)
        basis = torch.cos(math.pi * (2 * k[None] + 1) * k[:, None] / 14) * math.sqrt(2 / 7)
        basis[0] /= math.sqrt(2)
        blocks = images.view(-1, 1, 2, 7, 2, 7).transpose(3, 4)
        rounded = torch.round(basis @ blocks @ basis.T * 8) / 8
        return (basis.T @ rounded @ basis).transpose(3, 4).reshape_as(images)


class InputBits(Before):
    """Four bits an input pixel (Xu et al. 2018, feature squeezing)."""

    def change(self, images: Tensor) -> Tensor:
        return torch.round(images * 15) / 15


class HardQuantization(nn.Module):
    """Activations rounded without a straight-through gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        values = self.network.normalize(images)
        for layer in self.network.network:
            values = layer(values)
            values = torch.round(values * 4) / 4 if isinstance(layer, nn.ReLU) else values
        return values


class After(nn.Module):
    """A network with something done to its logits."""

    def __init__(self, network: nn.Module, change) -> None:
        super().__init__()
        self.network, self.change = network, change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(self.network(images))


class RandomResizing(Before):
    """To a random size and back (Xie et al. 2018, without their padding)."""

    def change(self, images: Tensor) -> Tensor:
        side = int(torch.randint(15, 22, ()))
        resized = F.interpolate(images, size=(side, side), mode="bilinear")
        return F.interpolate(resized, size=(14, 14), mode="bilinear")


class TestTimeNoise(Before):
    __test__ = False

    def change(self, images: Tensor) -> Tensor:
        return images + 0.03 * torch.randn_like(images)


class WinnersTakeAll(nn.Module):
    """Only the largest 15 % of a layer's activations stay (Xiao et al. 2020)."""

    def forward(self, values: Tensor) -> Tensor:
        flat = values.flatten(1)
        least = flat.topk(max(int(0.15 * flat.shape[1]), 1)).values[:, -1:]
        return torch.where(flat >= least, flat, 0.0).view_as(values)


class Thermometer(nn.Module):
    """A pixel as eight comparisons (Buckman et al. 2018)."""

    def forward(self, images: Tensor) -> Tensor:
        return (images > (torch.arange(8) + 0.5).view(1, 8, 1, 1) / 8).float()


class Kink(Before):
    """The identity, but flat exactly at 8-bit values: a slope of 0 wherever there are data."""

    def change(self, images: Tensor) -> Tensor:
        nearest = torch.round(images.detach() * 255) / 255
        away = images - nearest
        return nearest + away * away.abs() / (0.5 / 255)


class Ripples(Before):
    """Waves of 0.002 on the input, far too small to see, which turn every gradient (shattered)."""

    def change(self, images: Tensor) -> Tensor:
        return images + 0.002 * torch.sin(5000 * images)


class PartlyStopped(Before):
    """Gradients flow back to the top three rows only."""

    def change(self, images: Tensor) -> Tensor:
        return torch.cat([images[:, :, :3], images[:, :, 3:].detach()], 2)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Reversed(Before):
    """A backward pass with the wrong sign."""

    def change(self, images: Tensor) -> Tensor:
        return _Reversed.apply(images)


class RootAndSquare(Before):
    """The identity, with a gradient of 0 times infinity at black pixels."""

    def change(self, images: Tensor) -> Tensor:
        return torch.sqrt(images) ** 2


class BatchStatistics(Before):
    """Normalized by the batch it came in."""

    def change(self, images: Tensor) -> Tensor:
        mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
        return (images - mean) / std * 0.32 + 0.286


class Remembers(Before):
    """Counts how often it was asked, and shifts the image by it."""

    asked = 0

    def change(self, images: Tensor) -> Tensor:
        self.asked += 1
        return images.roll(self.asked % 3 - 1, 3)


def confident(logits: Tensor) -> Tensor:
    """The same answers, said with 200 more."""
    return logits + 200 * F.one_hot(logits.argmax(1), logits.shape[1])


# --- who is flagged, and for what (at least)

WRAPPED = {
    "jpeg-like rounding of the input": (JpegLike, {"zero_gradients_ce", "zero_gradients_nearby", "binarization"}),
    "input at four bits": (InputBits, {"zero_gradients_ce", "zero_gradients_nearby", "unbounded"}),
    "hard quantization": (HardQuantization, {"zero_gradients_margin", "square_beats_gradient", "binarization"}),
    "logits times 100": (lambda network: After(network, lambda z: 100 * z), {"zero_gradients_ce"}),
    "random resizing": (RandomResizing, {"repeatable"}),
    "noise at test time": (TestTimeNoise, {"repeatable"}),
    "kink at the data": (Kink, {"gradients_at_images", "zero_gradients_margin"}),
    "ripples": (Ripples, {"gradients_agree", "square_beats_gradient", "binarization"}),
    "gradient stopped in part": (PartlyStopped, {"square_beats_gradient", "binarization"}),
    "reversed gradient": (Reversed, {"unbounded", "binarization"}),
    "NaN gradient": (RootAndSquare, {"nan_gradients"}),
    "saturated logits": (
        lambda network: After(network, lambda z: 10 * torch.tanh(4 * z)),
        {"zero_gradients_margin", "gradients_agree"},
    ),
    "confidence without reason": (lambda network: After(network, confident), {"zero_gradients_ce"}),
    "batch statistics": (BatchStatistics, {"independent_of_neighbours"}),
    "memory": (Remembers, {"repeatable"}),
}


def test_the_zoo_has_at_least_ten_flaws():
    """Beside those that must be trained, further down."""
    assert len(WRAPPED) >= 10
    assert len({wrap for wrap, _ in WRAPPED.values()}) == len(WRAPPED), "each another one"
    assert all(wanted for _, wanted in WRAPPED.values()), "flagged for a reason that is named"


def failed(network, data, ball):
    found = masking_panel(Target(network), data.test, data.test_labels, ball)
    names = {check.name for check in found.checks if not check.passed}
    for check in found.checks:
        assert check.passed or ";" in check.meaning  # says what to do
    assert found.verdict == ("suspect" if names else "ok")
    return names


@pytest.mark.parametrize("flaw", WRAPPED)
def test_a_planted_flaw_is_flagged(flaw, robust, data, ball):
    wrap, wanted = WRAPPED[flaw]
    network = wrap(robust).eval()
    assert (predict(network, data.test).argmax(1) == data.test_labels).float().mean() > 0.3  # a classifier still
    assert failed(network, data, ball) >= wanted


@pytest.mark.parametrize("times", [1, 2])
def test_probabilities_are_refused(times, robust, data, ball):
    network = robust
    for _ in range(times):
        network = After(network, lambda z: z.softmax(1))
    with pytest.raises(ModelError, match="returns probabilities; expected logits; remove the softmax"):
        masking_panel(Target(network), data.test, data.test_labels, ball)


def test_winners_take_all_is_flagged(fresh, fit, data, ball):
    """Its gradients are not zero and agree nearby; what attacks find by following them is less than there is."""
    network = fit(fresh(WinnersTakeAll), epochs=4, inner="pgd-2")
    names = failed(network, data, ball)
    assert names & {"square_beats_gradient", "more_steps_never_weaker", "restarts", "binarization"}


def test_thermometer_coding_is_flagged(fresh, fit, data, ball):
    network = fit(nn.Sequential(Thermometer(), fresh(channels=8)), epochs=2)
    assert failed(network, data, ball) >= {"differentiable"}


def test_distillation_at_high_temperature_is_flagged(fresh, fit, data, ball):
    """Defensive distillation (Papernot et al. 2016): taught at temperature 50, asked at 1."""
    teacher = fit(fresh(), epochs=3, temperature=50.0, lr=1.0)
    with torch.no_grad():
        soft = (teacher(data.train) / 50).softmax(1)
    student = fit(fresh(), epochs=3, temperature=50.0, lr=1.0, targets=soft)
    logits = predict(student, data.test)
    right = logits.argmax(1) == data.test_labels
    assert right.float().mean() > 0.7
    assert margins(logits, data.test_labels)[right].median() > 50
    assert failed(student, data, ball) >= {"zero_gradients_ce"}


@pytest.fixture(scope="module")
def coarse(robust, fit, data):
    """A network of 4 bits, where the binarization test tries a second border."""
    network = quantize(robust, QuantizeSpec(weight_bits=4, activation_bits=4), data.train[:256])
    return fit(network, epochs=2, inner="fgsm-rs", lr=0.02)


@pytest.mark.parametrize("flaw", [flaw for flaw, (_, names) in WRAPPED.items() if "binarization" in names])
def test_flaws_before_a_network_of_few_bits_are_not_excused(flaw, coarse, data, ball):
    if flaw == "hard quantization":
        pytest.skip("it takes the network's layers apart; it is one of few bits itself")
    network = WRAPPED[flaw][0](coarse).eval()
    found = binarization_test(network, data.test[:64], ball)
    assert found.found < 0.3
    assert found.closeness == TIGHT
    assert not binarization_check(found).passed


def test_the_verdict_on_a_flaw_before_a_network_of_few_bits(coarse, data, ball):
    assert "binarization" in failed(JpegLike(coarse).eval(), data, ball)

"""The convolutions that fast copies have, over one channel or with a ReLU behind: same function, same gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coldforge.attacks.query import query
from coldforge.compress import attacking, quantize
from coldforge.evaluate import fast as fast_module
from coldforge.evaluate import fast_copy
from coldforge.evaluate.fast import _Convolution
from coldforge.recipe import QuantizeSpec

SHAPES = [(3, 1, 0), (3, 1, 1), (5, 3, 2), (1, 1, 0), ((3, 5), 4, (2, 0)), ((4, 2), 3, (3, 1))]


def network(kernel, outputs, padding, **options) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, outputs, kernel, padding=padding, **options)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).eval()


def uses_it(model: nn.Module, images: torch.Tensor) -> bool:
    """Whether a gradient goes through it."""
    seen, todo = set(), [model(images.clone().requires_grad_()).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return any(_Convolution.__name__ in type(node).__name__ for node in seen)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(9, 1, 11, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kernel", "outputs", "padding"), SHAPES)
def test_equals_the_usual_convolution(images, kernel, outputs, padding):
    model = network(kernel, outputs, padding)
    model(images)
    fast = fast_copy(model, "fp32")
    assert uses_it(fast, images)
    (logits, gradient), (expected, wanted) = (query(m, images, torch.cos) for m in (fast, model))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}, {"padding_mode": "reflect"}])
def test_other_convolutions_stay_as_they_are(images, options, monkeypatch):
    monkeypatch.setattr(fast_module, "_can_fuse", lambda: False)
    model = network(3, 2, 1, **options)
    model(images)
    fast = fast_copy(model, "fp32")
    assert not uses_it(fast, images)
    torch.testing.assert_close(query(fast, images, torch.cos)[1], query(model, images, torch.cos)[1])


class Doubled(nn.Conv2d):
    """Computes something else than its base class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_padding_in_words_more_channels_and_heirs_stay_too():
    for conv in (nn.Conv2d(1, 2, 3, padding="same"), nn.Conv2d(3, 2, 3, padding=1), Doubled(1, 2, 3)):
        images = torch.rand(2, conv.in_channels, 6, 6)
        model = nn.Sequential(conv, nn.Flatten(), nn.LazyLinear(3)).eval()
        model(images)
        assert not uses_it(fast_copy(model, "fp32"), images)


def test_in_bfloat16_the_direction_is_kept(images):
    model = network(3, 16, 1)
    model(images)
    fast = fast_copy(model, "bf16")
    assert uses_it(fast, images)
    found, wanted = (query(m, images, torch.cos)[1].flatten(1) for m in (fast, model))
    assert nn.functional.cosine_similarity(found, wanted).mean() > 0.999


def test_quantized_layers_have_it_too(images):
    model = network(3, 8, 1)
    model(images)
    twin = quantize(model, QuantizeSpec(calibration="minmax"), images)
    fast = fast_copy(twin, "fp32")
    for mode in ("pass_through", "clipped", "unrounded"):
        with attacking(fast, mode), attacking(twin, mode):
            assert uses_it(fast, images)
            (logits, gradient), (expected, wanted) = (query(m, images, torch.cos) for m in (fast, twin))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-4)


# --- ReLU as part of the convolution before it


class Residual(nn.Module):
    """Convolutions of all kinds; one of them is read twice, one ReLU reads a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.third = nn.Conv2d(8, 6, 3, stride=2, padding=(1, 0), dilation=2)
        self.relu = nn.ReLU()
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.first(x)))
        y = self.second(x)
        x = torch.relu(y + nn.functional.relu(y))
        return self.head(nn.functional.relu(self.third(x)).mean((2, 3)))


@pytest.fixture
def residual() -> nn.Module:
    torch.manual_seed(0)
    model = Residual()
    model(torch.rand(16, 3, 12, 12))  # statistics of the norm
    return model.eval()


@pytest.mark.skipif(not fast_module._can_fuse(), reason="torch has no fused kernel for this processor")
def test_fused_networks_compute_the_same(residual):
    images = torch.rand(5, 3, 12, 12)
    fast = fast_copy(residual, "fp32")
    relus = [node for node in fast.graph.nodes if fast_module._is_relu(node, dict(fast.named_modules()))]
    assert len(relus) == 2, "two of the four read a convolution that nobody else reads"
    (logits, gradient), (expected, wanted) = (query(m, images, torch.cos) for m in (fast, residual))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(gradient, wanted)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), expected)


class Sums(nn.Module):
    """Sums behind convolutions: of one and an earlier value, of two, the other way round, of one with itself, of one
    and a value of another shape, and one that is read twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(8)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = self.convs
        x = torch.relu(c[0](x))
        x = torch.relu(c[1](x) + x)
        x = torch.relu(torch.add(c[2](x), c[3](x)))
        x = torch.relu(x + c[4](x))
        y = c[5](x)
        x = torch.relu(y + y)
        x = torch.relu(c[6](x) + x.mean((2, 3), keepdim=True))
        total = c[7](x) + x
        return self.head((torch.relu(total) + 0.1 * total).mean((2, 3)))


@pytest.mark.skipif(not fast_module._can_fuse(), reason="torch has no fused kernel for this processor")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sums_are_part_of_a_convolution_too(precision):
    torch.manual_seed(0)
    model, images = Sums().eval(), torch.rand(5, 3, 9, 7)
    fast = fast_copy(model, precision)
    network = fast if precision == "fp32" else fast.network
    left = [node for node in network.graph.nodes if fast_module._is_sum(node)]
    assert len(left) == 2, "of the six sums of two values, those of the last lines stay"
    (logits, gradient), (expected, wanted) = (query(m, images, torch.cos) for m in (fast, model))
    near = {} if precision == "fp32" else {"atol": 0.03, "rtol": 0.03}
    torch.testing.assert_close(logits, expected, **near)
    if precision == "fp32":
        torch.testing.assert_close(gradient, wanted)
    assert torch.cosine_similarity(gradient.flatten(1), wanted.flatten(1)).min() > 0.99
    with torch.no_grad():
        torch.testing.assert_close(fast(images), logits)


def test_without_the_kernel_nothing_is_fused(residual, monkeypatch):
    monkeypatch.setattr(fast_module, "_can_fuse", lambda: False)
    images = torch.rand(5, 3, 12, 12)
    fast = fast_copy(residual, "fp32")
    assert not uses_it(fast, images)
    torch.testing.assert_close(fast(images), residual(images))


def test_noise_is_not_frozen_by_tracing(images):
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x + 0.1 * torch.randn(1, 1, 11, 8))

    model = Noisy()
    model(images)
    fast = fast_copy(model, "fp32")
    assert not torch.equal(fast(images), fast(images)), "the noise of one moment became a part of the network"

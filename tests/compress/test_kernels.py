"""Compiled fake quantization against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coldforge.compress import ActivationQuantizer, fake_quantize, fused, kernels
from coldforge.provenance import cpp_compiler

needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler: nothing can be compiled")


def outcome(
    x: torch.Tensor, grad: torch.Tensor, step: float, zero: int, bits: int, backward: str
) -> list[torch.Tensor]:
    """Values and both gradients."""
    x, learned = x.clone().requires_grad_(), torch.tensor(step, requires_grad=True)
    y = fake_quantize(x, learned, zero=zero, qmin=0, qmax=(1 << bits) - 1, grad_scale=0.5, backward=backward)
    return [y.detach(), *torch.autograd.grad(y, (x, learned), grad)]


@needs_compiler
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(2, 3), (5, 1, 4, 4), (3, 8, 5, 7), (7,)]),
    last=st.booleans(),
    step=st.floats(1e-3, 1.0),
    bits=st.integers(2, 8),
    backward=st.sampled_from(["clipped", "pass_through"]),
    data=st.data(),
)
def test_compiled_equals_plain(seed, shape, last, step, bits, backward, data) -> None:
    zero = data.draw(st.integers(0, (1 << bits) - 1))
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    x.view(-1)[::3] = (x.view(-1)[::3] / step).round() * step + step / 2 * (seed % 2)  # on codes, or between two
    if last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    plain = outcome(x, grad, step, zero, bits, backward)
    with fused() as used:
        compiled = outcome(x, grad, step, zero, bits, backward)
    assert used
    assert torch.equal(compiled[0], plain[0])
    assert torch.equal(compiled[1], plain[1])
    assert torch.allclose(compiled[2], plain[2], rtol=1e-4, atol=1e-4)
    assert compiled[0].stride() == x.stride()


@needs_compiler
def test_in_bfloat16_the_gradient_of_the_step_is_that_of_float32() -> None:
    x, grad = (torch.randn(64, 16, 14, 14, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    exact = outcome(x.float(), grad.float(), 0.01, 0, 8, "clipped")[2]
    with fused():
        compiled = outcome(x, grad, 0.01, 0, 8, "clipped")[2]
    plain = outcome(x, grad, 0.01, 0, 8, "clipped")[2]
    assert abs(compiled - exact) < 1e-3 * abs(exact)
    assert abs(plain - exact) > 10 * abs(compiled - exact), "plain PyTorch rounds each product"


@needs_compiler
def test_kernels_are_used_only_inside_and_only_for_one_step() -> None:
    with fused():
        assert kernels.is_fused()
        with fused(False) as used:
            assert not used
            assert not kernels.is_fused()
        assert kernels.is_fused()
        columns = fake_quantize(torch.ones(2, 3), torch.ones(2, 1), qmin=-7, qmax=7)
        assert torch.equal(columns, torch.ones(2, 3))
    assert not kernels.is_fused()


@needs_compiler
def test_other_ranges_are_not_compiled_anew() -> None:
    x, grad = torch.linspace(-2, 2, 48), torch.ones(48)
    with fused():
        outcome(x, grad, 0.1, 3, 4, "clipped")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for zero, bits in [(0, 4), (0, 8), (7, 8), (128, 8), (1, 2)]:
                outcome(x, grad, 0.1, zero, bits, "clipped")


@needs_compiler
def test_an_attack_that_needs_no_gradient_of_the_step() -> None:
    quantizer = ActivationQuantizer(4)
    quantizer.set_range(0.0, 1.0)
    x = torch.tensor([[-0.5, 0.21, 0.5, 1.5]], requires_grad=True)
    quantizer.requires_grad_(False)
    for mode, expected in (("clipped", [0.0, 1.0, 1.0, 0.0]), ("pass_through", [1.0] * 4)):
        quantizer.backward_mode = mode
        with fused():
            (gradient,) = torch.autograd.grad(quantizer(x).sum(), x)
        assert gradient.tolist() == [expected]


@pytest.mark.parametrize("broken", ["absent", "fails"])
def test_without_a_working_compiler_training_runs_as_before(broken, monkeypatch) -> None:
    kernels._compiles.cache_clear()
    if broken == "absent":
        monkeypatch.setattr(kernels, "cpp_compiler", lambda: None)
    else:
        monkeypatch.setattr(kernels, "cpp_compiler", lambda: "/usr/bin/c++")

        def fail(*_: object) -> None:
            raise RuntimeError("omp.h: no such file")

        monkeypatch.setattr(kernels, "_compiled", lambda _: fail)
    try:
        if broken == "fails":
            with pytest.warns(UserWarning, match=r"runs uncompiled, more slowly: omp\.h"), fused() as used:
                assert not used
        else:
            with fused() as used:
                assert not used
    finally:
        kernels._compiles.cache_clear()


@needs_compiler
def test_what_is_compiled_does_not_depend_on_what_came_before() -> None:
    """torch.compile gives up after some variants, and the next network would train uncompiled, to other bits."""
    few, many = torch.randn(3), torch.randn(5000)
    with fused():
        for x in (few, many):
            for dtype in (torch.float32, torch.bfloat16):
                outcome(x.to(dtype), x.to(dtype), 0.1, 0, 8, "clipped")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for shape in [(2, 3, 4, 4), (64, 1, 28, 28), (63, 5, 14, 14), (64, 128)]:
                for bits in (1, 4, 16):
                    for dtype in (torch.float32, torch.bfloat16):
                        x = torch.randn(shape, dtype=dtype)
                        outcome(x, x, 0.1, bits, bits, "clipped")
                        with torch.no_grad():
                            fake_quantize(x[..., :-1], torch.tensor(0.1), zero=0, qmin=0, qmax=bits, backward="clipped")

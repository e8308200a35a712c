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
    x: torch.Tensor, grad: torch.Tensor, step: float, zero: int, bits: int, backward: str, *, rectify: bool = False
) -> list[torch.Tensor]:
    """Values and both gradients."""
    x, learned = x.clone().requires_grad_(), torch.tensor(step, requires_grad=True)
    y = fake_quantize(
        x, learned, zero=zero, qmin=0, qmax=(1 << bits) - 1, grad_scale=0.5, backward=backward, rectify=rectify
    )
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
    rectify=st.booleans(),
    data=st.data(),
)
def test_compiled_equals_plain(seed, shape, last, step, bits, backward, rectify, data) -> None:
    zero = 0 if rectify else data.draw(st.integers(0, (1 << bits) - 1))
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    x.view(-1)[::3] = (x.view(-1)[::3] / step).round() * step + step / 2 * (seed % 2)  # on codes, or between two
    if last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    plain = outcome(x, grad, step, zero, bits, backward, rectify=rectify)
    with fused() as used:
        compiled = outcome(x, grad, step, zero, bits, backward, rectify=rectify)
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
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(2, 3), (5, 1, 3, 3), (16, 8, 3, 3), (130, 200)]),
    last=st.booleans(),
    bits=st.integers(2, 8),
)
def test_rows_with_steps_of_their_own(seed, shape, last, bits) -> None:
    """Weights: one step for each output channel."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    if last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    steps = torch.rand(len(x), *[1] * (x.ndim - 1), generator=generator) / 4 + 1e-3
    largest = (1 << bits - 1) - 1

    def both() -> list[torch.Tensor]:
        weight, learned = x.clone().requires_grad_(), steps.clone().requires_grad_()
        y = fake_quantize(weight, learned, qmin=-largest, qmax=largest, grad_scale=0.5)
        return [y.detach(), *torch.autograd.grad(y, (weight, learned), grad)]

    plain = both()
    with fused():
        assert kernels.takes(x, steps)
        compiled = both()
    assert torch.equal(compiled[0], plain[0])
    assert torch.equal(compiled[1], plain[1])
    assert torch.allclose(compiled[2], plain[2], rtol=1e-4, atol=1e-4)
    assert [part.shape for part in compiled] == [part.shape for part in plain]


@needs_compiler
def test_the_step_s_gradient_does_not_depend_on_threads(monkeypatch) -> None:
    x, grad = (torch.randn(300_001, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    found = []
    with fused():
        for threads in (1, 2, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found.append(outcome(x, grad, 0.01, 3, 6, "clipped"))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_none(dtype) -> None:
    """A guard against networks that fall apart looks for it."""
    x = torch.tensor([float("nan"), 0.5, float("inf"), -float("inf")] * 9, dtype=dtype)
    with fused():
        y, _, by_step = outcome(x, torch.ones_like(x), 0.5, 0, 4, "clipped")
    assert y[::4].isnan().all()
    assert y[1:4].tolist() == [0.5, 7.5, 0.0]
    assert by_step.isnan()


@needs_compiler
def test_gradients_and_inputs_in_other_layouts() -> None:
    """A view with gaps, a gradient that lies otherwise in memory, and one of another type."""
    x, grad = torch.randn(4, 6, 5, 8)[..., ::2], torch.randn(4, 6, 5, 4)
    for other in (grad, grad.contiguous(memory_format=torch.channels_last), grad.double().float().expand(4, 6, 5, 4)):
        plain = outcome(x, other, 0.1, 2, 4, "clipped")
        with fused():
            compiled = outcome(x, other, 0.1, 2, 4, "clipped")
        assert torch.equal(compiled[0], plain[0])
        assert torch.equal(compiled[1], plain[1])


@needs_compiler
def test_kernels_are_used_only_inside_and_only_where_there_is_one() -> None:
    with fused():
        assert kernels.is_fused()
        with fused(False) as used:
            assert not used
            assert not kernels.is_fused()
        assert kernels.is_fused()
        assert not kernels.takes(torch.ones(2, 3, dtype=torch.float64), torch.tensor(1.0))
        assert not kernels.takes(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 1))
        assert not kernels.takes(torch.ones(2, 3), torch.ones(1, 3)), "one step a column"
        double = fake_quantize(torch.full((2,), 0.3).double(), torch.tensor(0.25), qmin=-7, qmax=7)
        assert double.tolist() == [0.25, 0.25]
    assert not kernels.is_fused()


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


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """Nothing compiled yet."""
    monkeypatch.setenv("COLDFORGE_HOME", str(tmp_path))
    kernels._library.cache_clear()
    yield tmp_path
    kernels._library.cache_clear()


def test_without_a_compiler_training_runs_as_before(afresh, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "cpp_compiler", lambda: None)
    with fused() as used:
        assert not used
        assert fake_quantize(torch.tensor([0.3]), torch.tensor(0.25), qmin=0, qmax=7).tolist() == [0.25]


def test_a_compiler_that_fails_is_said(afresh, monkeypatch) -> None:
    broken = afresh / "c++"
    broken.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setattr(kernels, "cpp_compiler", lambda: str(broken))
    with pytest.warns(UserWarning, match="runs uncompiled, more slowly: no such header"), fused() as used:
        assert not used


@needs_compiler
def test_a_compiler_that_refuses_some_flags(afresh, monkeypatch) -> None:
    """Without OpenMP, as on macOS, and for a CPU that it does not know."""
    picky = afresh / "c++"
    lines = ["#!/bin/sh", 'case "$*" in *-fopenmp*|*-march*) exit 1;; esac', f'exec {cpp_compiler()} "$@"']
    picky.write_text("\n".join(lines) + "\n", encoding="utf-8")
    picky.chmod(0o755)
    monkeypatch.setattr(kernels, "cpp_compiler", lambda: str(picky))
    x = torch.linspace(-1, 3, 10_000)
    plain = outcome(x, x, 0.1, 0, 4, "clipped")
    with fused() as used:
        assert used
        compiled = outcome(x, x, 0.1, 0, 4, "clipped")
    assert torch.equal(compiled[0], plain[0])


@needs_compiler
def test_it_is_compiled_once(afresh, monkeypatch) -> None:
    with fused():
        (path,) = (afresh / "kernels").iterdir()
    kernels._library.cache_clear()
    monkeypatch.setattr(kernels, "_compile", lambda *_: pytest.fail("compiled again"))
    with fused() as used:
        assert used
    assert path.suffix == ".so"

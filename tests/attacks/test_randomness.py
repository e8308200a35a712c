"""Random numbers that belong to one image."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from coldforge.attacks.randomness import image_key, signs, uniforms

MASK = 2**64 - 1
KEYS = st.integers(0, 2**60 - 1)


def splitmix(state: int) -> int:
    """The published finalizer, in integers of any size."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def slow(key: int, counter: int, lane: int) -> float:
    golden = 0x9E3779B97F4A7C15
    state = splitmix((splitmix(key) + counter * golden) & MASK)
    return (splitmix((state + (lane + 1) * golden) & MASK) >> 40) / 2**24


@given(KEYS, st.integers(-1, 10_000), st.integers(1, 9))
def test_equals_arithmetic_without_overflow(key: int, counter: int, lanes: int) -> None:
    found = uniforms(torch.tensor([key]), torch.tensor([counter]), lanes)[0].tolist()
    assert found == [slow(key, counter, lane) for lane in range(lanes)]


@given(st.lists(KEYS, min_size=2, max_size=6), st.integers(0, 99))
def test_neighbours_do_not_matter(keys: list[int], counter: int) -> None:
    counters = torch.arange(len(keys)) + counter
    together = uniforms(torch.tensor(keys), counters, 5)
    for row, key in enumerate(keys):
        assert torch.equal(together[row], uniforms(torch.tensor([key]), counters[row : row + 1], 5)[0])


def test_uniform_and_uncorrelated_over_keys_counters_and_lanes() -> None:
    keys = torch.tensor([image_key(0, "square", image, 0) for image in range(64)])
    draws = torch.stack([uniforms(keys, torch.full((64,), step), 16) for step in range(64)])  # (step, key, lane)
    counts = torch.histc(draws, bins=50, min=0, max=1)
    chi2 = float(((counts - draws.numel() / 50) ** 2 / (draws.numel() / 50)).sum())
    assert 20 < chi2 < 95  # 49 degrees of freedom
    for dim in range(3):
        here, there = draws.narrow(dim, 0, draws.shape[dim] - 1), draws.narrow(dim, 1, draws.shape[dim] - 1)
        correlation = torch.corrcoef(torch.stack([here.flatten(), there.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.02
    assert abs(float(signs(draws).mean())) < 0.02


def test_a_key_names_the_draw() -> None:
    keys = {image_key(seed, name, image, run) for seed in (0, 1) for name in "ab" for image in (0, 1) for run in (0, 1)}
    assert len(keys) == 16

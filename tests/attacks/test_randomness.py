"""Random numbers that belong to one image."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coldforge.attacks.randomness import signs, uniforms
from coldforge.spec import seed_of

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


def test_the_reference_is_splitmix64() -> None:
    """First outputs for the seed 1234567, as published at prng.di.unimi.it and rosettacode.org."""
    golden = 0x9E3779B97F4A7C15
    found = [splitmix((1234567 + n * golden) & MASK) for n in range(1, 6)]
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(KEYS, st.integers(-1, 10_000), st.integers(1, 9))
def test_equals_arithmetic_without_overflow(key: int, counter: int, lanes: int) -> None:
    found = uniforms(torch.tensor([key]), torch.tensor([counter]), lanes)[0].tolist()
    assert found == [slow(key, counter, lane) for lane in range(lanes)]


@pytest.mark.parametrize("key", [0, 1, 2**60 - 1])
@pytest.mark.parametrize("counter", [-1, 0, 2**31, 2**62])
def test_extreme_keys_and_counters_wrap_without_a_word(key: int, counter: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = uniforms(torch.tensor([key]), torch.tensor([counter]), 3)[0].tolist()
    assert found == [slow(key, counter, lane) for lane in range(3)]


@given(st.lists(KEYS, min_size=2, max_size=6), st.integers(0, 99))
def test_neighbours_do_not_matter(keys: list[int], counter: int) -> None:
    counters = torch.arange(len(keys)) + counter
    together = uniforms(torch.tensor(keys), counters, 5)
    for row, key in enumerate(keys):
        assert torch.equal(together[row], uniforms(torch.tensor([key]), counters[row : row + 1], 5)[0])


@given(KEYS, st.integers(0, 99), st.integers(1, 6), st.integers(1, 6))
def test_asking_for_more_lanes_changes_none(key: int, counter: int, few: int, more: int) -> None:
    keys, counters = torch.tensor([key]), torch.tensor([counter])
    assert torch.equal(uniforms(keys, counters, few + more)[:, :few], uniforms(keys, counters, few))


# --- statistics, with fixed keys


@pytest.fixture(scope="module")
def draws() -> Tensor:
    """(64 steps, 64 keys, 16 lanes), as Square draws them."""
    keys = torch.tensor([seed_of(0, "square", image, 0) for image in range(64)])
    return torch.stack([uniforms(keys, torch.full((64,), step), 16) for step in range(64)])


def chi_square(counts: Tensor) -> float:
    """In standard deviations from what is expected of even chances."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


def test_numbers_are_uniform(draws: Tensor) -> None:
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(chi_square(torch.histc(draws, bins=50, min=0, max=1))) < 5
    for dim in range(3):  # for each step, each key and each lane by itself
        for one in draws.unbind(dim):
            assert abs(chi_square(torch.histc(one.contiguous(), bins=16, min=0, max=1))) < 6
    assert abs(float(signs(draws).mean())) < 0.02
    assert signs(torch.tensor([0.0, 0.49, 0.5, 0.99])).tolist() == [-1, -1, 1, 1]


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["steps", "keys", "lanes"])
@pytest.mark.parametrize("lag", [1, 2, 8])
def test_numbers_of_neighbours_are_independent(draws: Tensor, dim: int, lag: int) -> None:
    length = draws.shape[dim] - lag
    here, there = draws.narrow(dim, 0, length).flatten(), draws.narrow(dim, lag, length).flatten()
    assert abs(float(torch.corrcoef(torch.stack([here, there]))[0, 1])) < 5 / len(here) ** 0.5
    pairs = (here * 8).long() * 8 + (there * 8).long()  # both together: 64 even chances
    assert abs(chi_square(pairs.bincount(minlength=64).float())) < 6


def test_no_two_draws_are_the_same_stream(draws: Tensor) -> None:
    """A counter and a lane that could be traded for each other would give equal rows, one shifted."""
    values = {tuple(row) for row in draws[:, :8, :4].reshape(-1, 4).tolist()}
    assert len(values) == 64 * 8
    one = draws[:, 0].flatten()
    assert len(one.unique()) > len(one) - 3


def test_a_key_names_the_draw() -> None:
    parts = list(itertools.product((0, 1), "ab", (0, 1, 10), (0, 1)))
    keys = [seed_of(*each) for each in parts]
    assert len(set(keys)) == len(parts)
    assert all(0 <= key < 2**60 for key in keys)
    assert seed_of(1, "a", 11, 1) != seed_of(11, "a", 1, 1), "parts do not run into each other"

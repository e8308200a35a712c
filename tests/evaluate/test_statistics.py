import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldforge.evaluate import wilson_interval


@st.composite
def counts(draw):
    n = draw(st.integers(1, 20_000))
    return draw(st.integers(0, n)), n


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_examples(successes, n, low, high):
    """Newcombe, Statistics in Medicine 1998, table I, method 3."""
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(counts())
def test_the_interval_holds_the_fraction_inside_0_and_1(count):
    successes, n = count
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high


@given(counts())
def test_successes_and_failures_mirror(count):
    successes, n = count
    low, high = wilson_interval(successes, n)
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(counts())
def test_the_ends_solve_the_defining_equation(count):
    """Each end is a fraction from which the observed one lies 1.96 standard errors away (0 and 1 aside)."""
    successes, n = count
    for end in wilson_interval(successes, n):
        if 0 < end < 1:
            distance = abs(successes / n - end) / math.sqrt(end * (1 - end) / n)
            assert distance == pytest.approx(1.959964, rel=1e-5)


@given(counts(), st.integers(2, 10))
def test_more_images_narrow_the_interval(count, times):
    successes, n = count
    low, high = wilson_interval(successes, n)
    closer_low, closer_high = wilson_interval(times * successes, times * n)
    assert closer_high - closer_low < high - low


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_impossible_counts(successes, n):
    with pytest.raises(ValueError, match=rf"expected 0 <= successes <= n and n > 0, got {successes} of {n}"):
        wilson_interval(successes, n)

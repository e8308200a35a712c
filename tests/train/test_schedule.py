import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldforge.train import learning_rate, ramped_eps

SCHEDULES = ("cosine", "linear", "constant")
parts = st.floats(0, 0.9)
totals = st.integers(1, 300)


def rates(total, *, warmup, schedule, peak=0.1):
    return [learning_rate(step, total, peak=peak, warmup=warmup, schedule=schedule) for step in range(total)]


@given(totals, parts, st.sampled_from(SCHEDULES), st.floats(1e-6, 10))
def test_the_rate_is_positive_and_never_above_its_peak(total, warmup, schedule, peak):
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates(total, warmup=warmup, schedule=schedule, peak=peak))


@given(totals, parts, st.sampled_from(SCHEDULES))
def test_the_rate_rises_in_the_warm_up_and_never_after(total, warmup, schedule):
    found = rates(total, warmup=warmup, schedule=schedule)
    rising = [rate for step, rate in enumerate(found) if (step + 0.5) / total < warmup]
    falling = found[len(rising) :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(first < second for first, second in itertools.pairwise(rising))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_the_rate_comes_close_to_its_peak_and_ends_near_0(schedule, warmup):
    found = rates(200, warmup=warmup, schedule=schedule)
    assert max(found) > 0.98 * 0.1
    assert found[-1] < 0.01 * 0.1
    assert (found[0] < 0.02 * 0.1) == (warmup > 0)


def test_closed_examples():
    def at(step, schedule, warmup=0.0):
        return learning_rate(step, 4, peak=1.0, warmup=warmup, schedule=schedule)

    assert [at(step, "linear") for step in range(4)] == pytest.approx([0.875, 0.625, 0.375, 0.125])
    assert [at(step, "constant", 0.5) for step in range(4)] == pytest.approx([0.25, 0.75, 1, 1])
    assert at(1, "cosine") + at(2, "cosine") == pytest.approx(1)  # symmetric about the middle
    assert at(2, "linear", 0.5) == pytest.approx(0.75)


@given(totals, parts, st.floats(1e-3, 2))
def test_eps_rises_to_its_full_value_and_stays(total, ramp, eps):
    found = [ramped_eps(step, total, eps=eps, ramp=ramp) for step in range(total)]
    assert found == sorted(found)
    assert found[0] > 0
    assert found[-1] == eps
    assert all(value == eps for step, value in enumerate(found) if (step + 1) / total >= ramp)


def test_eps_without_a_ramp_is_full_from_the_first_step():
    assert ramped_eps(0, 100, eps=0.1, ramp=0.0) == 0.1
    assert ramped_eps(0, 100, eps=0.1, ramp=0.5) == pytest.approx(0.002)

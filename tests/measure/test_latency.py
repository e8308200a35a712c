from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldforge.errors import UsageError
from coldforge.measure.latency import measure_latency, quantile


class FakeMachine:
    """A clock that only calls advance, each by the next of its scripted durations."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, *durations: float) -> Callable[[], None]:
        count = 0

        def run() -> None:
            nonlocal count
            self.log.append(name)
            self.now += durations[min(count, len(durations) - 1)]
            count += 1

        return run


def test_calls_take_turns_after_an_untimed_call() -> None:
    machine = FakeMachine()
    calls = {"a": machine.call("a", 1.0), "b": machine.call("b", 2.0)}
    timings = measure_latency(calls, seconds=0, min_repeats=3, warmup=1, clock=machine.clock)
    assert machine.log == ["a", "b"] + ["a", "a", "b", "b"] * 3
    assert (timings["a"].median, timings["b"].median) == (1.0, 2.0)
    assert timings["a"].repeats == timings["b"].repeats == 3


def test_short_calls_fill_a_turn_after_settling() -> None:
    machine = FakeMachine()
    calls = {"a": machine.call("a", 0.25), "b": machine.call("b", 4.0)}
    timings = measure_latency(calls, seconds=0, min_repeats=1, warmup=0, settle=0.5, turn=1.0, clock=machine.clock)
    assert machine.log == ["a"] * 2 + ["a"] * 4 + ["b", "b"]
    assert (timings["a"].repeats, timings["b"].repeats) == (4, 1)


def test_warm_up_is_not_timed() -> None:
    machine = FakeMachine()
    timing = measure_latency(
        {"a": machine.call("a", 100.0, 50.0, 9.0, 1.0)}, seconds=0, min_repeats=2, warmup=2, clock=machine.clock
    )["a"]
    assert timing.p90 == timing.p10 == 1.0


def test_repeats_until_the_time_is_spent() -> None:
    machine = FakeMachine()
    calls = {"a": machine.call("a", 0.25), "b": machine.call("b", 0.75)}
    timings = measure_latency(calls, seconds=5.0, min_repeats=2, warmup=0, clock=machine.clock)
    assert timings["a"].repeats == timings["b"].repeats == 10  # 10 turns of 1 s, for two calls of 5 s


def test_a_slow_moment_hits_the_ratio_of_neither() -> None:
    machine = FakeMachine()
    slow = [5.0 if 20 <= index < 60 else 1.0 for index in range(100)]
    calls = {"a": machine.call("a", *slow), "b": machine.call("b", *[2 * value for value in slow])}
    timings = measure_latency(calls, seconds=0, min_repeats=50, warmup=0, clock=machine.clock)
    assert timings["b"].median / timings["a"].median == 2.0
    assert timings["b"].p90 / timings["a"].p90 == 2.0


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_quantiles_equal_numpy(values: list[float], q: float) -> None:
    assert quantile(sorted(values), q) == pytest.approx(float(np.quantile(values, q)), rel=1e-9, abs=1e-12)


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(UsageError, match="expected at least one call, got none"):
        measure_latency({})
    with pytest.raises(UsageError, match=r"expected min_repeats >= 1.*got 0"):
        measure_latency({"a": lambda: None}, min_repeats=0)
    with pytest.raises(UsageError, match="at least one value"):
        quantile([], 0.5)

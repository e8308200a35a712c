"""How numbers are written."""

from __future__ import annotations

import doctest

import pytest

from coldforge.report import text


def test_doctests_hold() -> None:
    found = doctest.testmod(text)
    assert found.attempted >= 16
    assert found.failed == 0


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.9996e-3, "1.00 ms"), (0.99951, "1.00 s"), (0.0, "0 µs"), (1.5e-6, "1.50 µs"), (0.0999, "99.9 ms")],
)
def test_seconds_keep_three_digits_at_the_borders(value: float, written: str) -> None:
    assert text.seconds(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [(999.6, "1,000"), (9.996, "10.0"), (0.0099951, "0.0100"), (12345.0, "12,345"), (-2.5, "-2.50")],
)
def test_three_digits_after_rounding_up(value: float, written: str) -> None:
    assert text.digits3(value) == written


@pytest.mark.parametrize(
    ("value", "written"), [(9.96, "10 s"), (59.6, "1 min 00 s"), (3599.7, "1 h 00 min"), (7.04, "7.0 s"), (-1, "–")]
)
def test_duration_carries_over(value: float, written: str) -> None:
    assert text.duration(value) == written


def test_missing_numbers_are_a_dash_and_not_zero() -> None:
    assert text.percent(None) == text.NONE
    assert text.interval(None) == ""
    assert text.times(None) == ""


def test_energy_always_says_how_it_was_found() -> None:
    assert text.energy_mark("measured (RAPL)") == "measured"
    assert text.energy_mark("Estimated, 10 W") == "estimated"
    assert text.energy_mark("") == "method not stated"

"""Wall time of calls, measured side by side so that their ratio holds on a noisy machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from coldforge.errors import UsageError


@dataclass(frozen=True)
class Timing:
    """Quantiles of the wall time of one call, in seconds."""

    median: float
    p10: float
    p90: float
    repeats: int


def quantile(ordered: Sequence[float], q: float) -> float:
    """The ``q`` quantile (0 to 1) of ascending values, linear between neighbours (numpy's default)."""
    if not ordered:
        raise UsageError("quantile: expected at least one value, got none")
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def measure_latency(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    min_repeats: int = 10,
    warmup: int = 3,
    settle: float = 0.06,
    turn: float = 0.1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time several calls in turn, A B C A B C ..., so that a slow moment of the machine slows all of them.

    A turn begins with untimed calls: the data comes back into the cache, and the worker threads of the runtime before,
    which spin for some tens of milliseconds after their work, go to sleep. Then the call is timed again and again, at
    least once.

    Args:
        calls: name to a function without arguments that does one batch.
        seconds: timed seconds to spend on each call, on average (the untimed calls come on top).
        min_repeats: least number of timed calls of each.
        warmup: extra untimed calls of each before the first turn.
        settle: seconds of untimed calls at the start of a turn; one call at least.
        turn: timed seconds of one turn; one call at least.
        clock: seconds from an arbitrary start; replaced in tests.

    Raises:
        UsageError: where nothing is to be measured.
    """
    if not calls:
        raise UsageError("measure_latency: expected at least one call, got none")
    if min_repeats < 1 or warmup < 0 or seconds < 0:
        raise UsageError(
            "measure_latency: expected min_repeats >= 1, warmup >= 0 and seconds >= 0, "
            f"got {min_repeats}, {warmup} and {seconds:g}"
        )
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = 0.0
    while spent < seconds * len(calls) or min(map(len, times.values())) < min_repeats:
        for name, call in calls.items():
            _repeat(call, settle, clock)
            new = _repeat(call, turn, clock)
            times[name] += new
            spent += sum(new)
    return {name: _timing(values) for name, values in times.items()}


def _repeat(call: Callable[[], object], seconds: float, clock: Callable[[], float]) -> list[float]:
    """Wall time of each call, for at least one call and at least ``seconds``."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = clock()
        call()
        times.append(clock() - start)
    return times


def _timing(values: Sequence[float]) -> Timing:
    ordered = sorted(values)
    return Timing(quantile(ordered, 0.5), quantile(ordered, 0.1), quantile(ordered, 0.9), len(ordered))

"""How a check of the masking panel is written down."""

from __future__ import annotations

from coldforge.records import MaskingCheckRecord

SMALLEST_SHARE = 0.02
"""A paired difference counts from this share of the images on ..."""
FEWEST_IMAGES = 2
"""... and from more than this many: of 100 images one or two are chance."""


def allowed(n: int, share: float = SMALLEST_SHARE) -> float:
    """The largest share of ``n`` images that a check lets pass."""
    return max(share, FEWEST_IMAGES / max(n, 1))


def check(
    name: str, value: float, threshold: float, fine: str, wrong: str, remedy: str, *, at_least: bool = False
) -> MaskingCheckRecord:
    """One check: passed where ``value`` is at most (``at_least``: at least) ``threshold``.

    Args:
        name: stable name.
        value: what was found.
        threshold: where it becomes suspicious.
        fine: what was found, in words, if it passed.
        wrong: the same if it failed.
        remedy: what to do then.
        at_least: large values are good.
    """
    passed = value >= threshold if at_least else value <= threshold
    meaning = fine if passed else f"{wrong}; {remedy}"
    return MaskingCheckRecord(name=name, passed=passed, value=value, threshold=threshold, meaning=meaning)


def percent(share: float) -> str:
    """For people.

    >>> percent(0.0313)
    '3.1 %'
    """
    return f"{100 * share:.1f} %"

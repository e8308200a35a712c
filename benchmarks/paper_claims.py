"""The claims of arXiv 2403.09441, each held against the points of our sweeps: holds, does not hold, or not decided.

Everything here is a pure function of points. A difference of two accuracies is the mean over seeds of the paired
differences, with a 95 % interval of two parts: the spread over seeds (Student's t) and the test images (binomial, as if
the two networks had seen different images, so that it is too wide rather than too narrow). A verdict is given only
where the whole interval lies on one side of the limit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paper_points import Compression, Point, Read

HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "not decided", "not computed"
CLOSE = 0.05
"""Accuracies that differ by less are comparable."""
LARGE = 0.20
"""A difference of at least so much is large."""
CHEAP = 0.5
"""Part of the cost of adversarial training of the dense network that is a fraction of it."""
HALF = 0.5
EIGHT, FOUR, ONE = 8.0, 4.0, 1.0
_T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""Student's t by degrees of freedom; 1.96 beyond."""
_MEASURES: dict[str, Callable[[Point], tuple[float, int]]] = {
    "clean": lambda point: (point.clean, point.n),
    "robust": lambda point: (point.robust, point.n_attacked),
}


def student_t95(degrees: int) -> float:
    """Two-sided 95 % point of Student's t."""
    return _T95.get(degrees, 1.96)


class Missing(Exception):
    """Points that a claim needs are not there."""


@dataclass(frozen=True)
class Finding:
    """What our numbers say of a claim, in one protocol and under one attack."""

    verdict: str
    sentence: str


@dataclass(frozen=True)
class Difference:
    """Of two networks, on the mean over seeds."""

    first: float
    second: float
    low: float
    high: float

    @property
    def value(self) -> float:
        """First minus second."""
        return self.first - self.second

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}] points"


@dataclass(frozen=True)
class Case:
    """Points of one data set, protocol and attack."""

    points: Sequence[Point]

    def of(self, compression: Compression, level: float, base: str, arm: str) -> list[Point]:
        """One network, once a seed, in the order of seeds.

        Raises:
            Missing: it was not computed.
        """
        asked = (compression, level, base, arm)
        found = [p for p in self.points if (p.compression, p.level, p.base, p.arm) == asked]
        if not found:
            raise Missing
        return sorted(found, key=lambda point: point.seed)

    def dense(self, base: str) -> list[Point]:
        """A dense network."""
        return self.of("none", 0.0, base, "dense")

    def levels(self, compression: Compression) -> list[float]:
        """Those computed, from little compression to much."""
        found = sorted({point.level for point in self.points if point.compression == compression})
        return found if compression == "pruning" else found[::-1]


def difference(first: Sequence[Point], second: Sequence[Point], measure: str) -> Difference:
    """Mean of ``first`` minus mean of ``second``, over the seeds that both have.

    Raises:
        Missing: they have no seed in common.
    """
    read = _MEASURES[measure]
    ours = {point.seed: read(point)[0] for point in first}
    theirs = {point.seed: read(point)[0] for point in second}
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise Missing
    mean, other = (statistics.fmean(values[seed] for seed in seeds) for values in (ours, theirs))
    images = sum(p * (1 - p) / read(points[0])[1] for p, points in ((mean, first), (other, second)))
    half = 1.96 * math.sqrt(images)
    if len(seeds) > 1:
        apart = statistics.stdev(ours[seed] - theirs[seed] for seed in seeds)
        half = math.hypot(half, student_t95(len(seeds) - 1) * apart / math.sqrt(len(seeds)))
    return Difference(mean, other, mean - other - half, mean - other + half)


def at_least(found: Difference, limit: float) -> str:
    """Whether a difference is at least ``limit``."""
    return HOLDS if found.low >= limit else FAILS if found.high < limit else OPEN


def at_most(found: Difference, limit: float) -> str:
    """Whether a difference is at most ``limit``."""
    return HOLDS if found.high <= limit else FAILS if found.low > limit else OPEN


def both(*verdicts: str) -> str:
    """All of them."""
    return FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS


# --- claims ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper, and how we ask whether it holds."""

    text: str
    test: Callable[[Case], Finding]


def say(level: float, compression: Compression) -> str:
    """A level in words."""
    if compression == "pruning":
        return f"{100 * level:.0f} % of the channels removed"
    return f"{level:.0f} bit" + "s" * (level != 1)


def _pc(value: float) -> str:
    return f"{100 * value:.1f} %"


def compression_alone(compression: Compression, level: float) -> Callable[[Case], Finding]:
    """Robust accuracy of an adversarially trained network, compressed and not tuned, is close to the dense one's."""

    def test(case: Case) -> Finding:
        dense = case.dense("adversarial")
        found = difference(case.of(compression, level, "adversarial", "none"), dense, "robust")
        kept = "at no level that was computed"
        for each in case.levels(compression):
            step = difference(case.of(compression, each, "adversarial", "none"), dense, "robust")
            if step.value < -CLOSE:
                break
            kept = f"up to {say(each, compression)}"
        if compression == "quantization":
            kept = kept.replace("up to", "down to")
        return Finding(
            at_least(found, -CLOSE),
            f"With {say(level, compression)} and no fine-tuning, robust accuracy is {_pc(found.first)} after "
            f"{_pc(found.second)} in the dense network: {found}. It stays within {100 * CLOSE:.0f} points {kept}.",
        )

    return test


def as_robust_as_dense(compression: Compression, level: float) -> Callable[[Case], Finding]:
    """A naturally trained network, compressed and tuned adversarially, is close to the dense adversarial one."""

    def test(case: Case) -> Finding:
        tuned = case.of(compression, level, "natural", "adversarial")
        found = difference(tuned, case.dense("adversarial"), "robust")
        return Finding(
            at_least(found, -CLOSE),
            f"Trained naturally, compressed ({say(level, compression)}) and tuned adversarially: robust accuracy "
            f"{_pc(found.first)}; dense and trained adversarially: {_pc(found.second)}; {found}.",
        )

    return test


def large_gain(compression: Compression, level: float) -> Callable[[Case], Finding]:
    """Adversarial fine-tuning adds much to a compressed, naturally trained network."""

    def test(case: Case) -> Finding:
        tuned, untuned = (case.of(compression, level, "natural", arm) for arm in ("adversarial", "none"))
        found = difference(tuned, untuned, "robust")
        return Finding(
            at_least(found, LARGE),
            f"At {say(level, compression)}, robust accuracy is {_pc(found.second)} before and {_pc(found.first)} after "
            f"adversarial fine-tuning: {found}.",
        )

    return test


def clean_without_robustness(compression: Compression, level: float) -> Callable[[Case], Finding]:
    """Natural fine-tuning restores the clean accuracy of a natural network and adds no robustness."""

    def test(case: Case) -> Finding:
        tuned, dense = case.of(compression, level, "natural", "natural"), case.dense("natural")
        clean, robust = difference(tuned, dense, "clean"), difference(tuned, dense, "robust")
        return Finding(
            both(at_least(clean, -CLOSE), at_most(robust, CLOSE)),
            f"At {say(level, compression)}, naturally tuned: clean accuracy {_pc(clean.first)} (dense "
            f"{_pc(clean.second)}; {clean}), robust accuracy {_pc(robust.first)} (dense {_pc(robust.second)}; "
            f"{robust}).",
        )

    return test


def trade_off(compression: Compression, level: float) -> Callable[[Case], Finding]:
    """From a robust base, natural fine-tuning gives more clean and less robust accuracy than adversarial."""

    def test(case: Case) -> Finding:
        natural, adversarial = (case.of(compression, level, "adversarial", arm) for arm in ("natural", "adversarial"))
        clean, robust = difference(natural, adversarial, "clean"), difference(natural, adversarial, "robust")
        return Finding(
            both(at_least(clean, 0.0), at_most(robust, 0.0)),
            f"At {say(level, compression)}, from an adversarially trained network, natural fine-tuning against "
            f"adversarial: clean accuracy {_pc(clean.first)} against {_pc(clean.second)} ({clean}), robust accuracy "
            f"{_pc(robust.first)} against {_pc(robust.second)} ({robust}).",
        )

    return test


def flat(until: float) -> Callable[[Case], Finding]:
    """After adversarial fine-tuning, robust accuracy hardly depends on the pruning ratio, up to ``until``."""

    def test(case: Case) -> Finding:
        levels = [level for level in case.levels("pruning") if level <= until]
        if len(levels) < 2:
            raise Missing
        least, most = (case.of("pruning", level, "natural", "adversarial") for level in (levels[0], levels[-1]))
        found = difference(most, least, "robust")
        return Finding(
            at_least(found, -CLOSE),
            f"Robust accuracy is {_pc(found.second)} with {say(levels[0], 'pruning')} and {_pc(found.first)} with "
            f"{say(levels[-1], 'pruning')}: {found}.",
        )

    return test


def collapse(level: float) -> Callable[[Case], Finding]:
    """With few bits, even clean accuracy is lost in spite of adversarial fine-tuning."""

    def test(case: Case) -> Finding:
        few, eight = (case.of("quantization", bits, "natural", "adversarial") for bits in (level, EIGHT))
        clean, robust = difference(few, eight, "clean"), difference(few, eight, "robust")
        return Finding(
            at_most(clean, -LARGE),
            f"From 8 bits to {say(level, 'quantization')}, clean accuracy goes from {_pc(clean.second)} to "
            f"{_pc(clean.first)} ({clean}), robust accuracy from {_pc(robust.second)} to {_pc(robust.first)}.",
        )

    return test


def cheaper(case: Case) -> Finding:
    """Close to dense adversarial training at a fraction of its cost, in a smaller network."""
    robust = as_robust_as_dense("pruning", HALF)(case)
    small, dense = case.of("pruning", HALF, "natural", "adversarial")[0], case.dense("adversarial")[0]
    if not dense.train_macs:
        raise Missing
    training, inference = small.train_macs / dense.train_macs, small.macs / dense.macs
    whole = training + case.dense("natural")[0].train_macs / dense.train_macs
    cheap = HOLDS if max(training, inference) <= CHEAP else FAILS
    return Finding(
        both(robust.verdict, cheap),
        f"{robust.sentence} The fine-tuning took {_pc(training)} of the multiply-adds of the dense network's "
        f"adversarial training, {_pc(whole)} with the natural training before it; the small network takes "
        f"{_pc(inference)} of the dense one's for an image.",
    )


def claims(data: str) -> list[Claim]:
    """The paper's claims for one data set. The limits of the pruning ratio are where its own curves bend."""
    until = {"fashion-mnist": 0.8}.get(data, 0.6)
    found = []
    for compression, level in (("pruning", HALF), ("quantization", EIGHT)):
        how = compression.capitalize()
        found += [
            Claim(f"{how} alone does not cost an adversarially trained network its robustness.",
                  compression_alone(compression, level)),
            Claim(f"{how}, then adversarial fine-tuning: comparable with adversarial training of the dense network.",
                  as_robust_as_dense(compression, level)),
            Claim(f"{how}: adversarial fine-tuning improves robustness by much.", large_gain(compression, level)),
            Claim(f"{how}: natural fine-tuning gives clean accuracy and no robustness.",
                  clean_without_robustness(compression, level)),
            Claim(f"{how}: the two fine-tunings trade clean accuracy for robustness.", trade_off(compression, level)),
        ]  # fmt: skip
    return [
        *found,
        Claim(f"Robust accuracy hardly falls up to a pruning ratio of {until:g}.", flat(until)),
        Claim("Quantization to 4 bits destroys the network.", collapse(FOUR)),
        Claim("Quantization to 1 bit destroys the network.", collapse(ONE)),
        Claim("Robustness and efficiency improve together, at a fraction of the cost.", cheaper),
    ]


def judge(claim: Claim, points: Sequence[Point]) -> Finding:
    """One claim on points of one case."""
    try:
        return claim.test(Case(points))
    except Missing:
        return Finding(MISSING, "")


def judged(points: Sequence[Point], data: str) -> list[dict[str, object]]:
    """All claims of a data set, each in every case that was computed, as plain values."""
    cases = dict.fromkeys(point.case for point in sorted(points, key=_order) if point.data == data)
    rows: list[dict[str, object]] = []
    for claim in claims(data):
        findings = []
        for case in cases:
            part = [point for point in points if point.case == case]
            finding = judge(claim, part)
            if finding.verdict != MISSING:
                seeds = len({point.seed for point in part})
                findings.append(
                    {"protocol": case[1], "attack": case[2], "seeds": seeds}
                    | {"verdict": finding.verdict, "sentence": finding.sentence}
                )
        rows.append({"claim": claim.text, "findings": findings})
    return rows


def _order(point: Point) -> tuple[bool, bool]:
    return point.protocol == "literal", point.attack == "autoattack-lite"


# --- which networks does the legend mean? ----------------------------------------------------------------------------


def readings(points: Sequence[Point], paper: Sequence[Read], data: str) -> list[dict[str, object]]:
    """How far each of our kinds of networks is from each line of the paper's legend.

    Returns:
        A row for each protocol, compression, base and arm: the mean of the absolute differences (fractions) over the
        levels that both have, for each "setting measure" of the paper; and over how many levels.
    """
    kinds = dict.fromkeys(
        (p.protocol, p.compression, p.base, p.arm)
        for p in sorted(points, key=_order)
        if p.data == data and p.compression != "none" and p.attack != "autoattack-lite"
    )
    rows: list[dict[str, object]] = []
    for protocol, compression, base, arm in kinds:
        group = [
            p for p in points
            if (p.data, p.protocol, p.compression, p.base, p.arm) == (data, protocol, compression, base, arm)
            and p.attack != "autoattack-lite"
        ]  # fmt: skip
        apart: dict[str, list[float]] = {}
        for value in paper:
            same = [p for p in group if (data, compression, p.level) == (value.data, value.compression, value.level)]
            if same:
                ours = statistics.fmean(_MEASURES[value.measure](p)[0] for p in same)
                apart.setdefault(f"{value.setting} {value.measure}", []).append(abs(ours - value.value))
        row: dict[str, object] = {"protocol": protocol, "compression": compression, "base": base, "arm": arm}
        row["levels"] = max(map(len, apart.values()), default=0)
        rows.append(row | {name: statistics.fmean(values) for name, values in apart.items()})
    return rows

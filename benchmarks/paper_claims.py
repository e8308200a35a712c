"""The claims of arXiv 2403.09441, each held against the points of our sweeps: holds, does not hold, or not decided.

Everything here is a pure function of points. A difference of two accuracies is the mean over seeds of the paired
differences, with a 95 % interval of two parts: the spread over seeds (Student's t) and the test images (binomial, as if
the two networks had seen different images, so that it is too wide rather than too narrow). A verdict is given only
where the whole interval lies on one side of the limit. With one seed there is no spread, and a verdict is of that seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from paper_points import Compression, Point, Read

HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "not decided", "not computed"
CLOSE = 0.05
"""Accuracies that differ by less are comparable."""
LARGE = 0.20
"""A difference of at least so much is large."""
CHEAP = 0.5
"""Part of the cost of adversarial training of the dense network that is a fraction of it."""
HALF = 0.5
LEAST = 0.1
"""The pruning ratio that all higher ones are compared with."""
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
    seeds: int = 0
    """How many seeds it rests on."""


@dataclass(frozen=True)
class Difference:
    """Of two networks, on the mean over seeds."""

    first: float
    second: float
    low: float
    high: float
    points: tuple[Point, ...]
    """Those that are compared."""

    @property
    def seeds(self) -> int:
        """How many seeds both have."""
        return len({point.seed for point in self.points})

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

    def levels(self, compression: Compression, base: str, arm: str) -> list[float]:
        """Those computed for such networks, from little compression to much."""
        asked = (compression, base, arm)
        found = sorted({p.level for p in self.points if (p.compression, p.base, p.arm) == asked})
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
    compared = tuple(point for point in (*first, *second) if point.seed in seeds)
    return Difference(mean, other, mean - other - half, mean - other + half, compared)


def at_least(found: Difference, limit: float) -> str:
    """Whether a difference is at least ``limit``."""
    return HOLDS if found.low >= limit else FAILS if found.high < limit else OPEN


def at_most(found: Difference, limit: float) -> str:
    """Whether a difference is at most ``limit``."""
    return HOLDS if found.high <= limit else FAILS if found.low > limit else OPEN


def both(*verdicts: str) -> str:
    """All of them."""
    return FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS


def finding(verdict: str, sentence: str, *differences: Difference) -> Finding:
    """With the seeds of the differences that it rests on, and what the masking panel said of the tuned networks.

    A robust accuracy that the panel suspects lets no claim hold.
    """
    panel = {
        (point.compression, point.level, point.base, point.seed): point.masking
        for each in differences
        for point in each.points
        if point.arm == "adversarial"
    }
    suspect = sum(said == "suspect" for said in panel.values())
    if suspect:
        sentence += f" Masking panel: suspect ({suspect} of {len(panel)} networks)."
        verdict = OPEN if verdict == HOLDS else verdict
    elif panel and set(panel.values()) == {"ok"}:
        sentence += " Masking panel: ok."
    return Finding(verdict, sentence, min(each.seeds for each in differences))


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
        for each in case.levels(compression, "adversarial", "none"):
            step = difference(case.of(compression, each, "adversarial", "none"), dense, "robust")
            if step.value < -CLOSE:
                break
            kept = f"up to {say(each, compression)}"
        if compression == "quantization":
            kept = kept.replace("up to", "down to")
        return finding(
            at_least(found, -CLOSE),
            f"With {say(level, compression)} and no fine-tuning, robust accuracy is {_pc(found.first)} after "
            f"{_pc(found.second)} in the dense network: {found}. It stays within {100 * CLOSE:.0f} points {kept}.",
            found,
        )

    return test


def as_robust_as_dense(compression: Compression, level: float) -> Callable[[Case], Finding]:
    """A naturally trained network, compressed and tuned adversarially, is close to the dense adversarial one."""

    def test(case: Case) -> Finding:
        tuned = case.of(compression, level, "natural", "adversarial")
        found = difference(tuned, case.dense("adversarial"), "robust")
        return finding(
            at_least(found, -CLOSE),
            f"Trained naturally, compressed ({say(level, compression)}) and tuned adversarially: robust accuracy "
            f"{_pc(found.first)}; dense and trained adversarially: {_pc(found.second)}; {found}.",
            found,
        )

    return test


def large_gain(compression: Compression, level: float) -> Callable[[Case], Finding]:
    """Adversarial fine-tuning adds much to a compressed, naturally trained network: untuned, and tuned naturally."""

    def test(case: Case) -> Finding:
        tuned, untuned, natural = (
            case.of(compression, level, "natural", arm) for arm in ("adversarial", "none", "natural")
        )
        over, beside = difference(tuned, untuned, "robust"), difference(tuned, natural, "robust")
        return finding(
            both(at_least(over, LARGE), at_least(beside, LARGE)),
            f"At {say(level, compression)}, robust accuracy is {_pc(over.second)} before and {_pc(over.first)} after "
            f"adversarial fine-tuning: {over}; after natural fine-tuning it is {_pc(beside.second)}: {beside}.",
            over,
            beside,
        )

    return test


def clean_without_robustness(compression: Compression, level: float) -> Callable[[Case], Finding]:
    """Natural fine-tuning restores the clean accuracy of a natural network and adds no robustness."""

    def test(case: Case) -> Finding:
        tuned, dense = case.of(compression, level, "natural", "natural"), case.dense("natural")
        clean, robust = difference(tuned, dense, "clean"), difference(tuned, dense, "robust")
        return finding(
            both(at_least(clean, -CLOSE), at_most(robust, CLOSE)),
            f"At {say(level, compression)}, naturally tuned: clean accuracy {_pc(clean.first)} (dense "
            f"{_pc(clean.second)}; {clean}), robust accuracy {_pc(robust.first)} (dense {_pc(robust.second)}; "
            f"{robust}).",
            clean,
            robust,
        )

    return test


def trade_off(compression: Compression, level: float) -> Callable[[Case], Finding]:
    """From a robust base, natural fine-tuning gives more clean and less robust accuracy than adversarial."""

    def test(case: Case) -> Finding:
        natural, adversarial = (case.of(compression, level, "adversarial", arm) for arm in ("natural", "adversarial"))
        clean, robust = difference(natural, adversarial, "clean"), difference(natural, adversarial, "robust")
        return finding(
            both(at_least(clean, 0.0), at_most(robust, 0.0)),
            f"At {say(level, compression)}, from an adversarially trained network, natural fine-tuning against "
            f"adversarial: clean accuracy {_pc(clean.first)} against {_pc(clean.second)} ({clean}), robust accuracy "
            f"{_pc(robust.first)} against {_pc(robust.second)} ({robust}).",
            clean,
            robust,
        )

    return test


def flat(until: float) -> Callable[[Case], Finding]:
    """After adversarial fine-tuning, robust accuracy hardly depends on the pruning ratio, up to ``until``."""

    def test(case: Case) -> Finding:
        levels = [level for level in case.levels("pruning", "natural", "adversarial") if level <= until]
        if len(levels) < 2 or levels[0] > LEAST or levels[-1] != until:
            raise Missing
        least, *more = (case.of("pruning", level, "natural", "adversarial") for level in levels)
        apart = [difference(each, least, "robust") for each in more]
        worst = min(apart, key=lambda each: each.low)  # it decides
        at = say(levels[1 + apart.index(worst)], "pruning")
        return finding(
            both(*(at_least(each, -CLOSE) for each in apart)),
            f"Robust accuracy is {_pc(worst.second)} with {say(levels[0], 'pruning')}; the interval that reaches "
            f"lowest is that of {at}, with {_pc(worst.first)}: {worst}.",
            *apart,
        )

    return test


def collapse(level: float) -> Callable[[Case], Finding]:
    """With few bits, even clean accuracy is lost in spite of adversarial fine-tuning."""

    def test(case: Case) -> Finding:
        few, eight = (case.of("quantization", bits, "natural", "adversarial") for bits in (level, EIGHT))
        clean, robust = difference(few, eight, "clean"), difference(few, eight, "robust")
        return finding(
            at_most(clean, -LARGE),
            f"From 8 bits to {say(level, 'quantization')}, clean accuracy goes from {_pc(clean.second)} to "
            f"{_pc(clean.first)} ({clean}), robust accuracy from {_pc(robust.second)} to {_pc(robust.first)}.",
            clean,
            robust,
        )

    return test


def cheaper(case: Case) -> Finding:
    """Close to dense adversarial training at a fraction of its cost, in a smaller network."""
    robust = as_robust_as_dense("pruning", HALF)(case)
    small, dense = case.of("pruning", HALF, "natural", "adversarial"), case.dense("adversarial")
    adversarial = statistics.fmean(point.train_macs for point in dense)
    if not adversarial:
        raise Missing
    training = statistics.fmean(point.train_macs for point in small) / adversarial
    before = statistics.fmean(point.train_macs for point in case.dense("natural")) / adversarial
    inference = statistics.fmean(point.macs for point in small) / statistics.fmean(point.macs for point in dense)
    whole = f"{_pc(training + before)} with the natural training before it" if before else (
        "the natural training before it not counted, as a checkpoint was given"
    )  # fmt: skip
    cheap = HOLDS if max(training, inference) <= CHEAP else FAILS
    return replace(
        robust,
        verdict=both(robust.verdict, cheap),
        sentence=f"{robust.sentence} The fine-tuning took {_pc(training)} of the multiply-adds of the dense network's "
        f"adversarial training ({whole}); the small network takes {_pc(inference)} of the dense one's for an image.",
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
            found = judge(claim, part)
            if found.verdict != MISSING:
                findings.append({"protocol": case[1], "attack": case[2], **asdict(found)})
        rows.append({"claim": claim.text, "findings": findings})
    return rows


def _order(point: Point) -> tuple[bool, bool]:
    return point.protocol == "literal", point.attack == "autoattack-lite"


# --- which networks does the legend mean? ----------------------------------------------------------------------------


def readings(points: Sequence[Point], paper: Sequence[Read], data: str) -> list[dict[str, object]]:
    """How far each of our kinds of networks is from each line of the paper's legend.

    Only levels that all kinds of a protocol and compression have are compared; in the corrected protocol 8 bits and
    more, as the paper's networks of fewer bits are not trained through their rounding, and ours are.

    Returns:
        A row for each protocol, compression, base and arm: the mean of the absolute differences (fractions) over the
        levels, for each "setting measure" of the paper; and over how many levels.
    """
    mine = [p for p in points if p.data == data and p.compression != "none" and p.attack != "autoattack-lite"]
    groups: dict[tuple[str, str], dict[tuple[str, str], list[Point]]] = {}
    for point in sorted(mine, key=_order):
        kinds = groups.setdefault((point.protocol, point.compression), {})
        kinds.setdefault((point.base, point.arm), []).append(point)
    rows: list[dict[str, object]] = []
    for (protocol, compression), kinds in groups.items():
        levels = set.intersection(*({point.level for point in group} for group in kinds.values()))
        if (protocol, compression) == ("corrected", "quantization"):
            levels = {level for level in levels if level >= EIGHT}
        for (base, arm), group in kinds.items():
            apart: dict[str, list[float]] = {}
            for read in paper:
                if (read.data, read.compression) == (data, compression) and read.level in levels:
                    ours = statistics.fmean(_MEASURES[read.measure](p)[0] for p in group if p.level == read.level)
                    apart.setdefault(f"{read.setting} {read.measure}", []).append(abs(ours - read.value))
            row: dict[str, object] = {"protocol": protocol, "compression": compression, "base": base, "arm": arm}
            row["levels"] = max(map(len, apart.values()), default=0)
            rows.append(row | {name: statistics.fmean(values) for name, values in apart.items()})
    return rows

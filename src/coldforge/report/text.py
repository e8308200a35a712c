"""How numbers and names are written in tables, figures and pages: one place, so that they agree everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Collection

NONE = "–"
"""What stands where nothing was measured."""

_ATTACKS = {
    "worst_case": "worst case",
    "autoattack": "AutoAttack",
    "autoattack-lite": "AA-lite",
    "clean": "clean",
}
LITE = "AA-lite: the cascade autoattack-lite, cheaper and weaker than AutoAttack; do not compare it with AutoAttack's."
ATTACK_NOTES = {
    "autoattack-lite": LITE,
    "transfer": "transfer: images found on other networks (float twin, float parent) and shown to this one.",
}
"""What must be read with these attacks' numbers."""
_RUNTIMES = {"pytorch": "PyTorch", "torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_NORMS = {"linf": "L∞", "l2": "L2"}


def percent(fraction: float | None) -> str:
    """A fraction in per cent with one decimal, without the sign.

    >>> percent(0.8432)
    '84.3'
    """
    return NONE if fraction is None else f"{100 * fraction:.1f}"


def interval(bounds: tuple[float, float] | None) -> str:
    """An interval of fractions in per cent.

    >>> interval((0.741, 0.7583))
    '74.1–75.8'
    """
    return "" if bounds is None else f"{percent(bounds[0])}–{percent(bounds[1])}"


def in_8_bits(found: float, rounded: float, flags: str = "") -> str:
    """What the worst case becomes where adversarial images are saved as 8-bit images; with its ``flags``."""
    raised = f", {flags}" if flags else ""
    return (
        f"saved as 8-bit images inside the ball, the adversarial images found leave {percent(rounded)} % in place of "
        f"{percent(found)} % (worst case{raised}); none was sought among such images."
    )


def digits3(value: float) -> str:
    """Three significant digits, never in exponent notation.

    >>> digits3(0.16312), digits3(19.04), digits3(1234.0)
    ('0.163', '19.0', '1,234')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.3g}")
    if abs(rounded) >= 1000:
        return f"{value:,.0f}"
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def times(ratio: float | None) -> str:
    """A factor.

    >>> times(12.68), times(250.2), times(0.25)
    ('12.7×', '250×', '0.250×')
    """
    if ratio is None:
        return ""
    return f"{ratio:,.0f}×" if ratio >= 99.95 else f"{ratio:.1f}×" if ratio >= 0.95 else f"{digits3(ratio)}×"


def size(count: int) -> str:
    """Bytes as KB or MB (powers of ten).

    >>> size(163_000), size(2_210_000), size(412)
    ('163 KB', '2.21 MB', '0.412 KB')
    """
    return f"{digits3(count / 1e3)} KB" if count < 999_500 else f"{digits3(count / 1e6)} MB"


def millions(count: float) -> str:
    """A count in millions.

    >>> millions(9_640_000)
    '9.64 M'
    """
    return f"{digits3(count / 1e6)} M"


def big(count: float) -> str:
    """A very large count with an SI letter (train_macs).

    >>> big(3.2e15), big(4.1e12)
    ('3.20 P', '4.10 T')
    """
    for scale, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= scale:
            return f"{digits3(count / scale)} {letter}"
    return millions(count)


def seconds(value: float) -> str:
    """A wall time of a call.

    >>> seconds(0.0015), seconds(0.00021), seconds(1.2)
    ('1.50 ms', '210 µs', '1.20 s')
    """
    if value < 0.9995e-3:
        return f"{digits3(value * 1e6)} µs"
    return f"{digits3(value * 1e3)} ms" if value < 0.9995 else f"{digits3(value)} s"


def duration(value: float) -> str:
    """A long time.

    >>> duration(48.2), duration(192), duration(3900), duration(0)
    ('48 s', '3 min 12 s', '1 h 05 min', '–')
    """
    if value <= 0:
        return NONE
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def energy(joules: float) -> str:
    """Energy of one image.

    >>> energy(0.00042), energy(0.0123)
    ('420 µJ', '12.3 mJ')
    """
    if joules < 0.9995e-3:
        return f"{digits3(joules * 1e6)} µJ"
    return f"{digits3(joules * 1e3)} mJ" if joules < 0.9995 else f"{digits3(joules)} J"


def energy_mark(method: str) -> str:
    """Says how an energy was found: measured, estimated or, where the method does not tell, method not stated.

    >>> energy_mark("estimated from the measured CPU time")
    'estimated'
    """
    found = [word for word in ("measured", "estimated") if word in method.lower()]
    return min(found, key=method.lower().index) if found else "method not stated"


def bits(weight: int, activation: int) -> str:
    """Bit widths of weights and activations.

    >>> bits(8, 8), bits(32, 32)
    ('w8 a8', 'fp32')
    """
    return "fp32" if (weight, activation) == (32, 32) else f"w{weight} a{activation}"


def under(name: str) -> str:
    """How an accuracy was reached.

    >>> under("pgd-20"), under("worst_case")
    ('under PGD-20', 'in the worst case of all attacks')
    """
    return "in the worst case of all attacks" if name == "worst_case" else f"under {attack(name)}"


def attack(name: str) -> str:
    """An attack's name as people write it. The lite cascade is never written like AutoAttack.

    >>> attack("pgd-20"), attack("worst_case"), attack("fgsm"), attack("square-500")
    ('PGD-20', 'worst case', 'FGSM', 'Square-500')
    >>> attack("autoattack"), attack("autoattack-lite")
    ('AutoAttack', 'AA-lite')
    """
    if name.lower().startswith(("pgd", "fgsm", "apgd", "fab")):
        return name.upper()
    return _ATTACKS.get(name, name.capitalize() if re.fullmatch(r"square(-\d+)?", name) else name)


def runtime(name: str) -> str:
    """A runtime's name as people write it."""
    return _RUNTIMES.get(name, name)


def norm(name: str) -> str:
    """A norm as people write it."""
    return _NORMS.get(name, name)


def eps(value: float) -> str:
    """eps in pixel units.

    >>> eps(0.1), eps(8 / 255)
    ('0.1', '0.0314')
    """
    return f"{value:.3g}"


def paper_eps(value: float) -> str:
    """What arXiv 2403.09441 calls this eps."""
    return f"The code of arXiv 2403.09441 counts eps on inputs scaled to [-1, 1]: there this eps is {eps(2 * value)}."


def eps_255(value: float) -> str:
    """The same in 8-bit steps.

    >>> eps_255(25.5), eps_255(8.0)
    ('25.5/255', '8/255')
    """
    return f"{value:.4g}/255"


def join(words: list[str]) -> str:
    """An English list.

    >>> join(["a", "b", "c"])
    'a, b and c'
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def span(numbers: Collection[int]) -> str:
    """Such as "2,000", or "500 to 2,000" where they differ."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"

"""What ``coldforge evaluate`` may be told: plain values, as they come from a command line. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Literal

from coldforge.errors import UsageError

ATTACKS = ("fgsm", "pgd-20", "autoattack-lite")
"""Where the gradients of a network are known."""
BLACK_BOX_ATTACKS = ("square",)
"""Where only a file is known."""

EXAMPLES = """Examples:

coldforge evaluate coldforge-quickstart

coldforge evaluate coldforge-quickstart --attack autoattack --n 0 --budget 1h

coldforge evaluate net.pt --model my_package.nets:resnet --mean 0.5 --std 0.25 --data cifar10 --eps 8/255

coldforge evaluate any.onnx --data folder:my-images --eps 0.03

coldforge evaluate any.onnx --surrogate coldforge-quickstart --data fashion-mnist --eps 0.1"""

Importance = Literal["l1", "l2", "batchnorm", "taylor", "taylor-adversarial", "random"]
"""As of :class:`coldforge.recipe.PruneSpec`."""

_UNITS = {"h": 3600.0, "min": 60.0, "m": 60.0, "s": 1.0}


@dataclass(frozen=True, kw_only=True)
class NetworkRequest:
    """Which network, which images, which attacks; the docstring of each field is the help of its option."""

    data: str | None = None
    """images, as in recipes: fashion-mnist, cifar10, hf:NAME, folder:DIR, ...; default: those of the folder."""
    eps: str | None = None
    """radius of the attacks in pixel units, such as 0.1 or 8/255; default: that of the folder's recipe."""
    norm: Literal["linf", "l2"] | None = None
    """norm of the perturbation; default: that of the folder's recipe, else linf."""
    n: int = 1000
    """how many images to attack, from the front of the set; 0: all."""
    seed: int = 0
    """seed of every random draw."""
    model: str | None = None
    """architecture of a checkpoint: package.module:factory, zoo:NAME, timm:NAME or torchvision:NAME."""
    mean: str | None = None
    """mean that a checkpoint or .onnx file wants taken from pixels in [0, 1]: one, or one a channel; 0, std 1: none."""
    std: str | None = None
    """the same for the standard deviation."""
    key_prefix: str = ""
    """prefix to strip from the keys of a checkpoint, such as "module."."""
    threads: int = 0
    """threads to compute with; 0: the physical cores, at most 8."""

    def __post_init__(self) -> None:
        for name in ("n", "seed", "threads"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name}: expected 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ScanRequest(NetworkRequest):
    """How to compress one layer at a time."""

    ratio: tuple[float, ...] = (0.25, 0.5)
    """part of the channels to remove; may be repeated."""
    importance: Importance = "l1"
    """by which channels are chosen, as in recipes."""
    bits: tuple[int, ...] = (4, 2)
    """bits of the layer's weights and its input; may be repeated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for ratio in self.ratio:
            if not 0 < ratio < 1:
                raise UsageError(f"--ratio: expected a part of the channels between 0 and 1, got {ratio:g}")
        for bits in self.bits:
            if not 1 <= bits <= 8:
                raise UsageError(f"--bits: expected 1 to 8, got {bits}")


@dataclass(frozen=True, kw_only=True)
class Request(NetworkRequest):
    """How to evaluate."""

    attack: tuple[str, ...] | None = None
    """comma-separated, see `coldforge recipes --attacks`; default: fgsm,pgd-20,autoattack-lite; .onnx alone: square."""
    budget: str | None = None
    """stop attacking after so long, such as 20min or 1h; what is unfinished is said, and done by the same command with
    a larger budget; checks come on top."""
    surrogate: Path | None = None
    """a folder of `coldforge run` or a checkpoint, on which to find images that are then tried on the target."""
    precision: Literal["auto", "exact", "fp32", "bf16"] = "auto"
    """how attacks search: on the network as it is, or faster on a copy; what a copy finds is verified exactly."""
    no_masking: bool = False
    """skip the masking checks; nothing then says whether the robust accuracy holds."""
    masking_n: int = 200
    """test images for the masking checks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masking_n < 1:
            raise UsageError(f"--masking-n: expected 1 or more, got {self.masking_n}; --no-masking skips the checks")

    @property
    def attack_names(self) -> tuple[str, ...]:
        """The names given, each once; empty: none was given."""
        words = [word.strip() for text in self.attack or () for word in text.split(",")]
        return tuple(dict.fromkeys(word for word in words if word))

    @property
    def budget_s(self) -> float:
        """Seconds; 0 without a budget."""
        return parse_duration(self.budget) if self.budget else 0.0

    def words(self) -> list[str]:
        """The options of the command line that give this request; defaults are left out."""
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            option = f"--{field.name.replace('_', '-')}"
            values = value if isinstance(value, tuple) else (value,)
            words += [option] if value is True else [word for item in values for word in (option, str(item))]
        return words


DEFAULTS = Request()
SCAN_DEFAULTS = ScanRequest()


def parse_duration(text: str) -> float:
    """Seconds of a duration such as ``20min``, ``90s``, ``1h`` or ``1h30min``.

    >>> parse_duration("1h30min")
    5400.0

    Raises:
        UsageError: for anything else.
    """
    words = text.strip().lower().replace(" ", "")
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?(?:h|min|m|s))+", words):
        raise UsageError(f"--budget: expected a time such as 20min, 90s or 1h, got {text!r}")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)(h|min|m|s)", words))
    if seconds <= 0:
        raise UsageError(f"--budget: expected a time above 0, got {text!r}; without --budget there is no limit")
    return seconds


def parse_numbers(text: str, channels: int, option: str) -> tuple[float, ...]:
    """One number a channel, from ``"0.5"`` (for all) or ``"0.49,0.48,0.45"``; fractions are allowed.

    Raises:
        UsageError: for anything else.
    """
    try:
        numbers = tuple(float(Fraction(word.strip())) for word in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise UsageError(
            f"{option}: expected numbers separated by commas, such as 0.49,0.48,0.45, got {text!r}"
        ) from None
    if len(numbers) == 1:
        return numbers * channels
    if len(numbers) != channels:
        raise UsageError(f"{option}: expected {channels} numbers, one a channel (or one for all), got {len(numbers)}")
    return numbers

"""What is evaluated, and the ways in which it can be attacked."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from coldforge.attacks import Attack, Classifier, Judge, Tiles, parse_attack, predict, untouched
from coldforge.compress import Backward, attacking, is_quantized
from coldforge.errors import AttackError
from coldforge.evaluate.fast import Precision, fast_copy

BACKWARDS: tuple[Backward, ...] = ("pass_through", "clipped")
"""How attacks take gradients of a quantized network: every image that stands after the first is tried with the second.

Where activations are clipped, "clipped" (the plain straight-through estimator) sees a gradient of 0, and
"pass_through" (BPDA) one that the forward pass does not have. The latter alone can be blind: a network trained under it
keeps 61 % under it and 6 % under the other, which alone came within 0.3 points of both there (docs/architecture.md).
"""

TRANSFER = "transfer"
"""Name in the ledger of the images found on other networks."""
TRANSFER_ATTACK = "pgd-20"
"""With which they are found."""
_SAME_ANSWERS = 0.95
"""A fast copy that answers fewer images like the network is no copy, and is not used."""
_NOISE = 4.0
"""How many times the root mean square of a bfloat16 copy's logit errors a margin must be to be told from 0."""


class Deployed(Protocol):
    """A file that answers; a session of :mod:`coldforge.deploy.runtime`."""

    def logits(self, images: Tensor, /) -> Tensor:
        """Images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``."""

    def labels(self, images: Tensor, /) -> Tensor:
        """Images to labels ``(N,)``."""


@dataclass(frozen=True, eq=False)
class Target:
    """A classifier under attack.

    Raises:
        AttackError: neither network nor file is given.
    """

    network: nn.Module | None
    """Where gradients come from: float or fake-quantized. None: a black box."""
    file: Deployed | None = None
    """The deployed file made from ``network``, or a black box. With it, every verdict is the file's."""
    surrogates: Mapping[str, nn.Module] = field(default_factory=dict)
    """Other networks by name, on which images are sought that fool this one too."""

    def __post_init__(self) -> None:
        if self.network is None and self.file is None:
            raise AttackError("expected a network or a file to evaluate, got neither")

    @property
    def quantized(self) -> bool:
        """Whether gradients must be passed through rounding."""
        return self.network is not None and is_quantized(self.network)

    def answers(self, images: Tensor) -> Tensor:
        """The labels that count, ``(N,)``."""
        if self.file is not None:
            return self.file.labels(images)
        assert self.network is not None
        with attacking(self.network):
            return predict(self.network, images).argmax(1)


@dataclass(frozen=True, eq=False)
class Way:
    """One way to run an attack on a target."""

    label: str
    """What the ledger says of it; empty for the plain one."""
    model: Classifier
    """Where the attack searches."""
    judge: Judge | None
    """Who has the last word; None: ``model``."""
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    near: float = float("inf")
    """Only images whose smallest margin so far is below this are worth this try."""

    def labels(self, points: Tensor) -> Tensor:
        """By who has the last word, ``(N,)``; inside :attr:`context`, while nothing searches."""
        return predict(self.model, points).argmax(1) if self.judge is None else self.judge(points)

    def is_worth_it(self, margin: Tensor) -> Tensor:
        """Of images with these smallest margins, which are to be tried in this way; NaN is near."""
        return ~(margin >= self.near) | (self.near == float("inf"))


class Ways:
    """Plans how attacks are run on one target; keeps the fast copies.

    Args:
        target: what is attacked.
        images: a few clean images ``(N, C, H, W)``, to see that a fast copy answers like the network.
        precision: how attacks search.
    """

    def __init__(self, target: Target, images: Tensor, precision: Precision) -> None:
        self._target, self._images, self._precision = target, images, precision
        self._copies: dict[tuple[int, Precision], nn.Module] = {}
        self._noise: dict[int, float] = {}  # of bfloat16 copies that are in use
        self._asking = threading.Lock()
        self._tiles = None if target.network is None else Tiles(target.network, images.shape[1:], gradients=False)

    def of(self, attack: Attack) -> list[Way]:
        """The ways in which this attack is run, one after the other on the images that still stand.

        Raises:
            AttackError: the attack needs gradients, and there is no network to take them from.
        """
        target = self._target
        if not attack.uses_gradients and target.file is not None:
            return [Way("on the file", target.file.logits, None)]
        if target.network is not None:
            modes = BACKWARDS if attack.uses_gradients and target.quantized else BACKWARDS[:1]
            label = len(modes) > 1
            return self._ways({mode: mode if label else "" for mode in modes}, target.network)
        if not target.surrogates:
            raise AttackError(
                f"{attack.name} needs gradients, and a file has none; give a surrogate to search on (--surrogate), or "
                "take an attack that only asks for answers, such as square"
            )
        surrogates = target.surrogates.items()
        return [self._way(f"from {name}", network, "pass_through") for name, network in surrogates]

    def transfer(self) -> tuple[Attack, list[Way]]:
        """The attack on other networks that is tried on this one: its float twin, if it is quantized; surrogates."""
        target = self._target
        attack = parse_attack(TRANSFER_ATTACK)
        assert isinstance(attack, Attack)
        if target.network is None:
            return attack, []  # every attack with gradients is one of transfer already
        ways = [self._way("from its float twin", target.network, "unrounded")] if target.quantized else []
        return attack, ways + [
            self._way(f"from {name}", network, "pass_through") for name, network in target.surrogates.items()
        ]

    def _ways(self, modes: Mapping[Backward, str], network: nn.Module) -> list[Way]:
        """For each kind of gradients one, and where it searches in bfloat16, one more in float32 for the images that
        came so near the decision boundary that bfloat16 cannot tell on which side they are.
        """
        plain = [self._way(label, network, mode) for mode, label in modes.items()]
        if self._precision != "bf16" or id(network) not in self._noise:
            return plain
        near = _NOISE * self._noise[id(network)]
        exact = [
            self._way(f"{label} in float32".strip(), network, mode, precision="fp32", near=near)
            for mode, label in modes.items()
        ]
        return [way for pair in zip(plain, exact, strict=True) for way in pair]

    def _way(
        self,
        label: str,
        network: nn.Module,
        mode: Backward,
        *,
        precision: Precision | None = None,
        near: float = float("inf"),
    ) -> Way:
        target = self._target
        search = self._copy(network, precision or self._precision, apart=mode == "unrounded")
        judge = None if search is target.network and target.file is None else self._verdicts
        return Way(label, search, judge, partial(_prepared, search, mode, target.network), near)

    def _verdicts(self, points: Tensor) -> Tensor:
        if self._target.file is not None:
            return self._target.file.labels(points)
        assert self._target.network is not None
        assert self._tiles is not None
        with self._asking:  # several threads search, and foreign code may keep what it computes
            tile = self._tiles.of(len(points))
            return predict(self._target.network, points, tile=tile).argmax(1)

    def _copy(self, network: nn.Module, precision: Precision, *, apart: bool) -> nn.Module:
        """Where to search; ``apart``: never the network itself, because it must judge at the same time."""
        if precision == "exact" and not apart:
            return network
        key = id(network), precision
        if key not in self._copies:
            fast = fast_copy(network, precision) if precision != "exact" else network
            error = self._error(network, fast)
            self._copies[key] = network if error is None else fast
            if error is not None and precision == "bf16":
                self._noise[id(network)] = error
        found = self._copies[key]
        return copy.deepcopy(network) if apart and found is network else found

    def _error(self, network: nn.Module, copied: nn.Module) -> float | None:
        """Root mean square of the copy's logit errors; None if it does not answer like the network."""
        try:
            expected, found = predict(network, self._images), predict(copied, self._images)
        except Exception:  # foreign code may refuse bfloat16 in any way it likes
            return None
        same = (expected.argmax(1) == found.argmax(1)).double().mean()
        return float((expected - found).double().square().mean().sqrt()) if same >= _SAME_ANSWERS else None


@contextmanager
def _prepared(search: nn.Module, mode: Backward, verifier: nn.Module | None) -> Iterator[None]:
    """Weights rounded once, gradients as wanted; the verifier rounds as it is. Both stay in evaluation mode, whoever
    asks them and stops asking meanwhile.
    """
    judge = verifier if verifier is not None and verifier is not search else None
    judging = attacking(judge) if judge is not None else nullcontext()
    still = untouched(judge) if judge is not None else nullcontext()
    with judging, still, attacking(search, mode), untouched(search):
        yield

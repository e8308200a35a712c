"""Does a file answer like its twin, the network whose gradients attacks use?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from coldforge.attacks import ThreatModel, parse_pgd, predict
from coldforge.compress import attacking
from coldforge.data import ImageSet
from coldforge.deploy import agreement
from coldforge.evaluate.robustness import names_of
from coldforge.evaluate.target import Deployed
from coldforge.records import AgreementRecord

_ATTACK = parse_pgd("pgd-20")


@dataclass(frozen=True, eq=False)
class Answers:
    """Labels by the twin and by its file."""

    clean_twin: Tensor  # (n,)
    clean_file: Tensor  # (n,)
    last: Tensor  # (m, C, H, W), m <= n: the last PGD-20 iterate of the images at the front
    adversarial_twin: Tensor  # (m,)
    adversarial_file: Tensor  # (m,)

    @property
    def agreement(self) -> AgreementRecord:
        """The parts on which both agree."""
        return AgreementRecord(
            clean=agreement(self.clean_twin, self.clean_file),
            adversarial=agreement(self.adversarial_twin, self.adversarial_file),
        )


def ask_both(
    twin: nn.Module,
    file: Deployed,
    data: ImageSet,
    threat_model: ThreatModel,
    *,
    n: int,
    seed: int,
    on_progress: Callable[[float, str], None] | None = None,
) -> Answers:
    """Ask the file and its twin about all of ``data``, and about the last PGD-20 iterates of its first ``n`` images,
    found on the twin.

    The last iterates lie deep in the wrong class or firmly in the right one; barely fooled images would measure
    rounding at the decision border only.
    """
    images, labels = data.pixels(), data.labels
    with attacking(twin):
        clean_twin = predict(twin, images).argmax(1)
        last = _ATTACK(
            twin,
            images[:n],
            labels[:n],
            threat_model,
            seed=seed,
            indices=names_of(images[:n]),
            keep_last=True,
            on_progress=None if on_progress is None else lambda fraction: on_progress(fraction, _ATTACK.name),
        ).last
        adversarial_twin = predict(twin, last).argmax(1)
    return Answers(clean_twin, file.labels(images), last, adversarial_twin, file.labels(last))

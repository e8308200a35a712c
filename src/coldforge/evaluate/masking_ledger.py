"""The part of the masking panel that needs no attacks of its own: what an evaluation's ledger says of its attacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coldforge.attacks import APGD, Attack, Ensemble, as_parts
from coldforge.evaluate.ledger import Ledger
from coldforge.evaluate.masking_attacks import BEND, SQUARE_SHARE, paired
from coldforge.evaluate.target import TRANSFER
from coldforge.records import MaskingCheckRecord

FEWEST_ATTACKED = 50
"""Images right when clean and attacked, below which the ledger says nothing."""


def ledger_check(ledger: Ledger, attacks: Sequence[Attack | Ensemble]) -> MaskingCheckRecord | None:
    """Do attacks without gradients, and images made on other networks, break what those with gradients leave?

    The panel asks the same with a short Square on about 100 images; here are all images and attacks of the evaluation.

    Args:
        ledger: of a white box.
        attacks: with which it was attacked.

    Returns:
        None where that cannot be said: no targeted APGD among the attacks with gradients (others honestly leave more),
        nothing without them, too few images, or a budget that left some unfinished.
    """
    blind = {TRANSFER} | {part.name for attack in attacks for part in as_parts(attack) if not part.uses_gradients}
    strong = any(isinstance(part, APGD) and part.loss == "dlr" for attack in attacks for part in as_parts(attack))
    columns = [*ledger.fooled]
    tried = ["Square"] * (len(blind) > 1) + ["images made on other networks"] * (TRANSFER in columns)
    if not strong or not tried or ledger.unfinished:
        return None
    count = min(len(ledger.fooled[column]) for column in columns)
    by_gradients, by_others = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    for column in columns:
        for image, by in enumerate(ledger.by[column][:count]):
            if by:
                others = column in blind or by.partition(" ")[0] in blind
                (by_others if others else by_gradients)[image] = True
    alone = (by_others & ~by_gradients)[ledger.right[:count]]
    if len(alone) < FEWEST_ATTACKED:
        return None
    return paired(
        "beyond_gradients",
        alone,
        " and ".join(tried),
        "all attacks of the evaluation with gradients",
        BEND,
        SQUARE_SHARE,
    )

"""The part of the masking panel that needs no attacks of its own: what an evaluation's ledger says of its attacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coldforge.attacks import Attack, Ensemble, as_parts
from coldforge.evaluate.ledger import Ledger
from coldforge.evaluate.masking_attacks import BEND, SQUARE_SHARE, paired
from coldforge.evaluate.target import TRANSFER
from coldforge.records import MaskingCheckRecord

FEWEST_ATTACKED = 50
"""Images right when clean and attacked to the end, below which the ledger says nothing."""
_STRONG_STEPS = 20
"""Steps, over all restarts and targets, from which an attack with gradients should need no help."""


def ledger_check(ledger: Ledger, attacks: Sequence[Attack | Ensemble]) -> MaskingCheckRecord | None:
    """Do attacks without gradients, and images made on other networks, break what those with gradients leave?

    The panel asks the same with a short Square on about 100 images; here are all images and attacks of the evaluation.

    Args:
        ledger: of a white box.
        attacks: with which it was attacked.

    Returns:
        None where that cannot be said: no strong attack with gradients, nothing without, or too few images.
    """
    blind = {TRANSFER} | {part.name for attack in attacks for part in as_parts(attack) if not part.uses_gradients}
    seeing = [part for attack in attacks for part in as_parts(attack) if part.uses_gradients]
    strong = any(part.steps * max(part.runs(len(ledger.labels.unique())), 1) >= _STRONG_STEPS for part in seeing)
    columns = [*ledger.fooled]
    if not strong or (TRANSFER not in columns and blind == {TRANSFER}):
        return None
    count = min(len(ledger.fooled[column]) for column in columns)
    done = ledger.right[:count].clone()
    for column in columns:
        done &= ledger.finished[column][:count]
    by_gradients, by_others = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    for column in columns:
        for image, by in enumerate(ledger.by[column][:count]):
            if by:
                others = column in blind or by.partition(" ")[0] in blind
                (by_others if others else by_gradients)[image] = True
    alone = (by_others & ~by_gradients)[done]
    if len(alone) < FEWEST_ATTACKED:
        return None
    return paired(
        "beyond_gradients",
        alone,
        "Square and images made on other networks",
        "all attacks of the evaluation with gradients",
        BEND,
        SQUARE_SHARE,
    )

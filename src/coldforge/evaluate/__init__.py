"""Evaluation: accuracy, robustness, and what can be said about both."""

from coldforge.evaluate.fast import Precision, fast_copy
from coldforge.evaluate.ledger import WORST_CASE, Ledger, Robustness, summarize
from coldforge.evaluate.masking import masking_panel
from coldforge.evaluate.masking_ledger import ledger_check
from coldforge.evaluate.robustness import evaluate, find_adversarial
from coldforge.evaluate.statistics import chance_doubt, mcnemar, paired_interval, wilson_interval
from coldforge.evaluate.target import BACKWARDS, TRANSFER, TRANSFER_ATTACK, Deployed, Target
from coldforge.evaluate.twins import Answers, ask_both

__all__ = [
    "BACKWARDS",
    "TRANSFER",
    "TRANSFER_ATTACK",
    "WORST_CASE",
    "Answers",
    "Deployed",
    "Ledger",
    "Precision",
    "Robustness",
    "Target",
    "ask_both",
    "chance_doubt",
    "evaluate",
    "fast_copy",
    "find_adversarial",
    "ledger_check",
    "masking_panel",
    "mcnemar",
    "paired_interval",
    "summarize",
    "wilson_interval",
]

"""Evaluation: accuracy, robustness, and what can be said about both."""

from coldforge.evaluate.robustness import BACKWARDS, Ledger, Robustness, evaluate, summarize
from coldforge.evaluate.statistics import wilson_interval

__all__ = ["BACKWARDS", "Ledger", "Robustness", "evaluate", "summarize", "wilson_interval"]
